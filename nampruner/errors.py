"""Everything a user can put right is a `NamPrunerError`; anything else is a bug of ours.

A message has three parts: what was given, what is allowed, what to do.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class NamPrunerError(ValueError):
    """Base of all errors the user can fix; the command line turns it into exit code 2."""


class GraphError(NamPrunerError):
    """The network cannot be traced, or nothing in it can be cut."""


class CertificateError(NamPrunerError):
    """A cut changed what the network computes; the cut is refused."""

    def __init__(self, message: str, *, module: str | None = None) -> None:
        super().__init__(message)
        self.module = module
        """Where the pruned network stopped; None where it ran."""


class CheckpointError(NamPrunerError):
    """A checkpoint folder is damaged, foreign or does not fit the model."""


class ParityError(NamPrunerError):
    """The exported file does not compute what the PyTorch model computes."""


class NoEffectWarning(UserWarning):
    """An option was given that changes nothing here."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return ` Did you mean a, b?` for the names closest to `given`, or an empty string."""
    close = get_close_matches(given, list(known), n=3, cutoff=0.5)
    return f" Did you mean {', '.join(close)}?" if close else ""
