"""What happened to a network's tensors one by one: frozen, cast, laid out, shared."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nampruner.checkpoint.record import Dtype, Kept
from nampruner.errors import CheckpointError
from nampruner.surgery import memory_layout, named_tensors

DTYPES: dict[Dtype, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def observe(model: nn.Module) -> tuple[Dtype, Kept]:
    """Return the dtype of most of a model, that of its first parameter, and what else to keep.

    Raises:
        CheckpointError: a tensor has a dtype that a checkpoint cannot hold.
    """
    floats = {name: t for name, t in named_tensors(model) if t.is_floating_point()}
    for name, tensor in floats.items():
        if tensor.dtype not in _NAMES:
            known = ", ".join(DTYPES)
            raise CheckpointError(
                f"{name} is {tensor.dtype}; bring it to one of {known} to save it"
            )
    first = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return _NAMES[first], Kept(
        frozen=tuple(name for name, p in model.named_parameters() if not p.requires_grad),
        dtypes={name: _NAMES[t.dtype] for name, t in floats.items() if t.dtype != first},
        channels_last=tuple(name for name, t in named_tensors(model) if _is_last(t)),
        tied=dict(_ties(model)),
    )


def _is_last(tensor: Tensor) -> bool:
    return memory_layout(tensor) != torch.contiguous_format


def _ties(model: nn.Module) -> Iterator[tuple[str, str]]:
    first: dict[int, str] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        other = first.setdefault(id(tensor), name)
        if other != name:
            yield name, other


def prepare(model: nn.Module, dtype: Dtype, kept: Kept | None) -> None:
    """Cast a fresh model, and share tensors, before it is cut.

    Raises:
        LookupError, ValueError: a name does not exist, or two tensors cannot be one.
    """
    model.to(DTYPES[dtype])
    for name, first in kept.tied.items() if kept else ():
        _tie(model, name, first)


def cast(model: nn.Module, kept: Kept | None) -> None:
    """Cast single tensors, once all that the cut brings are there.

    Raises:
        LookupError, ValueError: a name does not exist, or is of no floating-point tensor.
    """
    tensors = dict(named_tensors(model))
    for name, other in kept.dtypes.items() if kept else ():
        if not tensors[name].is_floating_point():
            raise ValueError(f"{name} is no floating-point tensor")
        tensors[name].data = tensors[name].data.to(DTYPES[other])


def _tie(model: nn.Module, name: str, first: str) -> None:
    module, key = _holder(model, name)
    other, other_key = _holder(model, first)
    old, new = getattr(module, key), getattr(other, other_key)
    if old is new:
        return
    if not isinstance(new, Tensor) or type(old) is not type(new) or old.shape != new.shape:
        raise ValueError(f"{name} and {first} cannot be one tensor")
    setattr(module, key, new)


def _holder(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


def finish(model: nn.Module, kept: Kept | None) -> None:
    """Freeze and lay out the tensors of a model that has its weights.

    Raises:
        LookupError: a name does not exist.
    """
    if kept is None:
        return
    tensors = dict(named_tensors(model))
    for name in (*kept.frozen, *kept.channels_last):
        tensors[name]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in kept.frozen)
    for name in kept.channels_last:
        ranks = {4: torch.channels_last, 5: torch.channels_last_3d}
        layout = ranks[tensors[name].dim()]
        tensors[name].data = tensors[name].data.contiguous(memory_format=layout)
