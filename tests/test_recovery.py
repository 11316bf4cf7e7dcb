"""Least squares, rows, and the walk through a whole network."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, image, lively

from nampruner.checkpoint import load, save
from nampruner.graph import DependencyGraph
from nampruner.pruning import plan_pruning, prune, restore
from nampruner.reconstruction import eliminate
from nampruner.recovery import fold_constants, recover
from nampruner.recovery.fit import ridge
from nampruner.recovery.refit import Cut, refit, remember
from nampruner.recovery.rows import Sites, features_per_channel, patches
from nampruner.recovery.survey import survey
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


def test_folding_names_what_it_changed() -> None:
    model = lively(Chain(norm=False)).eval()
    x = torch.randn(4, 3, 12, 12)
    plan = plan_pruning(model, x, ratio=3 / 13, round_to=1, importance=first_channels)
    assert fold_constants(cut(model, plan), model, plan, x) == ()
    with torch.no_grad():
        model.bn.weight[:3] = 0.0
        model.bn.bias[:3] = 0.5
    assert fold_constants(cut(model, plan), model, plan, x) == ("consumer",)


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
    assert fold_constants(slim, model, plan, x) == ()
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
