"""What a plan does to the widths, and how training went."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from nampruner.figures.style import (
    AFTER,
    BEFORE,
    MUTED,
    PALE,
    blank,
    grouped,
    legend_below,
    shortened,
    styled,
)
from nampruner.plan import LayerPlan, LayerRecovery, PruningPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]


def widths(plan: PruningPlan) -> "Figure":
    """Draw the width of every layer before and after the cut, the first layer on top."""
    rows = plan.layers
    total = sum(row.width_before for row in rows)
    removed = total - sum(row.width_after for row in rows)
    with styled():
        figure = blank(7.0, 0.19 * len(rows) + 1.3)
        axes = figure.subplots()
        places = range(len(rows))
        axes.barh(places, [row.width_before for row in rows], color=PALE, label="removed")
        _draw_kept(axes, rows)
        _label_widths(axes, rows)
        share = f" ({100 * removed / total:.0f} %)" if total else ""
        axes.set_title(f"{grouped(removed)} of {grouped(total)} channels go{share}")
        axes.set_xlabel("channels")
        legend_below(figure, axes)
    return figure


def _draw_kept(axes: "Axes", rows: Sequence[LayerPlan]) -> None:
    for color, label, cut in ((BEFORE, "kept", True), (MUTED, "whole layer kept", False)):
        some = {
            place: row.width_after
            for place, row in enumerate(rows)
            if (row.width_after < row.width_before) is cut
        }
        if some:
            axes.barh(list(some), list(some.values()), color=color, height=0.5, label=label)


def _label_widths(axes: "Axes", rows: Sequence[LayerPlan]) -> None:
    for place, row in enumerate(rows):
        cut = row.width_after != row.width_before
        text = f"{row.width_before} → {row.width_after}" if cut else str(row.width_before)
        axes.annotate(
            text,
            (row.width_before, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    axes.set_yticks(range(len(rows)), [shortened(row.layer, 40) for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)


def recovered(layers: Sequence[LayerRecovery]) -> "Figure":
    """Draw how much of what each consumer lost is given back by the channels that stay."""
    layers = [row for row in layers if row.explained is not None]
    given = [100 * (row.explained or 0.0) for row in layers]
    mean = sum(given) / max(len(layers), 1)
    with styled():
        figure = blank(7.0, 0.19 * len(layers) + 1.3)
        axes = figure.subplots()
        places = range(len(layers))
        axes.barh(places, [100.0] * len(layers), color=PALE, label="lost")
        axes.barh(places, given, color=BEFORE, height=0.5, label="given back")
        axes.set_yticks(places, [shortened(row.layer, 40) for row in layers], fontsize=7)
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.set_title(f"{mean:.0f} % of what was removed is given back without training")
        axes.set_xlabel("share of the variance, %")
        legend_below(figure, axes)
    return figure


def training_curves(metrics: Rows) -> "Figure":
    """Draw how good it was, the loss and exact zeros over the epochs, stage after stage.

    Args:
        metrics: rows of `metrics.jsonl`: stage, epoch, loss, train_accuracy,
            validation_accuracy, zeros; what a row lacks leaves a gap. Rows without an accuracy are
            drawn by the measures that they have in its place: mAP50, mAP50-95 …
    """
    shown = _shown(metrics)
    with styled():
        figure = blank(7.0, 5.6)
        quality, loss, zeros = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
        for key, color in zip(shown, (BEFORE, AFTER), strict=False):
            _draw_curve(quality, metrics, key, color)
        _draw_curve(loss, metrics, "loss", BEFORE)
        _draw_curve(zeros, metrics, "zeros", BEFORE)
        quality.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        quality.set_title(_found(metrics, shown[-1]), pad=18)
        loss.set_yscale("log")
        named = (quality, "accuracy" if shown == _ACCURACIES else shown[-1].rstrip("0123456789-"))
        for axes, label in (named, (loss, "loss"), (zeros, "scale factors at 0")):
            axes.set_ylabel(label)
            axes.grid(axis="y")
        _mark_stages((quality, loss, zeros), metrics)
        legend_below(figure, quality)
    return figure


_ACCURACIES = ("train_accuracy", "validation_accuracy")
_NO_MEASURES = {"stage", "epoch", "loss", "lr", "zeros", "factors", "seconds"}


def _shown(metrics: Rows) -> tuple[str, ...]:
    """Return the two measures to draw; the one in the title last."""
    found = [key for key in (metrics[-1] if metrics else ()) if key not in _NO_MEASURES]
    if not found or any(key in _ACCURACIES for key in found):
        return _ACCURACIES
    return tuple(reversed(found[:2]))


def _stages(metrics: Rows) -> list[tuple[str, list[tuple[int, Mapping[str, Any]]]]]:
    """Return stage → its rows, each with its place on the common axis, counted from 1."""
    numbered = enumerate(metrics, start=1)
    return [
        (stage, list(rows))
        for stage, rows in groupby(numbered, key=lambda item: str(item[1].get("stage", "")))
    ]


def _draw_curve(axes: "Axes", metrics: Rows, key: str, color: str) -> None:
    """Draw one line per stage: across a cut there is nothing to connect."""
    label = key.split("_")[0]
    for _, rows in _stages(metrics):
        points = [(place, row[key]) for place, row in rows if row.get(key) is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True), color=color, marker="o", markersize=3, label=label
            )
            label = "_nolegend_"


def _mark_stages(all_axes: Sequence["Axes"], metrics: Rows) -> None:
    from matplotlib.ticker import MaxNLocator

    all_axes[-1].set_xlabel("epoch, all stages")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for stage, rows in _stages(metrics):
        start = rows[0][0] - 0.5
        for axes in all_axes if rows[0][0] > 1 else ():
            axes.axvline(start, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        place = (start, 1.0)
        all_axes[0].annotate(
            stage,
            place,
            (2, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=8,
        )


def _found(metrics: Rows, key: str) -> str:
    last = {str(row.get("stage", "")): row[key] for row in metrics if row.get(key) is not None}
    ends = ", ".join(f"{100 * value:.2f} % after {stage}" for stage, value in last.items())
    name = key.replace("_", " ")
    name = name[0].upper() + name[1:] if key in _ACCURACIES else name
    return f"{name}: {ends}" if ends else f"No {key.replace('_', ' ')} recorded"
