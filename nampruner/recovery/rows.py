"""What a consumer sees at sampled positions: the rows of its least squares."""

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Consumer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
_PLAIN = {kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)}


def is_consumer(module: nn.Module) -> bool:
    """Whether the module is a convolution or linear layer that uses its weight as it stands."""
    weight = module._parameters.get("weight")
    return type(module).forward in _PLAIN and weight is not None


def taps(module: nn.Module) -> int:
    """Kernel elements of a convolution; 1 for a linear layer."""
    return math.prod(module.kernel_size) if isinstance(module, _CONV) else 1


_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Sites:
    """Sampled output positions: image number and coordinates, each [n]."""

    at: tuple[Tensor, ...]

    @staticmethod
    def sample(shape: torch.Size, count: int, seed: int) -> "Sites":
        """Draw `count` positions of an output [N, C, …] or [N, …, C] given as its grid."""
        total = math.prod(shape)
        generator = torch.Generator().manual_seed(seed)
        if count >= total:
            flat = torch.arange(total)[torch.randperm(total, generator=generator)]
        else:
            flat = torch.randint(0, total, (count,), generator=generator)
        return Sites(torch.unravel_index(flat, shape))


def grid(module: nn.Module, out: Tensor) -> torch.Size:
    """The output's positions: [N, *spatial], or all but the last dimension of a linear layer's."""
    if isinstance(module, _CONV):
        return torch.Size([out.shape[0], *out.shape[2:]])
    return out.shape[:-1]


def outputs(module: nn.Module, out: Tensor, sites: Sites) -> Tensor:
    """The consumer's outputs at the sites [n, O]."""
    return (out.movedim(1, -1) if isinstance(module, _CONV) else out)[sites.at]


def patches(module: nn.Module, x: Tensor, sites: Sites) -> Tensor:
    """The consumer's inputs at the sites [n, C, taps]."""
    if not isinstance(module, _CONV):
        return x[sites.at].unsqueeze(-1)
    padded = _padded(module, x).movedim(1, -1)
    image, *where = sites.at
    columns = []
    for tap in product(*map(range, module.kernel_size)):
        at = [
            position * stride + offset * dilation
            for position, stride, offset, dilation in zip(
                where, module.stride, tap, module.dilation, strict=True
            )
        ]
        columns.append(padded[(image, *at)])
    return torch.stack(columns, -1)


def _padded(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    amounts = list(module._reversed_padding_repeated_twice)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, amounts, mode=mode) if any(amounts) else x
