"""What was asked for, as an amount that falls with the widths, and how little of it may remain."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nampruner.config import ALONE, PruneOptions
from nampruner.errors import NamPrunerError
from nampruner.graph import DependencyGraph

Kept = NDArray[np.float64]

Steps = Mapping[str, int]
"""Module → width it should be a multiple of, as measured on a device."""

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_EXAMPLES = {"memory": "50%, 0.5 or 20MB"}
_EXAMPLE = "50%, 0.5 or 2.1G"


@dataclass(frozen=True)
class Device:
    """What a device makes of widths, as measured on it."""

    steps: Steps
    time: Callable[[DependencyGraph], Callable[[Kept], float]] | None = None
    """Graph → milliseconds as a function of the units [groups] that stay in each group."""
    share: float = 1.0
    """Of that time, how much may remain."""


def _holds(kept: Kept) -> None:
    """Nothing is wrong with any widths."""


@dataclass(frozen=True, eq=False)
class Budget:
    """What is counted, and how little of it may remain."""

    amount: Callable[[Kept], float]
    """Channels, MACs, parameters …, given the units [groups] that stay in each group."""
    least: float
    """No step is taken that leaves less."""
    enough: float = -math.inf
    """No step is taken once no more is left."""
    check: Callable[[Kept], None] = _holds
    """Refuses widths, after the last step, that are not what was asked for."""


def budgets(
    graph: DependencyGraph, options: PruneOptions, device: Device | None
) -> tuple[Budget, ...]:
    """Return the target, and after it what must hold as well.

    Raises:
        NamPrunerError: an amount cannot be read, or no time was measured.
    """
    if options.memory is None:
        return (_target(graph, options, device),)
    alone = all(getattr(options, name) is None for name in ALONE)
    limit = _limit(graph, options, alone=alone)
    return (limit,) if alone else (_target(graph, options, device), limit)


def _target(graph: DependencyGraph, options: PruneOptions, device: Device | None) -> Budget:
    full = graph.sizes
    if options.latency is not None:
        if device is None or device.time is None:
            raise NamPrunerError(
                f"latency = {options.latency!r} is a target in time, and no time was measured; "
                "give a device, or another target"
            )
        time = device.time(graph)
        return Budget(time, device.share * time(full))
    for name, amount in (("macs", graph.cost.macs), ("params", graph.cost.params)):
        given = getattr(options, name)
        if given is not None:
            return Budget(amount, remaining(name, given, amount(full)))
    wide = np.array([group.multiplicity for group in graph.groups], dtype=np.float64)
    total = float(wide @ full)
    return Budget(lambda kept: float(wide @ kept), (1 - (options.ratio or 0.0)) * total - 1e-9)


def _limit(graph: DependencyGraph, options: PruneOptions, *, alone: bool) -> Budget:
    """Return memory as what must hold: all that lies above the limit, in any step, goes.

    Counting every step that is too large, and not the largest alone, says of each channel whether
    its going helps: where two steps are equally large, neither alone lowers the peak.
    """
    given, memory = str(options.memory), graph.memory
    whole = memory.peak(graph.sizes)
    # beside another target, a limit that holds already is no mistake
    most = remaining("memory", given, whole if alone else math.inf, of=whole)

    def check(kept: Kept) -> None:
        if memory.peak(kept) > most + 0.5:
            raise NamPrunerError(
                f"memory = {given!r} asks for {most:.4g} bytes, and {memory.peak(kept):.4g} remain "
                f"of {whole:.4g} where every layer is as narrow as floor = {options.floor:g} and "
                f"round_to = {options.round_to} allow; allow more, or lower these"
            )

    # half a byte is rounding
    return Budget(
        lambda kept: float(np.maximum(memory.steps(kept) - most - 0.5, 0).sum()),
        least=0.0,
        enough=0.0,
        check=check,
    )


def remaining(name: str, given: str, most: float, *, of: float | None = None) -> float:
    """Read `50%`, `0.5` or `2.1G` (of memory `20MB`) as what may remain of a whole.

    Args:
        most: what can remain at most.
        of: the whole that a fraction is part of; `most` where it is not given.

    Raises:
        NamPrunerError: not a number, or outside what is possible.
    """
    whole = most if of is None else of
    suffix = "b?" if name == "memory" else ""
    match = re.fullmatch(rf"\s*([0-9.]+(?:e[+-]?\d+)?)\s*(%|([kmgt]?){suffix})\s*", given.lower())
    try:
        value = float(match.group(1)) if match else math.nan
    except ValueError:
        value = math.nan
    if match is None or math.isnan(value):
        example = _EXAMPLES.get(name, _EXAMPLE)
        raise NamPrunerError(f"{name} = {given!r} is no amount; give {example}")
    unit = match.group(2)
    fraction = value / 100 if unit == "%" else value
    if unit == "%" or (not unit and value <= 1):
        value = fraction * whole
    else:
        value *= _UNITS[match.group(3)]
    if not 0 < value <= most or (fraction > 1 and unit == "%"):
        raise NamPrunerError(
            f"{name} = {given!r} asks for {value:.4g} of {whole:.4g}; what remains must lie in "
            f"(0, {whole:.4g}]"
        )
    return value
