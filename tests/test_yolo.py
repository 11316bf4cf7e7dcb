"""YOLO networks: exact cuts, NAM in YAMLs and hooks, files for others, training that keeps them."""

import copy
import os
import pickle
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boxes import BEFORE, SIZE, boxes, formula
from PIL import Image
from torch import Tensor, nn
from zoo import lively

import nampruner
from nampruner import yolo
from nampruner.errors import NamPrunerError
from nampruner.export import exported_run
from nampruner.lineage import lineage
from nampruner.nam import nam_modules
from nampruner.staircase import Bench, layers_of, module_steps, staircase
from nampruner.yolo import network, row, source, trainers


def test_an_import_leaves_other_libraries_alone() -> None:
    assert (Image.open, torch.save) == BEFORE


NETWORKS = {
    "yolov5n.yaml": 64,
    "yolov8n.yaml": 52,
    "yolov9t.yaml": 171,
    "yolov10n.yaml": 88,
    "yolo11n.yaml": 78,
    "yolo12n.yaml": 110,
    "yolo26n.yaml": 106,
    "yolov8n-seg.yaml": 60,
    "yolov8n-pose.yaml": 58,
    "yolov8n-obb.yaml": 57,
    "yolov8n-cls.yaml": 21,
    "yolov8n-nam.yaml": 52,
}
"""Name → convolutions that lose channels at ratio 0.3, at the least."""
ATTENTION = {"yolov10n.yaml": "model.10*", "yolo26n.yaml": "model.22*"}
"""Where an attention block is viewed at a width that no number holds: the search for it is slow."""


def make(name: str = "yolov8n.yaml", classes: int = 3) -> nn.Module:
    model = nampruner.build(f"yolo:{name}", num_classes=classes, in_channels=3, image_size=SIZE)
    return lively(model).eval()


def picture(count: int = 1) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def slim() -> nn.Module:
    return nampruner.prune(make(), picture(), forward=yolo.forward, ratio=0.3).model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return boxes(tmp_path_factory.mktemp("boxes"))


SHORT: dict[str, Any] = {"epochs": 1, "imgsz": SIZE, "batch": 8, "device": "cpu", "amp": False}


def same(a: nn.Module, b: nn.Module) -> bool:
    with torch.no_grad():
        pairs = zip(
            yolo.forward(a.eval(), picture(2)), yolo.forward(b.eval(), picture(2)), strict=True
        )
        return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_version_and_task_is_cut_exactly(name: str) -> None:
    model = make(name)
    given = {"ignore": [ATTENTION[name]]} if name in ATTENTION else {}
    pruned = nampruner.prune(model, picture(), forward=yolo.forward, ratio=0.3, **given)
    assert pruned.certificate.max_relative_error <= 1e-9
    cut = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    cut = [n for n in cut if 0 in pruned.plan.removed.get(f"{n}.weight", {})]
    assert len(cut) >= NETWORKS[name] - (8 if given else 0)
    for module in pruned.model.modules():
        assert type(module).__module__.startswith(("ultralytics", "torch", "nampruner"))
        if hasattr(module, "forward_split"):  # what the exporter puts in the place of forward
            assert module.cv1.conv.out_channels == 2 * module.c


