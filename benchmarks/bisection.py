"""The ratio at which another tool's cut comes to a share of the MACs."""

from collections.abc import Callable

from torch import nn

_STEPS = 7


def largest_within(fraction: float, at: Callable[[float], tuple[nn.Module, float]]) -> nn.Module:
    """Return the largest network of at most `fraction` of the MACs.

    `at` cuts by a ratio and says what share of the MACs is left.

    Raises:
        RuntimeError: no ratio gets there.
    """
    low, high, best = 0.0, 0.95, None
    for _ in range(_STEPS):
        middle = (low + high) / 2
        slim, left = at(middle)
        if left > fraction:
            low = middle
        else:
            high, best = middle, slim
    if best is None:
        raise RuntimeError(f"no ratio reaches {fraction:.0%} of the MACs")
    return best
