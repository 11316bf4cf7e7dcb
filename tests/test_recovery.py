"""Least squares, rows, and the walk through a whole network."""

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, image, lively

from nampruner.certificate import cost_of
from nampruner.checkpoint import load, save
from nampruner.graph import DependencyGraph
from nampruner.plan import Certificate, PruningPlan, UnitVerdicts
from nampruner.pruning import plan_pruning, prune, restore
from nampruner.reconstruction import eliminate
from nampruner.recovery import fold_constants, recover, walk
from nampruner.recovery.fit import ridge
from nampruner.recovery.norms import Moments, Norms
from nampruner.recovery.refit import Cut, judge, refit, remember
from nampruner.recovery.rows import Sites, border, features_per_channel, patches
from nampruner.recovery.survey import run, survey
from nampruner.recovery.verdicts import verdict
from nampruner.surgery import cut


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# -- least squares ---------------------------------------------------------------------------------


def test_ridge_finds_an_exact_relation() -> None:
    x, weight, bias = torch.randn(1, 400, 6), torch.randn(6, 3), torch.randn(3)
    fit = ridge(x, x @ weight + bias, torch.zeros(1, 6, 3))
    # the smallest ridge is 1e-4 of the variance, and so is the bias it brings
    torch.testing.assert_close(fit.weight[0].float(), weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fit.intercept[0].float(), bias, rtol=1e-3, atol=1e-3)
    assert fit.explained > 1 - 1e-6


def test_ridge_keeps_what_the_data_does_not_determine() -> None:
    x = torch.randn(1, 200, 3)
    x[..., 2] = 1.0
    prior = torch.tensor([[[1.0], [2.0], [3.0]]])
    fit = ridge(x, x @ prior, prior)
    torch.testing.assert_close(fit.weight, prior.double())


def test_duplicates_share_and_nothing_is_nan() -> None:
    base = torch.randn(1, 300, 1)
    x = base.expand(1, 300, 2)
    fit = ridge(x, 2 * base, torch.zeros(1, 2, 1))
    torch.testing.assert_close(fit.weight[0, 0], fit.weight[0, 1])
    assert float(fit.weight.sum()) == pytest.approx(2, abs=1e-3)
    still = ridge(torch.zeros(1, 50, 2), torch.zeros(1, 50, 1), torch.ones(1, 2, 1))
    assert bool(torch.isfinite(still.weight).all())


def test_noise_is_not_fitted() -> None:
    x, y = torch.randn(1, 60, 20), torch.randn(1, 60, 1)
    fit = ridge(x, y, torch.zeros(1, 20, 1))
    free = torch.linalg.lstsq(x[0], y[0]).solution
    assert float(fit.weight.norm()) < float(free.norm())
    assert fit.explained < 0.2


def test_without_an_intercept_none_is_given() -> None:
    x = torch.randn(1, 200, 2)
    fit = ridge(x, x.sum(-1, keepdim=True) + 5, torch.zeros(1, 2, 1), centred=False)
    assert float(fit.intercept.abs().max()) == 0.0


# -- rows ------------------------------------------------------------------------------------------

CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, 3, stride=2, padding=1),
    nn.Conv2d(4, 6, 3, dilation=2, padding=2),
    nn.Conv2d(4, 6, (3, 1), padding="same"),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    nn.Conv2d(4, 4, 3, padding=1, groups=4),
    nn.Conv2d(4, 6, 3, groups=2),
]


