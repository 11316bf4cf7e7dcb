"""What goes into a training and what comes out."""

from typing import Self

from nampruner.config import FinetuneOptions, Precision, RuntimeOptions, TrainOptions
from nampruner.plan import Record


class FitSettings(Record):
    """Everything that decides how a training goes, beside model, data and penalty."""

    stage: str
    """Name in `metrics.jsonl` and beside the progress bar: train, finetune."""
    epochs: int
    lr: float
    """Peak of the one-cycle schedule."""
    momentum: float
    weight_decay: float
    label_smoothing: float
    precision: Precision
    seed: int
    device: str

    @classmethod
    def sparse(cls, options: TrainOptions, runtime: RuntimeOptions) -> Self:
        """Take the settings of the sparse training; a recipe is both arguments at once."""
        names = set(TrainOptions.model_fields)
        shared = options.model_dump(include=names)
        return cls(stage="train", seed=runtime.seed, device=runtime.device, **shared)

    @classmethod
    def finetuning(
        cls, options: TrainOptions, finetune: FinetuneOptions, runtime: RuntimeOptions
    ) -> Self:
        """Take those of fine-tuning: its own epochs and rate, all else as in training."""
        changes = {
            "stage": "finetune",
            "epochs": finetune.finetune_epochs,
            "lr": finetune.finetune_lr,
        }
        return cls.sparse(options, runtime).model_copy(update=changes)


class Evaluation(Record):
    """How well a model classifies a set of images."""

    accuracy: float
    """Share classified right, in [0, 1]."""
    loss: float
    """Mean cross-entropy in nats."""
    images: int


class EpochMetrics(Record):
    """One line of `metrics.jsonl`."""

    stage: str
    epoch: int
    """Counted from 1."""
    loss: float
    """Mean training loss, with label smoothing."""
    train_accuracy: float
    """On augmented images, while the weights change."""
    validation_loss: float
    validation_accuracy: float
    lr: float
    """Learning rate of the last step."""
    zeros: int
    """Penalized scale factors that are exactly zero."""
    factors: int
    """Penalized scale factors."""
    seconds: float


class History(Record):
    """A finished training, epoch by epoch."""

    epochs: tuple[EpochMetrics, ...] = ()
