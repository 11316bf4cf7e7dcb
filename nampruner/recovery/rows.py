"""What a consumer sees at sampled positions: the rows of its least squares."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PLAIN = {kind.forward for kind in (*_CONV, *_TRANSPOSED, nn.Linear)}


def is_consumer(module: nn.Module) -> bool:
    """Whether the module is a convolution or linear layer that uses its weight as it stands."""
    return type(module).forward in _PLAIN and module._parameters.get("weight") is not None


def sides(module: nn.Module) -> tuple[int, int]:
    """Dimensions of the weight: outputs, inputs."""
    return (1, 0) if isinstance(module, _TRANSPOSED) else (0, 1)


def is_linear(module: nn.Module) -> bool:
    """Whether channels lie in the last dimension, not in the second."""
    return isinstance(module, nn.Linear)


def has_taps(module: nn.Module) -> bool:
    """Whether outputs are sums over patches that can be gathered: all but transposed ones."""
    return not isinstance(module, _TRANSPOSED)


def grid(module: nn.Module, tensor: Tensor) -> torch.Size:
    """The positions of an input or output: [N, …] without its channels."""
    if is_linear(module):
        return tensor.shape[:-1]
    return torch.Size([tensor.shape[0], *tensor.shape[2:]])


@dataclass(frozen=True)
class Sites:
    """Sampled positions: image number and coordinates, each [n]."""

    at: tuple[Tensor, ...]

    @staticmethod
    def sample(shape: torch.Size, count: int, seed: int) -> "Sites":
        """Draw `count` positions of a grid; all of them, in random order, where there are fewer."""
        total = math.prod(shape)
        generator = torch.Generator().manual_seed(seed)
        if count >= total:
            flat = torch.randperm(total, generator=generator)
        else:
            flat = torch.randint(0, total, (count,), generator=generator)
        return Sites(torch.unravel_index(flat, shape))

    def of(self, module: nn.Module, tensor: Tensor) -> Tensor:
        """Channels at the sites [n, C]."""
        return (tensor if is_linear(module) else tensor.movedim(1, -1))[self.at]

    def under(self, tensor: Tensor, before: Sequence[int]) -> Tensor:
        """Channels [n, C] where the sites count from `before` zeros ahead of each dimension."""
        image, *where = (at.to(tensor.device) for at in self.at)
        inside = torch.ones_like(image, dtype=torch.bool)
        places = []
        for at, ahead, size in zip(where, before, tensor.shape[2:], strict=True):
            inside &= (at >= ahead) & (at < ahead + size)
            places.append((at - ahead).clamp(0, size - 1))
        rows = tensor.movedim(1, -1)[(image, *places)]
        return rows.masked_fill(~inside[:, None], 0.0)


def patches(module: nn.Module, x: Tensor, sites: Sites) -> Tensor:
    """The inputs that the outputs at the sites are made of [n, C, taps]."""
    if is_linear(module):
        return x[sites.at].unsqueeze(-1)
    padded = _padded(module, x).movedim(1, -1)
    image, *where = sites.at
    stride, step, kernel = (_numbers(module, n) for n in ("stride", "dilation", "kernel_size"))
    columns = []
    for tap in product(*map(range, kernel)):
        at = [w * stride[d] + tap[d] * step[d] for d, w in enumerate(where)]
        columns.append(padded[(image, *at)])
    return torch.stack(columns, -1)


def others(width: int, gone: list[int]) -> list[int]:
    """The indices that stay."""
    missing = set(gone)
    return [i for i in range(width) if i not in missing]


def _numbers(module: nn.Module, name: str) -> tuple[int, ...]:
    values: tuple[int, ...] = getattr(module, name)
    return values


def _padded(module: nn.Module, x: Tensor) -> Tensor:
    amounts: list[int] = list(module._reversed_padding_repeated_twice)  # type: ignore[arg-type]
    mode = str(module.padding_mode)
    mode = "constant" if mode == "zeros" else mode
    return F.pad(x, amounts, mode=mode) if any(amounts) else x


def zeros_around(module: nn.Module) -> list[tuple[int, int]]:
    """Zeros that are padded to each dimension of a map: ahead, behind."""
    kernel = getattr(module, "kernel_size", ())
    if not kernel or not has_taps(module) or module.padding_mode != "zeros":
        return [(0, 0)] * len(kernel)
    amounts: list[int] = list(module._reversed_padding_repeated_twice)  # type: ignore[arg-type]
    return list(zip(amounts[-2::-2], amounts[-1::-2], strict=True))


def border(module: nn.Module, x: Tensor, out: Tensor) -> float:
    """Share of the output positions whose window touches zero padding.

    That of a transposed convolution does where one of its taps has no input to read.
    """
    inside = 1.0
    for d, around in enumerate(zeros_around(module)):
        stride, step, kernel = (
            _numbers(module, n)[d] for n in ("stride", "dilation", "kernel_size")
        )
        at, taps = torch.arange(out.shape[2 + d])[:, None], torch.arange(kernel) * step
        if has_taps(module):
            read = at * stride + taps - around[0]
            missed = (read < 0) | (read >= x.shape[2 + d])
            missed &= any(around)  # what other paddings add is no zeros
        else:
            reach = at + _numbers(module, "padding")[d] - taps
            read = reach.div(stride, rounding_mode="floor")
            missed = (reach % stride == 0) & ((read < 0) | (read >= x.shape[2 + d]))
        inside *= 1 - missed.any(1).double().mean().item()
    return 1 - inside


def features_per_channel(width: int, removed: list[int], hint: int = 0) -> int:
    """How many neighbouring inputs of a linear layer make one channel, after a flatten.

    Removed inputs come in whole channels, so the length of a channel divides where their runs
    begin and end, and the layer's width; `hint` is believed where it divides them too.
    """
    size = width
    for previous, index in zip([-2, *removed], removed, strict=False):
        if index != previous + 1:
            size = math.gcd(size, index)
            size = math.gcd(size, previous + 1) if previous >= 0 else size
    size = math.gcd(size, removed[-1] + 1) if removed else width
    if hint and size % hint == 0:
        return hint
    return size if removed else 1
