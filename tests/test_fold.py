"""NAM folded for inference: the same numbers from fewer ops, or none where a gate stands still."""

import copy
from pathlib import Path

import onnx
import pytest
import torch
from test_nam import IMAGE, Residual, network, randomize
from torch import Tensor, nn

from nampruner.errors import NamPrunerError
from nampruner.export import export_onnx
from nampruner.nam import NAM, ChannelNAM, attach_nam, fold_nam, nam_modules
from nampruner.nam.fold import ChannelGate, SpatialGate


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def gated(*, parts: str = "both", at: tuple[str, ...] = (), preserve: bool = True) -> nn.Module:
    model = network(Residual(), Residual())
    attach_nam(model, IMAGE, parts=parts, at=at, preserve=preserve)
    return randomize(model).eval()


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float(((ours - theirs).norm() / theirs.norm()).detach())


PLACES = {
    "BN": ("1.bn2",),
    "convolution with a bias": ("1.conv2",),
    "a whole block": ("1",),
    "no layer that could take the gain": ("1.drop_path",),
    "one behind another": ("1.conv2", "1.bn2"),
}


@pytest.mark.parametrize("preserve", [True, False])
@pytest.mark.parametrize("parts", ["channel", "spatial", "both"])
@pytest.mark.parametrize("place", PLACES)
def test_folding_is_exact(place: str, parts: str, preserve: bool) -> None:
    model = gated(parts=parts, at=PLACES[place], preserve=preserve).double()
    before = copy.deepcopy(model.state_dict())
    folded = fold_nam(model)

    torch.testing.assert_close(folded.model(IMAGE.double()), model(IMAGE.double()))
    assert folded.gates == ()
    assert nam_modules(folded.model) == {}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    single = fold_nam(model.float()).model
    assert relative(single(IMAGE), model(IMAGE)) < 1e-6


def test_survivors_of_a_cut_keep_their_gate() -> None:
    part = randomize(ChannelNAM(10)).eval()
    part.keep_channels(torch.tensor([0, 2, 3, 9]))
    x = torch.randn(2, 4, 5, 5)
    folded = fold_nam(part).model
    assert isinstance(folded, ChannelGate)
    torch.testing.assert_close(folded(x), part(x))


def test_a_shared_weight_is_not_scaled_for_others() -> None:
    model = gated()
    model[2].bn2.weight = model[1].bn1.weight
    folded = fold_nam(model).model
    torch.testing.assert_close(folded(IMAGE), model(IMAGE))


def still(model: nn.Module, parts: tuple[str, ...] = ("channel", "spatial")) -> nn.Module:
    """Make gates of the named parts independent of their input: NAM factors of zero."""
    for path, part in nam_modules(model).items():
        if path.rpartition(".")[2] in parts:
            weight = part.bn.weight if isinstance(part, ChannelNAM) else part.weight
            nn.init.zeros_(weight)
    return model


def test_a_gate_that_stands_still_becomes_a_constant() -> None:
    model = still(gated())
    folded = fold_nam(model, [IMAGE], bound=1e-3)
    assert [gate.constant for gate in folded.gates] == [True] * 4
    assert all(gate.error < 1e-6 for gate in folded.gates)
    assert not any(isinstance(m, ChannelGate | SpatialGate) for m in folded.model.modules())
    torch.testing.assert_close(folded.model(IMAGE), model(IMAGE))


@pytest.mark.parametrize("part", ["channel", "spatial"])
def test_one_part_may_be_constant_and_the_other_stay(part: str) -> None:
    model = still(gated(), (part,))
    folded = fold_nam(model, [IMAGE], bound=1e-3)
    told = {gate.module: gate.constant for gate in folded.gates}
    assert told == {path: path.endswith(part) for path in nam_modules(model)}
    torch.testing.assert_close(folded.model(IMAGE), model(IMAGE))


def test_the_error_is_that_of_the_best_constant_and_the_bound_decides() -> None:
    model = gated(parts="channel", at=("1.bn2",), preserve=False)
    seen: list[Tensor] = []
    handle = model[1].bn2.nam.register_forward_hook(
        lambda module, x, y: seen.extend((x[0].clone(), y.clone()))  # the sum is in place
    )
    with torch.no_grad():
        model(IMAGE)
    handle.remove()
    x, y = (t.double().transpose(0, 1).flatten(1) for t in seen)
    pairs = zip(x[..., None], y[..., None], strict=True)
    best = torch.stack([torch.linalg.lstsq(a, b).solution[0, 0] for a, b in pairs])
    error = float((y - best[:, None] * x).norm() / y.norm())

    halves = [IMAGE[:1], IMAGE[1:]]
    below, above = (fold_nam(model, halves, bound=error * by) for by in (0.999, 1.001))
    assert below.gates[0].error == pytest.approx(error, rel=1e-6)
    assert [f.gates[0].constant for f in (below, above)] == [False, True]
    torch.testing.assert_close(below.model(IMAGE), model(IMAGE))
    assert 0 < relative(above.model(IMAGE), model(IMAGE)) < 10 * error


def test_a_gate_with_nothing_before_it_to_take_the_constant_stays() -> None:
    model = still(gated(at=("1.drop_path",)))
    folded = fold_nam(model, [IMAGE], bound=1e-3)
    assert [gate.constant for gate in folded.gates] == [False, False]
    torch.testing.assert_close(folded.model(IMAGE), model(IMAGE))


def test_what_cannot_be_measured_is_refused() -> None:
    model = gated()
    with pytest.raises(NamPrunerError, match="needs calibration inputs"):
        fold_nam(model, bound=1e-3)
    with pytest.raises(NamPrunerError, match="bound = 0"):
        fold_nam(model, [IMAGE], bound=0)


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(str(path)).graph.node]


def test_the_file_has_no_bn_and_no_division_and_folded_gates_leave_nothing(tmp_path: Path) -> None:
    model, bare = gated(), network(Residual(), Residual())
    export_onnx(bare, tmp_path / "bare.onnx", IMAGE)
    parity = export_onnx(model, tmp_path / "nam.onnx", IMAGE)
    export_onnx(fold_nam(still(model), [IMAGE], bound=1e-3).model, tmp_path / "still.onnx", IMAGE)

    assert parity.max_relative < 1e-5
    assert sorted(operators(tmp_path / "still.onnx")) == sorted(operators(tmp_path / "bare.onnx"))
    extra = operators(tmp_path / "nam.onnx")
    for each in operators(tmp_path / "bare.onnx"):
        extra.remove(each)
    per_site = ["Conv", "Sigmoid", "Mul", "Mul", "Add", "Sigmoid", "Mul"]
    assert sorted(extra) == sorted(2 * per_site)


def test_a_lone_nam_can_be_exported(tmp_path: Path) -> None:
    nam = randomize(NAM(3, 12, 12, gain=4.0)).eval()
    assert export_onnx(nam, tmp_path / "nam.onnx", IMAGE).max_relative < 1e-5
