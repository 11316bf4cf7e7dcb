"""Ultralytics' networks, trained and judged by Ultralytics, under the options of everybody."""

import csv
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from nampruner import models, yolo
from nampruner.checkpoint import CheckpointRecord, InputSpec
from nampruner.config import ExportCommand
from nampruner.errors import NamPrunerError
from nampruner.export import read_metadata
from nampruner.export.judges import Judge
from nampruner.importance import Batches
from nampruner.lineage import lineage
from nampruner.options import flag
from nampruner.pipeline.classifiers import top_one
from nampruner.pipeline.folders import METRICS, STATE, write
from nampruner.pipeline.task import Judged
from nampruner.progress import Progress
from nampruner.recipe import Recipe
from nampruner.training import resolve_device

EXAMPLES = 2


class Yolo:
    """A network of Ultralytics and a data set of its kind; see `Task`."""

    forward = staticmethod(yolo.forward)

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._more = _checked(recipe)
        self.data = yolo.read_data(recipe.data)
        self.name, self.classes = recipe.data, self.data.classes
        self.classifies = self.data.classify

    @property
    def input(self) -> InputSpec:
        return InputSpec(channels=self.data.channels, height=self._size, width=self._size)

    @property
    def _size(self) -> int:
        return self.recipe.image_size or 640

    def build(self) -> nn.Module:
        spec = models.parse_spec(self.recipe.model)
        shape = self.data.kpt_shape
        if shape and not spec.arguments and not spec.name.endswith(".pt"):
            spec = replace(spec, text=f"{spec.text}?kpt_shape={[*shape]}".replace(" ", ""))
        return models.build(
            spec.text,
            num_classes=len(self.data.classes),
            in_channels=self.data.channels,
            image_size=self._size,
        )

    def check(self, model: nn.Module) -> None:
        if (model.task == "classify") != self.data.classify:
            wanted = "a folder with train/ and val/" if model.task == "classify" else "a data YAML"
            raise NamPrunerError(f"the network is for {model.task}; give --data {wanted} for that")
        for what, has, wants in (
            ("classes", yolo.classes_of(model), len(self.data.classes)),
            ("channels", yolo.channels_of(model), self.data.channels),
        ):
            if has != wants:
                raise NamPrunerError(yolo.misfit(has, what, wants))
        stride = int(max(model.stride))  # type: ignore[arg-type]
        if self._size % stride and not self.data.classify:
            raise NamPrunerError(
                f"--image-size {self._size}: the network takes multiples of {stride}"
            )

    def examples(self) -> Tensor:
        return self._images("train", EXAMPLES)

    def calibration(self) -> list[Tensor]:
        return list(self._images("train", self.recipe.calibration).split(self.recipe.batch_size))

    def scoring(self) -> Batches:
        return self.calibration()

    def proof(self, count: int) -> Tensor:
        return self._images("val", count)

    def held_out(self) -> Iterable[Tensor]:
        yield from self._images("val", sys.maxsize).split(self.recipe.batch_size)

    def _images(self, split: Any, count: int) -> Tensor:
        source, classify = self.data.source, self.data.classify
        given = {"classify": classify, "image_size": self._size, "count": count, "split": split}
        return torch.cat(yolo.read_images(source, **given))

    def train(self, model: nn.Module, work: Path, progress: Progress) -> nn.Module:
        recipe = self.recipe
        sparsity = yolo.Sparsity(
            recipe.strength,
            method=recipe.penalty,
            warmup_epochs=recipe.penalty_warmup * recipe.epochs,
            nam=recipe.penalize_nam,
            bn=recipe.penalize_bn,
        )
        given = {**self._arguments(), "epochs": recipe.epochs, "lr0": recipe.lr}
        return _fit(model, self.data.source, _Stage("train", sparsity, given), work, progress)

    def finetune(self, model: nn.Module, work: Path, progress: Progress) -> nn.Module:
        recipe = self.recipe
        if recipe.finetune_epochs == 0:
            return model
        epochs, rate = recipe.finetune_epochs, recipe.finetune_lr
        given = {**self._arguments(), "epochs": epochs, "lr0": rate}
        stage = _Stage("finetune", yolo.Sparsity(0), given)
        return _fit(model, self.data.source, stage, work, progress)

    def _arguments(self) -> dict[str, Any]:
        """Return what training is told in Ultralytics' words."""
        recipe = self.recipe
        return {
            **self._judging(),
            "optimizer": "SGD",
            "momentum": recipe.momentum,
            "weight_decay": recipe.weight_decay,
            "amp": recipe.precision == "fp16",
            "seed": recipe.seed,
            **self._more,
        }

    def _judging(self) -> dict[str, Any]:
        recipe, device = self.recipe, resolve_device(self.recipe.device)
        return {
            "imgsz": self._size,
            "batch": recipe.batch_size,
            "workers": recipe.workers,
            "device": "cpu" if device.type == "cpu" else str(device.index or 0),
        }

    def evaluate(self, model: nn.Module, progress: Progress) -> Judged:
        return self._judged(yolo.validate(model, self.data.source, **self._judging()))

    def evaluate_onnx(self, path: Path, progress: Progress) -> Judged:
        task = read_metadata(path).get("task")
        given = {**self._judging(), "device": "cpu", "batch": 1}
        return self._judged(yolo.validate(path, self.data.source, task=task, **given))

    def _judged(self, numbers: Mapping[str, float]) -> Judged:
        found = measures(numbers)
        return Judged(accuracy=found.pop("accuracy", None), metrics=found)

    def judge(self, exported: nn.Module, options: ExportCommand) -> Judge:
        if self.classifies or not isinstance(exported, yolo.Exportable):
            return top_one(options)
        if "agreement" in options.model_fields_set:
            raise NamPrunerError("--agreement is for classifiers; a detector is judged by --drop")
        count = self.recipe.calibration
        return yolo.Precision(exported, self.data.source, options.drop, count, self._judging())

    def metadata(self, model: nn.Module) -> Mapping[str, str]:
        return yolo.describe_export(model, self._size)


