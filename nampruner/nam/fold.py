"""NAM at inference: two small ops per gate, or none.

In eval mode every number in a gate is a constant: channel NAM is x · sigmoid(a·x + b) with
a = w·γ/σ and b = w·(β - μ·γ/σ), spatial NAM the same per pixel. No normalization of the weight, no
BN is left; the gain goes into the convolution or BN that NAM follows. A gate that hardly moves on
calibration inputs is a constant, and goes there too.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map_only

from nampruner.errors import NamPrunerError
from nampruner.modes import evaluating
from nampruner.nam.attach import apply_nam
from nampruner.nam.branches import Inputs, call
from nampruner.nam.module import NAM, ChannelNAM, SpatialNAM, nam_modules
from nampruner.plan import FoldedGate

Constants = Mapping[str, Tensor]
"""Part of NAM (`channel`, `spatial`) → the factor per channel [C] that stands for its gate."""


class ChannelGate(nn.Module):
    """x · sigmoid(a·x + b) on x [N, C, H, W], one a and b per channel.

    a·x + b is a depthwise 1x1 convolution: runtimes give it the sigmoid and their blocked memory
    layout, which a broadcast product and sum would leave.
    """

    slope: Tensor
    shift: Tensor

    def __init__(self, slope: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("slope", slope.view(-1, 1, 1, 1))
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(F.conv2d(x, self.slope, self.shift, groups=len(self.shift)))


class SpatialGate(nn.Module):
    """x · sigmoid(a·x + b) on x [N, C, H, W], one a and b [1, 1, H, W] per pixel."""

    slope: Tensor
    shift: Tensor

    def __init__(self, slope: Tensor, shift: Tensor, size: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("slope", slope.view(1, 1, *size))
        self.register_buffer("shift", shift.view(1, 1, *size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x * self.slope + self.shift)


class _Gain(nn.Module):
    """What is left of NAM's gain where no layer before it can take it."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


@dataclass(frozen=True)
class Folded:
    """A network for inference only, and what became of its gates."""

    model: nn.Module
    gates: tuple[FoldedGate, ...] = ()
    """In the order of the modules; empty where nothing was measured."""


@torch.no_grad()
def fold_nam(
    model: nn.Module, batches: Iterable[Inputs] = (), *, bound: float | None = None
) -> Folded:
    """Return a copy of `model` for inference, its NAM folded; `model` is not changed.

    Without `bound` it computes the same, to rounding. With it, every gate that on `batches` could
    be a constant per channel at a relative output error ‖y - k·x‖ / ‖y‖ of at most `bound` becomes
    one, if a convolution or BN before it can take the constant.

    Raises:
        NamPrunerError: `bound` is not positive, or there are no batches to measure on.
    """
    found = {} if bound is None else _measured(model, batches, bound)
    still = {path: moves.constant for path, moves in found.items() if moves.error <= (bound or 0)}
    twin = nn.Sequential(copy.deepcopy(model))  # so that the model itself may be a NAM
    constant: set[str] = set()
    for path, nam in [(p, m) for p, m in twin.named_modules() if isinstance(m, NAM)]:
        host = _host(twin, path)
        parts = {part: f"{path}.{part}"[2:] for part in ("channel", "spatial")}
        known = {part: still[name] for part, name in parts.items() if host and name in still}
        constant |= {parts[part] for part in known}
        twin.set_submodule(path, _stages(nam, host, known))
    for path, part in nam_modules(twin).items():  # those that stand outside of a NAM
        twin.set_submodule(path, _gate(part))
    gates = (
        FoldedGate(module=path, error=moves.error, constant=path in constant)
        for path, moves in found.items()
    )
    return Folded(twin[0].eval(), tuple(gates))


def _stages(nam: NAM, host: nn.Module | None, known: Constants) -> nn.Module:
    """Return what is left behind the host, which takes the gain and the constants.

    What the host takes comes before the gates that stay, so their slopes are divided by it.
    """
    one = torch.ones((), dtype=torch.float64)
    gain = one if host is None else one * nam.gain
    behind_channel = gain * known.get("spatial", one)
    stages: list[nn.Module] = []
    if isinstance(nam.channel, ChannelNAM) and "channel" not in known:
        stages.append(_gate(nam.channel, behind_channel))
    if isinstance(nam.spatial, SpatialNAM) and "spatial" not in known:
        stages.append(_gate(nam.spatial, gain))
    if host is not None:
        _scale(host, behind_channel * known.get("channel", one))
    elif nam.gain != 1.0:
        stages.append(_Gain(nam.gain))
    return stages[0] if len(stages) == 1 else nn.Sequential(*stages)


