"""Masked against pruned, checked without the certificate's own code; mistakes are caught."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from zoo import ZOO, LayerScale, Net, ResidualProjection, image, lively, unit

import nampruner.certificate
import nampruner.graph
from nampruner.certificate import TOLERANCE, certify, culprits
from nampruner.config import PruneOptions
from nampruner.errors import CertificateError, GraphError, NamPrunerError
from nampruner.graph import call_model, channelwise, teach, trace
from nampruner.importance import score
from nampruner.plan import PruningPlan
from nampruner.pruning import plan_pruning, prune
from nampruner.selection import select
from nampruner.settle import Cut
from nampruner.surgery import cut

REFUSED = ["rolled"]
"""Networks in which no cut is exact."""


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    exact = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        return tree_flatten(call_model(exact, tree_map(lambda t: t.double(), inputs)))[0]


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    return max(((p - q).abs().max() / p.abs().max()).item() for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("name", sorted(set(ZOO) - set(REFUSED)))
@pytest.mark.parametrize("seed", [0, 1])
def test_every_cut_of_the_zoo_is_exact(name: str, seed: int) -> None:
    case = ZOO[name]
    model, x = case.make(), case.inputs()
    before = copy.deepcopy(model.state_dict())
    slim = prune(model, x, ratio=0.3, round_to=1, importance=random(seed))
    assert slim.certificate.max_relative_error <= TOLERANCE
    assert 0 < slim.plan.achieved.ratio <= 0.3
    assert bool(slim.plan.repairs) >= case.repairs
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    # a cut that changes nothing would be exact as well
    assert apart(run(model, x), run(slim.model, x)) > 1e-6


def random(seed: int) -> Any:
    return lambda model, graph: score(model, graph, "random", seed=seed)


@pytest.mark.parametrize("name", REFUSED)
def test_where_nothing_is_exact_the_cut_is_refused(name: str) -> None:
    with pytest.raises(GraphError, match="nothing in this network can be cut"):
        prune(ZOO[name].make(), ZOO[name].inputs(), ratio=0.3, round_to=1)


# -- masked by hand --------------------------------------------------------------------------------

BY_HAND = (
    "chain no_norm one_dimensional three_dimensional residual_projection dense_concat prelu",
    "padded_shortcut layer_scale unequal_split slices se_gate called_twice tied_weights two_inputs",
    "two_outputs pixel_shuffle channel_shuffle depthwise feature_map_output weight_gain",
    "branch_softmax",
)


@pytest.mark.parametrize("name", " ".join(BY_HAND).split())
def test_slim_is_the_original_with_the_weights_that_read_a_channel_at_zero(name: str) -> None:
    """The mask here follows from the layer types, not from the graph's consumers."""
    case = ZOO[name]
    model, x = case.make(), case.inputs()
    plan = plan_pruning(model, x, ratio=0.3, round_to=1, importance="random")
    masked = copy.deepcopy(model)
    for path, module in masked.named_modules():
        gone = plan.removed.get(f"{path}.weight", {}).get(1, [])
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            module.weight.data[:, gone] = 0
    assert apart(run(masked, x), run(cut(model, plan), x)) <= 1e-12


def test_nam_by_hand() -> None:
    """A channel before NAM goes, and every surviving gate stays what it was."""
    model = ZOO["nam_attached"].make()
    plan = plan_pruning(model, image(), ratio=0.3, round_to=1, importance="random")
    slim = cut(model, plan)
    masked = copy.deepcopy(model)
    for path in ("expand.0", "project", "head"):
        gone = plan.removed.get(f"{path}.weight", {}).get(1, [])
        masked.get_submodule(path).weight.data[:, gone] = 0
    lost = plan.removed["project.nam.channel.bn.weight"][0]
    removed = slim.get_buffer("project.nam.channel.removed")
    gamma = model.get_parameter("project.nam.channel.bn.weight")[lost].abs().sum()
    torch.testing.assert_close(removed.float(), gamma.detach())
    assert apart(run(masked, image()), run(slim, image())) <= 1e-12


def test_nam_is_exact_whatever_its_factors() -> None:
    model = ZOO["nam_attached"].make()
    for path, module in model.named_modules():
        if path.endswith("channel.bn"):
            module.weight.data = torch.rand(16) * 300 + 100
    plan = planned(model)
    assert certify(model, cut(model, plan), plan, image()).max_relative_error <= 1e-12


