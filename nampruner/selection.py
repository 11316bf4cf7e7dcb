"""Scores + target + rounding + floors → plan. The only arithmetic on `ratio`.

Channels go in steps that keep widths on multiples of `round_to`, cheapest step first, and a step
that would remove more than was asked is not taken: what is achieved is at most what was requested,
and within one step of it.
"""

import heapq
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from nampruner.config import PruneOptions
from nampruner.errors import GraphError, NamPrunerError, did_you_mean
from nampruner.graph import DependencyGraph, UnitGroup
from nampruner.importance import Scores
from nampruner.plan import Achieved, LayerPlan, LeftAlone, PruningPlan, Request

Bools = NDArray[np.bool_]
Kept = NDArray[np.float64]

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


@dataclass(frozen=True, eq=False)
class Step:
    """The next units of a group to go."""

    group: int
    units: NDArray[np.int64]
    channels: int
    cost: float
    """Mean score of the units: global scores, or ranks within the layer."""


def select(graph: DependencyGraph, scores: Scores, options: PruneOptions) -> PruningPlan:
    """Choose the units that go.

    Raises:
        NamPrunerError: the target cannot be read or a glob matches nothing.
        GraphError: nothing in the network can be cut.
    """
    graph = ignore(graph, options.ignore)
    if not graph.groups:
        reasons = "; ".join(f"{row.layer}: {row.reason}" for row in graph.left_alone()[:5])
        raise GraphError(f"nothing in this network can be cut ({reasons})")
    removed = graph.mask([])
    fits = _budget(graph, options)
    kept = np.array([len(group.units) for group in graph.groups], dtype=np.float64)
    queues = [_steps(n, g, scores, options) for n, g in enumerate(graph.groups)]
    heap = [(step.cost, step.group, step) for q in queues if (step := next(q, None))]
    heapq.heapify(heap)
    while heap:
        _, number, step = heapq.heappop(heap)
        kept[number] -= len(step.units)
        if not fits(kept):
            kept[number] += len(step.units)
            continue
        removed[step.units] = True
        following = next(queues[number], None)
        if following is not None:
            heapq.heappush(heap, (following.cost, number, following))
    return describe(graph, scores, options, removed)


def ignore(graph: DependencyGraph, globs: tuple[str, ...]) -> DependencyGraph:
    """Freeze every group that a glob names (by any layer it passes through)."""
    for glob in globs:
        hit = [g for g in graph.groups if any(fnmatchcase(n, glob) for n in _layers(graph, g))]
        names = {p.module for p in graph.products}
        if not hit and not any(fnmatchcase(name, glob) for name in names):
            raise NamPrunerError(
                f"ignore = {glob!r} matches no layer; layers are named like "
                f"{', '.join(sorted(names)[:4])}.{did_you_mean(glob, names)}"
            )
        units = [int(u) for group in hit for u in group.units]
        graph = graph.freeze(units, f"ignored by {glob!r}")
    return graph


def _layers(graph: DependencyGraph, group: UnitGroup) -> set[str]:
    """Modules whose output width the group decides."""
    slots = [graph.slots[n] for n in group.slots if n not in graph.consumers]
    return {slot.name.rpartition(".")[0] for slot in slots} | {group.name}


def _steps(number: int, group: UnitGroup, scores: Scores, options: PruneOptions) -> Iterator[Step]:
    """Steps of one group, least important units first, down to its floor."""
    quantum = options.round_to // math.gcd(options.round_to, group.multiplicity)
    size = len(group.units)
    order = group.units[np.argsort(scores[group.units], kind="stable")]
    least = max(1, math.ceil(math.ceil(options.floor * size) / quantum)) * quantum
    cost = scores[order] if options.scope == "global" else (np.arange(size) + 0.5) / size
    kept = size
    while (after := (kept - 1) // quantum * quantum) >= least:
        chosen = slice(size - kept, size - after)
        channels = (kept - after) * group.multiplicity
        yield Step(number, order[chosen], channels, float(cost[chosen].mean()))
        kept = after


def _budget(graph: DependencyGraph, options: PruneOptions) -> Callable[[Kept], bool]:
    """Whether so many kept units per group still remove no more than was asked."""
    full = np.array([len(group.units) for group in graph.groups], dtype=np.float64)
    if options.macs is not None:
        whole = graph.cost.macs(full)
        limit = remaining("macs", options.macs, whole)
        return lambda kept: graph.cost.macs(kept) >= limit
    if options.params is not None:
        whole = graph.cost.params(full)
        limit = remaining("params", options.params, whole)
        return lambda kept: graph.cost.params(kept) >= limit
    wide = np.array([group.multiplicity for group in graph.groups], dtype=np.float64)
    most = (options.ratio or 0.0) * float(wide @ full) + 1e-9
    return lambda kept: float(wide @ (full - kept)) <= most


def remaining(name: str, given: str, whole: float) -> float:
    """Read `50%`, `0.5` or `2.1G` as what may remain of `whole`.

    Raises:
        NamPrunerError: not a number, or outside what is possible.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*(%|[kmgt]?)\s*", given.lower())
    try:
        value = float(match.group(1)) if match else math.nan
    except ValueError:
        value = math.nan
    if match is None or math.isnan(value):
        raise NamPrunerError(f"{name} = {given!r} is no amount; give 50%, 0.5 or 2.1G")
    unit = match.group(2)
    fraction = value / 100 if unit == "%" else value
    if unit == "%" or (not unit and value <= 1):
        value = fraction * whole
    else:
        value *= _UNITS[unit]
    if not 0 < value <= whole:
        raise NamPrunerError(
            f"{name} = {given!r} asks for {value:.4g} of {whole:.4g}; what remains must lie in "
            f"(0, {whole:.4g}]"
        )
    return value


def describe(
    graph: DependencyGraph, scores: Scores, options: PruneOptions, removed: Bools
) -> PruningPlan:
    """Write a choice of units down as a plan."""
    before, after = graph.size(graph.mask([])), graph.size(removed)
    rows, alone = [], list(graph.left_alone())
    for group in graph.groups:
        stays = group.units[~removed[group.units]]
        width = len(stays) * group.multiplicity
        threshold = float(scores[stays].min()) if width < group.width else None
        rows.append(
            LayerPlan(
                layer=group.name,
                width_before=group.width,
                width_after=width,
                threshold=threshold,
            )
        )
        if next(_steps(0, group, scores, options), None) is None:
            step = f"{group.width} channels cannot shrink by a step of round_to {options.round_to}"
            alone.append(LeftAlone(layer=group.name, reason=step))
    total = sum(row.width_before for row in rows)
    gone = total - sum(row.width_after for row in rows)
    return PruningPlan(
        importance=options.importance,
        scope=options.scope,
        round_to=options.round_to,
        requested=Request(ratio=options.ratio, macs=options.macs, params=options.params),
        achieved=Achieved(
            ratio=gone / total,
            macs=after.macs / max(before.macs, 1),
            params=after.params / max(before.params, 1),
        ),
        before=before,
        after=after,
        layers=tuple(rows),
        left_alone=tuple(alone),
        removed=graph.indices(removed),
        masked=graph.indices(removed, consumed=True),
    )
