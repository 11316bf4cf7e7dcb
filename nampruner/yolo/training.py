"""Train a YOLO network as Ultralytics does, and keep what it is: NAM, widths, penalty."""

import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nampruner.errors import NamPrunerError, did_you_mean
from nampruner.penalty import Method
from nampruner.progress import Bar, Progress, Silent
from nampruner.yolo.files import PENALTY, entry_of, load, packed
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
from nampruner.yolo.trainers import Sparsity, trainer

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
    sparsity = Sparsity(strength, method, penalty_warmup_epochs)
    return fit(model, data, sparsity, arguments, verbose=verbose)


def fit(
    model: nn.Module,
    data: str | Path,
    sparsity: Sparsity,
    arguments: dict[str, Any],
    *,
    verbose: bool = False,
    progress: Progress | None = None,
    stage: str = "train",
) -> Trained:
    """Do what `train` does, under a penalty that is a value; `stage` is the name of its bar.

    Raises:
        NamPrunerError: see `train`.
    """
    check_whole(model)
    check_arguments(arguments)
    if sparsity.strength != 0:
        _advise(arguments.setdefault("optimizer", "SGD"))
    start = packed(model)
    setattr(start, PENALTY, asdict(sparsity))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "start.pt"
        torch.save({"model": start.float(), "train_args": {}}, path)
        given = {**arguments, "model": str(path), "data": str(data)}
        return _trained(str(start.task), verbose, progress, stage, given)


def resume(
    last: str | Path,
    *,
    verbose: bool = False,
    progress: Progress | None = None,
    stage: str = "train",
    **arguments: Any,
) -> Trained:
    """Go on with a training of `train` that was interrupted, from its `weights/last.pt`.

    Raises:
        NamPrunerError: there is no such checkpoint, or it was trained to its end.
    """
    check_arguments(arguments)
    task = str(load(last).task)
    try:
        given = {**arguments, "model": str(last), "resume": str(last)}
        return _trained(task, verbose, progress, stage, given)
    except AssertionError as error:
        raise NamPrunerError(f"{last}: {str(error).splitlines()[0]}; use train") from error


def finished(folder: str | Path) -> Trained | None:
    """Return what a training left in its run folder, if it came to its end.

    Raises:
        NamPrunerError: what it left cannot be read.
    """
    last = Path(folder) / "weights" / "last.pt"
    if not last.is_file() or entry_of(last).get("optimizer") is not None:
        return None
    return _left(Path(folder))


def validate(
    model: nn.Module | Path, data: str | Path, *, task: str | None = None, **arguments: Any
) -> Mapping[str, float]:
    """Return Ultralytics' metrics of `model` on the validation images of a data YAML.

    `model` is not changed. It may be a file that Ultralytics runs, such as an ONNX file; then
    `task` says what it is for. `arguments` are Ultralytics' own: imgsz, batch, conf, split …

    Raises:
        NamPrunerError: an argument is unknown.
    """
    check_arguments(arguments)
    task = task or str(model.task if isinstance(model, nn.Module) else "detect")
    judged = packed(model).float() if isinstance(model, nn.Module) else str(model)
    with tempfile.TemporaryDirectory() as folder, quiet(), _threads():
        given = {"plots": False, "workers": 0, **arguments, "data": str(data), "task": task}
        validator = _VALIDATORS[task](save_dir=Path(folder), args={**given, "mode": "val"})
        return _numbers(validator(model=judged))


def _trained(
    task: str, verbose: bool, progress: Progress | None, stage: str, arguments: Mapping[str, Any]
) -> Trained:
    given = {"workers": 0, "plots": False, **arguments, "task": task, "mode": "train"}
    with quiet(verbose), _threads(), _silent_processes(verbose):
        session = trainer(task)(overrides=given)
        with (progress or Silent()).bar(stage, session.args.epochs) as bar:
            watch = _Watch(bar)
            session.add_callback("on_train_start", watch.skip)
            session.add_callback("on_train_epoch_end", watch.tell)
            session.train()
    return _left(Path(session.save_dir))


class _Watch:
    """Moves a bar along with a training; what goes to the processes of DDP has none."""

    def __init__(self, bar: Bar | None = None) -> None:
        self._bar = bar

    def __reduce__(self) -> tuple[type["_Watch"], tuple[()]]:
        return _Watch, ()

    def skip(self, session: Any) -> None:
        if self._bar:
            for _ in range(session.start_epoch):
                self._bar.advance()

    def tell(self, session: Any) -> None:
        if self._bar:
            self._bar.advance(loss=float(session.loss.detach()))


def _left(folder: Path) -> Trained:
    best, last = (folder / "weights" / name for name in ("best.pt", "last.pt"))
    path = best if best.is_file() else last
    return Trained(load(path), _numbers(entry_of(path).get("train_metrics") or {}), folder)


@contextmanager
def _silent_processes(verbose: bool) -> Iterator[None]:
    """Keep what DDP starts from printing, too: standard output is for results."""
    before = os.environ.get("YOLO_VERBOSE")
    if not verbose:
        os.environ["YOLO_VERBOSE"] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("YOLO_VERBOSE", None)
        else:
            os.environ["YOLO_VERBOSE"] = before


@contextmanager
def _threads() -> Iterator[None]:
    """Give torch its number of threads back, which Ultralytics sets for the whole process."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _numbers(metrics: Mapping[str, Any]) -> Mapping[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """See that Ultralytics knows these training arguments, and that none follows from the network.

    Raises:
        NamPrunerError: one is unknown, or ours to say.
    """
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
            stacklevel=4,
        )