@pytest.mark.parametrize("module", CONVOLUTIONS, ids=str)
def test_patches_times_weight_is_the_convolution(module: nn.Conv2d) -> None:
    x = torch.randn(2, 4, 9, 8)
    out = module(x)
    sites = Sites.sample(torch.Size([2, *out.shape[2:]]), 50, seed=1)
    rows = patches(module, x, sites)
    rows = rows.reshape(len(rows), module.groups, -1)
    weight = module.weight.reshape(module.groups, module.out_channels // module.groups, -1)
    by_hand = torch.einsum("ngf,gof->ngo", rows, weight).flatten(1) + module.bias
    torch.testing.assert_close(by_hand, sites.of(module, out))


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_patches_in_one_and_three_dimensions(kind: type[nn.Conv1d]) -> None:
    module = kind(3, 5, 3, padding=1)
    x = torch.randn(2, 3, *[6] * (module.weight.dim() - 2))
    out = module(x)
    sites = Sites.sample(torch.Size([2, *out.shape[2:]]), 40, seed=1)
    rows = patches(module, x, sites).flatten(1)
    by_hand = rows @ module.weight.flatten(1).T + module.bias
    torch.testing.assert_close(by_hand, sites.of(module, out))


@pytest.mark.parametrize(
    ("width", "removed", "hint", "each"),
    [
        (12, [], 0, 1),
        (12, [], 4, 4),
        (12, [4, 5], 0, 2),
        (12, [4, 5, 10, 11], 0, 2),
        (1200, list(range(400, 1200)), 0, 400),
        (1200, list(range(400, 1200)), 100, 100),
        (1200, list(range(400, 1200)), 7, 400),
        (10, [3], 0, 1),
    ],
)
def test_features_per_channel(width: int, removed: list[int], hint: int, each: int) -> None:
    assert features_per_channel(width, removed, hint) == each


def touched(module: nn.Module, x: Tensor) -> Tensor:
    """Where a plain convolution of ones reads fewer ones than it has weights."""
    ones = copy.deepcopy(module)
    nn.init.ones_(ones.weight)
    nn.init.zeros_(ones.bias)
    return ones(torch.ones_like(x))[:, 0] < ones.weight[0].numel() - 0.5


PADDED = [
    *CONVOLUTIONS[:4],
    nn.Conv2d(4, 6, 3, padding=2, stride=2, dilation=2),
    nn.Conv2d(4, 6, (1, 5), padding=(0, 3), stride=(2, 3)),
    nn.Conv2d(4, 6, 3),
    nn.Conv3d(4, 6, 3, padding=1),
    nn.Conv1d(4, 6, 3, padding=1),
]


@pytest.mark.parametrize("module", PADDED, ids=str)
def test_the_border_is_where_zeros_are_read(module: nn.Conv2d) -> None:
    x = torch.randn(1, 4, *(9, 8, 7)[: module.weight.dim() - 2])
    wanted = touched(module, x).double().mean().item()
    assert border(module, x, module(x)) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("module", "share"),
    [
        (nn.ConvTranspose2d(2, 3, 3, padding=1), 16 / 25),
        (nn.ConvTranspose2d(2, 3, 2, stride=2), 0.0),
        (nn.ConvTranspose1d(2, 3, 4, stride=2), 4 / 12),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), 0.0),
        (nn.Linear(5, 3), 0.0),
    ],
    ids=str,
)
def test_borders_of_other_layers(module: nn.Module, share: float) -> None:
    dims = module.weight.dim() - 2
    x = torch.randn(1, 2, *[5] * max(dims, 1))
    assert border(module, x, module(x)) == pytest.approx(share)


def test_sites_may_lie_in_the_padding() -> None:
    x = torch.randn(2, 3, 4, 5)
    padded = nn.functional.pad(x, (2, 2, 1, 1))
    sites = Sites.sample(torch.Size([2, 6, 9]), 1000, seed=0)
    assert torch.equal(sites.under(x, [1, 2]), sites.of(nn.Identity(), padded))


# -- one consumer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_a_duplicate_input_is_replaced_without_loss(transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    dense, slim = kind(6, 4, 3, padding=1), kind(5, 4, 3, padding=1)
    dim = 0 if transposed else 1
    with torch.no_grad():
        slim.weight.copy_(dense.weight.narrow(dim, 0, 5))
        slim.bias.copy_(dense.bias)
    x = torch.randn(16, 6, 8, 8)
    x[:, 5] = 2 * x[:, 1] + 0.0
    lost = Cut(outputs=[], inputs=[5])
    with torch.no_grad():
        seen = remember(dense, slim, lost, x, dense(x), 1)
        assert seen is not None
        assert seen.method == ("affine" if transposed else "taps")
        fit = refit(dense, slim, lost, seen, x[:, :5], shift=True)
        torch.testing.assert_close(slim(x[:, :5]), dense(x), rtol=1e-2, atol=1e-2)
    assert fit.explained > 0.999


