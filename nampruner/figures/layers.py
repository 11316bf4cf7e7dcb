"""Where the time of several networks goes, layer by layer."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nampruner.figures.style import (
    AFTER,
    BEFORE,
    INK,
    MUTED,
    blank,
    legend_below,
    shortened,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LAYERS = 20
"""Further ones are added up."""
_COLORS = (BEFORE, AFTER, MUTED, INK)

Times = Mapping[str, Sequence[float | None]]
"""Layer → milliseconds in every network; None where it has no such layer."""


def slowest(times: Times, most: int = MOST_LAYERS) -> dict[str, tuple[float | None, ...]]:
    """Return the layers that take longest in any network, the others added up under one name."""
    order = sorted(times, key=lambda layer: -max(ms or 0.0 for ms in times[layer]))
    # a row that says "1 other layer" is no shorter than that layer
    first = order if len(order) <= most + 1 else order[:most]
    found = {layer: tuple(times[layer]) for layer in first}
    rest = order[len(first) :]
    if rest:
        columns = zip(*(times[layer] for layer in rest), strict=True)
        found[f"{len(rest)} other layers"] = tuple(sum(ms or 0.0 for ms in c) for c in columns)
    return found


def layer_times(times: Times, names: Sequence[str]) -> "Figure":
    """Draw the time of the slowest layers of every network as bars, the slowest on top."""
    rows = slowest(times)
    totals = [sum(each[n] or 0.0 for each in times.values()) for n in range(len(names))]
    height = 0.8 / len(names)
    with styled():
        figure = blank(7.0, (0.1 + 0.13 * len(names)) * len(rows) + 1.4)
        axes = figure.subplots()
        for number, name in enumerate(names):
            places = [at + (number - (len(names) - 1) / 2) * height for at in range(len(rows))]
            axes.barh(
                places,
                [row[number] or 0.0 for row in rows.values()],
                height=0.9 * height,
                color=_COLORS[number % len(_COLORS)],
                label=f"{shortened(name, 40)}: {totals[number]:.3g} ms",
            )
        axes.set_yticks(range(len(rows)), [shortened(row, 40) for row in rows], fontsize=7)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.set_title("Where the time goes, layer by layer")
        axes.set_xlabel("milliseconds, profiled")
        legend_below(figure, axes)
    return figure
