"""NAM against the paper in NumPy, and where attach puts it."""

import copy

import numpy as np
import pytest
import timm
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from nampruner.errors import NamPrunerError, NoEffectWarning
from nampruner.lineage import lineage, remember
from nampruner.nam import (
    NAM,
    ChannelNAM,
    SpatialNAM,
    attach_nam,
    attach_sites,
    nam_modules,
    resample_nam,
)

Array = NDArray[np.float64]
EPS = 1e-5
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def randomize(model: nn.Module) -> nn.Module:
    """Factors of both signs and statistics far from 0 and 1, so that a wrong formula shows."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | SpatialNAM):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            with torch.no_grad():
                module.weight[::3] *= -1
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype) * 2 + 0.5


# --- the paper, in NumPy -----------------------------------------------------------------------


def array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def gated(x: Array, weight: Array, normalized: Array) -> Array:
    return x / (1 + np.exp(-weight * normalized))


def paper(x: Array, norm: nn.Module, axes: tuple[int, ...], training: bool) -> Array:
    """Gate x with one scale factor per position along the axes that are not in `axes`."""
    shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    scale, shift, mean, var = (
        array(getattr(norm, name)).reshape(shape)
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    if training:
        mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    normalized = scale * (x - mean) / np.sqrt(var + EPS) + shift
    return gated(x, np.abs(scale) / np.abs(scale).sum(), normalized)


CHANNEL_AXES, SPATIAL_AXES = (0, 2, 3), (0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_paper(training: bool, dtype: torch.dtype) -> None:
    nam = randomize(NAM(6, 5, 7)).to(dtype).train(training)
    x = features(4, 6, 5, 7, dtype=dtype)
    middle = paper(array(x), nam.channel.bn, CHANNEL_AXES, training)
    expected = paper(middle, nam.spatial, SPATIAL_AXES, training)
    np.testing.assert_allclose(
        array(nam(x)), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )
    one = copy.deepcopy(nam)
    one.spatial = nn.Identity()
    np.testing.assert_allclose(array(one(x)), middle, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_parts_and_gain() -> None:
    x = features(2, 6, 5, 7)
    both = randomize(NAM(6, 5, 7)).eval()
    channel, spatial = (NAM(6, 5, 7, parts=parts).eval() for parts in ("channel", "spatial"))
    channel.channel, spatial.spatial = both.channel, both.spatial
    assert torch.equal(spatial(channel(x)), both(x))
    both.gain = 4.0
    assert torch.equal(both(x), 4 * spatial(channel(x)))
    with pytest.raises(NamPrunerError, match="'all'; give both, channel or spatial"):
        NAM(6, 5, 7, parts="all")


@pytest.mark.parametrize("momentum", [0.1, None])
def test_spatial_statistics_are_those_of_batch_norm(momentum: float | None) -> None:
    nam, bn = SpatialNAM(3, 4).double(), nn.BatchNorm1d(12, momentum=momentum).double()
    nam.momentum = momentum
    for _ in range(3):
        x = features(5, 2, 3, 4, dtype=torch.float64)
        nam(x)
        bn(x.reshape(10, 12))
    expected = bn.state_dict()
    assert nam.state_dict().keys() == expected.keys()
    for name, value in nam.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    nam.reset_running_stats()
    assert nam.running_mean.abs().sum() == 0
    assert bool((nam.running_var == 1).all())
    assert nam.num_batches_tracked == 0


def test_spatial_statistics_are_float32_under_autocast() -> None:
    nam = SpatialNAM(4, 4)
    x = (torch.randn(64, 32, 4, 4) + 100).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = nam(x)
    assert out.dtype == torch.bfloat16
    mean = array(x.float()).mean((0, 1)).ravel()
    np.testing.assert_allclose(array(nam.running_mean), 0.1 * mean, rtol=1e-5)


# --- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("detach_weight", [False, True])
@pytest.mark.parametrize("part", ["channel", "spatial"])
def test_scale_factor_learns_through_the_weight(part: str, detach_weight: bool) -> None:
    nam = randomize(NAM(3, 2, 2, parts=part, detach_weight=detach_weight)).double()
    inner = getattr(nam, part)
    norm = inner.bn if part == "channel" else inner
    axes = CHANNEL_AXES if part == "channel" else SPATIAL_AXES
    x, target = features(4, 3, 2, 2, dtype=torch.float64), torch.randn(4, 3, 2, 2).double()
    (nam(x) * target).sum().backward()

    fixed = array(norm.weight)
    shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]

    def loss(scale: Array) -> float:
        share = fixed if detach_weight else scale
        weight = (np.abs(share) / np.abs(share).sum()).reshape(shape)
        data = array(x)
        mean, var = data.mean(axes, keepdims=True), data.var(axes, keepdims=True)
        normalized = scale.reshape(shape) * (data - mean) / np.sqrt(var + EPS)
        normalized = normalized + array(norm.bias).reshape(shape)
        return float((gated(data, weight, normalized) * array(target)).sum())

    step = 1e-6 * np.eye(len(fixed))
    slopes = [(loss(fixed + d) - loss(fixed - d)) / 2e-6 for d in step]
    np.testing.assert_allclose(array(norm.weight.grad), slopes, rtol=1e-6, atol=1e-8)


def test_no_nan_when_every_factor_is_zero() -> None:
    nam = NAM(3, 2, 2)
    for norm in (nam.channel.bn, nam.spatial):
        nn.init.zeros_(norm.weight)
    x = features(4, 3, 2, 2).requires_grad_()
    out = nam(x)
    out.sum().backward()
    torch.testing.assert_close(out, x / 4)
    for tensor in (x, *nam.parameters()):
        assert tensor.grad is None or bool(tensor.grad.isfinite().all())


# --- memory format, cut, resampling ------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_channels_last_stays(training: bool) -> None:
    nam = randomize(NAM(8, 5, 6)).train(training)
    reference = copy.deepcopy(nam)
    x = features(2, 8, 5, 6)
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    out = nam(last)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, reference(x))
    out.sum().backward()
    assert last.grad.is_contiguous(memory_format=torch.channels_last)
    assert reference(x).is_contiguous()


@pytest.mark.parametrize("training", [True, False])
def test_survivors_keep_their_gate_after_two_cuts(training: bool) -> None:
    full = randomize(ChannelNAM(10)).double().train(training)
    full.bn.bias.requires_grad_(False)
    slim = copy.deepcopy(full)
    x = features(4, 10, 3, 3, dtype=torch.float64)
    expected = full(x)
    slim.keep_channels(torch.tensor([0, 2, 3, 5, 8, 9]))
    slim.keep_channels(torch.tensor([1, 2, 5]))
    kept = [2, 3, 9]
    torch.testing.assert_close(slim(x[:, kept]), expected[:, kept], rtol=1e-13, atol=1e-13)
    gone = [i for i in range(10) if i not in kept]
    torch.testing.assert_close(slim.removed, full.bn.weight[gone].abs().sum().detach())
    assert slim.bn.num_features == 3
    assert slim.bn.weight.requires_grad
    assert not slim.bn.bias.requires_grad
    assert slim.attention_weight().sum() < 1


def test_cut_down_to_dead_channels_is_finite() -> None:
    nam = ChannelNAM(4)
    with torch.no_grad():
        nam.bn.weight.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0]))
    nam.keep_channels(torch.tensor([1, 2]))
    x = features(2, 2, 3, 3)
    torch.testing.assert_close(nam(x), x / 2)


def test_resample_follows_a_ramp_and_keeps_constants() -> None:
    nam = SpatialNAM(4, 4)
    nam.bias.requires_grad_(False)
    with torch.no_grad():
        nam.weight.copy_(torch.arange(4.0).repeat(4))  # a ramp along the width
        nam.running_var.fill_(3.0)
    with pytest.warns(UserWarning, match="resampled from 4x4 to 6x8"):
        nam.resample(6, 8)
    # Pixel j of 8 has its centre at (j + ½)/2 - ½ of the old pixels; outside, the border goes on.
    ramp = np.clip((np.arange(8) + 0.5) / 2 - 0.5, 0, 3)
    np.testing.assert_allclose(array(nam.weight).reshape(6, 8), np.tile(ramp, (6, 1)), atol=1e-6)
    np.testing.assert_allclose(array(nam.running_var), 3.0, rtol=1e-6)
    assert nam.weight.requires_grad
    assert not nam.bias.requires_grad
    assert nam(features(2, 3, 6, 8)).shape == (2, 3, 6, 8)
    with pytest.warns(NoEffectWarning, match="already has 6x8"):
        nam.resample(6, 8)


def test_wrong_inputs_are_explained() -> None:
    nam = SpatialNAM(4, 4)
    with pytest.raises(NamPrunerError, match=r"5x4 pixels.*4x4.*resample"):
        nam(features(2, 3, 5, 4))
    with pytest.raises(NamPrunerError, match="one value per pixel"):
        nam(features(1, 1, 4, 4))


# --- attaching ---------------------------------------------------------------------------------


class Residual(nn.Module):
    """conv-bn-relu-conv-bn + shortcut, with the in-place habits of torchvision."""

    def __init__(self, channels: int = 8, *, functional: bool = False) -> None:
        super().__init__()
        self.functional = functional
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = self.drop_path(self.bn2(self.conv2(out)))
        if self.functional:
            out = out * 0.5
        out += x
        return self.act(out)


class Parallel(nn.Module):
    """A sum of two long branches, as where HRNet fuses resolutions: not a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)))
        self.right = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


