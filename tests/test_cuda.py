"""On a GPU: what the other tests say on the CPU holds there too. Skipped where there is none."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import Recorder, free_port, settings, small
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from zoo import ZOO, Net, image, lively

import nampruner
from nampruner.data import Data, load_data
from nampruner.errors import GraphError
from nampruner.graph import DependencyGraph
from nampruner.nam import NAM
from nampruner.penalty import Method, SparsityPenalty
from nampruner.recipe import Recipe
from nampruner.training import evaluate, fit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

GPU = torch.device("cuda", 0)
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _float32_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def _tf32(monkeypatch: pytest.MonkeyPatch, _float32_is_float32: None) -> None:
    """As PyTorch comes."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data(Recipe(data="digits"), seed=0)


def moved(values: Any, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda x: x.to(device), values)


def residual(parts: str = "channel") -> nn.Module:
    """ResNet-20 with NAM in each branch, on the CPU."""
    torch.manual_seed(0)
    model = nampruner.build("resnet20", num_classes=10, in_channels=3, image_size=16)
    nampruner.attach_nam(model, image(size=16), parts=parts)
    return lively(model).eval()


def devices_of(model: nn.Module) -> set[torch.device]:
    return {t.device for t in (*model.parameters(), *model.buffers())}


def outline(graph: DependencyGraph) -> list[tuple[str, int, int]]:
    return [(group.name, group.width, group.multiplicity) for group in graph.groups]


def near(one: Tensor, other: Tensor, part: float) -> None:
    """Within this part of the largest number."""
    wanted = other.detach().double().cpu()
    gap = (one.detach().double().cpu() - wanted).abs().max()
    assert float(gap) <= part * float(wanted.abs().max())


# --- trace, prune, certify, recover ------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_every_awkward_network_is_traced_alike_and_cut_exactly(name: str) -> None:
    case = ZOO[name]
    inputs = moved(case.inputs(), GPU)
    here, there = (
        nampruner.trace(case.make(), case.inputs()),
        nampruner.trace(_on_gpu(name), inputs),
    )
    assert outline(here) == outline(there)
    pruned = nampruner.prune(_on_gpu(name), inputs, ratio=0.3, round_to=1, importance="random")
    assert pruned.certificate.max_relative_error <= 1e-9
    assert devices_of(pruned.model) == {GPU}


def _on_gpu(name: str) -> nn.Module:
    return ZOO[name].make().to(GPU)


@pytest.mark.parametrize("importance", ["nam", "reconstruction"])
def test_the_whole_way_with_images_on_the_cpu(importance: str) -> None:
    model = residual().to(GPU)
    before = copy.deepcopy(model.state_dict())
    batches = [torch.randn(32, 3, 16, 16) for _ in range(4)]
    pruned = nampruner.prune(
        model, image(size=16).to(GPU), macs="50%", importance=importance, data=batches
    )
    proof = pruned.certificate
    assert proof.max_relative_error <= 1e-9
    assert proof.output_error_recovered is not None
    assert proof.output_error_cut is not None
    assert proof.output_error_recovered < 0.7 * proof.output_error_cut
    assert devices_of(pruned.model) == devices_of(model) == {GPU}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_plan_gives_one_cut() -> None:
    model = residual("both")
    plan = nampruner.plan_pruning(model, image(size=16), ratio=0.4)
    here = nampruner.cut(model, plan).state_dict()
    there = nampruner.cut(copy.deepcopy(model).to(GPU), plan).state_dict()
    assert here.keys() == there.keys()
    for name, value in there.items():
        if name.endswith(".removed"):  # a sum: its order may differ
            near(value, here[name], 1e-12)
        else:
            assert torch.equal(value.cpu(), here[name])


def test_both_recover_alike() -> None:
    model, batches = residual(), [torch.randn(64, 3, 16, 16)]
    plan = nampruner.plan_pruning(model, image(size=16), macs="50%")
    outputs = []
    for device in (torch.device("cpu"), GPU):
        dense = copy.deepcopy(model).to(device).double()
        slim = nampruner.cut(dense, plan)
        nampruner.recover(slim, dense, plan, [batch.double() for batch in batches])
        outputs.append(slim(batches[0].double().to(device)))
    near(outputs[1], outputs[0], 1e-3)