# -- mistakes are caught ---------------------------------------------------------------------------


def planned(model: nn.Module, x: Any = None) -> PruningPlan:
    x = image() if x is None else x
    graph = trace(model, x)
    options = PruneOptions(ratio=0.3, round_to=1, importance="random")
    return select(graph, score(model, graph, "random"), options)


def corrupted(plan: PruningPlan, name: str, dim: int, width: int) -> PruningPlan:
    """The plan with one index of one list replaced by a channel that should stay."""
    gone = plan.removed[name][dim]
    stays = next(i for i in range(width) if i not in gone)
    lists: Mapping[str, Any] = {**plan.removed, name: {**plan.removed[name]}}
    lists[name][dim] = sorted([stays, *gone[1:]])
    return plan.model_copy(update={"removed": lists})


@pytest.mark.parametrize("name", ["inner.0.weight", "inner.1.weight"])
def test_a_wrong_index_is_caught(name: str) -> None:
    model = ZOO["residual_projection"].make()
    plan = planned(model)
    assert certify(model, cut(model, plan), plan, image()).max_relative_error <= TOLERANCE
    wrong = corrupted(plan, name, 0, 20)
    with pytest.raises(CertificateError, match=r"not exact: pruned and masked differ by .* 1e-09"):
        certify(model, cut(model, wrong), wrong, image())


def test_a_forgotten_list_is_caught() -> None:
    model = ZOO["residual_projection"].make()
    plan = planned(model)
    lists = {k: v for k, v in plan.removed.items() if k != "last.weight"}
    wrong = plan.model_copy(update={"removed": lists})
    with pytest.raises(CertificateError, match="the pruned network does not run"):
        certify(model, cut(model, wrong), wrong, image())


class Branch(Net):
    """A residual branch that ends in a BN, or is scaled by a factor."""

    def __init__(self, factor: bool = False) -> None:
        super().__init__()
        self.inner = unit(16, 20)
        self.last = nn.Sequential(nn.Conv2d(20, 16, 1), nn.BatchNorm2d(16))
        self.factor = nn.Parameter(torch.zeros(())) if factor else 1.0

    def middle(self, x: Tensor) -> Tensor:
        return x + self.last(self.inner(x)) * self.factor


def test_a_wrong_index_behind_a_zero_scale_factor_is_caught() -> None:
    """Zero-init of a branch's last BN, as every ResNet recipe has it."""
    model = lively(Branch()).eval()
    nn.init.zeros_(model.last[1].weight)
    plan = planned(model)
    assert certify(model, cut(model, plan), plan, image()).max_relative_error <= TOLERANCE
    wrong = corrupted(plan, "inner.0.weight", 0, 20)
    with pytest.raises(CertificateError, match="not exact"):
        certify(model, cut(model, wrong), wrong, image())


def rezero() -> nn.Module:
    return lively(Branch(factor=True)).eval()


def zero_convolution() -> nn.Module:
    model = lively(Branch()).eval()
    nn.init.zeros_(model.last[0].weight)
    return model


def zero_head() -> nn.Module:
    model = lively(Branch()).eval()
    nn.init.zeros_(model.head.weight)
    return model


@pytest.mark.parametrize("build", [rezero, zero_convolution, zero_head])
def test_a_wrong_index_behind_other_zeros_is_caught(build: Any) -> None:
    model = build()
    wrong = corrupted(planned(model), "inner.0.weight", 0, 20)
    with pytest.raises(CertificateError, match="not exact"):
        certify(model, cut(model, wrong), wrong, image())


def test_only_zeros_that_could_hide_something_are_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = lively(Branch()).eval()
    with torch.no_grad():
        model.head.bias.zero_()  # it is added to the outputs, which all stay
        model.inner[0].weight[0, 0, 0, 0] = 0
    plan, cuts = planned(model), []
    slim = cut(model, plan)

    def counted(*args: Any) -> nn.Module:
        cuts.append(args)
        return cut(*args)

    monkeypatch.setattr(nampruner.certificate, "cut", counted)
    certify(model, slim, plan, image())
    assert not cuts
    with torch.no_grad():
        model.inner[0].weight[0] = 0
    certify(model, cut(model, plan), plan, image())
    assert len(cuts) == 1