def test_a_flattened_map_is_refitted_channel_by_channel() -> None:
    # 3 channels of 100 features, of which the last repeats the first: 40 images would not
    # determine 200 separate features, but they do determine 2 channels
    x = torch.randn(40, 3, 100)
    x[:, 2] = x[:, 0]
    dense, slim = nn.Linear(300, 2), nn.Linear(200, 2)
    with torch.no_grad():
        slim.weight.copy_(dense.weight[:, :200])
        slim.bias.copy_(dense.bias)
        lost = Cut(outputs=[], inputs=list(range(200, 300)))
        seen = remember(dense, slim, lost, x.flatten(1), dense(x.flatten(1)), 100)
        assert seen is not None
        assert seen.method == "affine"
        refit(dense, slim, lost, seen, x[:, :2].flatten(1), shift=True)
        torch.testing.assert_close(
            slim(x[:, :2].flatten(1)), dense(x.flatten(1)), rtol=1e-2, atol=1e-2
        )


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_constant_of_a_transposed_convolution_is_folded_on_average(stride: int) -> None:
    # with a stride every output sees some of the taps only
    dense = nn.ConvTranspose2d(3, 4, 3, stride=stride, padding=1)
    slim = nn.ConvTranspose2d(2, 4, 3, stride=stride, padding=1)
    x = torch.randn(16, 3, 6, 6)
    x[:, 2] = 5.0
    with torch.no_grad():
        slim.weight.copy_(dense.weight[:2])
        slim.bias.copy_(dense.bias)
        lost = Cut(outputs=[], inputs=[2])
        seen = remember(dense, slim, lost, x, dense(x), 1)
        assert seen is not None
        refit(dense, slim, lost, seen, x[:, :2], shift=True)
        left = (slim(x[:, :2]) - dense(x)).mean((0, 2, 3))
    torch.testing.assert_close(left, torch.zeros(4), atol=1e-3, rtol=0)


def test_each_lost_input_is_judged_as_its_consumer_reads_it() -> None:
    x = torch.randn(32, 7, 8, 8)
    x[:, 1] = x[:, 0] - 3 * x[:, 6]  # predicted
    x[:, 2] = x[:, 0] + 0.01 * torch.randn(32, 8, 8)  # nearly
    x[:, 3] = 2.0  # constant, but not where zeros are padded
    x[:, 4] = 0.0  # says nothing anywhere
    lost = Cut(outputs=[], inputs=[1, 2, 3, 4, 5])

    def judged(consumer: nn.Module, *, shift: bool = True) -> list[str]:
        errors = judge(consumer, lost, x, 1, shift=shift)
        assert errors is not None
        assert float(errors[3]) == 0.0
        return [verdict(error) for error in errors.tolist()]

    inner, padded = nn.Conv2d(7, 2, 3), nn.Conv2d(7, 2, 3, padding=1)
    assert judged(inner) == ["exact", "bounded", "exact", "exact", "lossy"]
    assert judged(padded) == ["exact", "bounded", "lossy", "exact", "lossy"]
    assert judged(inner, shift=False) == ["exact", "bounded", "lossy", "exact", "lossy"]
    assert judge(nn.Conv2d(7, 7, 3, groups=7), lost, x, 1, shift=True) is None


def test_what_varies_only_where_it_was_not_looked_at_is_no_constant() -> None:
    x = torch.randn(64, 3, 24, 24)
    x[:, 2] = 0.0
    x[63, 2, 23, 23] = 1e-3
    errors = judge(nn.Conv2d(3, 2, 1), Cut(outputs=[], inputs=[2]), x, 1, shift=True)
    assert errors is not None
    assert verdict(float(errors[0])) == "lossy"


