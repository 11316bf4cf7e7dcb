"""What a user may teach the tracer, and what becomes of a wrong teaching."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from zoo import Net, image, lively, unit

import nampruner
from nampruner.certificate import TOLERANCE
from nampruner.errors import NamPrunerError
from nampruner.graph import teach, trace


@torch.library.custom_op("nampruner_tests::swish", mutates_args=())
def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


@torch.library.custom_op("nampruner_tests::swap_halves", mutates_args=())
def swap_halves(x: Tensor) -> Tensor:
    return torch.roll(x, x.shape[1] // 2, 1)


@torch.library.custom_op("nampruner_tests::add", mutates_args=())
def add(x: Tensor, y: Tensor) -> Tensor:
    """Shares its name with an op of ours, and does something else."""
    return x + y.flip(1)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    before = dict(teach.TAUGHT)
    yield
    teach.TAUGHT.clear()
    teach.TAUGHT.update(before)


class Swishing(Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.inner = unit(16, 12)

    def act(self, x: Tensor) -> Tensor:
        return swish(x)

    def middle(self, x: Tensor) -> Tensor:
        return self.inner(self.act(x))


class Swapping(Swishing):
    def act(self, x: Tensor) -> Tensor:
        return swap_halves(x)


class Adding(Swishing):
    def act(self, x: Tensor) -> Tensor:
        return add(x, x)


def network(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return lively(cls()).eval()


def reason(model: nn.Module, layer: str) -> str | None:
    return {row.layer: row.reason for row in trace(model, image()).left_alone()}.get(layer)


@pytest.mark.parametrize("op", [swish, torch.ops.nampruner_tests.swish.default])
def test_an_op_that_is_like_another(op: object) -> None:
    model = network(Swishing)
    unknown = reason(model, "stem.0")
    assert unknown is not None
    assert "no rule" in unknown
    assert "nampruner_tests.swish" in unknown

    nampruner.rule(op, like=torch.ops.aten.relu)

    assert reason(model, "stem.0") is None
    slim = nampruner.prune(model, image(), ratio=0.5, round_to=1, importance="random")
    assert slim.certificate.max_relative_error <= TOLERANCE
    assert slim.model.stem[0].out_channels < 16


def test_a_rule_of_ones_own() -> None:
    @nampruner.rule(swap_halves)
    def _(call: nampruner.graph.Call) -> list[list[Tensor]]:
        moved = []
        for layer in call.labels(call.args[0]):
            first, second = layer.chunk(2, 1)
            call.tie(first, second)  # halves of the slim network have equal widths
            moved.append(torch.cat([second, first], 1))
        return [moved]

    model = network(Swapping)
    assert reason(model, "stem.0") is None
    slim = nampruner.prune(model, image(), ratio=0.5, round_to=1, importance="random")
    assert slim.certificate.max_relative_error <= TOLERANCE
    gone = slim.plan.removed["stem.0.weight"][0]
    assert gone
    assert {(index + 8) % 16 for index in gone} == set(gone)


def test_a_wrong_teaching_is_caught() -> None:
    nampruner.rule(swap_halves, like=torch.ops.aten.relu)
    slim = nampruner.prune(network(Swapping), image(), ratio=0.4, round_to=1, importance="bn")
    assert slim.certificate.max_relative_error <= TOLERANCE
    reasons = {row.layer: row.reason for row in slim.plan.left_alone}
    assert "not exact" in reasons["stem.0"]
    assert slim.model.inner[0].out_channels < 12


def test_an_op_of_another_namespace_is_not_taken_for_ours() -> None:
    found = reason(network(Adding), "stem.0")
    assert found is not None
    assert "no rule for this op: nampruner_tests.add" in found


def test_what_is_no_op_is_refused() -> None:
    with pytest.raises(NamPrunerError, match="is no op"):
        nampruner.rule(nn.ReLU, like=torch.ops.aten.relu)
    with pytest.raises(NamPrunerError, match="no rule is known for nampruner_tests"):
        nampruner.rule(swish, like=torch.ops.nampruner_tests.swap_halves)