@pytest.mark.parametrize("picks", [False, True])
def test_widths_follow_the_time_of_what_is_exported(
    picks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formula(monkeypatch, tmp_path)
    model: Any = make("yolov10n.yaml")
    model.end2end = picks
    unused = ("model.23.cv",) if picks else ("model.23.one2one_",)
    run = exported_run(model, yolo.forward)
    names = layers_of(model, picture(), run)
    assert "model.0.conv" in names
    assert not [name for name in names if name.startswith(unused)]
    assert len(names) == 83
    given = {"forward": yolo.forward, "importance": "magnitude", "ignore": ["model.10*"]}
    steps = module_steps(names, staircase(names.values(), Bench()))
    plan = nampruner.plan_pruning(model, picture(), macs="50%", round_to="auto", **given)
    assert len(set(steps.values())) > 1  # one number for all would not do
    cut = [row for row in plan.layers if row.width_after < row.width_before]
    assert len(cut) > 20
    assert all(row.width_after % steps.get(row.layer, 1) == 0 for row in cut)
    assert plan.achieved.macs == pytest.approx(0.5, abs=0.05)


def test_the_exporters_forward_computes_the_same(slim: nn.Module) -> None:
    other = copy.deepcopy(slim)
    for module in other.modules():
        if hasattr(module, "forward_split"):
            module.forward = module.forward_split  # type: ignore[method-assign]
    assert same(slim, other)


def test_recovery_by_unlabelled_images_helps_and_leaves_dfl(data: Path) -> None:
    model = make()
    batches = yolo.images(model, data, image_size=SIZE)
    assert [tuple(batch.shape) for batch in batches] == [(8, 3, SIZE, SIZE)]
    pruned = nampruner.prune(model, picture(), forward=yolo.forward, macs="70%", data=batches)
    proof = pruned.certificate
    assert proof.output_error_cut is not None
    assert proof.output_error_recovered is not None
    assert proof.output_error_recovered < 0.8 * proof.output_error_cut
    weight = network.head_of(pruned.model).dfl.conv.weight
    assert torch.equal(weight.flatten(), torch.arange(16.0))


def test_a_folder_gives_the_same_bits_and_the_names(slim: nn.Module, tmp_path: Path) -> None:
    slim.names = {0: "a", 1: "b", 2: "c"}  # type: ignore[assignment]
    yolo.save(slim, tmp_path / "folder")
    again = yolo.load(tmp_path / "folder")
    assert same(slim, again)
    assert again.names == slim.names
    assert same(slim, nampruner.load(tmp_path / "folder"))


def test_a_pt_gives_the_same_bits_and_a_folder_after_it(slim: nn.Module, tmp_path: Path) -> None:
    again = yolo.load(yolo.save(slim, tmp_path / "slim.pt"))
    assert same(slim, again)
    assert lineage(again) == lineage(slim)
    assert again.yaml == slim.yaml  # the tripwire is in the file only
    assert same(slim, nampruner.load(yolo.save(again, tmp_path / "folder")))
    thinner = nampruner.prune(again, picture(), forward=yolo.forward, ratio=0.2)
    assert len(lineage(thinner.model).plans) == 2


STRANGER = """
import sys
sys.modules["nampruner"] = None
from ultralytics import YOLO
import numpy as np
path, data = sys.argv[1:]
model = YOLO(path)
before = sum(p.numel() for p in model.model.parameters())
model.predict(np.zeros((64, 64, 3), np.uint8), imgsz=64, verbose=False)
metrics = model.val(data=data, imgsz=64, plots=False, verbose=False, workers=0)
assert 0 <= metrics.box.map50 <= 1
try:
    YOLO(path).train(data=data, epochs=1, imgsz=64, workers=0, device="cpu")
except KeyError as error:
    assert "nampruner.yolo.train" in str(error), error
else:
    raise SystemExit("the network grew back")
file = YOLO(path).export(format="onnx", imgsz=64, simplify=False)
import onnx
kept = sum(np.prod(t.dims) for t in onnx.load(file).graph.initializer)
assert kept < 1.02 * before, (kept, before)
import onnxruntime, torch
image = np.random.default_rng(0).random((1, 3, 64, 64), dtype=np.float32)
with torch.no_grad():
    wanted = YOLO(path).model.float().eval()(torch.from_numpy(image))[0].numpy()
session = onnxruntime.InferenceSession(file)
found = session.run(None, {session.get_inputs()[0].name: image})[0]
assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
print("fine")
"""


def test_plain_ultralytics_opens_a_slim_pt_and_does_not_grow_it_back(
    slim: nn.Module, data: Path, tmp_path: Path
) -> None:
    path = yolo.save(slim, tmp_path / "slim.pt")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STRANGER, str(path), str(data)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "ULTRALYTICS_SAFE_LOAD": "1"},
    )
    assert done.stdout.splitlines()[-1:] == ["fine"], done.stdout[-2000:] + done.stderr[-3000:]


def test_our_export_has_a_free_batch_size_and_the_slim_widths(tmp_path: Path) -> None:
    model = make("yolov8n-nam.yaml")
    yolo.attach_nam(model, picture())
    slim = nampruner.prune(model, picture(), forward=yolo.forward, ratio=0.3).model
    file, images = tmp_path / "slim.onnx", picture(3)
    parity = nampruner.export_onnx(yolo.Exportable(slim), file, images)
    assert parity.max_relative < 1e-4
    assert parity.inputs == 3
    raw = yolo.Exportable(slim, decoded=False)(images)
    assert [tuple(t.shape) for t in raw] == [(3, 3, 84), (3, 64, 84)]
    import onnx

    proto = onnx.load(file)
    assert not proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    kept = sum(int(np.prod(tensor.dims)) for tensor in proto.graph.initializer)
    assert kept < 1.02 * sum(p.numel() for p in slim.parameters())
    assert kept < 0.7 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo11n-seg.yaml", "yolov8n-pose.yaml"])
