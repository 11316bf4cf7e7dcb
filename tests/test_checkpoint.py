"""What is saved comes back bit for bit, and what is damaged does not come back at all."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from zoo import ZOO, Depthwise, image, lively

from nampruner import checkpoint, models
from nampruner.checkpoint import InputSpec, appearing, is_checkpoint, load, read, save
from nampruner.errors import CheckpointError, NamPrunerError
from nampruner.graph import call_model
from nampruner.lineage import lineage
from nampruner.nam import attach_nam
from nampruner.pruning import prune

SMALL = {
    "resnet20": 16,
    "timm:resnext50_32x4d?layers=[1,1,1,1]": 32,
    "timm:mobilenetv2_050": 32,
}


def built(spec: str, nam: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = models.build(spec, num_classes=10, in_channels=3, image_size=SMALL[spec])
    lively(model)
    if nam:
        attach_nam(model, image(size=SMALL[spec]))
        lively(model)
    return model.eval()


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return tree_leaves(call_model(model, inputs))


def same(a: nn.Module, b: nn.Module, inputs: Any) -> bool:
    pairs = zip(outputs(a, inputs), outputs(b, inputs), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("nam", [False, True], ids=["plain", "nam"])
@pytest.mark.parametrize("spec", SMALL)
def test_dense_once_and_twice_pruned_networks_come_back(
    spec: str, nam: bool, tmp_path: Path
) -> None:
    x = image(size=SMALL[spec])
    model = built(spec, nam)
    for step in range(3):
        again = load(save(model, tmp_path / str(step)))
        assert same(model, again, x)
        assert lineage(again) == lineage(model)
        assert len(lineage(again).plans) == step
        assert [n for n, _ in again.named_modules()] == [n for n, _ in model.named_modules()]
        model = prune(again, x, ratio=0.3, round_to=1, importance="random").model


def test_a_reloaded_network_is_pruned_as_the_saved_one_would_be(tmp_path: Path) -> None:
    x = image(size=16)
    slim = prune(built("resnet20", nam=True), x, ratio=0.3).model
    again = load(save(slim, tmp_path / "slim"))
    first, second = (prune(m, x, ratio=0.3) for m in (slim, again))
    assert first.plan == second.plan
    assert same(first.model, second.model, x)


def test_nam_may_come_after_a_cut(tmp_path: Path) -> None:
    x = image(size=16)
    slim = prune(built("resnet20"), x, ratio=0.3, round_to=1).model
    attach_nam(slim, x)
    again = prune(lively(slim).eval(), x, ratio=0.3, round_to=1).model
    assert same(again, load(save(again, tmp_path / "c")), x)


def test_repaired_attributes_come_back(tmp_path: Path) -> None:
    spec = "timm:mobilenetv2_050"
    slim = prune(built(spec), image(size=32), ratio=0.3, round_to=1, importance="random").model
    again = load(save(slim, tmp_path / "slim"))
    for (_, a), (_, b) in zip(slim.named_modules(), again.named_modules(), strict=True):
        if isinstance(a, nn.Conv2d):
            assert (a.groups, a.in_channels, a.out_channels) == (
                b.groups,
                b.in_channels,
                b.out_channels,
            )


NOT_SAVED = {"weight_norm", "nam_attached", "blur"}


@pytest.mark.parametrize("name", sorted(set(ZOO) - NOT_SAVED))
def test_a_model_of_the_callers_own(name: str, tmp_path: Path) -> None:
    case = ZOO[name]
    slim = prune(case.make(), case.inputs(), ratio=0.3, round_to=1, importance="random").model
    folder = save(slim, tmp_path / "slim")
    assert same(slim, load(folder, model=case.build()), case.inputs())
    with pytest.raises(CheckpointError, match="its own program built"):
        load(folder)


def test_a_buffer_that_is_not_saved_has_its_cut_shape(tmp_path: Path) -> None:
    case = ZOO["blur"]
    slim = prune(case.make(), image(), ratio=0.3, round_to=1).model
    assert same(slim, load(save(slim, tmp_path / "slim"), model=case.build()), image())


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    case = ZOO["tied_weights"]
    slim = prune(case.make(), image(), ratio=0.3, round_to=1).model
    folder = save(slim, tmp_path / "slim")
    stored = load_file(folder / "model.safetensors")
    assert ("first.weight" in stored) != ("second.weight" in stored)
    again = load(folder, model=case.build())
    assert again.first.weight is again.second.weight
    assert same(slim, again, image())


def test_nam_goes_onto_a_fresh_model(tmp_path: Path) -> None:
    slim = prune(ZOO["nam_attached"].make(), image(), ratio=0.3, round_to=1).model
    again = load(save(slim, tmp_path / "slim"), model=Depthwise())
    assert same(slim, again, image())
    assert again.project.nam.channel.removed > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model = built("resnet20").to(dtype)
    assert same(model, load(save(model, tmp_path / "c")), image(size=16).to(dtype))


def test_the_record_says_what_was_told(tmp_path: Path) -> None:
    spec = InputSpec(channels=3, height=16, width=16, mean=(0.5,), std=(0.2,))
    more = {
        "data": "digits",
        "classes": ("a", "b"),
        "metrics": {"accuracy": 0.5},
        "parent": "dense",
    }
    record = read(save(built("resnet20"), tmp_path / "c", input=spec, **more))
    assert record.input == spec
    assert record.data == "digits"
    assert record.classes == ("a", "b")
    assert record.metrics == {"accuracy": 0.5}
    assert record.lineage.source == "resnet20"
    assert record.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]


# -- damage ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    slim = prune(built("resnet20"), image(size=16), ratio=0.3).model
    return save(slim, tmp_path / "good")


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "nampruner.json"
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))

    return apply


def reweigh(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return apply


def truncate(name: str, keep: float) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])

    return apply


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "no record": lambda f: (f / "nampruner.json").unlink(),
    "weights cut short": truncate("model.safetensors", 0.7),
    "header cut short": truncate("model.safetensors", 0.001),
    "empty weights": truncate("model.safetensors", 0),
    "record cut short": truncate("nampruner.json", 0.5),
    "empty record": truncate("nampruner.json", 0),
    "record in another encoding": lambda f: (f / "nampruner.json").write_bytes(b"\xff\xfe"),
    "record of another shape": lambda f: (f / "nampruner.json").write_text("[1]"),
    "another format": edit(lambda r: r.update(format=2)),
    "unknown field": edit(lambda r: r.update(extra=1)),
    "a module that is not there": edit(
        lambda r: r["lineage"]["attributes"].update({"layer9": {"groups": 2}})
    ),
    "an attribute that is not there": edit(
        lambda r: r["lineage"]["attributes"].update({"conv1": {"gruops": 2}})
    ),
    "a tensor too few": reweigh(lambda w: w.pop("conv1.weight")),
    "a tensor too many": reweigh(lambda w: w.update({"conv9.weight": torch.zeros(1)})),
    "a tensor of another dtype": reweigh(
        lambda w: w.update({"conv1.weight": w["conv1.weight"].double()})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_refused(damage: Callable[[Path], Any], folder: Path) -> None:
    load(folder)
    damage(folder)
    with pytest.raises(CheckpointError):
        load(folder)


DISAGREE: dict[str, Callable[[Path], Any]] = {
    "record forgets the cut": edit(lambda r: r["lineage"].update(attributes={}, plans=[])),
    "a tensor of another shape": reweigh(
        lambda w: w.update({"conv1.weight": w["conv1.weight"][:-1].clone()})
    ),
    "no arguments": edit(lambda r: r["lineage"].update(arguments={})),
    "an argument too many": edit(lambda r: r["lineage"]["arguments"].update(depth=3)),
    "an attribute that is a method": edit(
        lambda r: r["lineage"]["attributes"].update({"conv1": {"forward": 2}})
    ),
}


@pytest.mark.parametrize("damage", DISAGREE.values(), ids=DISAGREE)
def test_record_and_weights_that_disagree_are_refused(
    damage: Callable[[Path], Any], folder: Path
) -> None:
    damage(folder)
    with pytest.raises(CheckpointError):
        load(folder)


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "foreign"])
def test_what_is_no_checkpoint(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "file":
        path.write_text("hello")
    elif kind != "missing":
        path.mkdir()
    if kind == "foreign":
        (path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        load(path)
    assert not is_checkpoint(path)


def test_a_source_that_is_not_there_any_more(folder: Path) -> None:
    edit(lambda r: r["lineage"].update(source="timm:resnet19"))(folder)
    with pytest.raises(NamPrunerError, match="unknown model 'timm:resnet19'"):
        load(folder)


def test_a_users_file_is_not_run_without_trust(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        "from pathlib import Path\nfrom torch import nn\n"
        "Path(__file__).with_name('ran').touch()\n"
        "def make(num_classes):\n    return nn.Sequential(nn.Conv2d(3, num_classes, 1))\n"
    )
    model = models.build(
        f"{file}:make", num_classes=4, in_channels=3, image_size=8, trust_source=True
    )
    saved = save(model.eval(), tmp_path / "c")
    (tmp_path / "ran").unlink()
    with pytest.raises(NamPrunerError, match="would run code"):
        load(saved)
    assert not (tmp_path / "ran").exists()
    assert same(model, load(saved, trust_source=True), image())


# -- writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "foreign"])
def test_nothing_foreign_is_overwritten(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is no checkpoint; give another folder"):
        save(built("resnet20"), path)
    assert (path if kind == "file" else path / "notes.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["x"]


def test_a_checkpoint_is_replaced_whole(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("old")
    dense = built("resnet20")
    save(dense, folder)
    assert sorted(os.listdir(folder)) == ["model.safetensors", "nampruner.json"]
    assert same(dense, load(folder), image(size=16))
    assert os.listdir(folder.parent) == [folder.name]


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("moment", ["weights", "record", "rename"])
def test_a_kill_while_writing_leaves_what_was_there(
    moment: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is cleaned up, as after `kill -9`, and still nothing half-written can be loaded."""
    before = load(folder)

    def die(*args: Any, **kwargs: Any) -> None:
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    where = {
        "weights": (checkpoint, "save_model"),
        "record": (Path, "write_text"),
        "rename": (os, "replace"),
    }
    monkeypatch.setattr(*where[moment], die)
    fresh = folder.with_name("fresh")
    for target in (folder, fresh):
        with pytest.raises(Killed):
            save(built("resnet20"), target)
    monkeypatch.undo()
    assert same(before, load(folder), image(size=16))
    assert not fresh.exists()
    leftovers = [p for p in folder.parent.iterdir() if p != folder]
    assert leftovers
    assert all(p.name.startswith(".") for p in leftovers)
    assert moment == "rename" or not any(is_checkpoint(p) for p in leftovers)


def test_a_failure_while_writing_cleans_up(tmp_path: Path) -> None:
    def fill() -> None:
        with appearing(tmp_path / "x") as draft:
            (draft / "a").write_text("1")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fill()
    assert os.listdir(tmp_path) == []
