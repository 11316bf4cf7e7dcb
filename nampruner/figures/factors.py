"""Histograms of the scale factors |γ|, before and after the penalty or the cut.

The axis is logarithmic, because a penalty moves factors by decades; exact zeros, which such an
axis has no place for, are drawn or written apart.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nampruner.figures.style import (
    AFTER,
    BEFORE,
    blank,
    grouped,
    legend_below,
    shortened,
    stacked,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = np.ndarray[Any, Any]
Factors = Mapping[str, Array]
"""Layer → its scale factors γ (or λ), any shape; the sign is ignored."""

_COLORS = (BEFORE, AFTER)
_DECADES = 5
"""Non-zero factors smaller than the largest by more than this fall into the first bin."""
_BINS = 48


def scale_factor_histogram(
    dense: Factors,
    slim: Factors | None = None,
    *,
    title: str | None = None,
    names: tuple[str, str] = ("dense", "slim"),
) -> "Figure":
    """Draw how the scale factors of the whole network are spread.

    Args:
        dense: factors before the penalty, or before the cut.
        slim: factors after it.
        title: a line above the one that tells the number of zeros.
        names: what the two are called in the legend.
    """
    sets = [magnitudes(factors) for factors in (dense, slim) if factors is not None]
    bins = edges(*sets)
    with styled():
        figure = blank(7.0, 3.8)
        axes = figure.subplots()
        for index, values in enumerate(sets):
            label = f"{names[index]} ({grouped(values.size)})"
            _draw_histogram(axes, values, bins, index, label)
            _draw_zeros(axes, values, bins, (index, len(sets)))
        _label_magnitudes(axes, bins)
        axes.set_ylabel("scale factors")
        axes.grid(axis="y")
        legend_below(figure, axes)
        found = [f"{grouped(int((v == 0).sum()))} of {grouped(v.size)}" for v in sets]
        axes.set_title(stacked(title, f"Exactly 0: {' → '.join(found)} scale factors"))
    return figure


def layer_histograms(
    dense: Factors,
    slim: Factors | None = None,
    *,
    title: str | None = None,
    names: tuple[str, str] = ("dense", "slim"),
) -> "Figure":
    """Draw the scale factors layer by layer, small, on one common axis.

    Args:
        dense, slim, title, names: as in `scale_factor_histogram`; a layer that only one of the
            two has is drawn from that one.
    """
    sets = [factors for factors in (dense, slim) if factors is not None]
    layers = list(dict.fromkeys(layer for factors in sets for layer in factors))
    columns = min(max(math.ceil(math.sqrt(0.7 * len(layers))), 3), 6)
    rows = max(math.ceil(len(layers) / columns), 1)
    bins = edges(*(magnitudes(factors) for factors in sets))
    with styled():
        figure = blank(1.9 * columns, 1.25 * rows + 0.8)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
        for axes, layer in zip(grid, layers, strict=False):
            _draw_layer(axes, layer, [factors.get(layer) for factors in sets], bins)
        for axes in grid[len(layers) :]:
            axes.set_visible(False)
        for axes in grid[max(len(layers) - columns, 0) : len(layers)]:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("|γ|")
        figure.suptitle(stacked(title, _layers_found(sets)), x=0.01, ha="left")
        for index, name in enumerate(names[: len(sets)]):
            _draw_histogram(grid[0], np.zeros(0), bins, index, name)
        legend_below(figure, grid[0])
    return figure


def magnitudes(factors: Factors) -> Array:
    """Return |γ| of all layers as one vector [ΣC]."""
    parts = [np.abs(np.asarray(values, dtype=np.float64)).ravel() for values in factors.values()]
    return np.concatenate(parts) if parts else np.zeros(0)


def edges(*sets: Array) -> Array:
    """Return bin edges, evenly spaced in decades, that hold every non-zero value of all sets."""
    values = np.concatenate(sets)
    values = values[values > 0]
    if values.size == 0:
        return np.geomspace(0.1, 10, _BINS + 1)
    high = float(values.max()) * 1.0001
    low = min(max(float(values.min()), high * 10.0**-_DECADES), high / 10) * 0.9999
    return np.geomspace(low, high, _BINS + 1)


def _draw_histogram(axes: "Axes", values: Array, bins: Array, index: int, label: str) -> None:
    """Fill the first set and outline the second: where they coincide, both stay visible."""
    counts, _ = np.histogram(np.maximum(values[values > 0], bins[0]), bins)
    if index == 0:
        axes.stairs(counts, bins, fill=True, color=_COLORS[0], alpha=0.55, label=label)
    else:
        axes.stairs(counts, bins, color=_COLORS[1], linewidth=1.3, label=label)


def _zero_place(bins: Array) -> tuple[float, float]:
    """Return where the zeros stand: left of the first bin, after a gap."""
    decades = math.log10(bins[-1] / bins[0])
    return bins[0] * 10 ** (-0.16 * decades), bins[0] * 10 ** (-0.06 * decades)


def _draw_zeros(axes: "Axes", values: Array, bins: Array, part: tuple[int, int]) -> None:
    index, of = part
    zeros = int((values == 0).sum())
    start, stop = np.geomspace(*_zero_place(bins), of + 1)[index : index + 2]
    axes.bar(start, zeros, stop - start, align="edge", color=_COLORS[index], alpha=0.8)
    place = (math.sqrt(start * stop), zeros)
    axes.annotate(
        grouped(zeros), place, (0, 2), textcoords="offset points", ha="center", fontsize=8
    )


def _label_magnitudes(axes: "Axes", bins: Array) -> None:
    start, stop = _zero_place(bins)
    axes.set_xscale("log")
    axes.set_xlim(start * (start / stop) ** 0.3, bins[-1] * (stop / start) ** 0.3)
    powers = range(math.ceil(math.log10(bins[0])), math.floor(math.log10(bins[-1])) + 1)
    axes.set_xticks([math.sqrt(start * stop), *(10.0**power for power in powers)])
    axes.set_xticklabels(["exactly\n0", *(f"$10^{{{power}}}$" for power in powers)])
    axes.minorticks_off()
    axes.set_xlabel("|γ|")


def _draw_layer(axes: "Axes", layer: str, sets: Sequence[Array | None], bins: Array) -> None:
    zeros = []
    for index, factors in enumerate(sets):
        if factors is None:
            continue
        values = magnitudes({layer: factors})
        _draw_histogram(axes, values, bins, index, "")
        zeros.append(f"{100 * np.mean(values == 0):.0f} %" if values.size else "–")
    axes.set_xscale("log")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.minorticks_off()
    axes.set_title(shortened(layer, 24), fontsize=7.5, weight="normal")
    axes.text(0.02, 0.94, f"0: {' → '.join(zeros)}", transform=axes.transAxes, va="top", size=7)


def _layers_found(sets: Sequence[Factors]) -> str:
    found = [
        f"{sum(bool((np.asarray(values) == 0).any()) for values in factors.values())} "
        f"of {len(factors)}"
        for factors in sets
    ]
    return f"Layers with scale factors at exactly 0: {' → '.join(found)}"