def test_inputs_on_the_cpu_are_refused() -> None:
    with pytest.raises(GraphError, match=r"inputs on cpu, network on cuda:0; bring them together"):
        nampruner.prune(residual().to(GPU), image(size=16), ratio=0.3)


def test_taylor_and_folding_take_batches_from_the_cpu() -> None:
    model, images = residual("both").to(GPU), torch.randn(8, 3, 16, 16)
    graph = nampruner.trace(model, images.to(GPU))
    labels = torch.arange(8)
    there = nampruner.score(model, graph, "taylor", batches=[(images, labels)])
    here = nampruner.score(model.cpu(), graph, "taylor", batches=[(images, labels)])
    near(torch.from_numpy(there), torch.from_numpy(here), 1e-3)
    folded = nampruner.fold_nam(model.to(GPU), [images], bound=1e-6)
    assert len(folded.gates) > 0
    near(folded.model(images.to(GPU)), model(images.to(GPU)), 1e-4)


class Picked(Net):
    """Rows picked by a buffer, which lies beside the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(8).flip(0))

    def middle(self, x: Tensor) -> Tensor:
        order: Tensor = self.order
        return x[:, :, order] + x.index_select(3, order)


def test_an_index_beside_its_tensor_keeps_the_channels_free() -> None:
    model = Picked().to(GPU)
    assert outline(nampruner.trace(model, image().to(GPU))) == [("stem.0", 16, 1)]


def test_channels_last_and_half_are_traced_alike() -> None:
    wanted = outline(nampruner.trace(residual(), image(size=16)))
    model = residual().to(GPU, memory_format=torch.channels_last)
    images = image(size=16).to(GPU, memory_format=torch.channels_last)
    assert outline(nampruner.trace(model, images)) == wanted
    for dtype in HALVES:
        assert outline(nampruner.trace(model.to(dtype), images.to(dtype))) == wanted


def test_a_checkpoint_comes_back_bit_equal_on_the_cpu(tmp_path: Path) -> None:
    slim = nampruner.prune(residual().to(GPU), image(size=16).to(GPU), ratio=0.3).model
    nampruner.save(slim, tmp_path / "slim")
    again = nampruner.load(tmp_path / "slim")
    assert devices_of(again) == {torch.device("cpu")}
    assert devices_of(slim) == {GPU}
    for name, value in slim.state_dict().items():
        assert torch.equal(value.cpu(), again.state_dict()[name])


# --- NAM and the penalty -----------------------------------------------------------------------


def _stepped(nam: nn.Module, x: Tensor, dtype: torch.dtype | None) -> list[Tensor]:
    """Output, gradient of the input, and of the scale factors, in float64 on the CPU."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
        out = nam(x if dtype is None else x.to(dtype))
    probe = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
    (out * probe.to(out.device, out.dtype)).sum().backward()
    found = [out, x.grad, *(p.grad for p in nam.parameters())]
    return [t.detach().double().cpu() for t in found]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("dtype", "part"), [(None, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 6e-2)]
)
@pytest.mark.parametrize("training", [True, False])
def test_nam_computes_what_it_does_in_float64(
    layout: torch.memory_format, dtype: torch.dtype | None, part: float, training: bool
) -> None:
    torch.manual_seed(0)
    nam = NAM(12, 6, 5).train(training)
    for parameter in nam.parameters():
        nn.init.uniform_(parameter, 0.2, 1.0)
    x = torch.randn(8, 12, 6, 5)
    wanted = _stepped(copy.deepcopy(nam).double(), x.double(), None)
    there = copy.deepcopy(nam).to(GPU)
    found = _stepped(there, x.to(GPU).contiguous(memory_format=layout), dtype)
    for one, other in zip(found, wanted, strict=True):
        near(one, other, part)
    assert all(p.dtype == torch.float32 for p in there.parameters())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", ["proximal", "subgradient"])
def test_the_penalty_skips_what_the_scaler_skips(fused: bool, method: Method) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).to(GPU)
    penalty = SparsityPenalty(model, strength=0.1, method=method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=fused)
    penalty.attach(optimizer)
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    factor = model[1].weight
    for poison, steps, value in ((float("inf"), 0, 1.0), (0.0, 1, 0.95), (0.0, 2, 0.9)):
        scaler.scale(torch.zeros((), device=GPU))  # a scaler must have been used
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        model[0].weight.grad[0] = poison
        scaler.step(optimizer)
        scaler.update()
        assert penalty.steps == steps
        torch.testing.assert_close(factor, torch.full_like(factor, value), rtol=0, atol=1e-6)


