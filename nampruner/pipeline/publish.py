"""The stages after the last checkpoint: ONNX files, their speed, figures, the report."""

import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nampruner import figures
from nampruner.checkpoint import CheckpointRecord
from nampruner.config import Format
from nampruner.errors import NamPrunerError
from nampruner.export import export_onnx, export_pt2, export_python, read_metadata
from nampruner.latency import measure
from nampruner.nam import SpatialNAM
from nampruner.pipeline.folders import METRICS, write
from nampruner.pipeline.job import Job, Loaded, build
from nampruner.pipeline.stages import ACCURACY, CUT, DENSE, RECOVERED, last_cut, prune_result
from nampruner.plan import Measured, OnnxResult, Parity, Record, RunResult
from nampruner.report import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECORD_KEY = "nampruner"
"""Key in the metadata of an ONNX file that holds the checkpoint's record as JSON."""


class Exported(Record):
    """An exported file or folder and its proof."""

    format: Format
    path: str
    size_bytes: int
    """Of the file, or of all files in the folder."""
    parity: Parity


def export(job: Job, found: Loaded, path: Path, kind: Format = "onnx") -> Exported:
    """Export a checkpoint and prove it on test images; the export carries the checkpoint's record.

    Raises:
        ParityError: it computes something else; it is not left under its name.
        NamPrunerError: `path` holds something that is not ours, or the network cannot be exported.
    """
    check_export_path(path, kind)
    write, said = _writer(job, found, kind)
    parity = write(
        found.model,
        path,
        job.examples(),
        inputs=job.data.test_inputs(job.recipe.parity_inputs),
        metadata={**said, RECORD_KEY: found.record.model_dump_json()},
        progress=job.progress,
    )
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    return Exported(format=kind, path=str(path), size_bytes=size, parity=parity)


def _writer(job: Job, found: Loaded, kind: Format) -> tuple[Callable[..., Parity], dict[str, str]]:
    """Return what writes this format, and what is to be said beside the record."""
    if kind == "python":
        # it was built from that source a moment ago, so it is trusted
        source = found.record.lineage.source
        return partial(export_python, original=source), _about(found.record)
    write = export_onnx if kind == "onnx" else export_pt2
    return partial(write, tolerance=job.recipe.tolerance), {}


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


def check_export_path(path: Path, kind: Format) -> None:
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


def compare(job: Job, dense: Loaded, slim: Loaded, folder: Path) -> RunResult:
    """Export both networks into `folder`, time them side by side, put all numbers together.

    Raises:
        NamPrunerError: see `export`; or `slim` was never cut.
    """
    base = prune_result(slim)
    files = {
        "dense": export(job, dense, folder / "dense.onnx"),
        "slim": export(job, slim, folder / "model.onnx"),
    }
    times = measure(
        {name: file.path for name, file in files.items()},
        job.data.test_inputs(1),
        threads=job.recipe.threads,
        progress=job.progress,
    )
    metrics = slim.record.metrics
    measured = {
        name: {"size_bytes": files[name].size_bytes, "latency": times[name]} for name in files
    }
    return RunResult(
        **{name: getattr(base, name) for name in ("requested", "achieved", "left_alone")},
        before=_column(base.before, metrics.get(DENSE), measured["dense"]),
        after=_column(base.after, metrics.get(ACCURACY), measured["slim"]),
        certificate=base.certificate,
        checkpoint=str(slim.folder),
        accuracy_cut=metrics.get(CUT),
        accuracy_recovered=metrics.get(RECOVERED),
        onnx=OnnxResult(
            path=files["slim"].path,
            parity=files["slim"].parity,
            latency_ms={name: latency.median_ms for name, latency in times.items()},
        ),
    )


def _column(base: Measured, accuracy: float | None, facts: Mapping[str, object]) -> Measured:
    return base.model_copy(update={"accuracy": accuracy, **facts})


def illustrate(job: Job, dense: Loaded, slim: Loaded, folder: Path) -> "dict[str, Figure]":
    """Draw what a cut did, save it as PNG in `folder`; return caption → figure."""
    drawn = _figures(job, dense, slim)
    rows = _metrics(slim.folder)
    if rows:
        drawn["training"] = ("Training", figures.training_curves(rows))
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, figure) in drawn.items():
        figures.save(figure, folder / f"{name}.png")
    return dict(drawn.values())


def _figures(job: Job, dense: Loaded, slim: Loaded) -> "dict[str, tuple[str, Figure]]":
    """Return file name → caption and figure."""
    before, after = factors(dense.model), factors(slim.model)
    drawn = {
        "factors": (
            "Scale factors before and after the cut",
            figures.scale_factor_histogram(before, after),
        ),
        "factors-by-layer": (
            "Scale factors before and after the cut, layer by layer",
            figures.layer_histograms(before, after),
        ),
        "widths": ("Widths before and after the cut", figures.widths(last_cut(slim)[0])),
        **_recovery(slim),
    }
    start = job.recipe.weights
    # a checkpoint outlives the file that its training started from
    if not dense.record.lineage.plans and (start is None or start.is_file()):
        fresh = factors(build(job))
        names = ("untrained", "trained")
        drawn["factors-trained"] = (
            "Scale factors before and after training under the penalty",
            figures.scale_factor_histogram(fresh, before, names=names),
        )
    return drawn


def _recovery(slim: Loaded) -> "dict[str, tuple[str, Figure]]":
    layers = last_cut(slim)[1].layers
    if not layers:
        return {}
    return {"recovery": ("Recovered without training", figures.recovered(layers))}


def factors(model: nn.Module) -> "dict[str, np.ndarray[tuple[int, ...], np.dtype[np.floating]]]":
    """Return layer → scale factors of all its BN layers: γ [C], and λ [H·W] of spatial NAM."""
    return {
        path: module.weight.detach().cpu().numpy()
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm | SpatialNAM) and module.weight is not None
    }


def _metrics(checkpoint: Path) -> list[dict[str, object]]:
    """Return the rows of the training that led to a checkpoint: its own, or its run's."""
    for path in (checkpoint / METRICS, checkpoint.parent / METRICS):
        if path.is_file():
            return [loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return []


def report(
    job: Job, dense: Loaded, slim: Loaded, result: RunResult, *, page: Path, command: str
) -> None:
    """Write the HTML page, and its figures as PNG beside it."""
    drawn = illustrate(job, dense, slim, page.parent / "figures")
    html = render(
        result,
        plan=last_cut(slim)[0],
        title=f"{job.recipe.model} on {job.data.name}",
        facts={"command": command, **facts(job)},
        figures=drawn,
    )
    write(page, html)


def facts(job: Job) -> dict[str, str]:
    """Return what the numbers of this run depend on."""
    packages = ("nampruner", "torch", "onnxruntime", "timm")
    return {
        "model": job.recipe.model,
        "data": job.data.name,
        "seed": str(job.recipe.seed),
        "device": str(job.device),
        "processor": f"{_processor()}, {os.cpu_count()} logical cores",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
    }


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def scratch() -> "tempfile.TemporaryDirectory[str]":
    """Return a folder for files that nobody keeps."""
    return tempfile.TemporaryDirectory(prefix="nampruner-")
