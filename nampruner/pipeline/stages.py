"""The stages that make a checkpoint: train, prune, fine-tune. Each takes values and leaves one.

`make` is the way into all of them: what is there already is not made twice.
"""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from nampruner import checkpoint
from nampruner.aiming import settle_on_device
from nampruner.config import Recipe
from nampruner.errors import CheckpointError
from nampruner.importance import score
from nampruner.penalty import SparsityPenalty, fitting_strength
from nampruner.pipeline.folders import is_made, link, parent_of
from nampruner.pipeline.job import Job, Loaded, build, keep
from nampruner.plan import Certificate, Measured, PruneResult, PruningPlan, Record
from nampruner.pruning import restore
from nampruner.selection import select
from nampruner.settle import Cut
from nampruner.training import FitSettings, fit

ACCURACY = "accuracy"
"""Metrics of a checkpoint: shares of the test images classified right …"""
DENSE, CUT, RECOVERED = "accuracy_dense", "accuracy_cut", "accuracy_recovered"
"""… by the network before the cut, right after it, and after recovery."""


class Made(Record):
    """What a command reports that leaves a checkpoint."""

    checkpoint: str
    metrics: dict[str, float]


def made(folder: Path) -> Made:
    """Return what the checkpoint in `folder` says of itself."""
    return Made(checkpoint=str(folder), metrics=checkpoint.read(folder).metrics)


def make(job: Job, out: Path, parent: Path | None, stage: Callable[[], None]) -> Path:
    """Run `stage`, which leaves a checkpoint in `out`, unless it is there already.

    Raises:
        NamPrunerError: `out` holds something else.
    """
    if is_made(out, job.recipe, parent):
        job.progress.note(f"{out} is there already")
    else:
        stage()
    return out


def check(job: Job) -> None:
    """Go the whole way once without training, so that a wrong option is found before any work.

    Raises:
        NamPrunerError: model and data do not match, a glob matches nothing, a target is
            impossible, or nothing can be cut.
    """
    model = build(job)
    graph = job.graph(model)
    select(graph, score(model, graph, "magnitude"), job.recipe, job.measured(model))


def train(job: Job, out: Path, work: Path) -> None:
    """Train the recipe's model under the penalty; `work` keeps the training's state."""
    recipe = job.recipe
    model = build(job)
    settings = FitSettings.sparse(recipe, recipe)
    penalty = _penalty(model, recipe, steps=recipe.epochs * len(job.data.train))
    fit(model, job.data, settings, penalty=penalty, folder=work, progress=job.progress)
    keep(job, model, out, metrics={ACCURACY: job.accuracy(model, "after training")})


def _penalty(model: nn.Module, recipe: Recipe, *, steps: int) -> SparsityPenalty | None:
    if recipe.strength == 0:
        return None
    warmup = round(recipe.penalty_warmup * steps)
    strength = recipe.strength
    if strength is None:
        # the mean rate of a one-cycle schedule is about half of its peak
        strength = fitting_strength(recipe.lr / 2, steps - warmup / 2, momentum=recipe.momentum)
    return SparsityPenalty(
        model,
        strength,
        method=recipe.penalty,
        nam=recipe.penalize_nam,
        bn=recipe.penalize_bn,
        warmup_steps=warmup,
        momentum=recipe.momentum,
    )


def decide(job: Job, dense: Loaded) -> Cut:
    """Plan a cut and certify it on a copy; nothing is written.

    Raises:
        NamPrunerError: see `nampruner.pruning.settle`.
    """
    model, graph = dense.model, job.graph(dense.model)
    return settle_on_device(
        model,
        graph,
        job.scores(model, graph),
        job.recipe,
        job.examples(),
        progress=job.progress,
    )


