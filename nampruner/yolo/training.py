"""Train a YOLO network as Ultralytics does, and keep what it is: NAM, widths, penalty."""

import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nampruner.errors import NamPrunerError, did_you_mean
from nampruner.penalty import Method
from nampruner.yolo.files import PENALTY, load, packed
from nampruner.yolo.library import (
    DEFAULT_CFG_DICT,
    ClassificationValidator,
    DetectionValidator,
    OBBValidator,
    PoseValidator,
    SegmentationValidator,
    quiet,
)
from nampruner.yolo.network import TASKS, check_whole
from nampruner.yolo.trainers import trainer

_OURS = ("model", "task", "mode", "resume", "pretrained")
_ADAPTIVE = ("auto", "adam", "adamax", "adamw", "nadam", "radam", "rmsprop")
_VALIDATORS: dict[str, Any] = dict(
    zip(
        TASKS,
        (
            DetectionValidator,
            SegmentationValidator,
            PoseValidator,
            OBBValidator,
            ClassificationValidator,
        ),
        strict=True,
    )
)


@dataclass(frozen=True)
class Trained:
    """What a training left."""

    model: nn.Module
    """The best of its epochs by Ultralytics' fitness, as its file has it: rounded to float16."""
    metrics: Mapping[str, float]
    """Of that epoch, under Ultralytics' names: `metrics/mAP50(B)` …"""
    folder: Path
    """Ultralytics' run folder."""


def train(
    model: nn.Module,
    data: str | Path,
    *,
    strength: float | None = None,
    method: Method = "proximal",
    penalty_warmup_epochs: float = 0.0,
    verbose: bool = False,
    **arguments: Any,
) -> Trained:
    """Train a copy of `model` on a data YAML by Ultralytics, under the sparsity penalty.

    `strength` counts beside the loss of one image; without it, it is fitted to the length of the
    run; 0 is plain training: fine-tuning. `arguments` are Ultralytics' own: epochs, imgsz, batch,
    device (several train by DDP), project, name … The optimizer is SGD where a penalty is on.

    Raises:
        NamPrunerError: an argument is unknown, the data have other classes, or the network is fused
            or quantized.

    Warns:
        UserWarning: a penalty beside an optimizer that adapts its rates.
    """
    check_whole(model)
    _check_arguments(arguments)
    penalized = strength is None or strength > 0
    if penalized:
        _advise(arguments.setdefault("optimizer", "SGD"))
    start = packed(model)
    wanted = {"strength": strength, "method": method, "warmup_epochs": penalty_warmup_epochs}
    setattr(start, PENALTY, wanted)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "start.pt"
        torch.save({"model": start.float(), "train_args": {}}, path)
        return _trained(str(start.task), verbose, model=str(path), data=str(data), **arguments)


def resume(last: str | Path, *, verbose: bool = False, **arguments: Any) -> Trained:
    """Go on with a training of `train` that was interrupted, from its `weights/last.pt`.

    Raises:
        NamPrunerError: there is no such checkpoint, or it was trained to its end.
    """
    _check_arguments(arguments)
    task = str(load(last).task)
    try:
        return _trained(task, verbose, model=str(last), resume=str(last), **arguments)
    except AssertionError as error:
        raise NamPrunerError(f"{last}: {str(error).splitlines()[0]}; use train") from error


def validate(model: nn.Module, data: str | Path, **arguments: Any) -> Mapping[str, float]:
    """Return Ultralytics' metrics of `model` on the validation images of a data YAML.

    `arguments` are Ultralytics' own: imgsz, batch, conf, split … `model` is not changed.

    Raises:
        NamPrunerError: an argument is unknown.
    """
    _check_arguments(arguments)
    task = str(model.task)
    with tempfile.TemporaryDirectory() as folder, quiet():
        given = {"plots": False, "workers": 0, **arguments, "data": str(data), "task": task}
        validator = _VALIDATORS[task](save_dir=Path(folder), args={**given, "mode": "val"})
        return _numbers(validator(model=packed(model).float()))


def _trained(task: str, verbose: bool, **arguments: Any) -> Trained:
    given = {"workers": 0, "plots": False, **arguments, "task": task, "mode": "train"}
    with quiet(verbose):
        session = trainer(task)(overrides=given)
        session.train()
        path = session.best if session.best.exists() else session.last
        model = load(path)
    entry = torch.load(path, map_location="cpu", weights_only=False)
    return Trained(model, _numbers(entry.get("train_metrics") or {}), Path(session.save_dir))


def _numbers(metrics: Mapping[str, Any]) -> Mapping[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    known = set(DEFAULT_CFG_DICT) - set(_OURS)
    for name in arguments:
        if name in _OURS:
            raise NamPrunerError(f"{name} = {arguments[name]!r} follows from the network")
        if name not in known:
            raise NamPrunerError(
                f"{name!r} is no training argument of Ultralytics.{did_you_mean(name, known)} "
                "All of them: docs.ultralytics.com/usage/cfg"
            )


def _advise(optimizer: str) -> None:
    if str(optimizer).lower() in _ADAPTIVE:
        warnings.warn(
            f"optimizer={optimizer}: rates that adapt, or are chosen for you (auto ignores lr0), "
            "move all scale factors alike, and the penalty separates them badly; use SGD",
            UserWarning,
            stacklevel=3,
        )
