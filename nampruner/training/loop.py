"""The one training loop: sparse training is `fit` with a penalty, fine-tuning without."""

import math
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from nampruner.data import Data
from nampruner.errors import NamPrunerError
from nampruner.penalty import SparsityPenalty, parameter_groups
from nampruner.progress import Bar, Progress, Silent
from nampruner.training.evaluation import check_match, evaluate, logits, number_right
from nampruner.training.resume import Memory, NoMemory, State
from nampruner.training.surroundings import (
    accelerated,
    mixed_seed,
    own_chance,
    placed,
    resolve_device,
    seed_all,
)
from nampruner.training.values import EpochMetrics, FitSettings, History


def fit(
    model: nn.Module,
    data: Data,
    settings: FitSettings,
    *,
    penalty: SparsityPenalty | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> History:
    """Train `model` in place by SGD under a one-cycle schedule (Smith, Topin 2019).

    With a `folder`, every epoch adds a line to its `metrics.jsonl`, and a training that was broken
    off goes on from its last finished epoch when called again with the same arguments. The chance
    in an epoch depends on the seed and its number alone, so both ways end at the same weights.

    Raises:
        NamPrunerError: model and data do not match, the device is not there, or the loss is no
            longer finite; the model then has the weights of the last good epoch.
    """
    if settings.epochs == 0:
        return History()
    progress = progress or Silent()
    device = resolve_device(settings.device)
    with accelerated(device, settings.precision) as accelerator, own_chance():
        with placed(model, accelerator.device):
            check_match(model, data)
            run = _Run(accelerator, model, data, settings, penalty)
            shown = progress if accelerator.is_main_process else Silent()
            memory = _memory(run, folder)
            history = _train(run, memory, shown)
        accelerator.wait_for_everyone()
    return history


class _Run:
    """Everything one training holds; its state is what `fit` needs to go on."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        data: Data,
        settings: FitSettings,
        penalty: SparsityPenalty | None,
    ) -> None:
        self.accelerator, self.model, self.data = accelerator, model, data
        self.settings, self.penalty = settings, penalty
        groups = parameter_groups(model, settings.weight_decay)
        nesterov = settings.momentum > 0
        sgd = SGD(groups, settings.lr, momentum=settings.momentum, nesterov=nesterov)
        if penalty is not None:
            penalty.attach(sgd)
        self.loader = accelerator.prepare(data.train)
        steps = settings.epochs * len(self.loader)
        # it marks the optimizer's step, which accelerate keeps and, beside a scaler, puts back
        self.scheduler = OneCycleLR(sgd, settings.lr, total_steps=steps, cycle_momentum=False)
        # accelerate marks and wraps what it prepares: the shell takes that, the model stays clean
        self.shell, self.optimizer = accelerator.prepare(nn.Sequential(model), sgd)
        self.epochs: tuple[EpochMetrics, ...] = ()

    def state(self) -> State:
        """Return copies of all that training changes."""
        scaler = self.accelerator.scaler
        weights = self.model.state_dict()
        return {
            "model": {name: value.detach().cpu().clone() for name, value in weights.items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "penalty": self.penalty.state_dict() if self.penalty else {},
            "scaler": scaler.state_dict() if scaler else {},
        }

    def restore(self, state: State) -> None:
        """Go back to a `state`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.penalty:
            self.penalty.load_state_dict(state["penalty"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.epochs = tuple(EpochMetrics(**row) for row in state["epochs"])

    def zeros(self) -> tuple[int, int]:
        """Return how many penalized factors are zero, and how many there are."""
        return self.penalty.zeros() if self.penalty else (0, 0)


class _DivergedError(Exception):
    """The loss is nan or infinite."""


def _memory(run: _Run, folder: Path | None) -> NoMemory:
    if folder is None:
        return NoMemory()
    penalty = run.penalty
    weights = run.model.state_dict()
    fingerprint = {
        **run.settings.model_dump(exclude={"device"}),
        "data": run.data.name,
        "steps": len(run.loader),
        "penalty": [penalty.method, penalty.strength, penalty.warmup_steps] if penalty else [],
        "model": {name: list(value.shape) for name, value in weights.items()},
    }
    return Memory(folder, run.settings.stage, fingerprint)


def _train(run: _Run, memory: NoMemory, progress: Progress) -> History:
    saved = memory.load(progress)
    if saved is not None:
        run.restore(saved)
    todo = range(len(run.epochs), run.settings.epochs)
    state = run.state()
    with progress.bar(run.settings.stage, len(todo) * len(run.loader)) as bar:
        for number in todo:
            try:
                run.epochs += (_epoch(run, number, bar),)
            except _DivergedError as error:
                run.model.load_state_dict(state["model"])
                raise _stopped(run, str(error)) from None
            state = run.state()
            if run.accelerator.is_main_process:
                memory.save(state, run.epochs)
    if run.accelerator.is_main_process:
        memory.forget()
    return History(epochs=run.epochs)


def _stopped(run: _Run, what: str) -> NamPrunerError:
    settings, done = run.settings, len(run.epochs)
    kept = f"after epoch {done}" if done else "before training"
    return NamPrunerError(
        f"{settings.stage}: {what} (epoch {done + 1} of {settings.epochs}); the model has its "
        f"weights {kept} again; lower the learning rate (its peak is {settings.lr:g})"
    )


def _epoch(run: _Run, number: int, bar: Bar) -> EpochMetrics:
    started = time.perf_counter()
    _seed(run, number)
    run.shell.train()
    loss, accuracy = _pass(run, number, bar)
    lr = run.scheduler.get_last_lr()[0]
    _agree(run)
    validation = evaluate(run.model, run.data.validation)
    if not math.isfinite(validation.loss):
        raise _DivergedError(f"the validation loss is {validation.loss}")
    zeros, factors = run.zeros()
    return EpochMetrics(
        stage=run.settings.stage,
        epoch=number + 1,
        loss=loss,
        train_accuracy=accuracy,
        validation_loss=validation.loss,
        validation_accuracy=validation.accuracy,
        lr=lr,
        zeros=zeros,
        factors=factors,
        seconds=time.perf_counter() - started,
    )


def _seed(run: _Run, number: int) -> None:
    """Make the chance of an epoch depend on seed and number: nothing of it need be saved."""
    order = run.data.train.generator
    if order is not None:
        order.manual_seed(mixed_seed(run.settings.seed, number))
    # processes draw the same order, but each its own augmentation
    seed_all(run.settings.seed, number, 1 + run.accelerator.process_index)


def _pass(run: _Run, number: int, bar: Bar) -> tuple[float, float]:
    """Go once through the training images; return mean loss and accuracy."""
    totals = torch.zeros(3, device=run.accelerator.device)
    for step, (images, labels) in enumerate(run.loader, start=1):
        loss, right = _step(run, images, labels)
        mean = float(run.accelerator.reduce(loss, "mean"))
        if not math.isfinite(mean):
            raise _DivergedError(f"the loss is {mean} at step {number * len(run.loader) + step}")
        totals += torch.stack([loss * len(labels), right, torch.ones_like(loss) * len(labels)])
        bar.advance(loss=mean, accuracy=float(totals[1] / totals[2]))
    loss_sum, right_sum, images_seen = run.accelerator.reduce(totals, "sum").tolist()
    return loss_sum / images_seen, right_sum / images_seen


def _step(run: _Run, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Take one step; return mean loss [] and number of images classified right []."""
    found = logits(run.shell(images))
    loss = F.cross_entropy(found, labels, label_smoothing=run.settings.label_smoothing)
    run.optimizer.zero_grad()
    run.accelerator.backward(loss)
    run.optimizer.step()
    # a gradient scaler skips a step that overflowed
    if not run.optimizer.step_was_skipped:
        run.scheduler.step()
    return loss.detach(), number_right(found, labels)


def _agree(run: _Run) -> None:
    """Give every process the BN statistics of the first; the weights are equal already."""
    if run.accelerator.num_processes > 1:
        for buffer in run.model.buffers():
            torch.distributed.broadcast(buffer, src=0)