def test_a_wrong_index_is_caught_on_zero_inputs() -> None:
    torch.manual_seed(0)
    model = LayerScale().eval()
    wrong = corrupted(planned(model), "inner.0.weight", 0, 12)
    with pytest.raises(CertificateError, match="not exact"):
        certify(model, cut(model, wrong), wrong, torch.zeros_like(image()))


def test_a_network_that_returns_nan_is_refused() -> None:
    model = ZOO["chain"].make()
    plan = planned(model)
    with pytest.raises(CertificateError, match="differ by inf"):
        certify(model, cut(model, plan), plan, image() * float("nan"))


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Declarations of this test end with it."""
    monkeypatch.setattr(nampruner.graph, "CHANNELWISE", copy.copy(teach.CHANNELWISE))
    monkeypatch.setattr(teach, "CHANNELWISE", nampruner.graph.CHANNELWISE)


class Centered(nn.Module):
    """Subtracts the mean over channels: not channel-wise."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class Gate(nn.Module):
    """Channel-wise, but written so that the tracer alone would freeze it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.ifft2(torch.fft.fft2(x)).real * self.gain.view(1, -1, 1, 1)


class Around(Net):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def middle(self, x: Tensor) -> Tensor:
        return self.inside(x)


def test_a_right_declaration_frees_channels(declared: None) -> None:
    model = lively(Around(Gate(16))).eval()
    with pytest.raises(GraphError, match="no rule for this op"):
        prune(model, image(), ratio=0.3, round_to=1)
    channelwise(Gate)
    slim = prune(model, image(), ratio=0.3, round_to=1)
    assert slim.plan.achieved.ratio == 0.25
    assert slim.model.inside.gain.shape == (12,)


def test_a_wrong_declaration_is_caught(declared: None) -> None:
    channelwise(Centered)
    model = lively(Around(Centered())).eval()
    with pytest.raises(NamPrunerError, match="a cut here is not exact"):
        prune(model, image(), ratio=0.3, round_to=1)


def test_only_what_is_at_fault_is_frozen(declared: None) -> None:
    channelwise(Centered)
    model = lively(ResidualProjection()).eval()
    model.shortcut = nn.Sequential(Centered(), model.shortcut)
    slim: Cut = prune(model, image(), ratio=0.3, round_to=1)
    reasons = {row.layer: row.reason for row in slim.plan.left_alone}
    assert reasons["stem.0"].startswith("a cut here is not exact")
    assert {"inner.0", "last"} <= {row.layer for row in slim.plan.layers}


@pytest.mark.parametrize(
    ("bad", "wanted"),
    [(set(), []), ({3}, [3]), ({0, 6}, [0, 6]), (set(range(7)), list(range(7)))],
)
def test_culprits_are_found_by_halving(bad: set[int], wanted: list[int]) -> None:
    calls = []

    def holds(items: Any) -> bool:
        calls.append(items)
        return not bad & set(items)

    assert culprits(range(7), holds) == wanted
    assert len(calls) < 14


def test_items_that_only_fail_together() -> None:
    assert culprits(range(6), lambda items: not {1, 4} <= set(items)) == [4]


class NumberInTheCode(nn.Module):
    """Its middle is split at numbers that no attribute holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = unit(16, 12), unit(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.first(x), [5, 7], 1)
        return self.last(torch.cat(parts[::-1], 1))


def test_where_a_network_stops_is_where_the_fault_is_sought(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    chain = [unit(16, 16) for _ in range(12)]
    blocks = [*chain[:6], NumberInTheCode(), *chain[6:]]
    model = lively(nn.Sequential(unit(3, 16), *blocks, nn.Conv2d(16, 5, 1))).eval()
    tried: list[int] = []
    certify = nampruner.settle.certify

    def counted(*args: Any) -> Any:
        tried.append(1)
        return certify(*args)

    monkeypatch.setattr(nampruner.settle, "certify", counted)
    slim = prune(model, image(), ratio=0.3, round_to=1, importance="random")
    reasons = {row.layer: row.reason for row in slim.plan.left_alone}
    assert set(reasons) == {"7.first.0", "14"}
    assert "does not run" in reasons["7.first.0"]
    # halving all fifteen groups would take about as many again
    assert len(tried) <= 8
