"""What every stage works with: the options, the images, the models, and whom it tells."""

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nampruner import checkpoint, models
from nampruner.aiming import known_device
from nampruner.baking import bake
from nampruner.checkpoint import CheckpointRecord, InputSpec
from nampruner.config import DataOptions, Options, Recipe, merged
from nampruner.data import Data, load_data
from nampruner.errors import NamPrunerError
from nampruner.graph import DependencyGraph, trace
from nampruner.importance import Batches, Scores, score
from nampruner.models.weights import named
from nampruner.nam import attach_nam
from nampruner.pipeline.folders import require_checkpoint
from nampruner.progress import Progress, Silent
from nampruner.selection import Device, Steps
from nampruner.staircase import Bench, Staircase, layers_of, module_steps, staircase
from nampruner.training import check_match, evaluate, resolve_device
from nampruner.training.surroundings import own_chance, seed_all

EXAMPLES = 4
"""Images on which a network is traced and a cut certified."""


@dataclass(frozen=True)
class Job:
    """One recipe, its images and its audience. `trust` allows to execute a user's `file.py`."""

    recipe: Recipe
    data: Data
    trust: bool = False
    progress: Progress = field(default_factory=Silent)

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        return resolve_device(self.recipe.device)

    def examples(self) -> Tensor:
        """Return the images [EXAMPLES, C, H, W] a network is traced on."""
        return self.data.example_input(EXAMPLES)

    def calibration(self) -> list[Tensor]:
        """Return the inputs recovery may look at, in batches."""
        return list(self.data.calibration(self.recipe.calibration))

    def labelled(self) -> Batches:
        """Return batches (inputs, labels) of about as many training images."""
        batches = -(-self.recipe.calibration // self.recipe.batch_size)
        return list(islice(self.data.plain, batches))

    def graph(self, model: nn.Module) -> DependencyGraph:
        """Bake what has to be, in place, and trace.

        Raises:
            GraphError: see `nampruner.graph.trace`.
        """
        bake(model)
        return trace(model, self.examples())

    def scores(self, model: nn.Module, graph: DependencyGraph) -> Scores:
        """Score the units of `graph` as the recipe says."""
        method = self.recipe.importance
        batches = self.labelled() if method in ("taylor", "reconstruction") else None
        return score(model, graph, method, batches=batches, seed=self.recipe.seed)

    def measured(self, model: nn.Module) -> Device | None:
        """Measure what the recipe needs to know of this device; it is cached."""
        return known_device(model, self.recipe, self.examples(), self.progress)

    def staircase(self, model: nn.Module) -> tuple[Staircase, Steps]:
        """Measure how time follows width for the layers of `model`: the curves, and the steps."""
        layers = layers_of(model, self.examples())
        bench = Bench(threads=self.recipe.threads)
        found = staircase(layers.values(), bench, self.progress)
        return found, module_steps(layers, found)

    def accuracy(self, model: nn.Module, which: str) -> float:
        """Return the share of the test images that the `which` model classifies right; say it."""
        found = evaluate(model, self.data.test, device=self.device)
        self.progress.note(f"test accuracy {which}: {100 * found.accuracy:.2f} %")
        return found.accuracy


@dataclass(frozen=True)
class Loaded:
    """A checkpoint, read."""

    folder: Path
    model: nn.Module
    record: CheckpointRecord


def prepare(recipe: Recipe, *, trust: bool = False, progress: Progress | None = None) -> Job:
    """Find the device and the images.

    Raises:
        NamPrunerError: one of them is not there.
    """
    resolve_device(recipe.device)
    data = load_data(recipe, seed=recipe.seed, trust_source=trust)
    return Job(recipe, data, trust, progress or Silent())


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
    check_match(found.model, job.data)
    return job, found


def load(folder: Path, *, trust: bool = False) -> Loaded:
    """Read a checkpoint.

    Raises:
        CheckpointError: it is damaged or none.
    """
    require_checkpoint(folder)
    model = checkpoint.load(folder, trust_source=trust)
    return Loaded(folder, model, checkpoint.read(folder))


def recipe_of(record: CheckpointRecord, flags: Options, source: str) -> Recipe:
    """Return the recipe that a checkpoint was made with, less what `flags` change.

    Raises:
        NamPrunerError: it names no data set and `flags` neither, or an option does not exist.
    """
    base = dict(record.recipe)
    explicit = flags.model_fields_set
    if isinstance(flags, DataOptions) and "data" not in base and "data" not in explicit:
        raise NamPrunerError(
            f"{source} does not say which images it is for; give --data mnist5k or another data set"
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

    Raises:
        NamPrunerError: see `nampruner.models.build`, `load_weights` and `attach_nam`.
    """
    recipe, data = job.recipe, job.data
    if recipe.model.startswith("yolo:"):
        raise NamPrunerError(
            f"--model {recipe.model} is trained and pruned in Python, on data of Ultralytics' own "
            "kind; see nampruner.yolo: train, images, save"
        )
    with own_chance():
        seed_all(recipe.seed)
        model = models.build(
            recipe.model,
            num_classes=data.num_classes,
            in_channels=data.in_channels,
            image_size=data.image_size,
            trust_source=job.trust,
        )
        if recipe.weights is not None:
            _start_from(recipe.weights, model, job)
        check_match(model, data)
        if recipe.nam != "none":
            attach_nam(model, job.examples(), parts=recipe.nam, at=recipe.nam_at)
    return model


def _start_from(path: Path, model: nn.Module, job: Job) -> None:
    left = models.load_weights(model, path, strict=job.recipe.weights_strict)
    if left:
        job.progress.note(f"not in {path}, so as it was built: {named(left)}")


def keep(job: Job, model: nn.Module, out: Path, **record: Any) -> None:
    """Save a checkpoint together with what the data and the recipe say about it."""
    data = job.data
    spec = InputSpec(
        channels=data.in_channels,
        height=data.image_size,
        width=data.image_size,
        mean=data.mean,
        std=data.std,
    )
    checkpoint.save(
        model,
        out,
        input=spec,
        data=data.name,
        classes=data.class_names,
        recipe=job.recipe.model_dump(mode="json", exclude_none=True),
        **record,
    )