def network(*blocks: nn.Module) -> nn.Sequential:
    """Name the layers of a small classifier 0, 1, …; its blocks begin at 1."""
    stem = nn.Conv2d(3, 8, 3, padding=1)
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


IMAGE = torch.linspace(-1, 1, 2 * 3 * 12 * 12).reshape(2, 3, 12, 12).sin()


def hosts(model: nn.Module) -> list[str]:
    return [site.module for site in lineage(model).nam]


def test_only_residual_branches_that_end_in_a_module() -> None:
    model = network(Residual(), Parallel(), Residual(functional=True), Residual())
    attach_nam(model, IMAGE)
    assert hosts(model) == ["1.bn2", "4.bn2"]
    assert set(nam_modules(model)) == {
        f"{host}.nam.{part}" for host in hosts(model) for part in ("channel", "spatial")
    }


def test_a_block_that_runs_twice_gets_none() -> None:
    shared = Residual()
    model = network(shared, Residual(), shared)
    attach_nam(model, IMAGE)
    assert hosts(model) == ["2.bn2"]


def zoo(name: str) -> nn.Module:
    library, _, arch = name.partition(":")
    if library == "timm":
        return randomize(timm.create_model(arch, num_classes=10)).eval()
    return randomize(getattr(torchvision.models, arch)(num_classes=10)).eval()


