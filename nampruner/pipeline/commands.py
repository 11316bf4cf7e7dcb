"""One function per command that writes: find what is acted on, run the stage, say what came out."""

from pathlib import Path
from typing import Any

from nampruner.config import (
    TARGETS,
    ExportCommand,
    FinetuneCommand,
    Kind,
    PruneCommand,
    TrainCommand,
)
from nampruner.errors import NamPrunerError
from nampruner.export.half import TOLERANCE as HALF_TOLERANCE
from nampruner.options import Options, flag
from nampruner.pipeline import exporting, int8, stages
from nampruner.pipeline.exporting import Exported, check_export_path
from nampruner.pipeline.folders import (
    RUNS,
    bare_name,
    check_run_folder,
    claim,
    cut_name,
    is_made,
    newest,
    run_folder,
    workshop,
)
from nampruner.pipeline.job import Job, Loaded, load, prepare, resume, trusted
from nampruner.pipeline.publish import scratch, timed
from nampruner.pipeline.stages import Made, check, made, make, planned, prune_result
from nampruner.pipeline.whole import run, trained
from nampruner.plan import PruningPlan
from nampruner.progress import Progress
from nampruner.recipe import merged
from nampruner.results import PruneResult, RunResult

_ENDINGS: dict[Kind, str] = {
    "onnx": ".onnx",
    "pt2": ".pt2",
    "python": "-python",
    "int8": "-int8.onnx",
    "fp16": "-fp16.onnx",
}
"""What is added to a checkpoint's name where no other was given."""
_APPLIES: dict[str, tuple[tuple[Kind, ...], str]] = {
    "fold_gates": (("onnx", "pt2", "int8", "fp16"), "whose outputs must be the same bits"),
    "tolerance": (("onnx", "pt2", "fp16"), "which is judged by equal bits or by --agreement"),
    "parity_inputs": (("onnx", "pt2", "python", "fp16"), "which is judged on all test images"),
    "agreement": (("int8",), "only to --int8"),
    "drop": (("int8",), "only to --int8"),
    "threads": (("int8",), "only to --int8, which is timed"),
}
"""Option → what it is for, and why it is for nothing else."""


def run_command(
    base: dict[str, Any], flags: Options, out: Path | None, *, trust: bool, progress: Progress
) -> tuple[RunResult, Path]:
    """Go the whole way with the recipe `base` and `flags`; return the result and its folder.

    Raises:
        NamPrunerError: see `run`.
    """
    recipe = merged(base, flags, "run")
    folder = out or run_folder(recipe)
    allowed = trust or trusted(recipe, flags)
    return run(recipe, folder, trust=allowed, progress=progress), folder


def train_command(
    flags: TrainCommand | PruneCommand, out: Path | None, *, trust: bool, progress: Progress
) -> Made:
    """Train; without `out` into the folder in which `run` goes on with the same options.

    Raises:
        NamPrunerError: an option is wrong, or the folder is another's.
    """
    recipe = merged({}, flags, "train")
    folder = run_folder(recipe)
    if out is None:
        check_run_folder(folder, recipe)
    elif is_made(out, recipe, None):
        return made(out)
    job = prepare(recipe, trust=trust or trusted(recipe, flags), progress=progress)
    check(job)
    if out is None:
        claim(folder, recipe)
        return made(trained(job, folder))
    with workshop(out) as work:
        stages.train(job, out, work)
    return made(out)


def prune_command(
    source: Path | None, flags: PruneCommand, out: Path | None, *, trust: bool, progress: Progress
) -> PruneResult:
    """Prune a checkpoint: the one given, the newest, or one of the embedded default.

    Where `flags` name an ONNX file, the slim network is exported there and timed against the dense.

    Raises:
        NamPrunerError: there is no target, or see the stage.
    """
    if flags.onnx is not None:
        check_export_path(flags.onnx, "onnx")
    job, dense = _opened(source, flags, trust=trust, progress=progress)
    target = out or cut_name(dense.folder, job.recipe)
    make(job, target, dense.folder, lambda: stages.prune(job, dense, target))
    slim = load(target, trust=trust)
    if flags.onnx is None:
        return prune_result(slim)
    with scratch() as folder:
        # the network that was cut is not what was read: it lies on the device, its weights baked
        whole = load(dense.folder, trust=trust)
        return timed(job, whole, slim, Path(folder) / "dense.onnx", flags.onnx).result


