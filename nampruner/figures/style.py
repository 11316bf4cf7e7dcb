"""How every figure looks, and how it becomes a file.

The colours are Okabe and Ito's: they stay apart for every kind of colour blindness, and in grey.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEFORE, AFTER, MUTED, PALE, INK = "#0072B2", "#D55E00", "#9AA5B1", "#D9DEE4", "#1F2933"

_STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.titlesize": 11.0,
    "figure.titleweight": "bold",
    "grid.color": "#E4E7EB",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.hashsalt": "nampruner",
}


@contextmanager
def styled() -> Iterator[None]:
    """Make and write figures in the house's style; matplotlib's settings are put back."""
    from matplotlib import rc_context

    with rc_context(_STYLE):  # type: ignore[arg-type]
        yield


def blank(width: float, height: float) -> "Figure":
    """Return an empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def legend_below(figure: "Figure", axes: "Axes") -> None:
    """Put the legend of `axes` under the figure, in one line, where it can hide nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower left", ncols=len(labels))


def stacked(title: str | None, finding: str) -> str:
    """Return the caller's title with what the figure shows under it."""
    return f"{title}\n{finding}" if title else finding


def shortened(name: str, length: int) -> str:
    """Keep the end of a module's name, which tells it from its neighbours."""
    return name if len(name) <= length else "…" + name[1 - length :]


def grouped(number: int) -> str:
    """Write 1234567 as 1 234 567, with spaces that no line breaks at."""
    return f"{number:,}".replace(",", "\u202f")


def svg(figure: "Figure") -> bytes:
    """Return `figure` as SVG, the same bytes for the same figure."""
    buffer = BytesIO()
    with styled():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def save(figure: "Figure", path: Path) -> None:
    """Write `figure` as PNG, under a draft name first, so no half picture is ever found."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with styled():
            figure.savefig(draft, format="png", metadata={"Software": None})
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
