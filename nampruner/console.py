"""How values look in a terminal, and who draws the bars: results to stdout, all else to stderr."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic import BaseModel
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Live
from rich.table import Table
from rich.text import Text

from nampruner.plan import PruneResult, PruningPlan
from nampruner.progress import Bar, Progress

if TYPE_CHECKING:
    from nampruner.pipeline.look import Benchmark, Evaluated, Ranking
    from nampruner.pipeline.publish import Exported
    from nampruner.pipeline.stages import Made

_WIDTH_OF_A_FILE = 120
_SECONDS_BETWEEN_LINES = 5.0


def _console(*, stderr: bool = False) -> Console:
    """Return a console; what goes into a file is not folded at 80 characters."""
    stream = sys.stderr if stderr else sys.stdout
    free = not stream.isatty() and "COLUMNS" not in os.environ
    return Console(stderr=stderr, width=_WIDTH_OF_A_FILE if free else None, highlight=False)


def show(value: BaseModel, *views: RenderableType, as_json: bool) -> None:
    """Print a result: as tables, or as one JSON object that leaves out what was not measured."""
    if as_json:
        sys.stdout.write(value.model_dump_json(indent=2, exclude_none=True) + "\n")
        return
    console = _console()
    for view in views:
        console.print(view)


def complain(message: str) -> None:
    """Print what the user can put right."""
    _console(stderr=True).print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def tell(message: str) -> None:
    """Print one line beside the results."""
    _console(stderr=True).print(Text(message), soft_wrap=True)


def progress() -> Progress:
    """Return bars for a terminal, lines for anything else."""
    return _Bars() if sys.stderr.isatty() else _Lines()


def _numbers(values: dict[str, float]) -> str:
    """Write `loss 0.412  accuracy 97.31 %`."""
    texts = [
        f"{name} {100 * value:.2f} %" if name == "accuracy" else f"{name} {value:.3g}"
        for name, value in values.items()
    ]
    return "  ".join(texts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


class _Line:
    """A bar as a line now and then: when a tenth is done, but not every moment."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total = name, max(total, 1)
        self._done, self._tenths = 0, 0
        self._start = self._said = time.monotonic()
        self._numbers = ""

    def advance(self, **numbers: float) -> None:
        self._done += 1
        self._numbers = _numbers(numbers)
        tenths, now = 10 * self._done // self._total, time.monotonic()
        if self._tenths < tenths < 10 and now - self._said > _SECONDS_BETWEEN_LINES:
            self._tenths, self._said = tenths, now
            left = (now - self._start) * (self._total - self._done) / self._done
            self._say(f"{100 * self._done // self._total:3d} %", f"{_clock(left)} left")

    def end(self) -> None:
        """Say how long it took and what it came to."""
        self._say("done ", _clock(time.monotonic() - self._start))

    def _say(self, *parts: str) -> None:
        first, last = parts
        tell(f"{self._name:<10} {first}  {self._numbers}  {last}")


class _Lines:
    """Plain lines; what runs inside another piece of work has none of its own."""

    def __init__(self) -> None:
        self._depth = 0

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Bar]:
        line = _Line(name, total) if self._depth == 0 else None
        self._depth += 1
        try:
            yield line or _Mute()
        finally:
            self._depth -= 1
        if line is not None:
            line.end()

    def note(self, text: str) -> None:
        tell(text)


class _Mute:
    def advance(self, **numbers: float) -> None:
        pass


class _LiveBar:
    def __init__(self, live: Live, task: TaskID) -> None:
        self._live, self._task = live, task
        self.numbers = ""

    def advance(self, **numbers: float) -> None:
        self.numbers = _numbers(numbers)
        self._live.update(self._task, advance=1, numbers=self.numbers)


class _Bars:
    """Live bars; a finished one leaves a line."""

    def __init__(self) -> None:
        self._live = Live(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=_console(stderr=True),
            transient=True,
        )
        self._depth = 0

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Bar]:
        start = time.monotonic()
        bar = _LiveBar(self._live, self._live.add_task(name, total=total, numbers=""))
        self._depth += 1
        if self._depth == 1:
            self._live.start()
        try:
            yield bar
            if self._depth == 1:
                self.note(f"{name:<10} {bar.numbers}  {_clock(time.monotonic() - start)}")
        finally:
            self._live.remove_task(bar._task)
            self._depth -= 1
            if self._depth == 0:
                self._live.stop()

    def note(self, text: str) -> None:
        self._live.console.print(Text(text), soft_wrap=True)


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
    from nampruner.report import before_after_rows, certificate_rows, requested_and_achieved

    facts = [f"{label}: {value}" for label, value in certificate_rows(result.certificate)]
    return [
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

    row = (value.path, value.data, percent(value.accuracy), f"{value.loss:.4f}", str(value.images))
    return table("", "data", "accuracy", "loss", "images", rows=[row])


def exported(value: "Exported") -> Table:
    """Return an exported file or folder and its proof."""
    from nampruner.report import size

    parity = value.parity
    agreement = f"{100 * parity.top1_agreement:.2f} % of {parity.inputs}"
    row = (value.path, size(value.size_bytes), f"{parity.max_relative:.1e}", agreement)
    return table(value.format, "size", "apart (relative)", "top-1 agrees", rows=[row])


def benchmark(value: "Benchmark") -> list[RenderableType]:
    """Return candidates side by side."""
    from nampruner.report import milliseconds, size

    first = value.candidates[0].latency
    threads = f"{first.threads} thread{'s' if first.threads > 1 else ''}"
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
    return [table("", "ONNX file", "latency", "of the first", "", rows=rows), Text(caption)]


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
    ]


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