def prune(job: Job, dense: Loaded, out: Path) -> None:
    """Cut, certify and recover; the checkpoint tells what every step did to the accuracy."""
    cut = decide(job, dense)
    metrics = {DENSE: _accuracy(job, dense), CUT: job.accuracy(cut.model, "after the cut")}
    for model in (dense.model, cut.model):
        model.to(job.device)
    whole = restore(
        cut,
        dense.model,
        job.calibration(),
        corrected=job.recipe.recover,
        allow_bias=job.recipe.allow_bias,
        progress=job.progress,
    )
    if job.recipe.recover:
        metrics[RECOVERED] = job.accuracy(whole.model, "after recovery")
    metrics[ACCURACY] = metrics.get(RECOVERED, metrics[CUT])
    keep(
        job,
        whole.model.cpu(),
        out,
        metrics=metrics,
        certificate=whole.certificate,
        parent=link(out, dense.folder),
    )


def _accuracy(job: Job, found: Loaded) -> float:
    """Return the test accuracy of a checkpoint, which knows it if it was made on these images."""
    options = ("data", "image_size", "seed")
    same = all(found.record.recipe.get(o) == getattr(job.recipe, o) for o in options)
    known = found.record.metrics.get(ACCURACY) if same else None
    return job.accuracy(found.model, "before the cut") if known is None else known


def finetune(job: Job, source: Loaded, out: Path, work: Path) -> None:
    """Train on after the cut, without the penalty; `work` keeps the training's state."""
    recipe, record = job.recipe, source.record
    settings = FitSettings.finetuning(recipe, recipe, recipe)
    fit(source.model, job.data, settings, folder=work, progress=job.progress)
    accuracy = job.accuracy(source.model, "after fine-tuning")
    keep(
        job,
        source.model,
        out,
        metrics={**record.metrics, ACCURACY: accuracy},
        certificate=record.certificate,
        parent=link(out, source.folder),
    )


def last_cut(found: Loaded) -> tuple[PruningPlan, Certificate]:
    """Return the plan and the certificate of a checkpoint's last cut.

    Raises:
        CheckpointError: it was never cut.
    """
    plans, certificate = found.record.lineage.plans, found.record.certificate
    if not plans or certificate is None:
        raise CheckpointError(f"{found.folder} was never pruned; `nampruner prune` it first")
    return plans[-1], certificate


def prune_result(found: Loaded) -> PruneResult:
    """Return what the last cut of a checkpoint did, up to and with recovery.

    Raises:
        CheckpointError: it was never cut.
    """
    metrics = found.record.metrics
    return planned(
        *last_cut(found),
        before=metrics.get(DENSE),
        after=metrics.get(RECOVERED, metrics.get(CUT)),
        folder=found.folder,
    )


def planned(
    plan: PruningPlan,
    certificate: Certificate,
    *,
    before: float | None = None,
    after: float | None = None,
    folder: Path | None = None,
) -> PruneResult:
    """Return a plan as a result; the accuracies are those before and after the cut."""
    return PruneResult(
        requested=plan.requested,
        achieved=plan.achieved,
        before=Measured(params=plan.before.params, macs=plan.before.macs, accuracy=before),
        after=Measured(params=plan.after.params, macs=plan.after.macs, accuracy=after),
        certificate=certificate,
        left_alone=plan.left_alone,
        checkpoint=None if folder is None else str(folder),
    )


def uncut_parent(found: Loaded) -> Path:
    """Return the checkpoint from which the last cut of `found` was made.

    Raises:
        CheckpointError: it was never cut, or the other checkpoint is no longer there.
    """
    last_cut(found)
    cuts, folder, record = len(found.record.lineage.plans), found.folder, found.record
    while len(record.lineage.plans) == cuts:
        parent = parent_of(folder, record.parent)
        if parent is None or not checkpoint.is_checkpoint(parent):
            raise CheckpointError(
                f"{found.folder} was made from {parent or 'a model in memory'}, which is not there;"
                " without it there is nothing to compare with"
            )
        folder, record = parent, checkpoint.read(parent)
    return folder