@dataclass(frozen=True)
class _Stage:
    """One training, in Ultralytics' words."""

    name: str
    sparsity: yolo.Sparsity
    arguments: dict[str, Any]

    def named(self, model: nn.Module) -> str:
        """Return a name under which the same training is found again."""
        shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
        text = json.dumps([asdict(self.sparsity), self.arguments, shapes], sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _fit(model: nn.Module, data: str, stage: _Stage, work: Path, progress: Progress) -> nn.Module:
    """Train, go on with a training that was broken off, or take what one left that was not."""
    project, name = (work / STATE).resolve(), stage.named(model)
    last = project / name / "weights" / "last.pt"
    done = yolo.finished(project / name)
    if done is None and last.is_file():
        progress.note(f"going on with {last}")
        done = yolo.resume(last, progress=progress, stage=stage.name)
    elif done is None:
        here = {"project": str(project), "name": name, "exist_ok": True}
        given = {**stage.arguments, **here}
        done = yolo.fit(model, data, stage.sparsity, given, progress=progress, stage=stage.name)
    _keep_rows(done.folder / "results.csv", stage.name, work / METRICS)
    return done.model


def measures(numbers: Mapping[str, float]) -> dict[str, float]:
    """Return what is reported of Ultralytics' metrics: mAP50, mAP50-95; accuracy; of masks (M) …"""
    found = {name.removeprefix("metrics/"): value for name, value in numbers.items()}
    kept = {name: found[name] for name in found if name.startswith(("mAP", "accuracy"))}
    kinds = {name.partition("(")[2] for name in kept}
    names = {"accuracy_top1": "accuracy", "accuracy_top5": "top-5 accuracy"}
    return {
        names.get(name, name.partition("(")[0] if len(kinds) == 1 else name): value
        for name, value in kept.items()
    }


def _checked(recipe: Recipe) -> dict[str, Any]:
    """See that the options apply, and read those that are passed on to Ultralytics."""
    if recipe.nam in ("both", "spatial"):
        raise NamPrunerError(
            f"--nam {recipe.nam}: λ would fix the image size, which Ultralytics changes; give "
            "channel or none"
        )
    if recipe.label_smoothing:
        raise NamPrunerError("--label-smoothing: Ultralytics' training has none; leave it out")
    if recipe.precision == "bf16":
        raise NamPrunerError("--precision bf16: Ultralytics trains in fp16 or no mixed precision")
    if recipe.importance == "taylor":
        raise NamPrunerError("--importance taylor needs the loss of a classifier; give another")
    found = {}
    for text in recipe.yolo_args:
        name, equals, value = text.partition("=")
        if name in _OPTIONS:
            raise NamPrunerError(f"--yolo-args {text}: give {flag(_OPTIONS[name])}")
        if not equals:
            raise NamPrunerError(f"--yolo-args {text}: write NAME=VALUE, such as mosaic=0.5")
        found[name] = yaml.safe_load(value)
    yolo.check_arguments(found)
    return found


_OPTIONS = {
    "data": "data",
    "imgsz": "image_size",
    "batch": "batch_size",
    "workers": "workers",
    "momentum": "momentum",
    "weight_decay": "weight_decay",
    "amp": "precision",
    "seed": "seed",
    "epochs": "epochs",
    "lr0": "lr",
    "project": "out",
    "name": "out",
    "exist_ok": "out",
}
"""Argument of Ultralytics' → our option for it."""


def _keep_rows(results: Path, stage: str, metrics: Path) -> None:
    """Add the epochs of a training to `metrics.jsonl`, once."""
    with results.open(encoding="utf-8", newline="") as file:
        read = [
            {key.strip(): float(text) for key, text in row.items()} for row in csv.DictReader(file)
        ]
    rows = [
        {
            "stage": stage,
            "epoch": int(row["epoch"]),
            "loss": sum(value for key, value in row.items() if key.startswith("train/")),
            **measures(row),
            "lr": row["lr/pg0"],
        }
        for row in read
    ]
    before = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    kept = [line for line in before if json.loads(line)["stage"] != stage]
    write(metrics, "".join(f"{line}\n" for line in [*kept, *map(json.dumps, rows)]))


def read_pt(path: Path) -> tuple[nn.Module, CheckpointRecord]:
    """Read a `.pt` of Ultralytics, and what it says of its training as a record of ours.

    Raises:
        NamPrunerError: see `nampruner.yolo.load`; or no known name describes its architecture.
    """
    model: Any = yolo.load(path)
    if lineage(model).source is None:
        raise NamPrunerError(
            f"{path}: no YAML that Ultralytics knows by name describes its architecture, so a "
            "checkpoint could not build it again; prune it in Python, see nampruner.yolo"
        )
    size, data = int(model.args.get("imgsz") or 640), model.args.get("data")
    recipe = {"model": f"yolo:{path}", "image_size": size}
    if data and Path(data).exists():
        recipe["data"] = str(data)
    channels = yolo.channels_of(model)
    record = CheckpointRecord(
        lineage=lineage(model),
        input=InputSpec(channels=channels, height=size, width=size),
        classes=tuple(str(model.names[index]) for index in sorted(model.names)),
        recipe=recipe,
    )
    return model, record