def plan_command(
    source: Path | None, flags: PruneCommand, *, trust: bool, progress: Progress
) -> tuple[PruneResult, PruningPlan]:
    """Decide what `prune` would cut; nothing is written.

    Raises:
        NamPrunerError: there is no target or no checkpoint, or see the stage.
    """
    if source is None and newest(RUNS) is None:
        raise NamPrunerError(f"there is no checkpoint under {RUNS}/ to plan for; `nampruner train`")
    job, dense = _opened(source, flags, trust=trust, progress=progress)
    cut = stages.decide(job, dense)
    return planned(cut.plan, cut.certificate), cut.plan


def _opened(
    source: Path | None, flags: PruneCommand, *, trust: bool, progress: Progress
) -> tuple[Job, Loaded]:
    if all(getattr(flags, target) is None for target in TARGETS):
        known = ", ".join(f"{flag(name)}" for name in TARGETS)
        raise NamPrunerError(f"no target was given; give one of {known}, such as --ratio 0.3")
    folder = source or newest(RUNS)
    if folder is None:
        progress.note(f"There is no checkpoint under {RUNS}/: training one of the default first")
        folder = Path(train_command(flags, None, trust=trust, progress=progress).checkpoint)
    elif source is None:
        progress.note(f"Pruning {folder}, the newest checkpoint that was never pruned")
    return resume(folder, flags, trust=trust, progress=progress)


def finetune_command(
    source: Path, flags: FinetuneCommand, out: Path | None, *, trust: bool, progress: Progress
) -> Made:
    """Fine-tune a checkpoint; what was broken off goes on.

    Raises:
        NamPrunerError: see the stage.
    """
    job, found = resume(source, flags, trust=trust, progress=progress)
    target = out or source.with_name(f"{bare_name(source)}-finetuned")

    def stage() -> None:
        with workshop(target) as work:
            stages.finetune(job, found, target, work)

    return made(make(job, target, source, stage))


def export_command(
    source: Path, flags: ExportCommand, out: Path | None, *, trust: bool, progress: Progress
) -> Exported:
    """Export a checkpoint.

    Raises:
        NamPrunerError: see the stage.
    """
    _check_combination(flags)
    path = out or source.with_name(f"{bare_name(source)}{_ENDINGS[flags.kind]}")
    check_export_path(path, flags.kind)
    if flags.fp16 and "tolerance" not in flags.model_fields_set:
        flags = flags.model_copy(update={"tolerance": HALF_TOLERANCE})
    job, found = resume(source, flags, trust=trust, progress=progress)
    if flags.int8:
        return int8.export(job, found, path, flags)
    return exporting.export(job, found, path, flags.kind)


def _check_combination(flags: ExportCommand) -> None:
    """See that no option was given that would do nothing.

    Raises:
        NamPrunerError: one was.
    """
    if flags.int8 and flags.fp16:
        raise NamPrunerError("--int8 and --fp16 were given together; give one")
    if flags.kind in ("int8", "fp16") and flags.format != "onnx":
        raise NamPrunerError(f"--{flags.kind} is ONNX; leave out --format {flags.format}")
    for option in sorted(flags.model_fields_set):
        kinds, reason = _APPLIES.get(option, ((flags.kind,), ""))
        if flags.kind not in kinds:
            what = f"--{flags.kind}" if flags.kind in ("int8", "fp16") else f"--format {flags.kind}"
            raise NamPrunerError(f"{flag(option)} does not apply to {what}, {reason}; leave it out")