def test_the_exported_head_computes_what_the_stock_one_does(name: str) -> None:
    model = make(name).double()
    with torch.no_grad():
        theirs, ours = model(picture(2).double())[0], yolo.Exportable(model)(picture(2).double())
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    ours = ours[0] if isinstance(ours, tuple) else ours
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-9)
    assert type(model.model[-1].dfl).__name__ == "DFL"  # type: ignore[union-attr, index]


def test_training_keeps_nam_and_widths_and_pulls_factors(data: Path, tmp_path: Path) -> None:
    model = make()
    yolo.attach_nam(model, picture())
    slim = nampruner.prune(model, picture(), forward=yolo.forward, ratio=0.3).model
    before = {name: tensor.shape for name, tensor in slim.state_dict().items()}
    done = yolo.train(slim, data, project=str(tmp_path), strength=1.0, lr0=1e-3, **SHORT)
    moved = 1e-3 * 8 / (1 - 0.937)  # one step of lr · p · images / (1 - momentum), from γ = 1
    for part in nam_modules(done.model).values():
        weight: Tensor = part.bn.weight  # type: ignore[union-attr, assignment]
        torch.testing.assert_close(weight, torch.full_like(weight, 1 - moved), atol=0.02, rtol=0)
    assert {name: tensor.shape for name, tensor in done.model.state_dict().items()} == before
    assert len(nam_modules(done.model)) == len(nam_modules(model)) > 0
    assert lineage(done.model) == lineage(slim)
    assert done.model.names == {0: "red", 1: "green", 2: "blue"}
    assert 0 <= done.metrics["metrics/mAP50(B)"] <= 1
    again = nampruner.load(yolo.save(done.model, tmp_path / "folder"))
    assert same(done.model, again)


TARGETS = {
    "detect": ("yolov8n.yaml", ""),
    "segment": ("yolov8n-seg.yaml", ""),
    "pose": ("yolov8n-pose.yaml?kpt_shape=[2,3]", "kpt_shape: [2, 3]\n"),
    "obb": ("yolo11n-obb.yaml", ""),
    "classify": ("yolov8n-cls.yaml", ""),
}
"""Task → network, and what its data YAML says besides."""


def labelled(data: Path, task: str, folder: Path) -> Path:
    """The set of boxes with the labels of another task."""
    if task == "classify":
        for split in ("train", "val"):
            for file in sorted((data.parent / "images" / split).iterdir()):
                target = folder / split / "abc"[int(file.stem) % 3] / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
        return folder
    for part in ("train", "val"):
        (folder / "images" / part).mkdir(parents=True)
        (folder / "labels" / part).mkdir(parents=True)
        for file in sorted((data.parent / "labels" / part).glob("*.txt")):
            kind, *numbers = file.read_text().split()
            x, y, w, h = map(float, numbers)
            corners = [(x - w / 2, y - h / 2), (x + w / 2, y - h / 2)]
            corners += [(x + w / 2, y + h / 2), (x - w / 2, y + h / 2)]
            outline = " ".join(f"{value:.4f}" for corner in corners for value in corner)
            points = f"{x:.4f} {y:.4f} {w:.4f} {h:.4f} {x:.4f} {y:.4f} 2 0.1 0.1 2"
            text = points if task == "pose" else outline
            (folder / "labels" / part / file.name).write_text(f"{kind} {text}\n")
            image = f"images/{part}/{file.stem}.png"
            (folder / image).write_bytes((data.parent / image).read_bytes())
    text = data.read_text().replace(str(data.parent), str(folder)) + TARGETS[task][1]
    (folder / "data.yaml").write_text(text)
    return folder / "data.yaml"


@pytest.mark.parametrize("task", ["segment", "pose", "obb", "classify"])
def test_every_task_has_a_trainer_that_keeps_the_network(
    task: str, data: Path, tmp_path: Path
) -> None:
    model = make(TARGETS[task][0])
    slim = nampruner.prune(model, picture(), forward=yolo.forward, ratio=0.3).model
    where = labelled(data, task, tmp_path / "set")
    images = yolo.images(slim, where, image_size=SIZE)
    assert sum(len(batch) for batch in images) == 8
    done = yolo.train(slim, where, project=str(tmp_path / "runs"), **SHORT)
    assert [p.shape for p in done.model.parameters()] == [p.shape for p in slim.parameters()]
    assert same(done.model, nampruner.load(yolo.save(done.model, tmp_path / "folder")))
    numbers = yolo.validate(done.model, where, imgsz=SIZE, batch=8)
    assert set(numbers) <= set(done.metrics)
    assert pickle.loads(pickle.dumps(yolo.trainer(task))) is yolo.trainer(task)  # as DDP does


