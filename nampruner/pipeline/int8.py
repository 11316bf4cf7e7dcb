"""The stage that exports INT8 and says what it brings: how good it is, how large, how fast."""

from pathlib import Path

from nampruner.config import ExportCommand
from nampruner.export import export_onnx, exportable
from nampruner.export.int8 import export_judged
from nampruner.int8 import Int8Gain
from nampruner.latency import compare, measure
from nampruner.pipeline.exporting import RECORD_KEY, Exported, folded_model
from nampruner.pipeline.job import Job, Loaded
from nampruner.pipeline.publish import scratch
from nampruner.plan import Latency


def export(job: Job, found: Loaded, path: Path, options: ExportCommand) -> Exported:
    """Export a checkpoint as INT8, prove it on test images, and compare it with its float file.

    Raises:
        ParityError: it gives other answers than the float network; nothing is written.
        NamPrunerError: it cannot be judged or exported, or an option is for another kind.
    """
    model, folded = folded_model(job, found.model)
    model = exportable(model)
    said = {**job.task.metadata(found.model), RECORD_KEY: found.record.model_dump_json()}
    judge = job.task.judge(model, options)
    task = job.task
    made = export_judged(
        model,
        path,
        task.calibration(),
        judge,
        inputs=task.held_out() if task.classifies else [task.proof(job.recipe.parity_inputs)],
        metadata=said,
        progress=job.progress,
    )
    with scratch() as folder:
        plain = Path(folder) / "float.onnx"
        examples, tolerance = job.task.examples(), job.recipe.tolerance
        export_onnx(model, plain, examples, tolerance=tolerance, metadata=said)
        before, after = _times(job, plain, path)
        verdict = compare(before, after)
        good = [task.evaluate_onnx(file, job.progress) for file in (plain, path)]
        gain = Int8Gain(
            **dict(made),
            size_float=plain.stat().st_size,
            accuracy_float=good[0].accuracy,
            accuracy=good[1].accuracy,
            metrics_float=good[0].metrics,
            metrics=good[1].metrics,
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
