"""How values look in a terminal."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from nampruner.int8 import Int8Gain
from nampruner.plan import PruningPlan
from nampruner.results import PruneResult

if TYPE_CHECKING:
    from nampruner.pipeline.exporting import Exported
    from nampruner.pipeline.layers import PerLayer
    from nampruner.pipeline.look import Benchmark, Evaluated, Ranking
    from nampruner.pipeline.stages import Made


def table(*columns: str, rows: Sequence[tuple[str, ...]]) -> Table:
    """Return a table: first column left, numbers right."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        grid.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    return grid


def plan_table(plan: PruningPlan) -> Table:
    """Return a plan layer by layer: width before and after, threshold, why left alone."""
    reasons = {row.layer: row.reason for row in plan.left_alone}
    rows = []
    for row in plan.layers:
        threshold = "" if row.threshold is None else f"{row.threshold:.4g}"
        widths = f"{row.width_before} → {row.width_after}"
        rows.append((row.layer, widths, threshold, reasons.pop(row.layer, "")))
    rows += [(layer, "", "", reason) for layer, reason in reasons.items()]
    grid = table("layer", "width", "threshold", "left alone", rows=rows)
    grid.columns[3].justify = "left"
    return grid


def before_after(result: PruneResult) -> list[RenderableType]:
    """Return the before/after table and what stands under it."""
    from nampruner.report import (
        before_after_rows,
        certificate_rows,
        not_faster,
        requested_and_achieved,
    )

    facts = [f"{label}: {value}" for label, value in certificate_rows(result.certificate)]
    warning = not_faster(result)
    return [
        *([Text(warning, "bold red")] if warning else []),
        table("", "dense", "slim", "change", rows=before_after_rows(result)),
        "",
        Text(f"{requested_and_achieved(result.requested, result.achieved)}."),
        Text(f"Certificate: {'; '.join(facts)}."),
    ]


def made(value: "Made") -> Table:
    """Return where a checkpoint is and what it achieves."""
    from nampruner.report import percent

    rows = [(name.replace("_", " "), percent(share)) for name, share in value.metrics.items()]
    return table("checkpoint", value.checkpoint, rows=rows)


def evaluated(value: "Evaluated") -> Table:
    """Return one evaluation."""
    from nampruner.report import percent

    told = {name: percent(share) for name, share in value.measures.items()}
    told |= {} if value.loss is None else {"loss": f"{value.loss:.4f}"}
    told |= {} if value.images is None else {"images": str(value.images)}
    return table("", "data", *told, rows=[(value.path, value.data, *told.values())])


def exported(value: "Exported") -> list[RenderableType]:
    """Return an exported file or folder, its proof, and what became of NAM's gates."""
    from nampruner.report import folded_gates, same_boxes, size

    parity = value.parity
    proof = ("inputs", str(parity.inputs))
    if parity.top1_agreement is not None:
        proof = ("top-1 agrees", f"{100 * parity.top1_agreement:.2f} % of {parity.inputs}")
    row = (value.path, size(value.size_bytes), f"{parity.max_relative:.1e}", proof[1])
    columns = (value.format, "size", "apart (relative)", proof[0])
    shown: list[RenderableType] = [table(*columns, rows=[row])]
    if parity.boxes:
        shown.append(Text(f"{same_boxes(parity.boxes)}."))
    if value.folded:
        shown.append(Text(f"{folded_gates(value.folded)}."))
    return [*shown, *_int8(value.int8, value.size_bytes)] if value.int8 else shown


def _int8(value: Int8Gain, size_bytes: int) -> list[RenderableType]:
    """Return INT8 beside float, and what stayed float."""
    from nampruner.report import milliseconds, percent, size

    rows = [
        ("latency", milliseconds(value.latency_float), milliseconds(value.latency)),
        ("size", size(value.size_float), size(size_bytes)),
    ]
    rows += [(k, percent(v), percent(value.metrics[k])) for k, v in value.metrics_float.items()]
    if value.accuracy_float is not None and value.accuracy is not None:
        rows.append(("test accuracy", percent(value.accuracy_float), percent(value.accuracy)))
    kept = ", ".join(each.node for each in value.kept_float) or "none"
    told = value.verdict if value.faster else f"it is not faster here ({value.verdict})"
    first = value.latency
    return [
        "",
        table("", "float", "INT8", rows=rows),
        Text(
            f"{value.quantized} nodes are INT8, {len(value.kept_float)} stay float: {kept}. "
            f"INT8 against float: {told}; batch {first.batch}, {_threads(first.threads)}, "
            f"{first.runtime}."
        ),
    ]


