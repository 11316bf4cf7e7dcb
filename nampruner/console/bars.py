"""Who draws how far long work is: live bars for a terminal, lines for anything else."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Live
from rich.text import Text

from nampruner.console.streams import console, tell
from nampruner.progress import Bar, Progress

_SECONDS_BETWEEN_LINES = 5.0


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
            console=console(stderr=True),
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
