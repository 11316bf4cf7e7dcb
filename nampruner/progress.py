"""How long work tells the outside how far it is; only the command line draws it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Bar(Protocol):
    """One piece of work of known length."""

    def advance(self, **numbers: float) -> None:
        """One step is done; `numbers` (loss, accuracy …) are shown beside the bar."""


class Progress(Protocol):
    """Whoever draws the bars."""

    def bar(self, name: str, total: int) -> AbstractContextManager[Bar]:
        """Open a bar of `total` steps."""

    def note(self, text: str) -> None:
        """Say one line."""


class _NoBar:
    def advance(self, **numbers: float) -> None:
        pass


class Silent:
    """Draws nothing: the default in Python."""

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Bar]:
        yield _NoBar()

    def note(self, text: str) -> None:
        pass