def _gate(part: ChannelNAM | SpatialNAM, scale: Tensor | None = None) -> nn.Module:
    """Return the gate of a NAM part whose input comes multiplied by `scale` ([C] or one number)."""
    norm = part.bn if isinstance(part, ChannelNAM) else part
    mean, var, weight, bias = (
        getattr(norm, name).double() for name in ("running_mean", "running_var", "weight", "bias")
    )
    share = part.attention_weight().double()
    slope = weight * torch.rsqrt(var + norm.eps)
    shift = share * (bias - mean * slope)
    slope = share * slope if scale is None else share * slope / scale.to(slope)
    slope, shift = slope.to(norm.weight.dtype), shift.to(norm.weight.dtype)
    if isinstance(part, ChannelNAM):
        return ChannelGate(slope, shift)
    return SpatialGate(slope, shift, (part.height, part.width))


def _host(model: nn.Module, path: str) -> nn.Module | None:
    """Return the convolution or BN whose output only this NAM sees; None where there is none."""
    name, _, child = path.rpartition(".")
    host = model.get_submodule(name)
    if child != "nam" or list(host._forward_hooks.values()) != [apply_nam]:
        return None
    # a layer that computes its weight, or that does more than the plain one, is not linear in it
    plain = type(host).forward in (nn.Conv2d.forward, _BatchNorm.forward)
    if not plain or host._forward_pre_hooks or parametrize.is_parametrized(host):
        return None
    places = [m for _, m in model.named_modules(remove_duplicate=False) if m is host]
    return host if len(places) == 1 and host.weight is not None else None


def _scale(layer: nn.Module, factor: Tensor) -> None:
    """Multiply the output of a convolution or BN by `factor` ([C] or one number), in place."""
    for name in ("weight", "bias"):
        old = layer._parameters[name]
        if old is not None:
            rows = factor.to(old.device).view(-1, *(1,) * (old.dim() - 1))
            # a new parameter, for the old one may be shared
            new = nn.Parameter((old.double() * rows).to(old.dtype), old.requires_grad)
            layer.register_parameter(name, new)


class _Moves:
    """How far one gate is from a constant per channel, from second moments in float64."""

    def __init__(self) -> None:
        self._xx = self._xy = self._yy = torch.zeros(())

    def watch(self, part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Forward hook: take in one batch."""
        x, y = (t.double().transpose(0, 1).flatten(1) for t in (inputs[0], output))
        self._xx = self._xx.to(x) + x.square().sum(1)
        self._xy = self._xy.to(x) + (x * y).sum(1)
        self._yy = self._yy.to(x) + y.square().sum(1)

    @property
    def constant(self) -> Tensor:
        """The factor per channel [C] that comes nearest; ½ where nothing ever came."""
        silent = self._xx == 0
        return torch.where(silent, 0.5, self._xy / torch.where(silent, 1.0, self._xx))

    @property
    def error(self) -> float:
        """‖y - k·x‖ / ‖y‖ over all channels."""
        left = (self._yy - self.constant * self._xy).clamp_min(0).sum()
        whole = self._yy.sum()
        return float((left / whole).sqrt()) if whole > 0 else 0.0


def _measured(model: nn.Module, batches: Iterable[Inputs], bound: float) -> dict[str, _Moves]:
    """Run the batches and return NAM part → how far its gate moves."""
    if not bound > 0:
        raise NamPrunerError(f"bound = {bound!r}: must be above 0, such as 1e-3")
    found = {path: _Moves() for path in nam_modules(model)}
    handles = [
        model.get_submodule(path).register_forward_hook(moves.watch)
        for path, moves in found.items()
    ]
    seen, device = 0, next(model.parameters(), torch.empty(0)).device
    try:
        with evaluating(model):
            for batch in batches:
                call(model, tree_map_only(Tensor, lambda x: x.to(device), batch))
                seen += 1
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise NamPrunerError("folding gates needs calibration inputs; give batches of inputs")
    return found
