"""Code that a generated `model.py` carries word for word; it needs nothing but torch.

What the exporter does to an original to find out what else differs, `model.py` does with these very
lines when it builds the network.
"""

import torch
from torch import Tensor, nn

from nampruner.nam import attention_weight


def put_empty(module: nn.Module, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Give `module` an empty parameter or buffer, for the weights to fill."""
    new = torch.empty(shape, dtype=dtype)
    if key in module._parameters:
        setattr(module, key, nn.Parameter(new))
    else:
        module.register_buffer(key, new)


def resize(module: nn.Module) -> None:
    """Give a standard layer tensors of the sizes that its attributes say."""
    sizes: dict[str, tuple[int, ...]] = {}
    if isinstance(module, nn.modules.conv._ConvNd):
        rows, columns = module.out_channels, module.in_channels
        if module.transposed:
            rows, columns = columns, rows
        kernel = (rows, columns // module.groups, *module.kernel_size)
        sizes = {"weight": kernel, "bias": (module.out_channels,)}
    elif isinstance(module, nn.Linear):
        sizes = {
            "weight": (module.out_features, module.in_features),
            "bias": (module.out_features,),
        }
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        names = ("weight", "bias", "running_mean", "running_var")
        sizes = dict.fromkeys(names, (module.num_features,))
    elif isinstance(module, nn.GroupNorm):
        sizes = dict.fromkeys(("weight", "bias"), (module.num_channels,))
    for key, size in sizes.items():
        old = {**module._parameters, **module._buffers}.get(key)
        if old is not None and old.shape != size:
            put_empty(module, key, size, old.dtype)


class ChannelNAM(nn.Module):
    """x · sigmoid(w · BN(x)), w = |γ| / (Σ|γ| + removed); `removed` is Σ|γ| of what was cut."""

    removed: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.register_buffer("removed", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        weight = attention_weight(self.bn.weight, self.removed)
        return (x * torch.sigmoid(weight.view(1, -1, 1, 1) * self.bn(x))).to(x.dtype)


class SpatialNAM(nn.Module):
    """x · sigmoid(w · BN_s(x)), w = |λ| / Σ|λ| per pixel, with the running statistics."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width, self.eps = height, width, 1e-5
        self.weight = nn.Parameter(torch.ones(height * width))
        self.bias = nn.Parameter(torch.zeros(height * width))
        self.register_buffer("running_mean", torch.zeros(height * width))
        self.register_buffer("running_var", torch.ones(height * width))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        slope = self.weight * torch.rsqrt(self.running_var + self.eps)
        shift = self.bias - self.running_mean * slope
        weight = attention_weight(self.weight)
        shape = (1, 1, self.height, self.width)
        gate = torch.sigmoid(x * (weight * slope).view(shape) + (weight * shift).view(shape))
        return (x * gate).to(x.dtype)


class NAM(nn.Module):
    """Normalization-based attention (arXiv 2111.12419) in eval mode: gain · M_s(M_c(x))."""

    def __init__(self, channels: int | None, size: tuple[int, int] | None, gain: float) -> None:
        super().__init__()
        self.channel = ChannelNAM(channels) if channels else nn.Identity()
        self.spatial = SpatialNAM(*size) if size else nn.Identity()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = self.spatial(self.channel(x))
        return gated if self.gain == 1.0 else gated * self.gain


def attach(host: nn.Module, nam: NAM) -> None:
    """Let `nam` follow `host`."""
    host.add_module("nam", nam)
    host.register_forward_hook(lambda host, inputs, output: host.nam(output))