def test_plain_ultralytics_trains_on_with_our_trainer(
    slim: nn.Module, data: Path, tmp_path: Path
) -> None:
    from ultralytics import YOLO

    theirs = YOLO(str(yolo.save(slim, tmp_path / "slim.pt")))
    given = {**SHORT, "data": str(data), "project": str(tmp_path), "plots": False, "workers": 0}
    theirs.train(trainer=yolo.trainer("detect"), **given)
    again = yolo.load(theirs.ckpt_path)
    assert [p.shape for p in again.parameters()] == [p.shape for p in slim.parameters()]
    assert lineage(again) == lineage(slim)


def test_a_pt_of_theirs_is_pruned_and_rebuilt_without_it(tmp_path: Path) -> None:
    from ultralytics import YOLO

    theirs = YOLO("yolo11n-seg.yaml")
    lively(theirs.model)
    theirs.save(str(tmp_path / "theirs.pt"))
    spec = f"yolo:{tmp_path / 'theirs.pt'}"
    model = nampruner.build(spec, num_classes=80, in_channels=3, image_size=SIZE)
    assert lineage(model).source == "yolo:yolo11n-seg.yaml"
    assert all(p.requires_grad == (".dfl." not in name) for name, p in model.named_parameters())
    slim = nampruner.prune(model, picture(), forward=yolo.forward, ratio=0.3).model
    folder = yolo.save(slim, tmp_path / "folder")
    (tmp_path / "theirs.pt").unlink()
    assert same(slim, nampruner.load(folder))


def test_nothing_of_an_attached_nam_is_lost_on_the_way(tmp_path: Path) -> None:
    model = make()
    yolo.attach_nam(model, picture())
    with torch.no_grad():
        for part in nam_modules(model).values():
            part.bn.weight.copy_(torch.rand(len(part.bn.weight)))  # type: ignore[union-attr]
    assert not same(model, make())
    assert same(model, copy.deepcopy(model))
    assert same(model, yolo.load(yolo.save(model, tmp_path / "nam.pt")))
    fused = copy.deepcopy(model).fuse(verbose=False)  # type: ignore[operator]
    with torch.no_grad():
        whole, folded = model(picture())[0], fused(picture())[0]
    torch.testing.assert_close(whole, folded, rtol=1e-3, atol=1e-3)


def test_a_row_of_a_yaml_is_nam(tmp_path: Path) -> None:
    plain, rows = source.describe("yolov8n.yaml"), source.describe("yolov8n-nam.yaml")
    assert rows["head"][-1][0] == [16, 20, 24]
    assert rows["head"][-4][:3] == [[-1, 9], 1, "Concat"]  # layer 9 lies in front of all NAM
    assert [r for r in rows["head"] if r[2] == "NAM"] == [[-1, 1, "NAM", []]] * 3
    assert [r[2] for r in plain["head"]] == [r[2] for r in rows["head"] if r[2] != "NAM"]
    file = yolo.write_nam_yaml("yolov8", tmp_path)
    assert file.name == "yolov8-nam.yaml"
    from ultralytics import YOLO

    theirs = YOLO(str(tmp_path / "yolov8s-nam.yaml"))
    assert len(nam_modules(theirs.model)) == 3
    assert len(nam_modules(make("yolo11n-cls-nam.yaml"))) == 1


def test_a_nam_row_without_channels_takes_them_from_a_state_dict() -> None:
    built, fresh = row.NAMRow(2.0), row.NAMRow(2.0)
    built(torch.rand(2, 5, 3, 3))
    fresh.load_state_dict(built.state_dict())
    image = torch.ones(1, 5, 2, 2)
    assert torch.equal(fresh.eval()(image), built.eval()(image))
    assert not torch.equal(fresh(image), row.NAMRow(2.0).eval()(image))


class StoppedError(Exception):
    """What ends a training in the test below."""


