"""A checkpoint is a folder: `model.safetensors` and `nampruner.json`. No pickle, no tracing.

Loading builds the original architecture from its source, puts NAM where it was, gives every tensor
the recorded shape and every attribute the recorded value, and loads strictly. A folder may come
from anybody: it is checked before anything is built, built under a limit, and refused with one
message.

record.py   the JSON                   guard.py   what a record may not ask for
kept.py     frozen, cast, shared, laid out: what a fresh network does not have
"""

import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_model
from torch import nn

from nampruner import models
from nampruner.baking import bake_again
from nampruner.checkpoint import kept
from nampruner.checkpoint.guard import Frugal, check_layers, check_origin, narrow
from nampruner.checkpoint.record import (
    RECORD,
    WEIGHTS,
    CheckpointRecord,
    InputSpec,
    Kept,
    parse_record,
    read,
)
from nampruner.errors import CheckpointError, NamPrunerError
from nampruner.lineage import Lineage, lineage, remember
from nampruner.models.weights import misfit, named, tensors_of, unsound
from nampruner.nam import attach_sites
from nampruner.surgery import add_bias, apply_cuts

__all__ = [
    "RECORD",
    "WEIGHTS",
    "CheckpointRecord",
    "InputSpec",
    "Kept",
    "appearing",
    "is_checkpoint",
    "load",
    "parse_record",
    "read",
    "save",
]

_PACKAGES = ("nampruner", "torch", "torchvision", "timm", "torch-pruning", "safetensors")
_SPARE_BYTES = 2**30
_LARGEST_SHRINKING = 64
"""A network before its cuts may take so many times the bytes of its weights, and the spare ones."""


def save(model: nn.Module, folder: str | Path, **record: Any) -> Path:
    """Write `model` to `folder`, which appears only when it is complete.

    Beside weights, saved buffers and the cuts, it keeps which parameters are frozen or shared,
    dtypes, and channels-last layouts; not hooks, nor gradients. `record` are further fields of
    `CheckpointRecord`: input, data, classes, recipe, metrics …

    Raises:
        CheckpointError: `folder` exists and is not a checkpoint; or the model holds NaN, or what
            safetensors cannot hold.
    """
    target = Path(folder)
    empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not empty and not (target / RECORD).is_file():
        raise CheckpointError(f"{target} exists and is no checkpoint; give another folder")
    reason = unsound(model, tensors_of(model))
    if reason:
        raise CheckpointError(f"{type(model).__name__} cannot be saved: {reason}")
    dtype, facts = kept.observe(model)
    entry = CheckpointRecord(
        lineage=lineage(model), dtype=dtype, kept=facts, versions=_versions(), **record
    )
    with appearing(target) as draft:
        try:
            save_model(model, str(draft / WEIGHTS))
        except (RuntimeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{type(model).__name__} cannot be saved: {error}") from error
        (draft / RECORD).write_text(entry.model_dump_json(indent=1), encoding="utf-8")
    return target


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A folder that is filled under a temporary name and renamed when nothing failed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield draft
        draft.chmod(0o755)
        if target.exists():
            stale = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, stale / "old")
            os.replace(draft, target)
            shutil.rmtree(stale)
        else:
            os.replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load(
    folder: str | Path, *, model: nn.Module | None = None, trust_source: bool = False
) -> nn.Module:
    """Build the recorded model in eval mode, on the CPU, with bit-equal weights.

    A model that was made by code of the user's, `file.py:function` or `package.module:Class`, is
    only built where `trust_source` is given: running a file, importing a package and calling what a
    record names all execute code, wherever it is installed. One that the caller made has no source:
    pass a fresh `model` of the same architecture, which is changed in place.

    Raises:
        CheckpointError: the folder is damaged, asks for what no checkpoint needs, is not trusted,
            or does not fit the architecture.
    """
    record, path = read(folder), Path(folder) / WEIGHTS
    _shapes(path)
    try:
        check_origin(record.lineage)
        with Frugal(_SPARE_BYTES + _LARGEST_SHRINKING * path.stat().st_size):
            built = model if model is not None else _build(record.lineage, folder, trust_source)
            fresh = {site.module for site in lineage(built).nam}
            attach_sites(built, [s for s in record.lineage.nam if s.module not in fresh])
        kept.prepare(built, record.dtype, record.kept)
        _cut_again(built, record.lineage)
        kept.cast(built, record.kept)
        _fill(built, path)
        kept.finish(built, record.kept)
    except CheckpointError:
        raise
    except NamPrunerError as error:
        raise CheckpointError(f"{folder}: {_first_line(error)}") from None
    except (RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: {RECORD} and {WEIGHTS} do not fit each other or the model "
            f"({_first_line(error)})"
        ) from None
    remember(built, **dict(record.lineage))
    return built.eval()


def _build(origin: Lineage, folder: str | Path, trust_source: bool) -> nn.Module:
    if origin.source is None:
        raise CheckpointError(
            f"{folder} holds a model that its own program built; pass load(…, model=) a fresh one"
        )
    arguments: dict[str, Any] = dict(origin.arguments)
    try:
        return models.build(origin.source, **arguments, trust_source=trust_source)
    except NamPrunerError:
        raise
    except Exception as error:  # a library fails in any way when its arguments are nonsense
        raise CheckpointError(
            f"{folder}: {origin.source} cannot be built again "
            f"({type(error).__name__}: {_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    """Leave out the stack of C++ calls that torch appends, and most of what has no end."""
    return (str(error) or type(error).__name__).splitlines()[0][:400]


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return name → shape of the stored tensors, without reading them."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is no checkpoint: it has no {WEIGHTS}")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); write the checkpoint again") from None


def _cut_again(model: nn.Module, origin: Lineage) -> None:
    """Apply every recorded plan, and give attributes their recorded values."""
    for count, plan in enumerate(origin.plans, start=1):
        check_layers(model, plan.baked)
        bake_again(model, plan.baked)
        apply_cuts(model, plan.removed)
        for bias in origin.biases:
            if bias.after == count:
                check_layers(model, [bias.module])
                add_bias(model.get_submodule(bias.module))
    check_layers(model, origin.baked)
    bake_again(model, origin.baked)
    modules = dict(model.named_modules())
    for path, values in origin.attributes.items():
        for name, value in values.items():
            narrow(modules[path], name, value)


def _fill(model: nn.Module, path: Path) -> None:
    """Strict load that knows shared tensors are stored once; only what fits is read at all."""
    wrong = misfit(model, _shapes(path))
    if wrong:
        raise ValueError(str(wrong))
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = tensors_of(model)
    other = [name for name, tensor in tensors.items() if tensor.dtype != state[name].dtype]
    reason = f"of another dtype: {named(other)}" if other else unsound(model, tensors)
    if reason:
        raise ValueError(reason)
    tensors = OrderedDict(tensors)
    # modules tell by their versions what an older file would need
    tensors._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(tensors, strict=False)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` looks like a checkpoint of ours."""
    return (folder / RECORD).is_file() and (folder / WEIGHTS).is_file()
