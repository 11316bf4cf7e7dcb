"""Which of two is faster; a difference inside the noise is called that."""

import math
from dataclasses import dataclass
from statistics import median

from nampruner.errors import NamPrunerError
from nampruner.plan import Latency

_FEWEST_TURNS = 5
"""Fewer say nothing about the next: the chance that all lie on one side is above 5 %."""


@dataclass(frozen=True)
class Verdict:
    """What two measurements say about each other."""

    speedup: float
    """Time of the first over time of the second."""
    low: float
    """With `high`, what the speed-up may be as well, at 95 %."""
    high: float

    @property
    def outside_noise(self) -> bool:
        return not self.low <= 1 <= self.high

    @property
    def faster(self) -> bool:
        """The second is faster, and not by chance."""
        return self.low > 1

    @property
    def slower(self) -> bool:
        """The second is slower, and not by chance."""
        return self.high < 1

    def __str__(self) -> str:
        if not self.outside_noise:
            return "no difference outside the noise"
        return f"{self.speedup:.2f}× faster" if self.faster else f"{1 / self.speedup:.2f}× slower"


def compare(first: Latency, second: Latency) -> Verdict:
    """Say whether `second` is faster than `first`.

    Turns are compared in pairs: what disturbs the machine for longer than a turn disturbs both.
    Where turns are not known, the spreads of single runs, added in quadrature, are the noise.

    Raises:
        NamPrunerError: they were measured at different batch sizes or thread counts.
    """
    ours, theirs = (first.batch, first.threads), (second.batch, second.threads)
    if ours != theirs:
        raise NamPrunerError(
            f"latencies at (batch, threads) {ours} and {theirs} cannot be compared; "
            "measure both in one run"
        )
    if len(first.turns_ms) == len(second.turns_ms) >= _FEWEST_TURNS:
        pairs = zip(first.turns_ms, second.turns_ms, strict=True)
        return _paired([one / other for one, other in pairs])
    speedup = first.median_ms / second.median_ms
    noise = speedup * math.hypot(first.spread_ms, second.spread_ms) / first.median_ms
    return Verdict(speedup, speedup - noise, speedup + noise)


def _paired(speedups: list[float]) -> Verdict:
    """Return their median between the ends of its 95 % interval.

    The interval is that of the sign test, from one ordered value to another, whatever the
    distribution.
    """
    count, ordered = len(speedups), sorted(speedups)
    left = max(int((count - 1.96 * count**0.5) / 2), 0)
    return Verdict(median(ordered), ordered[left], ordered[count - 1 - left])
