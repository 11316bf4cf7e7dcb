"""What sets a slim network apart from its original, as data that `model.py` can hold.

Nothing is taken from the record of the cuts: the two networks are compared, module by module. So
what is found is all there is, whoever changed it.
"""

from collections import defaultdict
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from nampruner import nam
from nampruner.errors import NamPrunerError
from nampruner.export import standalone
from nampruner.export.code import call_of, is_literal
from nampruner.lineage import lineage

Shape = tuple[int, ...]
Site = tuple[int | None, tuple[int, int] | None, float]
"""What `standalone.NAM` takes: channels, (height, width), gain."""

_PLAIN = {
    cls: f"nn.{cls.__name__}"
    for cls in (
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    )
} | {Conv2dSame: "Conv2dSame"}
_ARGUMENTS = {
    *("in_channels", "out_channels", "in_features", "out_features", "kernel_size", "stride"),
    *("padding", "output_padding", "dilation", "groups", "bias", "padding_mode"),
}
_INTERNAL = frozenset(vars(nn.Module()))
_WAY_OUT = "export onnx or pt2, which carry any network"


@dataclass(frozen=True)
class Difference:
    """How to make the slim network of its original, all but the weights; in this order."""

    plain: dict[str, str]
    """Layer that is a plain one now → how to build it."""
    nam: dict[str, Site]
    attributes: dict[str, dict[str, Any]]
    """Module → attribute → value."""
    dtype: torch.dtype | None
    """Of the parameters, where it is another one."""
    tensors: dict[str, tuple[Shape, torch.dtype]]
    """Parameters and buffers whose size does not follow from attributes."""
    shared: dict[str, str]
    """Parameter → the one that it is, in another module."""


def difference(original: nn.Module, slim: nn.Module) -> Difference:
    """Compare; `original` becomes like `slim`, but for the weights.

    Raises:
        NamPrunerError: they differ in more than widths, attributes and NAM.
    """
    plain = _plain(original, slim)
    sites = _attach(original, slim)
    _check_structure(original, slim)
    attributes = _attributes(original, slim)
    for path, values in attributes.items():
        module = original.get_submodule(path)
        for name, value in values.items():
            setattr(module, name, value)
        standalone.resize(module)
    dtype = _dtype(slim) if _dtype(slim) != _dtype(original) else None
    if dtype is not None:
        original.to(dtype)
    return Difference(plain, sites, attributes, dtype, _tensors(original, slim), _shared(slim))


def _plain(original: nn.Module, slim: nn.Module) -> dict[str, str]:
    """Replace the layers whose computed weight was baked, see `nampruner.baking`."""
    found = {}
    for path, layer in list(slim.named_modules()):
        name = _PLAIN.get(type(layer))
        if name and type(original.get_submodule(path)) is not type(layer):
            needed, optional = _arguments(layer)
            original.set_submodule(path, type(layer)(*needed, **optional))
            found[path] = call_of(name, *needed, **optional)
    return found


def _arguments(layer: nn.Module) -> tuple[list[Any], dict[str, Any]]:
    """Return what a layer is built with: what is always said, and what is not as usual."""
    needed, optional = [], {}
    for name, parameter in signature(type(layer)).parameters.items():
        if name in _ARGUMENTS:
            value = getattr(layer, name)
            value = value is not None if name == "bias" else value
            # (3, 3) is said as 3
            value = value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value
            if parameter.default is parameter.empty:
                needed.append(value)
            elif value != parameter.default:
                optional[name] = value
    return needed, optional


def _attach(original: nn.Module, slim: nn.Module) -> dict[str, Site]:
    """Put NAM into the original where only the slim network has it."""
    sites = {}
    for site in lineage(slim).nam:
        host = original.get_submodule(site.module)
        module = slim.get_submodule(f"{site.module}.nam")
        if isinstance(module, nam.NAM) and not hasattr(host, "nam"):
            sites[site.module] = _site(module)
            standalone.attach(host, standalone.NAM(*sites[site.module]))
    return sites


def _site(module: nam.NAM) -> Site:
    channel, spatial = module.channel, module.spatial
    return (
        channel.bn.num_features if isinstance(channel, nam.ChannelNAM) else None,
        (spatial.height, spatial.width) if isinstance(spatial, nam.SpatialNAM) else None,
        module.gain,
    )


def _check_structure(original: nn.Module, slim: nn.Module) -> None:
    before, after = dict(original.named_modules()), dict(slim.named_modules())
    for path in before.keys() ^ after.keys():
        where = "only in the slim network" if path in after else "missing from the slim network"
        raise NamPrunerError(f"module {path!r} is {where}, so no model.py is written; {_WAY_OUT}")
    for path, module in after.items():
        kind, was = type(module).__name__, type(before[path]).__name__
        if kind != was:
            raise NamPrunerError(f"module {path!r} is a {kind}, but was a {was}; {_WAY_OUT}")
        if _hooks(module) != _hooks(before[path]):
            raise NamPrunerError(
                f"module {path!r} has a forward hook that its original has not; remove it, or "
                f"{_WAY_OUT}"
            )


def _hooks(module: nn.Module) -> tuple[int, int]:
    return len(module._forward_hooks), len(module._forward_pre_hooks)


def _attributes(original: nn.Module, slim: nn.Module) -> dict[str, dict[str, Any]]:
    """Plain data that is not what it was; a mode (training or not) is none of it."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    before = dict(original.named_modules())
    for path, module in slim.named_modules():
        old = vars(before[path])
        for name in vars(module).keys() & old.keys() - _INTERNAL:
            value = getattr(module, name)
            if is_literal(value) and is_literal(old[name]) and repr(value) != repr(old[name]):
                found[path][name] = value
    return {path: dict(sorted(values.items())) for path, values in found.items()}


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _tensors(original: nn.Module, slim: nn.Module) -> dict[str, tuple[Shape, torch.dtype]]:
    """What still differs. A buffer that no state dict holds differs by its values as well."""
    found = {}
    kept = slim.state_dict()
    before = dict(original.named_modules())
    for path, module in slim.named_modules():
        for key, now in {**module._parameters, **module._buffers}.items():
            old = {**before[path]._parameters, **before[path]._buffers}.get(key)
            name = f"{path}.{key}" if path else key
            if now is None:
                if old is not None:
                    raise NamPrunerError(f"{name} is gone from the slim network; {_WAY_OUT}")
            elif (
                old is None
                or _kind(now) != _kind(old)
                or (name not in kept and not torch.equal(now, old))
            ):
                found[name] = _kind(now)
    return found


def _kind(tensor: Tensor) -> tuple[Shape, torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


def _shared(model: nn.Module) -> dict[str, str]:
    """Parameters that several modules hold; the first holder gives the name."""
    first: dict[Tensor, str] = {}
    found = {}
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{path}.{key}" if path else key
                if first.setdefault(parameter, name) != name:
                    found[name] = first[parameter]
    return found
