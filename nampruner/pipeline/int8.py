"""The stage that exports INT8 and says what it brings: agreement, accuracy, time."""

from pathlib import Path

from nampruner.errors import NamPrunerError
from nampruner.export import export_int8, export_onnx, exportable
from nampruner.latency import compare, measure
from nampruner.pipeline.job import Job, Loaded
from nampruner.pipeline.publish import RECORD_KEY, Exported, folded_model, scratch
from nampruner.plan import Int8Gain, Latency


def export(job: Job, found: Loaded, path: Path, agreement: float) -> Exported:
    """Export a checkpoint as INT8, prove it on all test images, and compare it with its float file.

    Raises:
        ParityError: it gives other answers than the float network; nothing is written.
        NamPrunerError: it is no classifier, or cannot be exported.
    """
    if not job.task.classifies:
        raise NamPrunerError(
            f"--int8 is judged by top-1 answers, and {found.folder} gives none; leave it out, or "
            "take --fp16"
        )
    model, folded = folded_model(job, found.model)
    model = exportable(model)
    said = {**job.task.metadata(found.model), RECORD_KEY: found.record.model_dump_json()}
    made = export_int8(
        model,
        path,
        job.task.calibration(),
        inputs=job.task.held_out(),
        agreement=agreement,
        metadata=said,
        progress=job.progress,
    )
    with scratch() as folder:
        plain = Path(folder) / "float.onnx"
        examples, tolerance = job.task.examples(), job.recipe.tolerance
        export_onnx(model, plain, examples, tolerance=tolerance, metadata=said)
        before, after = _times(job, plain, path)
        verdict = compare(before, after)
        gain = Int8Gain(
            **dict(made),
            size_float=plain.stat().st_size,
            accuracy_float=_accuracy(job, plain),
            accuracy=_accuracy(job, path),
            latency_float=before,
            latency=after,
            faster=verdict.faster,
            verdict=str(verdict),
        )
    return Exported(
        format="int8",
        path=str(path),
        size_bytes=path.stat().st_size,
        parity=made.parity,
        folded=folded,
        int8=gain,
    )


def _times(job: Job, plain: Path, path: Path) -> tuple[Latency, Latency]:
    found = measure(
        {"float": plain, "int8": path},
        job.task.proof(1),
        threads=job.recipe.threads,
        progress=job.progress,
    )
    return found["float"], found["int8"]


def _accuracy(job: Job, path: Path) -> float | None:
    return job.task.evaluate_onnx(path, job.progress).accuracy
