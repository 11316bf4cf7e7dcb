"""Give a layer whose weight is computed from its parameters that weight for good.

Weight standardization (Qiao et al. 2019, arXiv 1903.10520), weight and spectral normalization and
their kin compute every weight from its neighbours, so that no input could be cut without changing
the rest. Baked, such a layer is a plain convolution or linear layer that computes the same; trained
on, it is no longer renormalized.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from nampruner.errors import NamPrunerError
from nampruner.lineage import lineage, remember
from nampruner.modes import evaluating

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)
_OPS = (
    *(F.conv1d, F.conv2d, F.conv3d, F.linear),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
)


def bake(model: nn.Module) -> tuple[str, ...]:
    """Bake every layer of `model`, in place, that needs it to be cut; return their paths.

    What is baked is remembered in the model's lineage, so that a checkpoint can do it again.
    """
    done = tuple(path for path in _mixing(model) if _baked(model.get_submodule(path)))
    if done:
        remember(model, baked=(*lineage(model).baked, *done))
    return done


def baked(model: nn.Module) -> nn.Module:
    """Return a baked copy; `model` itself where no layer needs it."""
    if not _mixing(model):
        return model
    twin = copy.deepcopy(model)
    bake(twin)
    return twin


def bake_again(model: nn.Module, paths: Iterable[str]) -> None:
    """Bake these layers, in place, as `bake` did; those that are baked already stay.

    Raises:
        NamPrunerError: one of them is not what it was then.
    """
    missing = tuple(path for path in paths if path not in lineage(model).baked)
    for path in missing:
        if not _baked(model.get_submodule(path)):
            raise NamPrunerError(f"{path} was baked into a plain layer; this one cannot be")
    if missing:
        remember(model, baked=(*lineage(model).baked, *missing))


def _mixing(model: nn.Module) -> tuple[str, ...]:
    return tuple(p for p, m in model.named_modules() if isinstance(m, _LAYERS) and _mixes(m))


def _mixes(layer: nn.Module) -> bool:
    """Whether one slice of the parameters changes other slices of the weight."""
    if _computed(layer) is None:
        return False
    twin, generator = copy.deepcopy(layer), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            # a factor of zero would hide what its weight is made of
            parameter.add_(torch.rand(parameter.shape, generator=generator).to(parameter))
        shape = _used(twin).weight.shape
        return any(
            _reaches(twin, parameter, dim)
            for parameter in twin.parameters()
            for dim in (0, 1)
            if parameter.dim() > 1 and parameter.shape[dim] == shape[dim] > 1
        )


def _reaches(layer: nn.Module, parameter: nn.Parameter, dim: int) -> bool:
    def others() -> Tensor:
        weight = _used(layer).weight
        return weight.narrow(dim, 1, weight.shape[dim] - 1).clone()

    before = others()
    parameter.narrow(dim, 0, 1).add_(1)
    return not torch.equal(before, others())


def _computed(layer: nn.Module) -> "_Watch | None":
    """What the layer computes with, unless that is its parameter as it stands."""
    plain = type(layer).forward is _base(layer).forward and not layer._forward_pre_hooks
    if plain and not parametrize.is_parametrized(layer):
        return None
    try:
        used = _used(layer)
    except Exception:  # it takes something else than one tensor, so nothing is known of it
        return None
    return None if used.weight is layer._parameters.get("weight") else used


class _Watch(TorchFunctionMode):
    """Sees what a convolution or product is called with."""

    weight: Tensor
    bias: Tensor | None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OPS:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            self.weight, self.bias = given["weight"], given.get("bias")
        return func(*args, **kwargs)


def _used(layer: nn.Module) -> _Watch:
    seen = _Watch()
    with evaluating(layer), torch.no_grad(), seen:
        layer(_input(layer, 1))
    return seen


def _base(layer: nn.Module) -> type[nn.Module]:
    return next(cls for cls in _LAYERS if isinstance(layer, cls))


def _input(layer: Any, more: int) -> Tensor:
    like = next(layer.parameters())
    generator = torch.Generator().manual_seed(more)
    if isinstance(layer, nn.Linear):
        shape = [2, layer.in_features]
    else:
        reach = zip(layer.kernel_size, layer.dilation, strict=True)
        shape = [2, layer.in_channels, *(d * (k - 1) + 1 + more for k, d in reach)]
    return torch.randn(shape, generator=generator).to(like)


def _baked(layer: nn.Module) -> bool:
    """Bake one layer in place if a plain one computes the same."""
    base = _base(layer)
    inputs = [_input(layer, more).double() for more in (1, 4)]
    for cls in (base, Conv2dSame) if base is nn.Conv2d else (base,):
        trial = copy.deepcopy(layer).double()
        wanted = _outputs(trial, inputs)
        _become(trial, cls)
        got = _outputs(trial, inputs)
        if all(map(_close, wanted, got)):
            _become(layer, cls)
            return True
    return False


def _outputs(layer: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    with evaluating(layer), torch.no_grad():
        return [layer(x) for x in inputs]


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b)


def _become(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Make the layer a `cls` with the weight that it computes; hooks of others stay."""
    used = _used(layer)
    learns = any(p.requires_grad for p in layer.parameters())
    for hook in list(layer._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(layer, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(layer, hook.name)
    layer._modules.pop("parametrizations", None)
    bias = layer._parameters.get("bias")
    if used.bias is not None and used.bias is not bias:
        bias = nn.Parameter(used.bias.detach().clone(), learns)
    layer._parameters.clear()
    layer.__class__ = cls
    layer.weight = nn.Parameter(used.weight.detach().clone(), learns)
    layer.register_parameter("bias", bias)