# -- constants -------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Convolution, BN, ReLU, consumer without padding; `norm` puts a BN behind the consumer."""

    def __init__(self, *, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.consumer = nn.Conv2d(8, 5, 3, bias=not norm)
        self.norm = nn.BatchNorm2d(5) if norm else nn.Identity()
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.consumer(torch.relu(self.bn(self.conv(x)))))
        return self.head(x.mean((2, 3)))


def first_channels(model: nn.Module, graph: DependencyGraph) -> np.ndarray:
    """Score 0 for the first three channels of `conv`, 1 for all others."""
    scores = np.ones(graph.count)
    slot = next(s for s in graph.slots if s.name == "conv.weight" and s.dim == 0)
    scores[graph.units(slot)[:3]] = 0.0
    return scores


@pytest.mark.parametrize("norm", [True, False])
def test_constants_are_folded_without_data(norm: bool) -> None:
    model = lively(Chain(norm=norm)).eval()
    with torch.no_grad():
        model.bn.weight[:3] = 0.0
        model.bn.bias[:3] = torch.tensor([0.7, -0.4, 1.3])
    x = torch.randn(4, 3, 12, 12)
    result = prune(model, x, ratio=3 / 13, round_to=1, importance=first_channels)
    assert result.model.conv.out_channels == 5
    fresh = torch.randn(4, 3, 12, 12)
    torch.testing.assert_close(result.model(fresh), model(fresh), rtol=1e-5, atol=1e-5)
    assert result.certificate.verdicts == {"exact": 3}
    assert result.certificate.units == (UnitVerdicts(layer="conv", exact=(0, 1, 2)),)


def test_folding_names_what_it_changed() -> None:
    model = lively(Chain(norm=False)).eval()
    x = torch.randn(4, 3, 12, 12)
    plan = plan_pruning(model, x, ratio=3 / 13, round_to=1, importance=first_channels)
    assert fold_constants(cut(model, plan), model, plan, x).layers == []
    with torch.no_grad():
        model.bn.weight[:2] = 0.0
        model.bn.bias[:2] = 0.5
    (row,) = fold_constants(cut(model, plan), model, plan, x).layers
    assert (row.layer, row.method, row.explained) == ("consumer", "constant", None)
    assert (row.verdict, row.units) == ("lossy", {"exact": 2, "lossy": 1})


def test_a_survey_sees_what_follows_what() -> None:
    model = lively(Chain(norm=True)).eval()
    seen = survey(model, torch.randn(2, 3, 12, 12))
    assert seen.behind == {"conv": "bn", "consumer": "norm"}
    assert seen.bytes_per_image == 8 * 10 * 10 * 4


# -- the whole walk --------------------------------------------------------------------------------

WALKED = [
    "residual_projection",
    "dense_concat",
    "depthwise",
    "narrow_groups",
    "wide_groups",
    "se_gate",
    "nam_attached",
    "flatten_linear",
    "transposed",
    "one_dimensional",
    "three_dimensional",
    "called_twice",
    "no_norm",
    "channel_shuffle",
]


