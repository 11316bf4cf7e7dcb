"""The stages after the last checkpoint: speed, figures, the report."""

import os
import platform
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nampruner import figures
from nampruner.latency import compare as judge
from nampruner.latency import measure
from nampruner.nam import SpatialNAM
from nampruner.pipeline.exporting import Exported, export
from nampruner.pipeline.folders import METRICS, write
from nampruner.pipeline.job import Job, Loaded, build
from nampruner.pipeline.stages import (
    CUT,
    DENSE,
    NOW,
    RECOVERED,
    last_cut,
    prune_result,
    quality,
)
from nampruner.pipeline.task import YOLO
from nampruner.plan import Latency
from nampruner.report import render
from nampruner.results import OnnxResult, PruneResult, RunResult
from nampruner.staircase.device import processor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def compare(job: Job, dense: Loaded, slim: Loaded, folder: Path) -> RunResult:
    """Export both networks into `folder`, time them side by side, put all numbers together.

    Raises:
        NamPrunerError: see `export`; or `slim` was never cut.
    """
    base = timed(job, dense, slim, folder / "dense.onnx", folder / "model.onnx")
    result, file = base.result, base.file
    columns = {
        side: column.model_copy(update=dict(quality(slim, end)))
        for side, column, end in (
            ("before", result.before, DENSE),
            ("after", result.after, NOW),
        )
    }
    cut, recovered = quality(slim, CUT), quality(slim, RECOVERED)
    return RunResult(
        **{**dict(result), **columns},
        accuracy_cut=cut.accuracy,
        metrics_cut=cut.metrics,
        accuracy_recovered=recovered.accuracy,
        metrics_recovered=recovered.metrics,
        onnx=OnnxResult(
            path=file.path,
            parity=file.parity,
            latency_ms={"dense": base.dense.median_ms, "slim": base.slim.median_ms},
            folded=file.folded,
        ),
    )


@dataclass(frozen=True)
class Timed:
    """A cut whose two ONNX files were timed side by side."""

    result: PruneResult
    file: Exported
    """The slim one."""
    dense: Latency
    slim: Latency


def timed(job: Job, dense: Loaded, slim: Loaded, before: Path, after: Path) -> Timed:
    """Export both networks, time them in turns, and say what the cut came to, speed included.

    Raises:
        NamPrunerError: see `export`; or `slim` was never cut.
    """
    base = prune_result(slim)
    files = [export(job, dense, before), export(job, slim, after)]
    times = measure(
        {file.path: file.path for file in files},
        job.task.proof(1),
        threads=job.recipe.threads,
        progress=job.progress,
    )
    first, second = (times[file.path] for file in files)
    columns = {
        side: column.model_copy(update={"size_bytes": file.size_bytes, "latency": latency})
        for side, column, file, latency in zip(
            ("before", "after"), (base.before, base.after), files, (first, second), strict=True
        )
    }
    result = base.model_copy(update={**columns, "faster": judge(first, second).faster})
    return Timed(result, files[1], first, second)


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
    # a checkpoint outlives the files that its training started from
    if not dense.record.lineage.plans and all(file.is_file() for file in _started_from(job)):
        fresh = factors(build(job))
        names = ("untrained", "trained")
        drawn["factors-trained"] = (
            "Scale factors before and after training under the penalty",
            figures.scale_factor_histogram(fresh, before, names=names),
        )
    return drawn


def _started_from(job: Job) -> list[Path]:
    """Return the files that a training began with."""
    model, weights = job.recipe.model, job.recipe.weights
    files = [] if weights is None else [weights]
    return [*files, Path(model.removeprefix(YOLO))] if model.endswith(".pt") else files


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
        title=f"{job.recipe.model} on {job.task.name}",
        facts={"command": command, **facts(job)},
        figures=drawn,
    )
    write(page, html)


def facts(job: Job) -> dict[str, str]:
    """Return what the numbers of this run depend on."""
    library = "ultralytics" if job.recipe.model.startswith(YOLO) else "timm"
    packages = ("nampruner", "torch", "onnxruntime", library)
    return {
        "model": job.recipe.model,
        "data": job.task.name,
        "seed": str(job.recipe.seed),
        "device": str(job.device),
        "processor": f"{processor()}, {os.cpu_count()} logical cores",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
    }


def scratch() -> "tempfile.TemporaryDirectory[str]":
    """Return a folder for files that nobody keeps."""
    return tempfile.TemporaryDirectory(prefix="nampruner-")