# --- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_it_learns_in_every_precision(digits: Data, precision: str) -> None:
    model = small()
    penalty = SparsityPenalty(model, 0.01)
    rows = fit(model, digits, on_gpu(precision=precision), penalty=penalty).epochs
    assert rows[-1].loss < 0.8 * rows[0].loss
    assert rows[-1].validation_accuracy > 0.5
    assert devices_of(model) == {torch.device("cpu")}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert 0 < penalty.steps <= 3 * len(digits.train)


def on_gpu(**changes: Any) -> Any:
    return settings(**{"device": "cuda", "epochs": 3, **changes})


def test_a_model_on_the_gpu_stays_there(digits: Data) -> None:
    model = small().to(GPU)
    fit(model, digits, settings(device="cuda:0", epochs=1))
    assert devices_of(model) == {GPU}
    there, here = evaluate(model, digits.test), evaluate(model.cpu(), digits.test)
    assert there.images == here.images
    assert there.accuracy == pytest.approx(here.accuracy, abs=0.01)
    assert there.loss == pytest.approx(here.loss, rel=1e-3)


def test_the_same_seed_gives_the_same_bits(digits: Data) -> None:
    models = [small(dropout=0.2) for _ in range(2)]
    torch.cuda.manual_seed(1)
    wanted = torch.rand(1, device=GPU)
    torch.cuda.manual_seed(1)
    for model in models:
        fit(model, digits, on_gpu(epochs=1))
    assert torch.equal(torch.rand(1, device=GPU), wanted)
    one, other = (model.state_dict() for model in models)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_training_goes_on_where_another_device_stopped(
    digits: Data, tmp_path: Path, precision: str, first: str, second: str
) -> None:
    def train(device: str, progress: Recorder) -> tuple[nn.Module, Any]:
        model = small()
        penalty = SparsityPenalty(model, 0.01, warmup_steps=5)
        chosen = on_gpu(device=device, precision=precision)
        return model, fit(
            model, digits, chosen, penalty=penalty, folder=tmp_path, progress=progress
        )

    with pytest.raises(KeyboardInterrupt):
        train(first, Recorder(stop_at=len(digits.train) + 3))
    again = Recorder()
    model, history = train(second, again)
    assert again.notes == []
    assert again.bars["train"] == 2 * len(digits.train)
    assert history.epochs[-1].loss < history.epochs[0].loss
    assert evaluate(model, digits.validation).accuracy > 0.5


def test_fp16_resumes_with_its_scale(digits: Data, tmp_path: Path) -> None:
    whole, broken = small(), small()
    fit(whole, digits, on_gpu(precision="fp16"))
    progress = Recorder(stop_at=len(digits.train) + 3)
    with pytest.raises(KeyboardInterrupt):
        fit(small(), digits, on_gpu(precision="fp16"), folder=tmp_path, progress=progress)
    fit(broken, digits, on_gpu(precision="fp16"), folder=tmp_path)
    one, other = whole.state_dict(), broken.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


