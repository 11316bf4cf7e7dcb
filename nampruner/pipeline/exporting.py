"""The stage that exports a checkpoint and proves the export on test images."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from nampruner.certificate import cost_of
from nampruner.checkpoint import CheckpointRecord
from nampruner.config import Kind
from nampruner.errors import NamPrunerError
from nampruner.export import (
    export_fp16,
    export_onnx,
    export_pt2,
    export_python,
    exportable,
    read_metadata,
)
from nampruner.export.parity import BATCH
from nampruner.int8 import Int8Gain
from nampruner.latency import device_of
from nampruner.nam import fold_nam, nam_modules
from nampruner.pipeline.job import Job, Loaded
from nampruner.plan import FoldedGates, Parity, Record

RECORD_KEY = "nampruner"
"""Key in the metadata of an ONNX file that holds the checkpoint's record as JSON."""


class Exported(Record):
    """An exported file or folder and its proof."""

    format: Kind
    path: str
    size_bytes: int
    """Of the file, or of all files in the folder."""
    parity: Parity
    folded: FoldedGates | None = None
    """Only where gates were made constant."""
    int8: Int8Gain | None = None


def export(job: Job, found: Loaded, path: Path, kind: Kind = "onnx") -> Exported:
    """Export a checkpoint and prove it on test images; the export carries the checkpoint's record.

    Raises:
        ParityError: it computes something else; it is not left under its name.
        NamPrunerError: `path` holds something that is not ours, or the network cannot be exported.
    """
    check_export_path(path, kind)
    write, said = _writer(job, found, kind)
    model, folded = (found.model, None) if kind == "python" else folded_model(job, found.model)
    parity = write(
        model if kind == "python" else exportable(model),
        path,
        job.task.examples(),
        inputs=job.task.proof(job.recipe.parity_inputs),
        metadata={**said, RECORD_KEY: found.record.model_dump_json()},
        progress=job.progress,
    )
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    return Exported(format=kind, path=str(path), size_bytes=size, parity=parity, folded=folded)


def folded_model(job: Job, model: nn.Module) -> tuple[nn.Module, FoldedGates | None]:
    """Make constants of the gates that hardly move, where that is asked, and say what it cost."""
    bound = job.recipe.fold_gates
    if bound is None:
        return model, None
    if not nam_modules(model):
        job.progress.note("there is no NAM in this network, so --fold-gates changes nothing")
        return model, None
    device = device_of(model)
    found = fold_nam(model, (batch.to(device) for batch in job.task.calibration()), bound=bound)
    proof = job.task.proof(job.recipe.parity_inputs).split(BATCH)
    error, agreement = cost_of(model, found.model, proof, job.task.forward)
    told = FoldedGates(bound=bound, gates=found.gates, output_error=error, top1_agreement=agreement)
    return found.model, told


def _writer(job: Job, found: Loaded, kind: Kind) -> tuple[Callable[..., Parity], dict[str, str]]:
    """Return what writes this format, and what is to be said beside the record."""
    if kind == "python":
        # it was built from that source a moment ago, so it is trusted
        source = found.record.lineage.source
        return partial(export_python, original=source), _about(found.record)
    write = {"onnx": export_onnx, "fp16": export_fp16, "pt2": export_pt2}[kind]
    return partial(write, tolerance=job.recipe.tolerance), dict(job.task.metadata(found.model))


def _about(record: CheckpointRecord) -> dict[str, str]:
    """Return what a reader of `model.py` wants to know about its inputs and outputs."""
    spec, classes = record.input, record.classes
    said = {
        "data": record.data,
        "mean": ", ".join(f"{value:.4g}" for value in spec.mean) if spec else None,
        "std": ", ".join(f"{value:.4g}" for value in spec.std) if spec else None,
        "classes": ", ".join(classes) if classes else None,
    }
    return {key: text for key, text in said.items() if text}


def check_export_path(path: Path, kind: Kind) -> None:
    """See that writing `path` destroys nothing of anybody else's.

    Raises:
        NamPrunerError: something is there that nampruner did not export in this format.
    """
    if path.exists() and (path.is_dir() != (kind == "python") or not _is_ours(path)):
        raise NamPrunerError(
            f"{path} exists and is no {kind} export of nampruner; give another --out"
        )


def _is_ours(path: Path) -> bool:
    try:
        return RECORD_KEY in read_metadata(path)
    except NamPrunerError:
        return False
