"""Whose folder is it, where do results go, which checkpoint was meant.

A run's folder is named after the hash of its recipe, so the same command finds its own work again.
Nothing here is ever overwritten: a folder holds what was asked for, or it is an error.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from nampruner import checkpoint
from nampruner.config import TARGETS
from nampruner.errors import CheckpointError, NamPrunerError
from nampruner.recipe import Recipe, read_recipe

RUNS = Path("runs")
RECIPE = "recipe.yaml"
RESULT = "result.json"
METRICS = "metrics.jsonl"
STATE = ".training"
"""Folder in which a training that is not ours keeps its state until its checkpoint is there."""
STAGES = ("dense", "pruned", "slim")
"""Checkpoints of a run, in the order in which they are made."""


def run_folder(recipe: Recipe) -> Path:
    """Return `runs/<model>-<data>-<8 hex digits of the recipe's hash>`."""
    digest = hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:8]
    return RUNS / f"{_plain(recipe.model)}-{_plain(recipe.data)}-{digest}"


def _plain(text: str) -> str:
    """Return the last, telling part of a spec, as it may stand in a file name."""
    last = text.rstrip("/").rpartition("/")[2].partition("?")[0]
    return re.sub(r"[^\w.]+", "_", last)


def check_run_folder(folder: Path, recipe: Recipe) -> None:
    """See that `folder` is new, empty, or holds a run of this very recipe.

    Raises:
        NamPrunerError: it is something else; for another recipe the message names the difference.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise NamPrunerError(f"{folder} is a file; give --out another folder")
    if not (folder / RECIPE).is_file():
        if any(folder.iterdir()):
            raise NamPrunerError(
                f"{folder} exists and is no run of nampruner (it has no {RECIPE}); "
                "give --out another folder"
            )
        return
    other = read_recipe(folder / RECIPE)
    if other != recipe:
        raise NamPrunerError(
            f"{folder} holds a run of another recipe ({_difference(other, recipe)}); "
            "give --out another folder, or the same options"
        )


def _difference(there: Recipe, here: Recipe) -> str:
    """Say what differs: `epochs 12 there, 3 asked for`."""
    return _changes(_options(there), _options(here))


def _options(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")


def _changes(there: dict[str, Any], here: dict[str, Any]) -> str:
    changed = [key for key in here if there.get(key) != here[key]]
    rows = [f"{key} {there.get(key)} there, {here[key]} asked for" for key in changed[:4]]
    return "; ".join(rows) + ("; …" if len(changed) > 4 else "")


def claim(folder: Path, recipe: Recipe) -> None:
    """Make `folder` the run's own, and clear away what a killed process left half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*STAGES, "*.onnx", METRICS):
        for draft in folder.glob(f".{name}.*"):
            shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
    write(folder / RECIPE, recipe_text(recipe))


def recipe_text(recipe: Recipe) -> str:
    """Write a recipe down as YAML: running it gives the same again."""
    values = recipe.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def write(path: Path, text: str) -> None:
    """Write a file under a draft name and rename it, so it is never half there."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def is_made(out: Path, recipe: Recipe, parent: Path | None) -> bool:
    """Say whether `out` already holds what this recipe makes of `parent`.

    Raises:
        NamPrunerError: `out` exists and holds anything else.
    """
    if not out.exists():
        return False
    if not checkpoint.is_checkpoint(out):
        raise NamPrunerError(
            f"{out} exists and is no checkpoint of ours; give --out another folder"
        )
    record = checkpoint.read(out)
    wanted = _options(recipe)
    made = {**dict.fromkeys(wanted), **record.recipe}
    if parent_of(out, record.parent) != (parent and parent.resolve()):
        raise NamPrunerError(
            f"{out} holds a checkpoint made from {record.parent}; give --out another folder"
        )
    if made != wanted:
        raise NamPrunerError(
            f"{out} holds a checkpoint made with other options ({_changes(made, wanted)}); "
            "give --out another folder"
        )
    return True


def link(out: Path, parent: Path) -> str:
    """Return `parent` as seen from `out`, so that both may be moved together."""
    return os.path.relpath(parent.resolve(), out.resolve())


def parent_of(folder: Path, linked: str | None) -> Path | None:
    """Follow a `link` of the checkpoint in `folder`."""
    return None if linked is None else (folder / linked).resolve()


def cut_name(source: Path, recipe: Recipe) -> Path:
    """Name the cut of a checkpoint after what was done: `runs/x/dense-ratio0.3`."""
    given = [f"{name}{amount}" for name in TARGETS if (amount := getattr(recipe, name)) is not None]
    return source.with_name("-".join([bare_name(source), *given]).replace("%", "pct"))


def bare_name(source: Path) -> str:
    """Return the name of a checkpoint; of a `.pt` file without its ending."""
    return source.stem if is_pt(source) else source.name


def is_pt(path: Path) -> bool:
    """Say whether `path` is a file of Ultralytics'."""
    return path.suffix == ".pt" and path.is_file()


def newest(runs: Path) -> Path | None:
    """Return the newest checkpoint under `runs` that was never pruned; without one, the newest.

    A run leaves a dense and a slim checkpoint, and what one asks to prune is the dense one.
    """
    found = []
    for record in runs.rglob(checkpoint.RECORD):
        folder = record.parent
        hidden = any(part.startswith(".") for part in folder.relative_to(runs).parts)
        if hidden or not checkpoint.is_checkpoint(folder):
            continue
        plans = checkpoint.read(folder).lineage.plans
        found.append((not plans, record.stat().st_mtime, folder))
    return max(found)[2] if found else None


def require_checkpoint(folder: Path) -> None:
    """See that `folder` is a checkpoint.

    Raises:
        CheckpointError: it is not; for a run's folder the message names the checkpoints in it.
    """
    if not folder.exists():
        raise CheckpointError(f"{folder}: there is no such folder; give a checkpoint")
    if (folder / checkpoint.RECORD).is_file() or not folder.is_dir():
        return
    inside = [str(sub) for sub in sorted(folder.iterdir()) if checkpoint.is_checkpoint(sub)]
    hint = f" Did you mean {', '.join(inside)}?" if inside else ""
    raise CheckpointError(f"{folder} is no checkpoint: it has no {checkpoint.RECORD}.{hint}")


def forget(work: Path) -> None:
    """Remove the state of a training whose checkpoint is there."""
    shutil.rmtree(work / STATE, ignore_errors=True)


@contextmanager
def workshop(out: Path) -> Iterator[Path]:
    """A folder beside `out` in which a training keeps its state; its metrics end up in `out`.

    It stays when the training is broken off, and is found again by the same command.
    """
    beside = out.with_name(f".{out.name}.unfinished")
    yield beside
    if (beside / METRICS).is_file():
        os.replace(beside / METRICS, out / METRICS)
    shutil.rmtree(beside, ignore_errors=True)
