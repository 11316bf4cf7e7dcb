"""The stages that look and touch nothing: rank, evaluate, bench."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nampruner import figures
from nampruner.checkpoint import CheckpointRecord, parse_record
from nampruner.config import TARGETS, BenchCommand, RankCommand
from nampruner.errors import NamPrunerError
from nampruner.export import export_onnx, exportable, read_metadata
from nampruner.graph import DependencyGraph, UnitGroup
from nampruner.importance import Scores
from nampruner.latency import compare, measure, open_session
from nampruner.lineage import Lineage
from nampruner.options import Options
from nampruner.pipeline.exporting import RECORD_KEY
from nampruner.pipeline.folders import is_pt
from nampruner.pipeline.job import Job, Loaded, load, prepare, recipe_of, resume
from nampruner.pipeline.layers import PerLayer, draw_layers, per_layer
from nampruner.pipeline.publish import scratch
from nampruner.pipeline.task import Judged
from nampruner.plan import Latency, Record
from nampruner.progress import Progress, Silent
from nampruner.recipe import Recipe
from nampruner.selection import select
from nampruner.staircase import Bench, GroupTime, Staircase, savings

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


class LayerScores(Record):
    """Importance of one group of channels, named after the first layer that produces it."""

    layer: str
    width: int
    least: float
    median: float
    largest: float


class WouldBe(Record):
    """What a ratio would come to."""

    ratio: float
    achieved: float
    macs: float
    """Fraction of the MACs that would remain."""
    params: float


class Ranking(Record):
    """What `nampruner rank` reports."""

    importance: str
    layers: tuple[LayerScores, ...]
    scores: tuple[float, ...]
    """Of every unit that can be cut, ascending."""
    would_be: tuple[WouldBe, ...]
    times: tuple[GroupTime, ...] | None = None
    """What one step of width saves in each group; None where time was not asked for."""
    staircase: Staircase | None = None
    """What that step was read from."""


def rank(job: Job, found: Loaded, *, latency: bool = False) -> Ranking:
    """Score every channel and say what some ratios would do; the model is not changed.

    With `latency` it also measures where on this device fewer channels are less time.

    Raises:
        NamPrunerError: nothing can be cut, or a glob matches nothing.
    """
    recipe, graph = job.recipe, job.graph(found.model)
    scores = job.scores(found.model, graph)
    device = job.measured(found.model)
    plans = [select(graph, scores, _at(recipe, ratio), device) for ratio in RATIOS]
    units = [int(unit) for group in graph.groups for unit in group.units]
    return Ranking(
        importance=recipe.importance,
        layers=tuple(_layer(group, scores) for group in graph.groups),
        scores=tuple(sorted(scores[units].tolist())),
        would_be=tuple(
            WouldBe(
                ratio=ratio,
                achieved=plan.achieved.ratio,
                macs=plan.achieved.macs,
                params=plan.achieved.params,
            )
            for ratio, plan in zip(RATIOS, plans, strict=True)
        ),
        **(_times(job, found, graph, scores) if latency else {}),
    )


def _times(job: Job, found: Loaded, graph: DependencyGraph, scores: Scores) -> dict[str, Any]:
    layers, bench = job.layers(found.model), Bench(threads=job.recipe.threads)
    curves, steps = job.staircase(found.model)
    times = savings(graph, scores, layers, bench, steps, job.progress)
    return {"staircase": curves, "times": times}


def rank_path(
    path: Path, flags: RankCommand, *, trust: bool = False, progress: Progress | None = None
) -> Ranking:
    """Open a checkpoint and rank its channels.

    Raises:
        NamPrunerError: see `resume` and `rank`.
    """
    job, found = resume(path, flags, trust=trust, progress=progress)
    return rank(job, found, latency=flags.latency)


def draw_scores(ranking: Ranking, path: Path) -> None:
    """Draw the histogram of the scores as PNG, and beside it the staircase that was measured."""
    figure = figures.scale_factor_histogram(
        {"scores": np.array(ranking.scores)},
        title=f"Importance ({ranking.importance})",
        names=("channels", ""),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figures.save(figure, path)
    if ranking.staircase is not None and ranking.staircase.stairs:
        drawn = figures.staircase(ranking.staircase)
        figures.save(drawn, path.with_name(f"{path.stem}-staircase.png"))


def _at(recipe: Recipe, ratio: float) -> Recipe:
    return recipe.model_copy(update={**dict.fromkeys(TARGETS), "ratio": ratio})


def _layer(group: UnitGroup, scores: Scores) -> LayerScores:
    own = scores[group.units]
    return LayerScores(
        layer=group.name,
        width=group.width,
        least=float(own.min()),
        median=float(np.median(own)),
        largest=float(own.max()),
    )


class Evaluated(Judged):
    """What `nampruner evaluate` reports."""

    path: str
    data: str


def evaluate_path(
    path: Path, flags: Options, *, trust: bool = False, progress: Progress | None = None
) -> Evaluated:
    """Judge a checkpoint or an ONNX file on the held-out images.

    Raises:
        NamPrunerError: it is neither, or does not fit the data.
    """
    progress = progress or Silent()
    if path.is_file() and not is_pt(path):
        job = _of_onnx(path, flags, trust=trust, progress=progress)
        result = job.task.evaluate_onnx(path, progress)
    else:
        job, found = resume(path, flags, trust=trust, progress=progress)
        result = job.task.evaluate(found.model, progress)
    return Evaluated(path=str(path), data=job.task.name, **result.model_dump())


def _of_onnx(path: Path, flags: Options, *, trust: bool, progress: Progress) -> Job:
    """Find the images for an ONNX file; one of ours says which, else `--data` must."""
    said = read_metadata(path).get(RECORD_KEY)
    record = (
        parse_record(said, f"the metadata of {path}")
        if said
        else CheckpointRecord(lineage=Lineage())
    )
    return prepare(recipe_of(record, flags, str(path)), trust=trust, progress=progress)


class Timed(Record):
    """One candidate of `nampruner bench`."""

    path: str
    size_bytes: int
    """Size of the ONNX file."""
    latency: Latency
    times: float
    """Time over that of the first candidate: the median of pairs of turns."""
    verdict: str
    """Against the first candidate."""


class Benchmark(Record):
    """What `nampruner bench` reports."""

    candidates: tuple[Timed, ...]
    per_layer: PerLayer | None = None
    """Where the time goes; None where that was not asked for."""


def bench(
    paths: Sequence[Path],
    options: BenchCommand,
    *,
    figure: Path | None = None,
    trust: bool = False,
    progress: Progress | None = None,
) -> Benchmark:
    """Time checkpoints and ONNX files in turns, all as ONNX in ONNX Runtime.

    Args:
        figure: where the times per layer are drawn, a PNG.

    Raises:
        NamPrunerError: there is nothing to compare, or one cannot be run.
    """
    if len(paths) < 2 or len(set(paths)) < len(paths):
        raise NamPrunerError(
            "bench compares; give at least two checkpoints or ONNX files, each once"
        )
    if figure is not None and not options.per_layer:
        raise NamPrunerError("the figure of bench is that of --per-layer; give both or neither")
    with scratch() as folder:
        files = {
            str(path): _as_onnx(path, Path(folder) / f"{n}.onnx", trust=trust, progress=progress)
            for n, path in enumerate(paths)
        }
        inputs, threads = _noise(files.values(), options.batch), options.threads
        times = measure(files, inputs, threads=threads, rounds=options.rounds, progress=progress)
        layers = None
        if options.per_layer:
            layers = per_layer(files, inputs, threads=threads, progress=progress)
            if figure is not None:
                draw_layers(layers, figure)
        first = times[str(paths[0])]
        verdicts = {name: compare(first, latency) for name, latency in times.items()}
        return Benchmark(
            candidates=tuple(
                Timed(
                    path=name,
                    size_bytes=file.stat().st_size,
                    latency=times[name],
                    times=1 / verdicts[name].speedup,
                    verdict="" if times[name] is first else str(verdicts[name]),
                )
                for name, file in files.items()
            ),
            per_layer=layers,
        )


def _as_onnx(path: Path, draft: Path, *, trust: bool, progress: Progress | None) -> Path:
    if path.is_file() and not is_pt(path):
        return path
    found = load(path, trust=trust)
    spec = found.record.input
    if spec is None:
        raise NamPrunerError(f"{path} does not say what images it takes; give it as an ONNX file")
    export_onnx(
        exportable(found.model),
        draft,
        torch.zeros(2, spec.channels, spec.height, spec.width),
        progress=progress,
    )
    return draft


def _noise(files: Iterable[Path], batch: int) -> Tensor:
    """Return inputs [batch, …] for the first file; their values do not matter for the time."""
    shape = open_session(next(iter(files))).get_inputs()[0].shape
    if not all(isinstance(size, int) for size in shape[1:]):
        raise NamPrunerError(f"an ONNX file of input {shape} has no fixed image size")
    return torch.randn(batch, *shape[1:], generator=torch.Generator().manual_seed(0))
