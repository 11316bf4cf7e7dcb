"""Trainers that keep the network they are given: one per task, importable by DDP workers.

Stock trainers build a network from its YAML and copy the weights that fit; of a pruned one almost
none do. The penalty travels as plain values on the network itself, so that it is there in every
process, and again when a training is resumed.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from nampruner.errors import NamPrunerError, did_you_mean
from nampruner.penalty import Method, SparsityPenalty, fitting_strength
from nampruner.yolo.files import PENALTY, misfit
from nampruner.yolo.library import (
    ClassificationTrainer,
    DetectionTrainer,
    OBBTrainer,
    PoseTrainer,
    SegmentationTrainer,
    unwrap_model,
)
from nampruner.yolo.network import channels_of, check_whole, classes_of


@dataclass(frozen=True)
class Sparsity:
    """The penalty of a training: plain values, which travel on the network."""

    strength: float | None
    """Beside the loss of one image; None: fitted to the length of the run; 0: no penalty."""
    method: Method = "proximal"
    warmup_epochs: float = 0.0
    nam: bool = True
    """Whether NAM's factors are pulled."""
    bn: bool = True
    """Whether those of the network's own BN are."""


class _Keeping:
    """Returns the given network instead of building one, and attaches its penalty."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # in a process of DDP the callbacks come along from the one that started it
        if attach_penalty not in self.callbacks["on_train_start"]:  # type: ignore[attr-defined]
            self.add_callback("on_train_start", attach_penalty)  # type: ignore[attr-defined]

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        """Return `weights`, the network itself; see `BaseTrainer.get_model`.

        Raises:
            NamPrunerError: there is none, it does not fit the data, or it is fused.
        """
        return _fitting(weights, self.data)  # type: ignore[attr-defined]


class KeepingDetectionTrainer(_Keeping, DetectionTrainer):  # type: ignore[misc]
    """For boxes."""


class KeepingSegmentationTrainer(_Keeping, SegmentationTrainer):  # type: ignore[misc]
    """For masks."""


class KeepingPoseTrainer(_Keeping, PoseTrainer):  # type: ignore[misc]
    """For keypoints."""


class KeepingOBBTrainer(_Keeping, OBBTrainer):  # type: ignore[misc]
    """For rotated boxes."""


class KeepingClassificationTrainer(_Keeping, ClassificationTrainer):  # type: ignore[misc]
    """For whole images."""


_TRAINERS: dict[str, Any] = {
    "detect": KeepingDetectionTrainer,
    "segment": KeepingSegmentationTrainer,
    "pose": KeepingPoseTrainer,
    "obb": KeepingOBBTrainer,
    "classify": KeepingClassificationTrainer,
}


def trainer(task: str) -> Any:
    """Return the trainer class for `YOLO("pruned.pt").train(trainer=…)`, which keeps the network.

    Raises:
        NamPrunerError: there is no such task.
    """
    if task not in _TRAINERS:
        raise NamPrunerError(
            f"task = {task!r}; give {', '.join(_TRAINERS)}.{did_you_mean(task, _TRAINERS)}"
        )
    return _TRAINERS[task]


def _fitting(model: Any, data: dict[str, Any]) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise NamPrunerError(
            "this trainer keeps the network it is given, and was given none; name a .pt file as "
            "model, and leave pretrained alone"
        )
    check_whole(model)
    for what, has, wants in (
        ("classes", classes_of(model), data["nc"]),
        ("channels", channels_of(model), data.get("channels", 3)),
    ):
        if has != wants:
            raise NamPrunerError(misfit(has, what, wants))
    return model


def attach_penalty(trainer: Any) -> None:
    """Attach the penalty that the network asks for to the optimizer of this training."""
    model = unwrap_model(trainer.model)
    wanted = Sparsity(**getattr(model, PENALTY, {"strength": 0}))
    if wanted.strength == 0:
        return
    steps = max(1, len(trainer.train_loader) // trainer.accumulate)
    penalty = SparsityPenalty(
        model,
        strength_of(trainer, wanted.strength, steps * trainer.epochs),
        method=wanted.method,
        nam=wanted.nam,
        bn=wanted.bn,
        warmup_steps=round(wanted.warmup_epochs * steps),
    )
    penalty.steps = trainer.start_epoch * steps
    penalty.attach(trainer.optimizer)


def strength_of(trainer: Any, strength: float | None, steps: int) -> float:
    """Return the penalty's coefficient beside a loss that is summed, as in Ultralytics.

    A `strength` given counts beside the loss of one image, so it is multiplied by the images of
    one step. Without one, it is what makes a factor that no gradient holds fall by 0.8.
    """
    if strength is None:
        rate = trainer.args.lr0 * (1 + trainer.args.lrf) / 2
        return fitting_strength(rate, steps, momentum=trainer.args.momentum)
    # the loss of a classifier is a mean over the batch
    images = 1 if trainer.args.task == "classify" else trainer.batch_size
    return strength * images * int(trainer.accumulate)