@pytest.mark.parametrize("name", [n for n in WALKED if n in ZOO])
def test_recovery_helps_where_images_are_low_dimensional(name: str) -> None:
    net = ZOO[name]
    model = lively(net.make()).eval()
    shape = net.inputs().shape
    # smooth images span few dimensions, as real ones do: channels can predict one another
    basis = torch.randn(3, *shape[1:])
    data = torch.einsum("nk,k...->n...", torch.randn(128, 3), basis)
    result = prune(model, net.inputs(), ratio=0.3, round_to=1, importance="magnitude")
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = restore(result, model, [data]).certificate
    assert found.output_error_cut is not None
    assert found.output_error_recovered is not None
    assert found.output_error_recovered < found.output_error_cut
    assert all(bool(torch.isfinite(p).all()) for p in result.model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_nothing_cut_nothing_changed() -> None:
    model = lively(ZOO["residual_projection"].make()).eval()
    result = prune(model, image(), ratio=0.0)
    before = {n: t.clone() for n, t in result.model.state_dict().items()}
    assert recover(result.model, model, result.plan, [torch.randn(64, *image().shape[1:])]) == ()
    assert all(torch.equal(t, before[n]) for n, t in result.model.state_dict().items())


# -- more images than fit into memory --------------------------------------------------------------


@pytest.fixture
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only 16 images fit."""
    monkeypatch.setattr(walk, "_BUDGET_BYTES", 0)


def test_moments_are_mean_and_variance() -> None:
    x = 3 + 0.1 * torch.randn(40, 3, 5, 6)
    shift = torch.tensor([2.9, 0.0, 3.0])
    sums = Moments.of(x[:10], shift) + Moments.of(x[10:], shift)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(sums.mean + shift, mean, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(sums.var, var, rtol=1e-4, atol=0)
    assert torch.equal(sums[[2, 0]].mean, sums.mean[[2, 0]])


def test_statistics_are_those_of_all_images(few_at_once: None) -> None:
    model, x = lively(Chain(norm=True)).eval(), torch.randn(4, 3, 12, 12)
    plan = plan_pruning(model, x, ratio=3 / 13, round_to=1, importance=first_channels)
    slim, images = cut(model, plan), 2 * torch.randn(100, 3, 12, 12)
    recover(slim, model, plan, images.split(30))
    seen = {}
    for net in (model, slim):
        net.consumer.register_forward_hook(lambda m, _, out: seen.update({m: out.double()}))
        net(images)
    was, now = seen[model.consumer], seen[slim.consumer]
    moved = now.mean((0, 2, 3)) - was.mean((0, 2, 3))
    wanted = model.norm.running_mean + moved
    torch.testing.assert_close(slim.norm.running_mean.double(), wanted, rtol=1e-4, atol=1e-5)
    grown = now.var((0, 2, 3)) / was.var((0, 2, 3))
    ratio = (slim.norm.running_var / model.norm.running_var).double()
    torch.testing.assert_close(ratio, grown, rtol=1e-3, atol=1e-3)
    assert torch.equal(slim.bn.running_mean, model.bn.running_mean[3:])


def test_more_images_do_not_hurt(few_at_once: None) -> None:
    model = lively(ZOO["residual_projection"].make()).eval()
    shape = tuple(image().shape[1:])
    data = smooth(400, shape)
    plan = plan_pruning(model, image(), ratio=0.4, round_to=1, importance="magnitude")
    errors = []
    for count in (16, 336):
        slim = cut(model, plan)
        recover(slim, model, plan, [data[:count]])
        errors.append(cost_of(model, slim, [data[336:]])[0])
    assert errors[1] <= errors[0] * 1.05


def test_an_exact_cut_stays_exact(few_at_once: None) -> None:
    model = lively(Chain(norm=True)).eval()
    with torch.no_grad():
        model.bn.weight[:3] = 0.0
        model.bn.bias[:3] = torch.tensor([0.7, -0.4, 1.3])
    x = torch.randn(4, 3, 12, 12)
    data = torch.randn(90, 3, 12, 12).split(13)
    result = prune(model, x, ratio=3 / 13, round_to=1, importance=first_channels, data=data)
    fresh = torch.randn(8, 3, 12, 12)
    torch.testing.assert_close(result.model(fresh), model(fresh), rtol=1e-4, atol=1e-5)
    (row,) = result.certificate.layers
    assert (row.method, row.verdict, row.border) == ("constant", "exact", 0.0)


@pytest.mark.parametrize(("norm", "passes"), [(True, 6), (False, 2)])
def test_only_statistics_need_more_passes(few_at_once: None, norm: bool, passes: int) -> None:
    model, x = lively(Chain(norm=True) if norm else Bare()).eval(), torch.randn(4, 3, 12, 12)
    total = 13 if norm else 14
    plan = plan_pruning(model, x, ratio=3 / total, round_to=1, importance=first_channels)
    slim, calls = cut(model, plan), []
    model.register_forward_hook(lambda _, inputs, out: calls.append(len(inputs[0])))
    recover(slim, model, plan, [torch.randn(80, 3, 12, 12)])
    # a look at one image, the walk, and where there are statistics the other 64 in four parts
    assert calls == [1, *[16] * (passes - 1)]


def test_many_images_need_no_more_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "_affordable", lambda seen: 64)
    model, x = lively(Chain(norm=True)).eval(), torch.randn(4, 3, 12, 12)
    plan = plan_pruning(model, x, ratio=3 / 13, round_to=1, importance=first_channels)
    slim, calls = cut(model, plan), []
    model.register_forward_hook(lambda _, inputs, out: calls.append(len(inputs[0])))
    recover(slim, model, plan, [torch.randn(80, 3, 12, 12)])
    assert calls == [1, 64]


def test_another_pass_over_the_same_images_changes_nothing() -> None:
    model, x = lively(ZOO["residual_projection"].make()).eval(), image()
    plan = plan_pruning(model, x, ratio=0.4, round_to=1, importance="magnitude")
    slim, data = cut(model, plan), smooth(64, tuple(x.shape[1:]))
    recover(slim, model, plan, [data])
    once = {name: t.clone() for name, t in slim.state_dict().items()}
    norms = Norms(model, slim, plan)
    with torch.no_grad():
        run(model, data, before=norms.watch())
        run(slim, data, before=norms.follow(lambda: True))
    for name, tensor in slim.state_dict().items():
        torch.testing.assert_close(tensor, once[name], rtol=1e-4, atol=1e-5)


# -- elimination -----------------------------------------------------------------------------------


def test_elimination_is_the_error_of_the_best_reexpression() -> None:
    samples = torch.randn(500, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    samples -= samples.mean(0)
    weight = torch.randn(3, 5, dtype=torch.float64)
    covariance = samples.T @ samples / len(samples)
    order, costs = eliminate([(covariance, weight.T @ weight)])

    def error(gone: list[int]) -> float:
        stay = [i for i in range(5) if i not in gone]
        target = samples @ weight.T
        best = torch.linalg.lstsq(samples[:, stay], target).solution
        return float((target - samples[:, stay] @ best).square().sum() / len(samples))

    # one channel: the cheapest, at its true cost; several: the running sum is the true error
    singles = [error([i]) for i in range(5)]
    assert order[0] == int(np.argmin(singles))
    for count in (1, 2, 3):
        assert float(np.sum(costs[:count])) == pytest.approx(error(order[:count].tolist()))


def test_a_duplicate_goes_first() -> None:
    base = torch.randn(300, 4, dtype=torch.float64)
    samples = torch.cat([base, base[:, :1]], 1)
    covariance = samples.T @ samples / 300 + 1e-8 * torch.eye(5, dtype=torch.float64)
    order, costs = eliminate([(covariance, torch.eye(5, dtype=torch.float64))])
    assert order[0] in (0, 4)
    assert costs[0] < 1e-6 < costs[1]


def test_consumers_add_up() -> None:
    covariance = torch.eye(3, dtype=torch.float64)
    grams = [torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ([1, 5, 2], [1, 1, 1])]
    order, costs = eliminate([(covariance, gram) for gram in grams])
    assert order.tolist() == [0, 2, 1]
    assert costs.tolist() == pytest.approx([2, 3, 6])
    assert list(itertools.accumulate(costs))[-1] == pytest.approx(11)


# -- how much per layer ----------------------------------------------------------------------------


def smooth(count: int, shape: tuple[int, ...]) -> Tensor:
    """Images that span few dimensions, as real ones do."""
    return torch.einsum("nk,k...->n...", torch.randn(count, 3), torch.randn(3, *shape))


def test_reconstruction_removes_what_the_others_know() -> None:
    model = lively(ZOO["chain"].make()).eval()
    with torch.no_grad():  # the second half of the first layer repeats the first half
        convolution = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        half = convolution.out_channels // 2
        for tensor in (convolution.weight, norm.weight, norm.bias):
            tensor[half:] = tensor[:half]
        for buffer in (norm.running_mean, norm.running_var):
            buffer[half:] = buffer[:half]
    data = [torch.randn(256, *image().shape[1:])]
    by_error = {"importance": "reconstruction", "allocation": "error", "round_to": 1}
    result = prune(model, image(), macs="75%", data=data, **by_error)
    assert result.certificate.output_error_cut is not None
    assert result.certificate.output_error_recovered is not None
    assert result.certificate.output_error_cut > 0.05
    assert result.certificate.output_error_recovered < 0.01


def test_error_allocation_spends_where_it_costs_least() -> None:
    model = lively(ZOO["residual_projection"].make()).eval()
    data = [smooth(128, tuple(image().shape[1:]))]
    errors = {}
    for allocation in ("uniform", "error"):
        result = prune(
            model,
            image(),
            macs="50%",
            round_to=1,
            data=data,
            importance="reconstruction",
            allocation=allocation,
        )
        assert 0.5 <= result.plan.achieved.macs < 0.56
        errors[allocation] = result.certificate.output_error_recovered
    assert errors["error"] is not None
    assert errors["uniform"] is not None
    assert errors["error"] <= errors["uniform"] * 1.5


def test_a_norm_with_two_feeders_is_not_shifted_for_one() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1, bias=False)
            self.bn = nn.BatchNorm2d(8)
            self.left = nn.Conv2d(8, 5, 1, bias=False)
            self.right = nn.Conv2d(3, 5, 1, bias=False)
            self.norm = nn.BatchNorm2d(5)
            self.head = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            left = self.norm(self.left(torch.relu(self.bn(self.conv(x)))))
            return self.head((left - self.norm(self.right(x))).mean((2, 3)))

    model = lively(Shared()).eval()
    with torch.no_grad():
        model.bn.weight[:3] = 0.0
        model.bn.bias[:3] = 0.9
    x = torch.randn(4, 3, 8, 8)
    plan = plan_pruning(model, x, ratio=3 / 13, round_to=1, importance=first_channels)
    slim = cut(model, plan)
    assert fold_constants(slim, model, plan, x).layers == []
    assert torch.equal(slim.norm.running_mean, model.norm.running_mean)


# -- added biases, and what becomes of each removed input ------------------------------------------


class Bare(nn.Module):
    """Neither a bias nor a BN behind the consumer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.consumer = nn.Conv2d(8, 6, 3, bias=False)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.consumer(torch.relu(self.conv(x)))).mean((2, 3)))