def test_an_interrupted_training_is_resumed(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def stop(trainer: Any) -> None:
        raise StoppedError

    kept = trainers.attach_penalty

    def attach(trainer: Any) -> None:
        kept(trainer)
        trainer.add_callback("on_model_save", stop)

    given = {**SHORT, "epochs": 2, "project": str(tmp_path)}
    with monkeypatch.context() as patch:
        patch.setattr(trainers, "attach_penalty", attach)
        with pytest.raises(StoppedError):
            yolo.train(make(), data, **given)
    (last,) = tmp_path.rglob("last.pt")
    done = yolo.resume(last)
    assert done.folder == last.parent.parent
    assert len((done.folder / "results.csv").read_text().splitlines()) == 3
    with pytest.raises(NamPrunerError, match="use train"):
        yolo.resume(done.folder / "weights" / "last.pt")


class _Session:
    """What of a trainer the penalty looks at."""

    def __init__(self, model: nn.Module, task: str) -> None:
        self.model, self.train_loader, self.epochs, self.start_epoch = model, range(40), 5, 1
        self.batch_size, self.accumulate = 16, 4
        from types import SimpleNamespace

        self.args = SimpleNamespace(lr0=0.01, lrf=0.01, momentum=0.9, task=task)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(("task", "images"), [("detect", 16), ("classify", 1)])
def test_the_strength_follows_the_summed_loss(task: str, images: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model.nampruner_penalty = {"strength": 1e-3, "method": "proximal", "warmup_epochs": 0.0}  # type: ignore[assignment]
    session = _Session(model, task)
    trainers.attach_penalty(session)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    session.optimizer.step()
    gamma: Tensor = model[1].weight  # type: ignore[assignment]
    torch.testing.assert_close(gamma, torch.full((4,), 1 - 0.1 * 1e-3 * images * 4))
    fitted = trainers.strength_of(session, None, 50)
    assert fitted == pytest.approx(0.8 * 0.1 / (0.01 * 1.01 / 2 * 50))


def test_messages(slim: nn.Module, data: Path, tmp_path: Path) -> None:
    def refused(match: str, call: Any, *args: Any, **kwargs: Any) -> None:
        with pytest.raises(NamPrunerError, match=match):
            call(*args, **kwargs)

    refused("Did you mean yolov8", make, "yolov8q.yaml")
    refused("nothing is downloaded", make, "yolov8n.pt")
    refused("is for semantic", make, "yolo26n-sem.yaml")
    refused("no training argument.*Did you mean epochs", yolo.train, slim, data, epoch=3)
    refused("follows from the network", yolo.train, slim, data, task="segment")
    refused("has 5 classes, the data 3", yolo.train, make(classes=5), data, **SHORT)
    fused = copy.deepcopy(make()).fuse(verbose=False)  # type: ignore[operator]
    refused("fused", yolo.forward, fused, picture())
    refused("fused", yolo.load, yolo.save(fused, tmp_path / "fused.pt"))
    refused("no YOLO", yolo.forward, nn.Linear(3, 3), picture())
    torch.save({"model": make(), "modelopt": {"modelopt": 1}}, tmp_path / "quantized.pt")
    refused("quantized", yolo.load, tmp_path / "quantized.pt")
    yolo.save(slim, tmp_path / "slim.pt")
    refused(
        "has 3 classes, the data 5",
        nampruner.build,
        f"yolo:{tmp_path / 'slim.pt'}",
        num_classes=5,
        in_channels=3,
        image_size=SIZE,
    )
    refused("no images", yolo.images, slim, tmp_path / "nowhere")


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(NamPrunerError, match="without running code"):
        yolo.load(tmp_path / "evil.pt")
    evil = tmp_path / "evil.yaml"
    evil.write_text("nc: 1\nbackbone: [[-1, 1, torch_safe_load, []]]\nhead: []\n")
    with pytest.raises(NamPrunerError, match="is no layer"):
        make(str(evil))


def test_an_optimizer_that_adapts_is_warned_of(data: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("nampruner.yolo.training._trained", lambda *given: given[-1])
    with pytest.warns(UserWarning, match="use SGD"):
        yolo.train(make(), data, optimizer="AdamW")
    assert yolo.train(make(), data)["optimizer"] == "SGD"  # type: ignore[index]
    assert "optimizer" not in yolo.train(make(), data, strength=0)  # type: ignore[operator]


def test_without_ultralytics_the_extra_is_named(monkeypatch: Any) -> None:
    for name in [name for name in sys.modules if name.startswith("ultralytics")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    with pytest.raises(NamPrunerError, match=re.escape("pip install 'nampruner[yolo]'")):
        runpy.run_path(str(Path(yolo.__file__).parent / "library.py"))


def test_what_needs_another_way_is_refused_with_it(slim: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(NamPrunerError, match=r"yolo\.save"):
        nampruner.export_python(slim, tmp_path / "python", picture())