def basic_blocks(model: nn.Module, last: str) -> list[str]:
    """Every block of a ResNet is residual."""
    blocks = [name for name, _ in model.named_modules() if name.count(".") == 1]
    return [f"{name}.{last}" for name in blocks if name.startswith("layer")]


def inverted(model: nn.Module, kind: str, flag: str, last: str) -> list[str]:
    """Blocks of an inverted-residual network that say themselves that they have a shortcut."""
    return [
        f"{name}.{last}"
        for name, module in model.named_modules()
        if type(module).__name__ in kind.split("|") and getattr(module, flag)
    ]


EXPECTED = {
    "timm:resnet18": lambda m: basic_blocks(m, "bn2"),
    "timm:resnet50": lambda m: basic_blocks(m, "bn3"),
    "torchvision:resnet18": lambda m: basic_blocks(m, "bn2"),
    "timm:seresnet18": lambda m: basic_blocks(m, "se"),
    "timm:mobilenetv2_100": lambda m: inverted(m, "InvertedResidual", "has_skip", "bn3"),
    "timm:efficientnet_b0": lambda m: inverted(m, "InvertedResidual", "has_skip", "bn3"),
    "torchvision:mobilenet_v2": lambda m: [
        n.replace("3", "2") if ".1.conv." in n else n
        for n in inverted(m, "InvertedResidual", "use_res_connect", "conv.3")
    ],
    "timm:regnety_002": lambda m: [
        f"{n}.conv3.bn" for n, b in m.named_modules() if type(b).__name__ == "Bottleneck"
    ],
    "timm:dla34": lambda m: [
        f"{n}.bn2" for n, b in m.named_modules() if type(b).__name__ == "DlaBasic"
    ],
    "timm:hrnet_w18_small": lambda m: [
        f"{n}.{'bn3' if type(b).__name__ == 'Bottleneck' else 'bn2'}"
        for n, b in m.named_modules()
        if type(b).__name__ in ("BasicBlock", "Bottleneck")
    ],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_residual_branches_of_known_networks(name: str) -> None:
    model, x = zoo(name), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        sites = attach_nam(model, x)
        after = model(x)
    found = [site.module for site in sites]
    assert len(found) >= 6
    assert sorted(found) == sorted(EXPECTED[name](model))
    assert bool(after.isfinite().all())
    assert not torch.equal(before, after)
    assert F.cosine_similarity(before, after).min() > 0.9


@pytest.mark.parametrize("name", ["timm:vgg11_bn", "torchvision:shufflenet_v2_x0_5"])
def test_networks_without_residual_sums_ask_for_a_place(name: str) -> None:
    with pytest.raises(NamPrunerError, match=r"--nam-at.*Batch normalizations here: \w+"):
        attach_nam(zoo(name), torch.randn(1, 3, 64, 64))


def test_at_follows_the_globs() -> None:
    model = network(Residual(), Residual())
    sites = attach_nam(model, (IMAGE,), parts="channel", at=("1.bn?", "0"), preserve=False)
    assert [site.module for site in sites] == ["1.bn1", "1.bn2", "0"]
    assert [type(module) for module in nam_modules(model).values()] == [ChannelNAM] * 3
    assert sites[0].gain == 1.0
    attach_nam(model, {"input": IMAGE}, at=("2.bn2",))
    assert hosts(model) == ["1.bn1", "1.bn2", "0", "2.bn2"]


@pytest.mark.parametrize(
    ("globs", "message"),
    [
        (("1.bn2", "1.bm1"), r"'1.bm1' matches no module. Did you mean .*1\.bn1"),
        (("1.act",), "'1.act' ran 2 times"),
        (("4",), r"'4' returns a tensor of shape \[2, 5\]"),
        (("1.spare",), "'1.spare' ran 0 times"),
    ],
)
def test_at_refuses_what_cannot_carry_nam(globs: tuple[str, ...], message: str) -> None:
    model = network(Residual())
    model[1].spare = nn.BatchNorm2d(8)
    with pytest.raises(NamPrunerError, match=message):
        attach_nam(model, IMAGE, at=globs)
    assert nam_modules(model) == {}
    assert hosts(model) == []


class Chained(nn.Module):
    """A branch that is an nn.Sequential and ends in an activation that another one shares."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), last)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def test_a_chain_of_layers_would_run_nam_twice() -> None:
    model = network(Chained(nn.ReLU()))
    with pytest.raises(NamPrunerError, match=r"give its last layer, '1\.branch\.2', in `at`"):
        attach_nam(model, IMAGE, at=("1.branch",))
    assert nam_modules(model) == {}
    attach_nam(model, IMAGE, at=("1.branch.2",))
    assert hosts(model) == ["1.branch.2"]


def test_nor_is_it_chosen_where_its_last_layer_is_shared() -> None:
    act = nn.ReLU()
    model = network(Chained(act), Chained(act), Residual())
    attach_nam(model, IMAGE)
    assert hosts(model) == ["3.bn2"]
    runs: list[str] = []
    for name, module in nam_modules(model).items():
        module.register_forward_hook(lambda *_, name=name: runs.append(name))
    model(IMAGE)
    assert sorted(runs) == ["3.bn2.nam.channel", "3.bn2.nam.spatial"]


def test_a_host_carries_one_nam() -> None:
    model = network(Residual())
    attach_nam(model, IMAGE)
    with pytest.raises(NamPrunerError, match=r"'1\.bn2' already has a child 'nam'"):
        attach_nam(model, IMAGE)
    with pytest.raises(NamPrunerError, match=r"no module '1\.bn9'.*Did you mean"):
        attach_sites(model, [lineage(model).nam[0].model_copy(update={"module": "1.bn9"})])


def test_nam_learns_inside_the_network_and_the_rest_stays() -> None:
    model = network(Residual(), Residual())
    model[1].eval()
    before = {name: (value, value.clone()) for name, value in model.state_dict().items()}
    types = {name: type(module) for name, module in model.named_modules()}
    modes = {name: module.training for name, module in model.named_modules()}
    attach_nam(model, IMAGE)
    state = model.state_dict()
    for name, (value, copied) in before.items():
        assert state[name].data_ptr() == value.data_ptr()
        assert torch.equal(state[name], copied)
    named = dict(model.named_modules())
    assert {name: type(named[name]) for name in types} == types
    assert {name: named[name].training for name in types} == modes
    assert not named["1.bn2.nam.channel.bn"].training
    assert named["2.bn2.nam.channel.bn"].training
    model(IMAGE).square().sum().backward()
    for part in nam_modules(model).values():
        weight = part.bn.weight if isinstance(part, ChannelNAM) else part.weight
        assert weight.grad.abs().sum() > 0


def test_takes_the_dtype_of_its_host() -> None:
    model = network(Residual()).double()
    attach_nam(model, IMAGE.double(), at=("1.drop_path",))
    assert {value.dtype for value in model.parameters()} == {torch.float64}
    assert model(IMAGE.double()).dtype == torch.float64


def test_copy_and_checkpoint_compute_the_same_bits() -> None:
    model = network(Residual(), Residual())
    attach_nam(model, IMAGE, detach_weight=True)
    randomize(model).eval()
    copied = copy.deepcopy(model)
    fresh = network(Residual(), Residual()).eval()
    attach_sites(fresh, lineage(model).nam)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(copied(IMAGE), model(IMAGE))
    assert torch.equal(fresh(IMAGE), model(IMAGE))
    assert lineage(fresh).nam == lineage(copied).nam == lineage(model).nam
    nn.init.zeros_(copied[1].bn2.nam.channel.bn.bias)
    nn.init.zeros_(copied[1].bn2.nam.channel.bn.weight)
    assert not torch.equal(copied(IMAGE), model(IMAGE))


def test_attaching_after_the_lineage_was_restored_records_no_site_twice() -> None:
    model, fresh = network(Residual()), network(Residual())
    attach_nam(model, IMAGE)
    remember(fresh, nam=lineage(model).nam)
    attach_sites(fresh, lineage(fresh).nam)
    assert lineage(fresh).nam == lineage(model).nam


@pytest.mark.parametrize("strict", [False, True])
def test_export_contains_nam(strict: bool) -> None:
    model = network(Residual())
    attach_nam(model, IMAGE)
    randomize(model).eval()
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(model, (IMAGE,), dynamic_shapes=(batch,), strict=strict)
    assert "1.bn2.nam.spatial.weight" in program.state_dict
    x = torch.randn(3, 3, 12, 12)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_resampled_network_takes_another_size_and_reloads() -> None:
    model = network(Residual(), nn.MaxPool2d(2), Residual()).eval()
    attach_nam(model, IMAGE)
    larger = torch.randn(2, 3, 20, 16)
    with pytest.raises(NamPrunerError, match="resample_nam"):
        model(larger)
    with pytest.warns(UserWarning, match="resampled"):
        resample_nam(model, larger)
    assert [(site.height, site.width) for site in lineage(model).nam] == [(20, 16), (10, 8)]
    fresh = network(Residual(), nn.MaxPool2d(2), Residual()).eval()
    attach_sites(fresh, lineage(model).nam)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(larger), model(larger))
