"""The whole way in one resumable walk: every finished stage leaves its artefact, once."""

from pathlib import Path

from pydantic import ValidationError

from nampruner.checkpoint import is_checkpoint
from nampruner.errors import NamPrunerError
from nampruner.options import Options
from nampruner.pipeline.folders import RESULT, check_run_folder, claim, write
from nampruner.pipeline.job import Job, load, prepare, resume
from nampruner.pipeline.publish import compare, report, scratch
from nampruner.pipeline.stages import check, finetune, last_cut, make, prune, train, uncut_parent
from nampruner.progress import Progress, Silent
from nampruner.recipe import Recipe
from nampruner.results import RunResult

PLAN, PAGE = "plan.json", "report.html"


def run(
    recipe: Recipe, folder: Path, *, trust: bool = False, progress: Progress | None = None
) -> RunResult:
    """Train, prune, fine-tune, export and report into `folder`, from its last finished stage on.

    Raises:
        NamPrunerError: an option is wrong (then nothing is written), or `folder` is another's.
    """
    progress = progress or Silent()
    check_run_folder(folder, recipe)
    if (folder / RESULT).is_file():
        progress.note(f"{folder} is finished; this is its result")
        return read_result(folder)
    job = prepare(recipe, trust=trust, progress=progress)
    if not is_checkpoint(folder / "dense"):
        check(job)
    claim(folder, recipe)
    dense = trained(job, folder)
    return published(job, folder, dense, tuned(job, folder, pruned(job, folder, dense)))


def trained(job: Job, folder: Path) -> Path:
    """Leave the sparsely trained network in `dense/`."""
    out = folder / "dense"
    return make(job, out, None, lambda: train(job, out, folder))


def pruned(job: Job, folder: Path, dense: Path) -> Path:
    """Leave the cut and recovered network in `pruned/`, its plan in `plan.json`."""
    out = folder / "pruned"
    make(job, out, dense, lambda: prune(job, load(dense, trust=job.trust), out))
    plan, certificate = last_cut(load(out, trust=job.trust))
    told = plan.model_copy(update={"certificate": certificate})
    write(folder / PLAN, told.model_dump_json(indent=1))
    return out


def tuned(job: Job, folder: Path, cut: Path) -> Path:
    """Leave the fine-tuned network in `slim/`."""
    out = folder / "slim"
    return make(job, out, cut, lambda: finetune(job, load(cut, trust=job.trust), out, folder))


def published(job: Job, folder: Path, dense: Path, slim: Path) -> RunResult:
    """Leave `model.onnx`, the figures and `report.html`; `result.json` last: it ends the run."""
    before, after = load(dense, trust=job.trust), load(slim, trust=job.trust)
    result = compare(job, before, after, folder)
    command = f"nampruner run {folder / 'recipe.yaml'}"
    report(job, before, after, result, page=folder / PAGE, command=command)
    write(folder / RESULT, result.model_dump_json(indent=1))
    return result


def read_result(folder: Path) -> RunResult:
    """Read the result of a finished run.

    Raises:
        NamPrunerError: it is damaged.
    """
    path = folder / RESULT
    try:
        return RunResult.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise NamPrunerError(
            f"{path} is damaged ({first}); remove it, and the same command writes it again"
        ) from None


def report_on(path: Path, flags: Options, page: Path, *, trust: bool, progress: Progress) -> None:
    """Write the report of a run, from its own numbers, or of a pruned checkpoint, measured anew.

    Raises:
        NamPrunerError: `path` is neither.
    """
    job, slim = resume(_slim(path), flags, trust=trust, progress=progress)
    dense = load(uncut_parent(slim), trust=trust)
    command = f"nampruner report {path}"
    if (path / RESULT).is_file():
        report(job, dense, slim, read_result(path), page=page, command=command)
        return
    with scratch() as folder:
        result = compare(job, dense, slim, Path(folder))
        report(job, dense, slim, result, page=page, command=command)


def _slim(path: Path) -> Path:
    return path / "slim" if (path / RESULT).is_file() else path
