"""The way from a model to a certified cut, in one call and step by step."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, Net, image, lively

from nampruner.certificate import TOLERANCE, certify
from nampruner.errors import GraphError, NamPrunerError
from nampruner.graph import DependencyGraph
from nampruner.pruning import plan_pruning, prune
from nampruner.settle import Cut
from nampruner.surgery import cut

TWICE = [n for n in ZOO if n != "rolled"]


def test_the_steps_give_what_prune_gives() -> None:
    model = ZOO["depthwise"].make()
    whole = prune(model, image(), ratio=0.3, round_to=1)
    plan = plan_pruning(model, image(), ratio=0.3, round_to=1)
    assert plan == whole.plan
    slim = cut(model, plan)
    bare = whole.certificate.model_copy(update={"layers": (), "verdicts": {}, "units": ()})
    assert certify(model, slim, plan, image()) == bare
    assert sum(whole.certificate.verdicts.values()) > 0
    assert torch.equal(slim(image()), whole.model(image()))


@pytest.mark.parametrize("name", TWICE)
def test_pruning_twice_is_exact(name: str) -> None:
    case = ZOO[name]
    once = prune(case.make(), case.inputs(), ratio=0.2, round_to=1, importance="random")
    twice = prune(once.model, case.inputs(), ratio=0.3, round_to=1, importance="random")
    assert isinstance(twice, Cut)
    assert twice.certificate.max_relative_error <= TOLERANCE
    assert twice.plan.before == once.plan.after
    assert twice.plan.after.params < once.plan.after.params


def test_pruning_twice_by_hand() -> None:
    """Two cuts of a plain chain remove what one cut of both would."""
    model = ZOO["no_norm"].make()
    once = prune(model, image(), ratio=0.2, round_to=1, importance="random")
    twice = prune(once.model, image(), ratio=0.3, round_to=1, importance="random")
    left = torch.arange(12)
    for result in (once, twice):
        gone = result.plan.removed["0.weight"][0]
        left = torch.tensor([v for i, v in enumerate(left.tolist()) if i not in gone])
    assert torch.equal(twice.model[0].weight, model[0].weight[left])
    assert torch.equal(twice.model[0].bias, model[0].bias[left])


@pytest.mark.parametrize("target", [{"ratio": 0.4}, {"macs": "60%"}, {"params": "0.6"}])
def test_targets(target: dict[str, Any]) -> None:
    plan = plan_pruning(ZOO["dense_concat"].make(), image(), round_to=1, **target)
    assert plan.requested.model_dump(exclude_none=True) == target
    achieved = plan.achieved
    if "ratio" in target:
        assert 0.35 < achieved.ratio <= 0.4
    else:
        (name,) = target
        assert 0.6 <= getattr(achieved, name) < 0.7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 1.2}, "ratio = 1.2"),
        ({"ratio": -0.1}, "ratio = -0.1"),
        ({"ratio": 0.3, "macs": "50%"}, "ratio and macs were given together"),
        ({"ratios": 0.3}, "unknown option 'ratios'.*Did you mean ratio"),
        ({"ratio": 0.3, "importance": "l1"}, "importance = 'l1'"),
        ({"ratio": 0.3, "ignore": ("layer9",)}, "'layer9' matches no layer"),
        ({"macs": "lots"}, "no amount"),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(NamPrunerError, match=words):
        prune(ZOO["chain"].make(), image(), **options)


def test_a_network_with_nothing_to_cut_names_the_reasons() -> None:
    with pytest.raises(GraphError, match=r"nothing in this network can be cut \(0: output of the"):
        prune(nn.Sequential(nn.Conv2d(3, 5, 1)), image(), ratio=0.3)


def test_what_is_refused_is_frozen_and_the_rest_is_planned_again() -> None:
    result = prune(
        ZOO["split_with_numbers_in_the_code"].make(),
        image(),
        ratio=0.3,
        round_to=1,
        importance="random",
    )
    reasons = {row.layer: row.reason for row in result.plan.left_alone}
    assert "a cut here is not exact (the pruned network does not run" in reasons["inner.0"]
    assert [row.layer for row in result.plan.layers] == ["stem.0"]
    assert result.plan.achieved.ratio == 0.25


def test_widths_computed_in_python_are_caught() -> None:
    """A factor that follows the width cannot be seen by any trace; the certificate sees it."""

    class Scaled(Net):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(16, 16, 1)

        def middle(self, x: Tensor) -> Tensor:
            return self.inner(x) * x.shape[1] ** -0.5

    result = prune(lively(Scaled()).eval(), image(), ratio=0.3, round_to=1)
    reasons = {row.layer: row.reason for row in result.plan.left_alone}
    assert "not exact" in reasons["stem.0"]
    assert [row.layer for row in result.plan.layers] == ["inner"]


def test_values_decide_nothing_about_the_graph() -> None:
    """A width guarded by an assertion cannot be repaired and is refused, not crashed on."""

    class Strict(Net):
        def middle(self, x: Tensor) -> Tensor:
            assert x.shape[1] == 16
            return x

    with pytest.raises(NamPrunerError, match="a cut here is not exact"):
        prune(lively(Strict()).eval(), image(), ratio=0.3, round_to=1)


def test_a_network_that_does_not_run_in_float64_is_a_clear_error() -> None:
    class Single(Net):
        def middle(self, x: Tensor) -> Tensor:
            return torch.einsum("nchw,hk->nckw", x, torch.eye(8))

    with pytest.raises(GraphError, match="float64"):
        prune(lively(Single()).eval(), image(), ratio=0.3, round_to=1)


def test_single_precision_inside_does_not_hide_the_channels() -> None:
    class Cast(Net):
        def middle(self, x: Tensor) -> Tensor:
            return x.float().relu().to(x.dtype)

    result = prune(lively(Cast()).eval(), image(), ratio=0.3, round_to=1)
    assert result.plan.achieved.ratio == 0.25


def test_importance_as_a_function_and_taylor() -> None:
    model = ZOO["chain"].make()

    def backwards(net: nn.Module, graph: DependencyGraph) -> Any:
        return -torch.arange(graph.count).numpy()

    mine = plan_pruning(model, image(), ratio=0.3, round_to=1, importance=backwards)
    assert mine.removed["3.weight"][0] == list(range(16 - len(mine.removed["3.weight"][0]), 16))
    labelled = [(image(), torch.tensor([0, 1]))]
    taylor = plan_pruning(
        model, image(), ratio=0.3, round_to=1, importance="taylor", batches=labelled
    )
    assert taylor.importance == "taylor"
    assert taylor.removed != mine.removed


def test_another_forward_is_used_throughout() -> None:
    model = ZOO["two_outputs"].make()
    calls = []

    def only_maps(net: nn.Module, x: Tensor) -> Any:
        calls.append(net)
        return net(x)[1]

    result = prune(model, image(), ratio=0.2, round_to=1, forward=only_maps)
    assert len(calls) >= 3
    assert {row.layer for row in result.plan.left_alone} == {"last"}


def test_inputs_are_not_written_to() -> None:
    class InPlace(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.clone().sub_(0.5))

    x = image()
    before = x.clone()
    prune(lively(InPlace()).eval(), x, ratio=0.3, round_to=1)
    assert torch.equal(x, before)


def test_training_goes_on_after_the_cut() -> None:
    torch.manual_seed(0)
    slim = prune(ZOO["depthwise"].make().train(), image(), ratio=0.3, round_to=1).model
    optimizer = torch.optim.SGD(slim.parameters(), lr=0.1, momentum=0.9)
    x, y = image(batch=8), torch.arange(8) % 5
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(slim(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_plan_fits_every_copy_of_the_model() -> None:
    model = ZOO["slices"].make()
    other = copy.deepcopy(model)
    plan = plan_pruning(model, image(), ratio=0.3, round_to=1)
    assert torch.equal(cut(model, plan)(image()), cut(other, plan)(image()))