WORKER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_training import Watching, fixed_data, settings
from nampruner.training import fit
model = Watching()
rows = fit(model, fixed_data(), settings(device="cuda")).epochs
print(torch.distributed.get_backend(), torch.distributed.get_world_size(), rows[-1].loss)
"""


def test_one_process_of_nccl(tmp_path: Path) -> None:
    from test_training import Watching, fixed_data

    where = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(Path(__file__).parent)],
        env=os.environ | where | {"MASTER_PORT": str(free_port())},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    backend, world, loss = done.stdout.split()[-3:]
    assert (backend, world) == ("nccl", "1")
    alone = fit(Watching(), fixed_data(), settings(device="cuda")).epochs
    assert float(loss) == pytest.approx(alone[-1].loss, rel=1e-2)


# --- time, compilation, export -----------------------------------------------------------------


def test_every_timed_run_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, forwards, wait = [0], [0], torch.cuda.synchronize

    def counted(device: Any = None) -> None:
        waits[0] += 1
        wait(device)

    def seen(*_: Any) -> None:
        forwards[0] += 1

    monkeypatch.setattr(torch.cuda, "synchronize", counted)
    model = small().to(GPU).eval()
    model.register_forward_hook(seen)
    found = nampruner.measure({"ours": model}, torch.randn(4, 1, 8, 8), rounds=5, seconds=0.2)
    assert waits == forwards
    assert found["ours"].runs <= forwards[0]
    assert found["ours"].runtime.endswith("eager cuda")
    assert devices_of(model) == {GPU}


@pytest.mark.filterwarnings("ignore")
def test_a_slim_network_compiles() -> None:
    slim = nampruner.prune(attentive(), digit().to(GPU), ratio=0.4, round_to=1).model
    images = torch.randn(16, 1, 8, 8, device=GPU)
    with torch.no_grad():
        near(torch.compile(slim)(images), slim(images), 1e-4)


def digit() -> Tensor:
    return image(channels=1)


def attentive() -> nn.Module:
    """A small network with NAM behind its first layers, on the GPU."""
    model = lively(small())
    nampruner.attach_nam(model, digit(), at=("1",))
    return model.to(GPU).eval()


@pytest.fixture
def slim() -> Iterator[nn.Module]:
    pruned = nampruner.prune(attentive(), digit().to(GPU), ratio=0.3, round_to=1)
    yield pruned.model
    assert devices_of(pruned.model) == {GPU}


EXPORTS: dict[str, tuple[Callable[..., Any], float]] = {
    "model.onnx": (nampruner.export_onnx, 1e-5),
    "half.onnx": (nampruner.export_fp16, 1e-2),
    "model.pt2": (nampruner.export_pt2, 1e-5),
}


@pytest.mark.usefixtures("_tf32")
@pytest.mark.parametrize("name", EXPORTS)
def test_it_is_exported_from_the_gpu(slim: nn.Module, tmp_path: Path, name: str) -> None:
    export, tolerance = EXPORTS[name]
    images = torch.randn(40, 1, 8, 8, device=GPU)
    parity = export(slim, tmp_path / name, digit().to(GPU), inputs=images)
    assert parity.max_relative <= tolerance
    assert parity.inputs == 40


@pytest.mark.usefixtures("_tf32")
def test_int8_is_calibrated_from_the_gpu(slim: nn.Module, tmp_path: Path) -> None:
    batches = [torch.randn(64, 1, 8, 8) for _ in range(2)]
    path = tmp_path / "int8.onnx"
    found = nampruner.export_int8(slim, path, moved(batches, GPU), inputs=batches, agreement=0.5)
    assert (found.parity.top1_agreement or 0) >= 0.5
    assert path.is_file()


# --- YOLO --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_yolo_trains_the_slim_network_in_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ultralytics")
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    from boxes import SIZE, boxes, tiny

    from nampruner import yolo

    # before it lets half in, it would fetch a network to try it with
    monkeypatch.setattr("ultralytics.engine.trainer.check_amp", lambda model: True)
    data, facts = boxes(tmp_path / "boxes"), {"num_classes": 3, "in_channels": 3}
    model = nampruner.build(f"yolo:{tiny(tmp_path)}", image_size=SIZE, **facts)
    picture = torch.rand(2, 3, SIZE, SIZE)
    yolo.attach_nam(model, picture)
    model = model.to(GPU).eval()
    batches = yolo.images(model, data, image_size=SIZE)
    pruned = nampruner.prune(model, picture.to(GPU), forward=yolo.forward, ratio=0.3, data=batches)
    assert pruned.certificate.max_relative_error <= 1e-9
    shapes = {name: value.shape for name, value in pruned.model.state_dict().items()}
    # the scaler skips steps until its scale has come down from 65 536
    given = {"epochs": 16, "imgsz": SIZE, "batch": 8, "nbs": 8, "warmup_epochs": 0, "device": 0}
    done = yolo.train(pruned.model, data, project=str(tmp_path), strength=1.0, lr0=1e-3, **given)
    last = yolo.load(done.folder / "weights" / "last.pt")
    assert {name: value.shape for name, value in last.state_dict().items()} == shapes
    factors = [m.bn.weight for m in last.modules() if isinstance(m, nampruner.nam.ChannelNAM)]
    pull = 1e-3 * 8 / (1 - 0.937)
    assert factors
    for factor in factors:
        assert float(factor.max()) < 1 - 0.5 * pull
    assert 0 <= done.metrics["metrics/mAP50(B)"] <= 1
