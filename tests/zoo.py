"""Tiny awkward networks: every habit of real code that makes pruning go wrong, one at a time.

Each is a `Case`: how to build it, what to feed it, and what must happen. `free` names layers whose
channels can go, `alone` maps layers that must keep their width to a word of the reason.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import CondConv2d
from torch import Tensor, nn
from torch.nn import functional as F

from nampruner.nam import attach_nam

Inputs = Callable[[], Any]


def image(channels: int = 3, size: int = 8, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, size, size, generator=generator)


@dataclass(frozen=True)
class Case:
    """A network and what is known about it."""

    build: Callable[[], nn.Module]
    inputs: Inputs = image
    free: tuple[str, ...] = ()
    alone: Mapping[str, str] = field(default_factory=dict)
    repairs: bool = False
    """Whether a width is hard-coded, so that a plan without repairs cannot run."""

    def make(self) -> nn.Module:
        """The network in eval mode with statistics and factors that make a wrong cut visible."""
        torch.manual_seed(0)
        return lively(self.build()).eval()


def lively(model: nn.Module) -> nn.Module:
    """Random statistics, biases and scale factors: a fresh network hides mistakes."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            size = module.num_features
            if module.affine:
                module.weight.data = (torch.rand(size, generator=generator) + 0.5).to(module.weight)
                module.bias.data = (torch.randn(size, generator=generator) * 0.3).to(module.bias)
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.copy_(torch.randn(size, generator=generator) * 0.3)
                module.running_var.copy_(torch.rand(size, generator=generator) + 0.5)
    return model


ZOO: dict[str, Case] = {}


def case(
    *,
    inputs: Inputs = image,
    free: tuple[str, ...] = (),
    alone: Mapping[str, str] | None = None,
    repairs: bool = False,
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Put a network into the zoo, under the name of its class or function in snake_case."""

    def put(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", build.__name__).lower()
        ZOO[name] = Case(build, inputs, free, alone or {}, repairs)
        return build

    return put


def unit(a: int, b: int, kernel: int = 3, **more: Any) -> nn.Sequential:
    """Convolution, BN, ReLU."""
    padding = kernel // 2
    return nn.Sequential(
        nn.Conv2d(a, b, kernel, padding=padding, bias=False, **more), nn.BatchNorm2d(b), nn.ReLU()
    )


class Net(nn.Module):
    """A stem to 16 channels, a middle of the subclass, and a head of 5 classes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = unit(3, 16)
        self.head = nn.Linear(width, 5)

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Any:
        return self.head(self.middle(self.stem(x)).mean((2, 3)))


# -- plain -----------------------------------------------------------------------------------------


@case(free=("0", "3"))
def chain() -> nn.Module:
    return nn.Sequential(
        *unit(3, 12), *unit(12, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    )


@case(free=("0", "2"))
def no_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


@case(inputs=lambda: torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1)), free=("0",))
def one_dimensional() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 12, 3),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Conv1d(12, 8, 3),
        nn.Flatten(),
        nn.Linear(96, 5),
    )


@case(
    inputs=lambda: torch.randn(2, 2, 4, 6, 6, generator=torch.Generator().manual_seed(1)),
    free=("0",),
)
def three_dimensional() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 12, 3, padding=1),
        nn.BatchNorm3d(12),
        nn.PReLU(12),
        nn.MaxPool3d(2),
        nn.Conv3d(12, 8, 1),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


@case(free=("0",))
def bn_without_factors() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12, affine=False), nn.ReLU(), nn.Conv2d(12, 5, 3)
    )


@case(free=("0",))
def bn_without_statistics() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.BatchNorm2d(12, track_running_stats=False),
        nn.ReLU(),
        nn.Conv2d(12, 5, 3),
    )


@case(free=("0",))
def instance_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.InstanceNorm2d(12, affine=True), nn.ReLU(), nn.Conv2d(12, 5, 3)
    )


def _normalized_in_groups(groups: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.GroupNorm(groups, 12),
        nn.ReLU(),
        nn.Conv2d(12, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 5, 1),
    )


@case(free=("0", "3"), repairs=True)
def group_norm() -> nn.Module:
    return _normalized_in_groups(6)


@case(free=("3",), alone={"0": "normalization over channels"})
def one_group_norm() -> nn.Module:
    return _normalized_in_groups(1)


@case(free=("0",))
def prelu() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.PReLU(12), nn.Conv2d(12, 8, 3), nn.PReLU(), nn.Conv2d(8, 5, 1)
    )


# -- shortcuts -------------------------------------------------------------------------------------