def test_a_bias_is_added_only_where_it_is_allowed(tmp_path: Path) -> None:
    model, x = Bare().eval(), torch.randn(4, 3, 12, 12)
    with torch.no_grad():  # a constant channel: only a bias can say what it said
        model.conv.weight[:3] = 0.0
        model.conv.bias[:3] = 2.0
    data = [torch.randn(256, 3, 12, 12)]
    errors = {}
    for allowed in (False, True):
        result = prune(model, x, ratio=3 / 14, round_to=1, importance=first_channels)
        found = restore(result, model, data, allow_bias=allowed)
        errors[allowed] = found.certificate.output_error_recovered
        assert (found.model.consumer.bias is not None) is allowed
    assert errors[True] is not None
    assert errors[False] is not None
    assert errors[True] < 1e-4 < errors[False]
    save(found.model, tmp_path / "slim")
    again = load(tmp_path / "slim", model=Bare())
    assert torch.equal(again(x), found.model(x))
    twice = prune(again, x, ratio=0.2, round_to=1, importance="magnitude").model
    save(twice, tmp_path / "twice")
    assert torch.equal(load(tmp_path / "twice", model=Bare())(x), twice.eval()(x))


def test_each_removed_input_is_judged() -> None:
    model = lively(Chain(norm=True)).eval()
    with torch.no_grad():  # channel 0 repeats channel 7, channel 1 says nothing new, 2 is its own
        for tensor in (model.conv.weight, model.bn.weight, model.bn.bias):
            tensor[0] = tensor[7]
        for buffer in (model.bn.running_mean, model.bn.running_var):
            buffer[0] = buffer[7]
        model.bn.weight[1] = 0.0
        model.bn.bias[1] = 0.5
    x = torch.randn(4, 3, 12, 12)
    data = [torch.randn(256, 3, 12, 12)]
    result = prune(model, x, ratio=3 / 13, round_to=1, importance=first_channels, data=data)
    row = next(row for row in result.certificate.layers if row.layer == "consumer")
    assert row.removed == 3
    assert row.units == {"exact": 2, "lossy": 1}
    assert result.certificate.verdicts == {"exact": 2, "lossy": 1}
    assert result.certificate.units == (UnitVerdicts(layer="conv", exact=(0, 1), lossy=(2,)),)


