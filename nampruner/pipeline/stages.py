"""The stages that make a checkpoint: train, prune, fine-tune. Each takes values and leaves one.

`make` is the way into all of them: what is there already is not made twice.
"""

from collections.abc import Callable
from pathlib import Path

from nampruner import checkpoint
from nampruner.aiming import settle_on_device
from nampruner.errors import CheckpointError
from nampruner.importance import score
from nampruner.pipeline.folders import forget, is_made, is_pt, link, parent_of
from nampruner.pipeline.job import Job, Loaded, build, keep, record_of
from nampruner.plan import Certificate, PruningPlan, Record
from nampruner.pruning import restore
from nampruner.results import Measured, PruneResult, Quality
from nampruner.selection import select
from nampruner.settle import Cut

NOW, DENSE, CUT, RECOVERED = "", "_dense", "_cut", "_recovered"
"""Ends of the names of a checkpoint's metrics: of the network in it, of the one before the cut, of
the cut one, and of the recovered one."""


UNKNOWN = Quality()


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
    model = job.task.train(build(job), work, job.progress)
    keep(job, model, out, metrics=job.measures(model, "after training"))
    forget(work)


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
        job.task.examples(),
        forward=job.task.forward,
        progress=job.progress,
    )


def prune(job: Job, dense: Loaded, out: Path) -> None:
    """Cut, certify and recover; the checkpoint tells how good the network was after every step."""
    cut = decide(job, dense)
    metrics = {DENSE: _measures(job, dense), CUT: job.measures(cut.model, "after the cut")}
    for model in (dense.model, cut.model):
        model.to(job.device)
    whole = restore(
        cut,
        dense.model,
        job.task.calibration(),
        corrected=job.recipe.recover,
        allow_bias=job.recipe.allow_bias,
        forward=job.task.forward,
        progress=job.progress,
    )
    if job.recipe.recover:
        metrics[RECOVERED] = job.measures(whole.model, "after recovery")
    metrics[NOW] = metrics.get(RECOVERED, metrics[CUT])
    keep(
        job,
        whole.model.cpu(),
        out,
        metrics={
            f"{name}{end}": share for end, found in metrics.items() for name, share in found.items()
        },
        certificate=whole.certificate,
        parent=link(out, dense.folder),
    )


def _measures(job: Job, found: Loaded) -> dict[str, float]:
    """Return how good a checkpoint is; it knows that if it was made on these images."""
    options = ("data", "image_size", "seed")
    same = all(found.record.recipe.get(o) == getattr(job.recipe, o) for o in options)
    known = quality(found, NOW).measures if same else {}
    return known or job.measures(found.model, "before the cut")


def quality(found: Loaded, end: str) -> Quality:
    """Return what a checkpoint says of one of its networks: `NOW`, `DENSE`, `CUT`, `RECOVERED`."""
    metrics = found.record.metrics
    others = tuple(other for other in (DENSE, CUT, RECOVERED) if other != end)
    own = {
        name.removesuffix(end): share
        for name, share in metrics.items()
        if name.endswith(end) and not name.endswith(others)
    }
    return Quality(accuracy=own.pop("accuracy", None), metrics=own)


def finetune(job: Job, source: Loaded, out: Path, work: Path) -> None:
    """Train on after the cut, without the penalty; `work` keeps the training's state."""
    model, record = job.task.finetune(source.model, work, job.progress), source.record
    keep(
        job,
        model,
        out,
        metrics={**record.metrics, **job.measures(model, "after fine-tuning")},
        certificate=record.certificate,
        parent=link(out, source.folder),
    )
    forget(work)


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
    recovered = quality(found, RECOVERED)
    return planned(
        *last_cut(found),
        before=quality(found, DENSE),
        after=recovered if recovered.measures else quality(found, CUT),
        folder=found.folder,
    )


def planned(
    plan: PruningPlan,
    certificate: Certificate,
    *,
    before: Quality = UNKNOWN,
    after: Quality = UNKNOWN,
    folder: Path | None = None,
) -> PruneResult:
    """Return a plan as a result; the qualities are those before and after the cut."""
    return PruneResult(
        requested=plan.requested,
        achieved=plan.achieved,
        before=Measured(**dict(plan.before), **dict(before)),
        after=Measured(**dict(plan.after), **dict(after)),
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
        if parent is None or not (checkpoint.is_checkpoint(parent) or is_pt(parent)):
            raise CheckpointError(
                f"{found.folder} was made from {parent or 'a model in memory'}, which is not there;"
                " without it there is nothing to compare with"
            )
        folder, record = parent, record_of(parent)
    return folder
