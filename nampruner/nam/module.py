"""NAM, the normalization-based attention module.

Liu, Shao, Teng, Hoffmann: "NAM: Normalization-based Attention Module", NeurIPS 2021 workshop
(arXiv 2111.12419). A BN scale factor measures how much a channel (γ) or a pixel (λ) varies; its
share of all of them is the attention weight:

    M_c(F) = sigmoid(W_γ · BN(F)),     W_γ = |γ| / Σ|γ|     one γ per channel   (eqs. 1-2)
    M_s(F) = sigmoid(W_λ · BN_s(F)),   W_λ = |λ| / Σ|λ|     one λ per pixel     (eq. 3)

Each multiplies its own input; the channel part comes first. Shapes: N batch, C channels, H, W.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from nampruner.errors import NamPrunerError, NoEffectWarning
from nampruner.graph import channelwise

Parts = Literal["both", "channel", "spatial"]


def attention_weight(scale: Tensor, removed: Tensor | None = None) -> Tensor:
    """Return |scale| / (Σ|scale| + removed), the shape of `scale`; zeros where the sum is zero."""
    size = scale.abs()
    total = size.sum() if removed is None else size.sum() + removed
    # The sum is replaced before the division: a NaN made and masked afterwards has NaN gradients.
    return size / torch.where(total > 0, total, torch.ones_like(total))


def _gated(x: Tensor, normalized: Tensor) -> Tensor:
    """Return x · sigmoid(normalized) in the type of x."""
    return (x * torch.sigmoid(normalized)).to(x.dtype)


def _wide(normalized: Tensor) -> Tensor:
    """Under autocast the gate is float32: near ½ half precision has too few steps for it."""
    return normalized.to(torch.promote_types(normalized.dtype, torch.float32))


@channelwise
class ChannelNAM(nn.Module):
    """Channel attention x · sigmoid(w · BN(x)) on x [N, C, H, W], w = |γ| / (Σ|γ| + removed).

    γ learns through w as well as through BN; `detach_weight` cuts the way through w, as the
    published code does. `removed` is Σ|γ| of the channels cut so far: it keeps the denominator,
    and with it every surviving gate, what it was before the cut.
    """

    removed: Tensor

    def __init__(self, channels: int, *, detach_weight: bool = False) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.detach_weight = detach_weight
        # float64: rounding this sum would move every surviving gate
        self.register_buffer("removed", torch.zeros((), dtype=torch.float64))

    def attention_weight(self) -> Tensor:
        """Return the NAM weight [C]; it sums to 1 as long as no channel was cut."""
        weight = attention_weight(self.bn.weight, self.removed)
        return weight.detach() if self.detach_weight else weight

    def forward(self, x: Tensor) -> Tensor:
        weight = self.attention_weight()
        if self.training:  # w · BN(x) is a BN with factors w·γ and w·β: one pass less, two back
            factors = {"weight": weight * self.bn.weight, "bias": weight * self.bn.bias}
            return _gated(x, _wide(functional_call(self.bn, factors, (x,))))
        return _gated(x, weight.view(1, -1, 1, 1) * self.bn(x))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ChannelNAM":
        removed = self.removed
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.removed.device.type != "mps":  # which has no float64
            self.removed = removed.to(self.removed.device)
        return self

    @torch.no_grad()
    def keep_channels(self, index: Tensor) -> None:
        """Keep the channels `index` [K] (int64), in place; their outputs stay what they were."""
        gone = torch.ones_like(self.bn.weight, dtype=torch.bool)
        gone[index] = False
        self.removed += self.bn.weight[gone].double().abs().sum()
        for name in ("weight", "bias"):
            old = getattr(self.bn, name)
            setattr(self.bn, name, nn.Parameter(old[index].clone(), old.requires_grad))
        for name in ("running_mean", "running_var"):
            setattr(self.bn, name, getattr(self.bn, name)[index].clone())
        self.bn.num_features = len(index)

    def extra_repr(self) -> str:
        return f"detach_weight={self.detach_weight}"


@partial(channelwise, parameters=False)
class SpatialNAM(nn.Module):
    """Spatial attention x · sigmoid(w · BN_s(x)) on x [N, C, H, W], w = |λ| / Σ|λ| per pixel.

    BN_s normalizes every pixel over batch and channels. Parameters, buffers, `eps`, `momentum`
    and `reset_running_stats` are those of `nn.BatchNorm2d`, with the H·W pixels as its features:
    `weight` is λ. λ fixes the input size; `resample` changes it.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, height: int, width: int, *, detach_weight: bool = False) -> None:
        super().__init__()
        pixels = height * width
        self.height, self.width = height, width
        self.eps = 1e-5
        self.momentum: float | None = 0.1
        self.detach_weight = detach_weight
        self.weight = nn.Parameter(torch.ones(pixels))
        self.bias = nn.Parameter(torch.zeros(pixels))
        self.register_buffer("running_mean", torch.zeros(pixels))
        self.register_buffer("running_var", torch.ones(pixels))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))

    def reset_running_stats(self) -> None:
        """Forget the running statistics: mean 0, variance 1."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def attention_weight(self) -> Tensor:
        """Return the NAM weight [H·W]; it sums to 1."""
        weight = attention_weight(self.weight)
        return weight.detach() if self.detach_weight else weight

    def forward(self, x: Tensor) -> Tensor:
        """Gate x [N, C, H, W].

        Raises:
            NamPrunerError: H and W are not the size of λ, or there is one value per pixel to
                train on.
        """
        self._check(x)
        weight = self.attention_weight()
        if self.training:
            return _gated(x, _wide(self._normalized(x, weight)))
        slope = self.weight * torch.rsqrt(self.running_var + self.eps)
        shift = self.bias - self.running_mean * slope
        # w · BN_s(x) is one multiply-add with maps [1, 1, H, W]; no memory format is disturbed.
        shape = (1, 1, self.height, self.width)
        return _gated(x, x * (weight * slope).view(shape) + (weight * shift).view(shape))

    def _check(self, x: Tensor) -> None:
        if tuple(x.shape[-2:]) != (self.height, self.width):
            raise NamPrunerError(
                f"spatial NAM got an input of {x.shape[-2]}x{x.shape[-1]} pixels, its λ is for "
                f"{self.height}x{self.width}: use that size, or resample λ with "
                "nampruner.resample_nam(model, inputs)"
            )
        if self.training and x.shape[0] * x.shape[1] < 2:
            raise NamPrunerError(
                "spatial NAM got one value per pixel (batch 1, one channel) in training mode; "
                "give a larger batch or call model.eval()"
            )

    def _normalized(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return w · BN_s(x) by the statistics of the batch, and follow them.

        Pixels become the features of a batch norm in a view, in either memory format.
        """
        self.num_batches_tracked += 1
        step = self.momentum
        if step is None:  # as in BN: the average of all batches since the reset
            step = 1.0 / float(self.num_batches_tracked)
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        view = x.permute(0, 2, 3, 1).flatten(1, 2) if last else x.flatten(2).flatten(0, 1)
        found = F.batch_norm(
            view,
            self.running_mean,
            self.running_var,
            weight * self.weight,
            weight * self.bias,
            training=True,
            momentum=step,
            eps=self.eps,
        )
        count, channels, height, width = x.shape
        if last:
            return found.view(count, height, width, channels).permute(0, 3, 1, 2)
        return found.view(count, channels, height, width)

    @torch.no_grad()
    def resample(self, height: int, width: int) -> None:
        """Fit λ, its bias and the statistics to another input size, in place, bilinearly.

        As one does with position embeddings (antialiased when shrinking). The parameters are new
        objects: build the optimizer afterwards.

        Warns:
            UserWarning: always, as the attention changes with the size.
        """
        if (height, width) == (self.height, self.width):
            warnings.warn(f"λ already has {height}x{width} pixels", NoEffectWarning, stacklevel=3)
            return
        warnings.warn(
            f"spatial NAM: λ resampled from {self.height}x{self.width} to {height}x{width} "
            "pixels; fine-tune, or compare the accuracy",
            UserWarning,
            stacklevel=3,
        )
        for name in ("weight", "bias", "running_mean", "running_var"):
            old = getattr(self, name)
            grid = old.view(1, 1, self.height, self.width)
            if old.dtype in (torch.float16, torch.bfloat16):
                grid = grid.float()
            new = F.interpolate(grid, (height, width), mode="bilinear", antialias=True)
            flat = new.flatten().to(old.dtype)
            if isinstance(old, nn.Parameter):
                flat = nn.Parameter(flat, old.requires_grad)
            setattr(self, name, flat)
        self.height, self.width = height, width

    def extra_repr(self) -> str:
        return f"{self.height}, {self.width}, detach_weight={self.detach_weight}"


