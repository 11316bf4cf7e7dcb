"""A checkpoint is a folder: `model.safetensors` and `nampruner.json`. No pickle, no tracing.

Loading builds the original architecture from its source, puts NAM where it was, gives every tensor
the recorded shape and every attribute the recorded value, and loads strictly.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_model
from torch import Tensor, nn

from nampruner import models
from nampruner.errors import CheckpointError
from nampruner.lineage import Lineage, lineage, remember
from nampruner.nam import attach_sites
from nampruner.plan import Certificate, Record
from nampruner.surgery import add_bias, apply_cuts, literal, set_literal

WEIGHTS = "model.safetensors"
RECORD = "nampruner.json"
_LARGEST_RECORD_BYTES = 256 * 2**20
_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_PACKAGES = ("nampruner", "torch", "torchvision", "timm", "torch-pruning", "safetensors")


class InputSpec(Record):
    """What the network expects."""

    channels: int
    height: int
    width: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class CheckpointRecord(Record):
    """`nampruner.json`."""

    format: Literal[1] = 1
    lineage: Lineage
    input: InputSpec | None = None
    data: str | None = None
    classes: tuple[str, ...] | None = None
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Options of the command that wrote it."""
    metrics: dict[str, float] = Field(default_factory=dict)
    certificate: Certificate | None = None
    """Of the last cut."""
    dtype: Literal["float16", "bfloat16", "float32", "float64"] = "float32"
    """Of the parameters."""
    versions: dict[str, str] = Field(default_factory=dict)
    parent: str | None = None
    """Checkpoint this one was made from."""


def save(model: nn.Module, folder: str | Path, **record: Any) -> Path:
    """Write `model` to `folder`, which appears only when it is complete.

    `record` are further fields of `CheckpointRecord`: input, data, classes, recipe, metrics …

    Raises:
        CheckpointError: `folder` exists and is not a checkpoint.
    """
    target = Path(folder)
    empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not empty and not (target / RECORD).is_file():
        raise CheckpointError(f"{target} exists and is no checkpoint; give another folder")
    entry = CheckpointRecord(
        lineage=lineage(model), dtype=_dtype(model), versions=_versions(), **record
    )
    with appearing(target) as draft:
        save_model(model, str(draft / WEIGHTS))
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


def read(folder: str | Path) -> CheckpointRecord:
    """Read `nampruner.json`.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it has no {RECORD}")
    if path.stat().st_size > _LARGEST_RECORD_BYTES:
        raise CheckpointError(f"{path} is too large to be a record of ours")
    try:
        return CheckpointRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError, RecursionError) as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is damaged ({first}); write the checkpoint again") from None


def load(
    folder: str | Path, *, model: nn.Module | None = None, trust_source: bool = False
) -> nn.Module:
    """Build the recorded model in eval mode, on the CPU, with bit-equal weights.

    A model that was made by a `file.py:function` is only built where `trust_source` is given, for
    that executes the file; one that the caller made has no source: pass a fresh `model` of the same
    architecture, which is changed in place.

    Raises:
        CheckpointError: the folder is damaged, or does not fit the architecture.
    """
    record = read(folder)
    weights = _weights(Path(folder))
    built = model if model is not None else _build(record.lineage, folder, trust_source)
    fresh = {site.module for site in lineage(built).nam}
    attach_sites(built, [s for s in record.lineage.nam if s.module not in fresh])
    try:
        built.to(_DTYPES[record.dtype])
        _cut_again(built, record.lineage)
        _fill(built, weights)
    except (RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: {RECORD} and {WEIGHTS} do not fit each other or the model ({error})"
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
    except TypeError as error:
        raise CheckpointError(
            f"{folder}: {origin.source} cannot be built again ({error})"
        ) from None


def _weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it has no {WEIGHTS}")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); write the checkpoint again") from None


def _cut_again(model: nn.Module, origin: Lineage) -> None:
    """Apply every recorded plan, and give attributes their recorded values."""
    for count, plan in enumerate(origin.plans, start=1):
        apply_cuts(model, plan.removed)
        for bias in origin.biases:
            if bias.after == count:
                add_bias(model.get_submodule(bias.module))
    modules = dict(model.named_modules())
    for path, values in origin.attributes.items():
        for name, value in values.items():
            if literal(vars(modules[path]).get(name)) is None:
                raise ValueError(f"{path}.{name} is no width")
            set_literal(modules[path], name, value)


def _fill(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Strict load that knows shared tensors are stored once."""
    state = model.state_dict()
    stored = {state[name].data_ptr() for name in weights if name in state}
    absent = [n for n, t in state.items() if n not in weights and t.data_ptr() not in stored]
    extra = [name for name in weights if name not in state]
    other = [n for n, t in weights.items() if n in state and t.dtype != state[n].dtype]
    shape = [n for n, t in weights.items() if n in state and t.shape != state[n].shape]
    wrong = {
        "missing": absent,
        "unknown": extra,
        "of another dtype": other,
        "of another shape": shape,
    }
    for what, names in wrong.items():
        if names:
            raise ValueError(f"{what}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}")
    model.load_state_dict(weights, strict=False)


def _dtype(model: nn.Module) -> str:
    first = next(model.parameters(), None)
    return "float32" if first is None else str(first.dtype).removeprefix("torch.")


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
