"""Weights from a file of anybody's: read without running code, fitted by name."""

import argparse
import pickle
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nampruner.errors import NamPrunerError

_PICKLED = (".pt", ".pth")
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net")
_AVERAGED = ("state_dict_ema", "model_ema", "ema")
"""Taken only where a file holds nothing else."""
_PREFIXES = ("module.", "_orig_mod.", "model.")
"""Of DataParallel, torch.compile and Lightning."""
_SHOWN = 3


@dataclass(frozen=True)
class Misfit:
    """What keeps named tensors from being a network's; false where they fit."""

    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    shaped: tuple[str, ...]
    """With both shapes."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.unknown or self.shaped)

    def __str__(self) -> str:
        parts = {
            "missing": self.missing,
            "unknown": self.unknown,
            "of another shape": self.shaped,
        }
        return "; ".join(f"{what}: {named(names)}" for what, names in parts.items() if names)


def named(names: Sequence[str]) -> str:
    """Write the first few of many names down, and how many there are."""
    more = f", … ({len(names)} in all)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def misfit(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> Misfit:
    """Compare names and shapes with those of `model`; of a shared tensor one name is enough."""
    state = tensors_of(model)
    stored = {identity(state[name]) for name in shapes if name in state}
    absent = [name for name in state if name not in shapes and identity(state[name]) not in stored]
    other = [
        f"{name} {list(shape)} instead of {list(state[name].shape)}"
        for name, shape in shapes.items()
        if name in state and tuple(shape) != tuple(state[name].shape)
    ]
    unknown = [name for name in shapes if name not in state]
    return Misfit(tuple(absent), tuple(unknown), tuple(other))


def unsound(model: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """Say why tensors that fit by name and shape cannot be the weights; empty where they can."""
    state = tensors_of(model)
    broken = [name for name, tensor in tensors.items() if bool(torch.isnan(tensor).any())]
    if broken:
        return f"not a number (NaN): {named(broken)}"
    first: dict[Any, str] = {}
    for name, tensor in tensors.items():
        other = first.setdefault(identity(state[name]), name)
        if other != name and not torch.equal(tensors[other], tensor):
            return f"{other} and {name} are one tensor in the network, and two different ones here"
    return ""


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of `model` as far as it is tensors."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def identity(tensor: Tensor) -> Any:
    """Return what two names of one tensor have in common."""
    where = tensor.data_ptr() if tensor.numel() else id(tensor)
    return where, tensor.shape, tensor.stride()


def load_weights(model: nn.Module, path: str | Path, *, strict: bool = True) -> tuple[str, ...]:
    """Fill `model`, in place, from a state dict in a .safetensors, .pt or .pth file.

    Values are brought to the dtype and device of the model. Without `strict`, a tensor that is
    missing or of another shape stays as it was built; those names are returned.

    Raises:
        NamPrunerError: the file cannot be read without running code, or does not fit; then the
            model is as before.
    """
    tensors = _renamed(read_weights(path), model)
    state = tensors_of(model)
    wrong = _without_counters(misfit(model, {name: t.shape for name, t in tensors.items()}))
    fitting = {n: t for n, t in tensors.items() if n in state and t.shape == state[n].shape}
    if wrong and (strict or not fitting):
        raise NamPrunerError(
            f"weights {path} do not fit {type(model).__name__}: {wrong}; give the weights of this "
            "very network (its arguments and number of classes too)"
            + (", or leave what does not fit as it was built: --no-weights-strict" * bool(fitting))
        )
    kind = [n for n, t in fitting.items() if t.is_floating_point() != state[n].is_floating_point()]
    reason = f"another kind of number: {named(kind)}" if kind else unsound(model, fitting)
    if reason:
        raise NamPrunerError(f"weights {path}: {reason}; give another file")
    model.load_state_dict(fitting, strict=False)
    held = {identity(state[name]) for name in fitting}
    return tuple(name for name, tensor in state.items() if identity(tensor) not in held)


def _without_counters(wrong: Misfit) -> Misfit:
    """Files from before PyTorch 0.4.1 do not count the batches that a BN layer has seen."""
    missing = (name for name in wrong.missing if not name.endswith("num_batches_tracked"))
    return replace(wrong, missing=tuple(missing))


def _renamed(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Take off what a wrapper put before every name."""
    known = model.state_dict()
    for prefix in (*_PREFIXES, *_PREFIXES):
        if not any(name.startswith(prefix) for name in known):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict, plain or under one of the usual keys (`state_dict`, `model`, `ema` …).

    A .pt file is read with `weights_only=True`: code in it is refused, never run.

    Raises:
        NamPrunerError: the file is missing, damaged, needs code, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise NamPrunerError(
            f"weights {path}: there is no such file; give a .safetensors, .pt or .pth file"
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix not in _PICKLED:
        raise NamPrunerError(
            f"weights {path}: the name must end in .safetensors, .pt or .pth; convert or rename it"
        )
    return _state_dict(_read_pickled(path), path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise NamPrunerError(f"weights {path}: damaged ({error}); get the file again") from None


def _read_pickled(path: Path) -> Any:
    try:
        # timm keeps the options of its training, which are plain values, beside the weights
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _needs_code(path, str(error)) from None
    except Exception as error:  # a damaged pickle fails in any way there is
        if "TorchScript" in str(error):  # some versions of torch say it so
            raise _needs_code(path, "") from None
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise NamPrunerError(f"weights {path}: damaged ({first}); get the file again") from None


def _needs_code(path: Path, said: str) -> NamPrunerError:
    _, found, name = said.partition("GLOBAL ")
    what = name.split()[0] if found and name.split() else "code"
    return NamPrunerError(
        f"weights {path}: holds more than tensors ({what}), and reading it would run code; in the "
        "program that made it, save the tensors alone: torch.save(model.state_dict(), …)"
    )


def _state_dict(found: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(4):
        if not isinstance(found, Mapping):
            break
        entries = {k: v for k, v in found.items() if not str(k).endswith("_extra_state")}
        if entries and all(isinstance(value, Tensor) for value in entries.values()):
            return {str(name): tensor.detach() for name, tensor in entries.items()}
        inside = [k for k in (*_WRAPPERS, *_AVERAGED) if isinstance(found.get(k), Mapping)]
        if not inside:
            break
        if len(inside) > 1:
            warnings.warn(f"{path} holds {', '.join(inside)}: {inside[0]} is used", stacklevel=2)
        found = found[inside[0]]
    keys = named([str(key) for key in found]) if isinstance(found, Mapping) else ""
    raise NamPrunerError(
        f"weights {path}: no state dict in it ({keys or type(found).__name__}); save "
        "model.state_dict(), plain or under the key state_dict"
    )