class NAM(nn.Module):
    """gain · M_s(M_c(x)) on x [N, C, H, W]; an absent part is the identity.

    Each gate starts at about ½, as w is 1/C and 1/(H·W). `gain` makes up for it where NAM joins a
    network that already computes something; 1 is the paper.

    Raises:
        NamPrunerError: `parts` is none of both, channel, spatial.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        *,
        parts: Parts = "both",
        detach_weight: bool = False,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        if parts not in get_args(Parts):
            raise NamPrunerError(f"parts = {parts!r}; give both, channel or spatial")
        self.gain = gain
        self.channel: nn.Module = nn.Identity()
        self.spatial: nn.Module = nn.Identity()
        if parts != "spatial":
            self.channel = ChannelNAM(channels, detach_weight=detach_weight)
        if parts != "channel":
            self.spatial = SpatialNAM(height, width, detach_weight=detach_weight)

    def forward(self, x: Tensor) -> Tensor:
        gated = cast(Tensor, self.spatial(self.channel(x)))
        return gated if self.gain == 1.0 else gated * self.gain

    def extra_repr(self) -> str:
        return f"gain={self.gain:g}"


def nam_modules(model: nn.Module) -> dict[str, ChannelNAM | SpatialNAM]:
    """Return every NAM part of `model` by its module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ChannelNAM | SpatialNAM)
    }
