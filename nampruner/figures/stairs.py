"""How time follows width on one device."""

from typing import TYPE_CHECKING

from nampruner.figures.style import AFTER, BEFORE, INK, MUTED, PALE, blank, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nampruner.staircase import Kind, Staircase, Stairs

_COLORS = (BEFORE, AFTER, MUTED, INK)


def staircase(measured: "Staircase") -> "Figure":
    """Draw the time of every measured convolution as channels leave it, one panel per kind.

    INT8 is dashed. A step is marked: below it, fewer channels are not less time.
    """
    steps = measured.steps
    with styled():
        figure = blank(3.2 * len(steps) + 0.8, 3.8)
        panels = figure.subplots(1, len(steps), squeeze=False, sharey=True)[0]
        for axes, (kind, step) in zip(panels, steps.items(), strict=True):
            ours = [each for each in measured.stairs if each.geometry.kind == kind]
            removed = sorted({each.widths[0] - width for each in ours for width in each.widths})
            places = {number: place for place, number in enumerate(removed)}
            shapes = list(dict.fromkeys(each.geometry for each in ours))
            for each in ours:
                _draw(axes, each, places, _COLORS[shapes.index(each.geometry) % len(_COLORS)])
            if step in places:
                axes.axvline(places[step], color=PALE, linewidth=8, zorder=0)
            axes.set_xticks(range(len(removed)), [str(number) for number in removed])
            axes.set_title(_titled(measured, kind, step))
            axes.set_xlabel("channels removed")
            axes.grid(axis="y")
            axes.legend(fontsize=7, loc="best")
        panels[0].set_yscale("log", base=2)  # shared; a cliff is ten times what a step is
        panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panels[0].set_ylabel("time, of the whole width")
        threads = f"{measured.threads} thread{'s' if measured.threads > 1 else ''}"
        figure.suptitle(
            f"Time follows width in steps (ONNX Runtime, batch 1, {threads}; INT8 dashed)",
            x=0.02,
            ha="left",
        )
    return figure


def _draw(axes: "Axes", stairs: "Stairs", places: dict[int, int], color: str) -> None:
    shape = stairs.geometry
    label = (
        f"{shape.kernel[0]}×{shape.kernel[1]}, {shape.outputs} at {shape.size[0]}×{shape.size[1]}"
    )
    at = [places[stairs.widths[0] - width] for width in stairs.widths]
    axes.plot(
        at,
        [ms / stairs.ms[0] for ms in stairs.ms],
        color=color,
        marker="o",
        markersize=3,
        linestyle="--" if stairs.int8 else "-",
        label="_nolegend_" if stairs.int8 else label,
    )


def _titled(measured: "Staircase", kind: "Kind", step: int) -> str:
    """Say the step, and where float and INT8 have others."""
    ours, theirs = (measured.steps_in(int8=int8).get(kind) for int8 in (False, True))
    both = f" (float {ours}, INT8 {theirs})" if theirs not in (None, ours) else ""
    return f"{kind}: step {step}{both}"