def benchmark(value: "Benchmark") -> list[RenderableType]:
    """Return candidates side by side."""
    from nampruner.report import milliseconds, size

    first = value.candidates[0].latency
    threads = _threads(first.threads)
    rows = [
        (
            each.path,
            size(each.size_bytes),
            milliseconds(each.latency),
            f"×{each.times:.2f}",
            each.verdict,
        )
        for each in value.candidates
    ]
    caption = f"median ± spread of {first.runs} runs, batch {first.batch}, {threads}, "
    caption += first.runtime
    grid = table("", "ONNX file", "latency", "of the first", "", rows=rows)
    return [grid, Text(caption), *(_per_layer(value.per_layer) if value.per_layer else ())]


def _per_layer(value: "PerLayer") -> list[RenderableType]:
    """Return the slowest layers, side by side."""
    from nampruner.figures import slowest

    times = {row.layer: row.ms for row in value.layers}
    rest = {f"unmatched: {row.layer}": row.ms for row in value.unmatched}
    rows = [
        (layer, *(cell for pair in zip(ms, value.total_ms, strict=True) for cell in _part(*pair)))
        for layer, ms in {**slowest(times), **rest, "all": value.total_ms}.items()
    ]
    columns = [cell for name in value.candidates for cell in (f"{name}, ms", "share")]
    caption = (
        f"Medians of {min(value.runs)} profiled runs. The profiler takes time too, so compare "
    )
    caption += "layers, not sums; unmatched is what ONNX Runtime put in."
    return ["", table("layer", *columns, rows=rows), Text(caption)]


def _part(ms: float | None, total: float) -> tuple[str, str]:
    return ("–", "–") if ms is None else (f"{ms:.3f}", f"{100 * ms / max(total, 1e-12):.1f} %")


def ranking(value: "Ranking") -> list[RenderableType]:
    """Return scores per layer, their histogram, and what some ratios would do."""
    layers = [
        (r.layer, str(r.width), f"{r.least:.4g}", f"{r.median:.4g}", f"{r.largest:.4g}")
        for r in value.layers
    ]
    ratios = [
        (f"{r.ratio:g}", f"{r.achieved:.3f}", f"{100 * r.macs:.1f} %", f"{100 * r.params:.1f} %")
        for r in value.would_be
    ]
    return [
        table("layer", "channels", "least", "median", "largest", rows=layers),
        "",
        bars(value.scores),
        "",
        table("ratio", "achieved", "MACs remain", "params remain", rows=ratios),
        *_times(value),
    ]


def _times(value: "Ranking") -> list[RenderableType]:
    """Return where time goes and what a step of width saves, the largest saving first."""
    if value.times is None or value.staircase is None:
        return []
    rows = [
        (
            *(r.layer, str(r.width), str(r.step)),
            *(f"{100 * r.share:.1f} %", f"{100 * r.saved:.2f} %", f"{100 * r.paid:.2f} %"),
        )
        for r in sorted(value.times, key=lambda row: -row.saved)
    ]
    curves = value.staircase
    ours, theirs = curves.steps_in(int8=False), curves.steps_in(int8=True)
    steps = ", ".join(
        f"{kind} {step} (float {ours[kind]}, INT8 {theirs.get(kind, '–')})"
        for kind, step in curves.steps.items()
    )
    threads = _threads(curves.threads)
    caption = f"Of the time of all convolutions, ONNX Runtime, batch 1, {threads}. "
    caption += f"Steps of this device: {steps or 'none, the layers are too narrow'}."
    paid = "error paid" if value.importance == "reconstruction" else "importance paid"
    columns = ("layer", "channels", "step", "share of time", "a step saves", paid)
    return ["", table(*columns, rows=rows), Text(caption)]


def _threads(number: int) -> str:
    return f"{number} thread{'s' if number > 1 else ''}"


def bars(values: tuple[float, ...], *, bins: int = 12, width: int = 50) -> Table:
    """Return a histogram in text."""
    low, high = min(values), max(values)
    step = (high - low) / bins or 1.0
    counts = [0] * bins
    for value in values:
        counts[min(int((value - low) / step), bins - 1)] += 1
    most = max(counts)
    edges = [f"{low + step * n:.4g}" for n in range(bins + 1)]
    rows = [
        (f"{low} … {high}", str(number), "█" * round(width * number / most))
        for (low, high), number in zip(pairwise(edges), counts, strict=True)
    ]
    grid = table("importance", "channels", "", rows=rows)
    grid.columns[2].justify = "left"
    return grid
