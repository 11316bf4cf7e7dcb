"""Which of two is faster; a difference inside the noise is called that."""

import math
from dataclasses import dataclass

from nampruner.errors import NamPrunerError
from nampruner.plan import Latency


@dataclass(frozen=True)
class Verdict:
    """What two measurements say about each other."""

    speedup: float
    """Time of the first over time of the second."""
    noise: float
    """The part of the first's time that a difference must exceed to count."""

    @property
    def outside_noise(self) -> bool:
        return abs(1 - 1 / self.speedup) > self.noise

    @property
    def faster(self) -> bool:
        """The second is faster, and not by chance."""
        return self.outside_noise and self.speedup > 1

    @property
    def slower(self) -> bool:
        """The second is slower, and not by chance."""
        return self.outside_noise and self.speedup < 1

    def __str__(self) -> str:
        if not self.outside_noise:
            return "no difference outside the noise"
        return f"{self.speedup:.2f}× faster" if self.faster else f"{1 / self.speedup:.2f}× slower"


def compare(first: Latency, second: Latency) -> Verdict:
    """Say whether `second` is faster than `first`.

    Two independent errors add in quadrature; medians closer than that are not told apart. Where
    the error of a median is not known, the spread of single runs stands for it.

    Raises:
        NamPrunerError: they were measured at different batch sizes or thread counts.
    """
    ours, theirs = (first.batch, first.threads), (second.batch, second.threads)
    if ours != theirs:
        raise NamPrunerError(
            f"latencies at (batch, threads) {ours} and {theirs} cannot be compared; "
            "measure both in one run"
        )
    noise = math.hypot(_error_ms(first), _error_ms(second)) / first.median_ms
    return Verdict(first.median_ms / second.median_ms, noise)


def _error_ms(latency: Latency) -> float:
    return latency.spread_ms if latency.error_ms is None else latency.error_ms
