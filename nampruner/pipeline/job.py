"""What every stage works with: the options, the images, the models, and whom it tells."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nampruner import checkpoint, models
from nampruner.aiming import known_device
from nampruner.baking import bake
from nampruner.budget import Device, Steps
from nampruner.checkpoint import CheckpointRecord
from nampruner.config import DataOptions
from nampruner.errors import NamPrunerError
from nampruner.export import exported_run
from nampruner.graph import DependencyGraph, trace
from nampruner.importance import Scores, score
from nampruner.models.weights import named
from nampruner.nam import attach_nam, nam_modules
from nampruner.options import Options
from nampruner.pipeline.folders import is_pt, require_checkpoint
from nampruner.pipeline.task import YOLO, Task, open_task
from nampruner.progress import Progress, Silent
from nampruner.recipe import Recipe, merged
from nampruner.staircase import Bench, Geometry, Staircase, layers_of, module_steps, staircase
from nampruner.training import resolve_device
from nampruner.training.surroundings import own_chance, seed_all


@dataclass(frozen=True)
class Job:
    """One recipe, its task and its audience. `trust` allows to execute a user's `file.py`."""

    recipe: Recipe
    task: Task
    trust: bool = False
    progress: Progress = field(default_factory=Silent)

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        return resolve_device(self.recipe.device)

    def graph(self, model: nn.Module) -> DependencyGraph:
        """Bake what has to be, in place, and trace.

        Raises:
            GraphError: see `nampruner.graph.trace`.
        """
        bake(model)
        return trace(model, self.task.examples(), self.task.forward)

    def scores(self, model: nn.Module, graph: DependencyGraph) -> Scores:
        """Score the units of `graph` as the recipe says."""
        method = self.recipe.importance
        batches = self.task.scoring() if method in ("taylor", "reconstruction") else None
        return score(model, graph, method, batches=batches, seed=self.recipe.seed)

    def measured(self, model: nn.Module) -> Device | None:
        """Measure what the recipe needs to know of this device; it is cached."""
        return known_device(
            model, self.recipe, self.task.examples(), self.task.forward, self.progress
        )

    def layers(self, model: nn.Module) -> dict[str, Geometry]:
        """Return the convolutions of what is exported of `model`."""
        run = exported_run(model, self.task.forward)
        return layers_of(model, self.task.examples(), run)

    def staircase(self, model: nn.Module) -> tuple[Staircase, Steps]:
        """Measure how time follows width for the layers of `model`: the curves, and the steps."""
        layers = self.layers(model)
        bench = Bench(threads=self.recipe.threads)
        found = staircase(layers.values(), bench, self.progress)
        return found, module_steps(layers, found)

    def measures(self, model: nn.Module, which: str) -> dict[str, float]:
        """Return how good the `which` model is on held-out images, by measure; say it."""
        found = self.task.evaluate(model, Silent()).measures
        said = ", ".join(f"{name} {100 * share:.2f} %" for name, share in found.items())
        self.progress.note(f"{said} {which}")
        return found


@dataclass(frozen=True)
class Loaded:
    """A checkpoint, read."""

    folder: Path
    model: nn.Module
    record: CheckpointRecord


def prepare(recipe: Recipe, *, trust: bool = False, progress: Progress | None = None) -> Job:
    """Find the device and the images.

    Raises:
        NamPrunerError: one of them is not there, or see `open_task`.
    """
    resolve_device(recipe.device)
    return Job(recipe, open_task(recipe, trust=trust), trust, progress or Silent())


def resume(
    folder: Path, flags: Options, *, trust: bool = False, progress: Progress | None = None
) -> tuple[Job, Loaded]:
    """Open a checkpoint: its model, and the options it was made with, less what `flags` change.

    Raises:
        NamPrunerError: it is damaged, names no data set, or does not fit the data.
    """
    found = load(folder, trust=trust)
    recipe = recipe_of(found.record, flags, str(folder))
    # who names a file on the command line has decided to run it
    named = "data" in flags.model_fields_set
    job = prepare(recipe, trust=trust or named, progress=progress)
    job.task.check(found.model)
    return job, found


def load(path: Path, *, trust: bool = False) -> Loaded:
    """Read a checkpoint: a folder of ours, or a `.pt` of Ultralytics.

    Raises:
        NamPrunerError: it is damaged or none.
    """
    require_checkpoint(path)
    if is_pt(path):
        from nampruner.pipeline.yolo import read_pt

        return Loaded(path, *read_pt(path))
    record = checkpoint.read(path)
    model: Any = checkpoint.load(path, trust_source=trust)
    if record.classes and (record.lineage.source or "").startswith(YOLO):
        model.names = dict(enumerate(record.classes))
    return Loaded(path, model, record)


def record_of(path: Path) -> CheckpointRecord:
    """Read what a checkpoint says of itself.

    Raises:
        NamPrunerError: it is damaged or none.
    """
    return load(path).record if is_pt(path) else checkpoint.read(path)


def recipe_of(record: CheckpointRecord, flags: Options, source: str) -> Recipe:
    """Return the recipe that a checkpoint was made with, less what `flags` change.

    Raises:
        NamPrunerError: it names no data set and `flags` neither, or an option does not exist.
    """
    base = dict(record.recipe)
    if record.lineage.source is not None:
        base.setdefault("model", record.lineage.source)
    explicit = flags.model_fields_set
    if isinstance(flags, DataOptions) and "data" not in base and "data" not in explicit:
        raise NamPrunerError(
            f"{source} does not say which images it is for; give --data, such as --data mnist5k"
        )
    if record.input and "data" in explicit:
        # another data set is brought to the size that the network was made for
        base["image_size"] = record.input.height
    return merged(base, flags, source)


def trusted(recipe: Recipe, flags: Options) -> bool:
    """Say whether all user's code in `recipe` was named by `flags`, not by a file."""
    specs = {name: getattr(recipe, name) for name in ("model", "data")}
    files = {name for name, spec in specs.items() if models.runs_user_code(spec)}
    return files <= flags.model_fields_set


def build(job: Job) -> nn.Module:
    """Build the recipe's model for its data, NAM attached; the seed decides the weights.

    A network that brings NAM of its own gets more of it only where `nam_at` says.

    Raises:
        NamPrunerError: see `nampruner.models.build`, `load_weights` and `attach_nam`.
    """
    recipe = job.recipe
    with own_chance():
        seed_all(recipe.seed)
        model = job.task.build()
        if recipe.weights is not None:
            _start_from(recipe.weights, model, job)
        job.task.check(model)
        if recipe.nam != "none" and (recipe.nam_at or not nam_modules(model)):
            attach_nam(model, job.task.examples(), parts=recipe.nam, at=recipe.nam_at)
    return model


def _start_from(path: Path, model: nn.Module, job: Job) -> None:
    left = models.load_weights(model, path, strict=job.recipe.weights_strict)
    if left:
        job.progress.note(f"not in {path}, so as it was built: {named(left)}")


def keep(job: Job, model: nn.Module, out: Path, **record: Any) -> None:
    """Save a checkpoint together with what the data and the recipe say about it."""
    checkpoint.save(
        model,
        out,
        input=job.task.input,
        data=job.task.name,
        classes=job.task.classes,
        recipe=job.recipe.model_dump(mode="json", exclude_none=True),
        **record,
    )