class Fork(nn.Module):
    """Every channel has two consumers; one of them pads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 5, 3)
        self.padded = nn.Conv2d(8, 5, 3, padding=1)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        ends = [f(x).square().mean((2, 3)) for f in (self.inner, self.padded)]
        return self.head(torch.cat(ends, 1))


def forked() -> tuple[nn.Module, Tensor]:
    """Channel 0 is constant; channel 1 nearly, and channel 2 quite, repeats channel 7."""
    model = lively(Fork()).eval()
    with torch.no_grad():
        for tensor in (model.bn.weight, model.bn.bias, model.bn.running_mean, model.bn.running_var):
            tensor[1:3] = tensor[7]
        model.conv.weight[1:3] = model.conv.weight[7]
        model.conv.weight[1] += 0.005 * torch.randn(8, 1, 1)
        model.bn.bias[1:] = 0.0
        model.bn.running_mean[1:] = 0.0
        model.bn.weight[0] = 0.0
        model.bn.bias[0] = 2.0
    return model, torch.randn(4, 8, 9, 9)


def test_a_unit_is_as_good_as_its_worst_consumer() -> None:
    model, x = forked()
    data = [torch.randn(64, 8, 9, 9)]
    chosen = {"ratio": 3 / 8, "round_to": 1, "importance": first_channels}
    found = prune(model, x, data=data, ignore=("inner", "padded"), **chosen).certificate
    rows = {row.layer: row for row in found.layers}
    assert rows["inner"].units == {"exact": 2, "bounded": 1}
    assert rows["padded"].units == {"exact": 1, "bounded": 1, "lossy": 1}
    assert (rows["inner"].border, rows["padded"].border) == (0.0, pytest.approx(32 / 81))
    assert {row.method for row in found.layers} == {"taps"}
    (units,) = found.units
    assert (units.layer, units.exact, units.lossy) == ("conv", (2,), (0,))
    assert 1e-5 < units.bounded[1] <= 0.1
    assert found.verdicts == {"exact": 1, "bounded": 1, "lossy": 1}
    assert Certificate.model_validate_json(found.model_dump_json()) == found


def test_without_data_only_constants_are_known() -> None:
    model, x = forked()
    chosen = {"ratio": 3 / 8, "round_to": 1, "importance": first_channels}
    found = prune(model, x, ignore=("inner", "padded"), **chosen).certificate
    assert found.verdicts == {"lossy": 3}  # the padded consumer misses the constant at its border
    assert [row.units for row in found.layers] == [{"exact": 1, "lossy": 2}, {"lossy": 3}]
    model.padded.padding = (0, 0)
    model.padded._reversed_padding_repeated_twice = [0] * 4
    found = prune(model, x, ignore=("inner", "padded"), **chosen).certificate
    assert found.units == (UnitVerdicts(layer="conv", exact=(0,), lossy=(1, 2)),)


def test_a_layer_that_runs_twice_says_that_nothing_was_done() -> None:
    net = ZOO["called_twice"]
    model = lively(net.make()).eval()
    data = [smooth(64, tuple(image().shape[1:]))]
    result = prune(model, net.inputs(), ratio=0.3, round_to=1, importance="magnitude", data=data)
    rows = {row.method: row for row in result.certificate.layers}
    assert (rows["none"].verdict, rows["none"].bound, rows["none"].explained) == ("lossy", None, 0)
    gone = sum(row.width_before - row.width_after for row in result.plan.layers)
    assert sum(result.certificate.verdicts.values()) == gone


def test_a_plan_can_tell_what_became_of_it() -> None:
    model, x = forked()
    result = prune(model, x, ratio=0.2, round_to=1)
    told = result.plan.model_copy(update={"certificate": result.certificate})
    assert PruningPlan.model_validate_json(told.model_dump_json()) == told
