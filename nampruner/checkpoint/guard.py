"""What a record from elsewhere may not ask for: files, downloads, any memory, any attribute."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nampruner.lineage import Lineage, Literals
from nampruner.models import OF_WEIGHTS, parse_spec
from nampruner.surgery import literal, set_literal

_ARGUMENTS = {"num_classes", "in_channels", "image_size"}
_LAYERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


class Frugal(TorchDispatchMode):
    """Refuse to make tensors of more than `limit` bytes in all, before they are made."""

    def __init__(self, limit: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = limit

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        size = args[0] if args else kwargs.get("size")
        if isinstance(size, list | tuple) and size and all(type(n) is int for n in size):
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            self._spend(math.prod(size) * dtype.itemsize)
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and not func.is_view and not _has_tensor(args):
            self._spend(out.nbytes)
        return out

    def _spend(self, size_bytes: int) -> None:
        self.left -= size_bytes
        if self.left < 0:
            raise ValueError("the recorded network is far larger than its weights")


def _has_tensor(args: tuple[Any, ...]) -> bool:
    return any(isinstance(value, Tensor) for value in args)


def check_origin(origin: Lineage) -> None:
    """See that a lineage only names what building an architecture needs.

    Raises:
        ValueError: it names weights to fetch or files to read, or sizes that are none.
    """
    source = parse_spec(origin.source or "")
    fetched = sorted(OF_WEIGHTS & set(source.arguments))
    if fetched:
        raise ValueError(f"{', '.join(fetched)} in {source.text!r} would fetch or read weights")
    if source.family == "yolo" and source.name.endswith(".pt"):
        raise ValueError(f"{source.text!r} would read weights; a network is built from its YAML")
    other = sorted(set(origin.arguments) - _ARGUMENTS)
    if other:
        raise ValueError(f"the argument {other[0]!r} is none that a network is built with")
    for name, value in origin.arguments.items():
        if type(value) is not int or not 0 <= value < 2**31:
            raise ValueError(f"{name} is {value!r}, which is no size")
    if len({site.module for site in origin.nam}) < len(origin.nam):
        raise ValueError("NAM is recorded twice after one module")
    for site in origin.nam:
        if not math.isfinite(site.gain):
            raise ValueError(f"NAM after {site.module} has the gain {site.gain}")


def narrow(module: nn.Module, attribute: str, value: Literals) -> None:
    """Set a width, as surgery did: an integer attribute that is there, to no larger a number.

    Raises:
        ValueError: it is no such attribute.
    """
    old = literal(vars(module).get(attribute))
    if old is None:
        raise ValueError(f"{attribute} is no width")
    before, after = (v if isinstance(v, tuple) else (v,) for v in (old, value))
    shrinks = all(
        0 <= new * _sign(old) <= abs(old) for old, new in zip(before, after, strict=False)
    )
    if len(before) != len(after) or type(old) is not type(value) or not shrinks:
        raise ValueError(f"{attribute} cannot go from {old} to {value}")
    set_literal(module, attribute, value)


def _sign(number: int) -> int:
    return -1 if number < 0 else 1


def check_layers(model: nn.Module, paths: Iterable[str]) -> None:
    """See that these are convolutions or linear layers: all that is baked or given a bias.

    Raises:
        ValueError: one is not.
    """
    for path in paths:
        if not isinstance(model.get_submodule(path), _LAYERS):
            raise ValueError(f"{path!r} is no convolution or linear layer")
