"""Where the time goes, layer by layer, of several networks side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from nampruner import figures
from nampruner.export import layers_of
from nampruner.latency import Profile, by_layer, profile
from nampruner.plan import Record
from nampruner.progress import Progress


class LayerTime(Record):
    """One layer in every candidate; None where a candidate has none of that name."""

    layer: str
    ms: tuple[float | None, ...]
    """Median of the profiled runs."""
    share: tuple[float | None, ...]
    """Of the time of all layers of the candidate."""


class PerLayer(Record):
    """Where the time of every candidate goes; times of single layers add up to `total_ms`."""

    candidates: tuple[str, ...]
    runs: tuple[int, ...]
    """Profiled runs of each."""
    total_ms: tuple[float, ...]
    """Of all layers; the profiler itself takes part of it."""
    layers: tuple[LayerTime, ...]
    """The slowest in any candidate first."""
    unmatched: tuple[LayerTime, ...]
    """By operation: nodes that ONNX Runtime put in and that belong to no layer."""


def per_layer(
    files: Mapping[str, Path], inputs: Tensor, *, threads: int, progress: Progress | None = None
) -> PerLayer:
    """Profile ONNX files in turns and put layers of the same name side by side.

    Raises:
        NamPrunerError: see `nampruner.latency.profile`.
    """
    runs = profile(files, inputs, threads=threads, progress=progress)
    return side_by_side({n: by_layer(runs[n], layers_of(file).find) for n, file in files.items()})


def side_by_side(profiles: Mapping[str, Profile]) -> PerLayer:
    """Put layers of the same name side by side."""
    found = list(profiles.values())
    totals = [each.total for each in found]
    return PerLayer(
        candidates=tuple(profiles),
        runs=tuple(each.runs for each in found),
        total_ms=tuple(totals),
        layers=_rows([each.layers for each in found], totals),
        unmatched=_rows([each.unmatched for each in found], totals),
    )


def _rows(columns: Sequence[Mapping[str, float]], totals: Sequence[float]) -> tuple[LayerTime, ...]:
    slowest = {
        name: max(column.get(name, 0.0) for column in columns)
        for column in columns
        for name in column
    }
    return tuple(
        LayerTime(
            layer=name,
            ms=tuple(column.get(name) for column in columns),
            share=tuple(
                column[name] / max(total, 1e-12) if name in column else None
                for column, total in zip(columns, totals, strict=True)
            ),
        )
        for name in sorted(slowest, key=lambda name: -slowest[name])
    )


def draw_layers(found: PerLayer, path: Path) -> None:
    """Draw the slowest layers as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figures.save(figures.layer_times(_milliseconds(found), found.candidates), path)


def _milliseconds(found: PerLayer) -> dict[str, tuple[float | None, ...]]:
    put_in = {f"unmatched: {row.layer}": row.ms for row in found.unmatched}
    return {row.layer: row.ms for row in found.layers} | put_in