@case(free=("stem.0", "inner.0", "last"))
class ResidualProjection(Net):
    def __init__(self) -> None:
        super().__init__(24)
        self.inner = unit(16, 20)
        self.last = nn.Conv2d(20, 24, 1)
        self.shortcut = nn.Conv2d(16, 24, 1)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.last(self.inner(x)) + self.shortcut(x))


@case(free=("stem.0", "grow.0.0", "grow.1.0"))
class DenseConcat(Net):
    def __init__(self) -> None:
        super().__init__(32)
        self.grow = nn.ModuleList([unit(16, 8), unit(24, 8)])

    def middle(self, x: Tensor) -> Tensor:
        for block in self.grow:
            x = torch.cat([x, block(x)], 1)
        return x


@case(free=("inner.0",))
class PaddedShortcut(Net):
    """Option A of He et al.: subsample, and pad the new channels with zeros."""

    def __init__(self) -> None:
        super().__init__(24)
        self.inner = unit(16, 20)
        self.last = nn.Conv2d(20, 24, 3, stride=2, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x)) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))


@case(free=("stem.0",), alone={"last": "meets a fixed width"})
class SkipFromTheInput(Net):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.stem(x))


@case(free=("stem.0", "inner.0"))
class LayerScale(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inner = unit(16, 12)
        self.last = nn.Conv2d(12, 16, 1)
        self.scale = nn.Parameter(torch.rand(1, 16, 1, 1))

    def middle(self, x: Tensor) -> Tensor:
        return x + self.scale * self.last(self.inner(x))


# -- splits and slices -----------------------------------------------------------------------------


@case(free=("stem.0", "branch.0"))
class ChannelShuffle(Net):
    def __init__(self) -> None:
        super().__init__()
        self.branch = unit(8, 8)

    def middle(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        x = torch.cat([left, self.branch(right)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


@case(free=("stem.0",), repairs=True)
class EqualSplit(Net):
    def __init__(self) -> None:
        super().__init__()
        self.part = 8
        self.branch = unit(8, 8)

    def middle(self, x: Tensor) -> Tensor:
        left, right = torch.split(x, self.part, 1)
        return torch.cat([left, self.branch(right)], 1)


@case(free=("stem.0",), repairs=True)
class UnequalSplit(Net):
    def __init__(self) -> None:
        super().__init__(18)
        self.parts = [4, 12]
        self.small, self.large = unit(4, 6), unit(12, 12)

    def middle(self, x: Tensor) -> Tensor:
        small, large = torch.split(x, self.parts, 1)
        return torch.cat([self.small(small), self.large(large)], 1)


@case()
class SplitWithNumbersInTheCode(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inner = unit(16, 16)

    def middle(self, x: Tensor) -> Tensor:
        left, right = torch.split(self.inner(x), [10, 6], 1)
        return torch.cat([right, left], 1)


@case(free=("stem.0",), repairs=True)
class Slices(Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.keep = 10
        self.branch = unit(6, 12)
        self.other = unit(10, 12)

    def middle(self, x: Tensor) -> Tensor:
        return self.other(x[:, : self.keep]) + self.branch(x[:, self.keep :])


@case(repairs=True)
class SliceWrittenInPlace(Net):
    """RexNet's `x[:, :c] += y`."""

    def __init__(self) -> None:
        super().__init__(24)
        self.width = 16
        self.inner = unit(16, 20)
        self.last = nn.Conv2d(20, 24, 1)

    def middle(self, x: Tensor) -> Tensor:
        y = self.last(self.inner(x))
        y[:, : self.width] += x
        return y


@case()
class SliceFilledIn(Net):
    def __init__(self) -> None:
        super().__init__(24)
        self.inner = unit(16, 20)
        self.last = nn.Conv2d(24, 24, 1)

    def middle(self, x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape[0], 24, *x.shape[2:])
        out[:, :16] = x
        out[:, 16:] = self.inner(x)[:, :8]
        return self.last(out)


@case(free=("stem.0",))
class Rolled(Net):
    """Where a channel goes depends on how many there are: no cut is exact."""

    def middle(self, x: Tensor) -> Tensor:
        return torch.roll(x, 3, 1)


@case(free=("stem.0",))
class Glu(Net):
    def __init__(self) -> None:
        super().__init__(8)

    def middle(self, x: Tensor) -> Tensor:
        return F.glu(x, 1)


@case(free=("stem.0", "inner.0"))
class Patches(Net):
    """Overlapping patches: the elements of a window stay beside their channel."""

    def __init__(self) -> None:
        super().__init__(12)
        self.inner = unit(16, 12)
        self.mix = nn.Conv1d(16 * 9, 12 * 9, 1)

    def middle(self, x: Tensor) -> Tensor:
        windows = self.mix(F.unfold(x, 3, padding=1))
        return self.inner(x) + F.fold(windows, (8, 8), 3, padding=1)


@case(free=("up",))
class PixelShuffle(Net):
    def __init__(self) -> None:
        super().__init__(8)
        self.up = nn.Conv2d(16, 32, 1)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(F.pixel_shuffle(self.up(x), 2))


# -- groups ----------------------------------------------------------------------------------------


@case(free=("stem.0", "inner.0"))
class NarrowGroups(Net):
    def __init__(self) -> None:
        super().__init__(32)
        self.inner = unit(16, 32, groups=8)

    def middle(self, x: Tensor) -> Tensor:
        return self.inner(x)


@case(free=("stem.0", "inner.0"))
class WideGroups(Net):
    def __init__(self) -> None:
        super().__init__(24)
        self.inner = unit(16, 24, groups=2)

    def middle(self, x: Tensor) -> Tensor:
        return self.inner(x)


@case(free=("stem.0", "expand.0", "deep.0"))
class Depthwise(Net):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.deep = unit(16, 24, 1), unit(24, 24, groups=24)
        self.project = nn.Conv2d(24, 16, 1)

    def middle(self, x: Tensor) -> Tensor:
        return x + self.project(self.deep(self.expand(x)))


@case(free=("stem.0", "deep.0"))
class DepthwiseMultiplier(Net):
    def __init__(self) -> None:
        super().__init__(48)
        self.deep = unit(16, 48, groups=16)

    def middle(self, x: Tensor) -> Tensor:
        return self.deep(x)


@case(free=("stem.0", "up"))
class Transposed(Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.up = nn.ConvTranspose2d(16, 20, 2, stride=2)
        self.last = nn.ConvTranspose2d(20, 12, 3)

    def middle(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.up(x)))


@case(free=("stem.0",))
class TransposedDepthwise(Net):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2, groups=16)

    def middle(self, x: Tensor) -> Tensor:
        return self.up(x)


@case(alone={"stem.0": "grouped transposed"})
class TransposedGroups(Net):
    def __init__(self) -> None:
        super().__init__(8)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2, groups=4)
        self.last = unit(8, 12)
        self.head = nn.Linear(12, 5)

    def middle(self, x: Tensor) -> Tensor:
        return self.last(self.up(x))


@case(free=("stem.0",))
class Blur(Net):
    """BlurPool: a kernel in a buffer that is not saved, one copy per channel."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        kernel = (row[:, None] * row).expand(16, 1, 3, 3).clone()
        self.register_buffer("kernel", kernel, persistent=False)

    def middle(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, stride=2, groups=x.shape[1])


# -- attention over channels -----------------------------------------------------------------------


@case(free=("stem.0", "squeeze"))
class SeGate(Net):
    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)

    def middle(self, x: Tensor) -> Tensor:
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


@case(alone={"stem.0": "across channels"})
class SoftmaxOverChannels(Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.last = unit(16, 12)

    def middle(self, x: Tensor) -> Tensor:
        return self.last(x.softmax(1))


@case()
class BranchSoftmax(Net):
    """SK: a softmax over stacked branches, not over channels."""

    def __init__(self) -> None:
        super().__init__(12)
        self.branches = nn.ModuleList([unit(16, 12, 3), unit(16, 12, 5)])
        self.weigh = nn.Conv2d(12, 24, 1)

    def middle(self, x: Tensor) -> Tensor:
        both = torch.stack([branch(x) for branch in self.branches], 1)
        squeezed = both.sum(1).mean((2, 3), keepdim=True)
        weights = self.weigh(squeezed).view(x.shape[0], 2, -1, 1, 1).softmax(1)
        return (both * weights).sum(1)


@case(alone={"stem.0": "convolution across labelled positions"})
class Eca(Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.across = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.last = unit(16, 12)

    def middle(self, x: Tensor) -> Tensor:
        gate = self.across(x.mean((2, 3)).unsqueeze(1)).sigmoid().transpose(1, 2)
        return self.last(x * gate.unsqueeze(-1))


@case(alone={"stem.0": "normalization over channels"})
class LayerNorm(Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.norm = nn.LayerNorm(16)
        self.last = unit(16, 12)

    def middle(self, x: Tensor) -> Tensor:
        return self.last(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class Attention(Net):
    """Two heads over the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.project = nn.Linear(16, 16)

    def middle(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = (
            layer(tokens).view(n, h * w, 2, -1).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = self.attend(q, k, v).transpose(1, 2).reshape(n, h * w, -1)
        return x + self.project(mixed).transpose(1, 2).reshape(n, c, h, w)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


@case(free=("stem.0", "v"))
class FusedAttention(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


@case(free=("stem.0", "q", "v"))
class AttentionByHand(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1) @ v


@case(inputs=lambda: image(3, 8))
def nam_attached() -> nn.Module:
    torch.manual_seed(0)
    model = Depthwise()
    attach_nam(model, image())
    for module in model.modules():
        if type(module).__name__ == "SpatialNAM":
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


# -- shared and computed weights -------------------------------------------------------------------


@case(free=("stem.0",))
class CalledTwice(Net):
    def __init__(self) -> None:
        super().__init__()
        self.block = unit(16, 16)

    def middle(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


@case(free=("stem.0", "inner.0"))
class TiedWeights(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inner = unit(16, 12, 1)
        self.first, self.second = nn.Conv2d(12, 16, 1), nn.Conv2d(12, 16, 1)
        self.second.weight = self.first.weight

    def middle(self, x: Tensor) -> Tensor:
        return self.first(self.inner(x)) + self.second(self.inner(x).relu())


class StandardizedConv(nn.Conv2d):
    """Weight standardization: mean and variance over the inputs of every output."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        spread = self.weight.std((1, 2, 3), keepdim=True) + 1e-5
        return F.conv2d(x, (self.weight - mean) / spread, self.bias, padding=self.padding)


@case(free=("last",), alone={"stem.0": "mixes channels"})
class WeightStandardization(Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.last = StandardizedConv(16, 12, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.last(x))


@case(free=("inner.0",))
class ConditionalConvolution(Net):
    """The weight of every image is a mixture of four (CondConv, Yang et al. 2019)."""

    def __init__(self) -> None:
        super().__init__(12)
        self.router = nn.Linear(16, 4)
        self.mixed = CondConv2d(16, 16, 3, padding=1, num_experts=4)
        self.inner = unit(16, 12)

    def middle(self, x: Tensor) -> Tensor:
        weights = torch.sigmoid(self.router(x.mean((2, 3))))
        return self.inner(F.relu(self.mixed(x, weights)))


class GainConv(nn.Conv2d):
    """A weight that is a product of two parameters."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.gain, self.bias, padding=self.padding)


@case(free=("stem.0", "last"))
class WeightGain(Net):
    def __init__(self) -> None:
        super().__init__(12)
        self.last = GainConv(16, 12, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.last(x))


@case()
class WeightNorm(Net):
    def __init__(self) -> None:
        super().__init__(12)
        convolution = nn.Conv2d(16, 12, 3, padding=1)
        self.last = nn.utils.parametrizations.weight_norm(convolution)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.last(x))


@case(free=("stem.0",))
class UnusedParameters(Net):
    def __init__(self) -> None:
        super().__init__()
        self.forgotten = nn.Conv2d(16, 16, 3)
        self.scale = nn.Parameter(torch.ones(16))


# -- inputs and outputs ----------------------------------------------------------------------------


@case(inputs=lambda: (image(), image(2)), free=("stem.0",))
class TwoInputs(Net):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(2, 16, 1)

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        return self.head((self.stem(x) + self.other(extra)).mean((2, 3)))


@case(inputs=lambda: {"extra": image(2), "x": image()}, free=("stem.0",))
class NamedInputs(TwoInputs):
    pass


@case(free=("stem.0",), alone={"last": "output"})
class TwoOutputs(Net):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(16, 6, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.head(x.mean((2, 3))), [self.last(x)]


@case(free=("stem.0",), alone={"last": "output"})
class OutputDict(TwoOutputs):
    def forward(self, x: Tensor) -> Any:
        logits, maps = super().forward(x)
        return {"logits": logits, "maps": maps}


@case(free=("inner.0",), alone={"stem.0": "output"})
class FeatureMapOutput(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inner = unit(16, 12)
        self.last = unit(12, 16)

    def forward(self, x: Tensor) -> Any:
        features = self.stem(x)
        return features, self.head(self.last(self.inner(features)).mean((2, 3)))


@case(free=("stem.0",))
class BatchInAReshape(Net):
    """Frames of a clip: the batch is taken apart and put together again."""

    def middle(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        clip = x.reshape(n // 2, 2, c, h, w).mean(1)
        return clip.repeat_interleave(2, 0)
