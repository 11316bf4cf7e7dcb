"""Scores + target + rounding + floors → plan. The only arithmetic on `ratio`.

Channels go in steps that keep widths on multiples of `round_to`, cheapest step first, and a step
that would remove more than was asked is not taken: what is achieved is at most what was requested,
and within one step of it. Memory is a limit: steps are taken until it holds.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from nampruner.budget import Budget, Device, Kept, Steps, budgets
from nampruner.config import TARGETS, PruneOptions
from nampruner.errors import GraphError, NamPrunerError, did_you_mean
from nampruner.graph import DependencyGraph, UnitGroup
from nampruner.importance import Scores
from nampruner.plan import Achieved, LayerPlan, LeftAlone, PruningPlan, Request

Bools = NDArray[np.bool_]

DEFAULT_STEP = 8
"""Where nothing was measured of any layer that a group passes through."""


@dataclass(frozen=True, eq=False)
class Step:
    """The next units of a group to go."""

    group: int
    units: NDArray[np.int64]
    cost: float
    """Mean score of the units, their mean rank in the layer, or the sum of their scores."""


def select(
    graph: DependencyGraph, scores: Scores, options: PruneOptions, device: Device | None = None
) -> PruningPlan:
    """Choose the units that go.

    `device` is for `round_to="auto"` and for targets in time; see `nampruner.staircase`.

    Raises:
        NamPrunerError: the target cannot be read or reached, a glob matches nothing, or there is no
            device.
        GraphError: nothing in the network can be cut.
    """
    graph = ignore(graph, options.ignore)
    if not graph.groups:
        reasons = "; ".join(f"{row.layer}: {row.reason}" for row in graph.left_alone()[:5])
        raise GraphError(f"nothing in this network can be cut ({reasons})")
    quanta = [quantum(graph, group, _rounding(options, device)) for group in graph.groups]
    removed, kept = graph.mask([]), graph.sizes.copy()
    for budget in budgets(graph, options, device):
        queues = [
            (
                step
                for step in _steps(number, group, quanta[number], scores, options)
                if not removed[step.units].any()
            )
            for number, group in enumerate(graph.groups)
        ]
        for step in _taken(queues, budget, kept, by_price=options.allocation == "error"):
            removed[step.units] = True
        budget.check(kept)
    return describe(graph, scores, options, removed, quanta)


def _rounding(options: PruneOptions, device: Device | None) -> Steps | int:
    if options.round_to != "auto":
        return options.round_to
    if device is None:
        raise NamPrunerError(
            'round_to = "auto" rounds to what was measured on a device, and nothing was; give '
            "a device, or a number such as 8"
        )
    return device.steps


def quantum(graph: DependencyGraph, group: UnitGroup, rounding: Steps | int) -> int:
    """Return how many units of a group go at a time, so that widths are multiples of a step.

    The step is one number for all, or the largest of the layers that the group passes through.
    """
    step = rounding if isinstance(rounding, int) else _largest(graph, group, rounding)
    return math.lcm(*(step // math.gcd(step, many) for many in group.produced))


def _largest(graph: DependencyGraph, group: UnitGroup, steps: Steps) -> int:
    modules = {graph.slots[number].name.rpartition(".")[0] for number in group.slots}
    return max((steps[module] for module in modules if module in steps), default=DEFAULT_STEP)


def _taken(
    queues: Sequence[Iterator[Step]], budget: Budget, kept: Kept, *, by_price: bool
) -> Iterator[Step]:
    """Steps in the order of their cost, or of their cost per amount saved, while they fit.

    `kept` [groups] follows them.
    """
    now = budget.amount(kept)
    heap: list[tuple[float, int, Step]] = []

    def rest(step: Step) -> float:
        kept[step.group] -= len(step.units)
        found = budget.amount(kept)
        kept[step.group] += len(step.units)
        return found

    def push(number: int) -> None:
        step = next(queues[number], None)
        if step is not None:
            price = step.cost / max(now - rest(step), 1e-12) if by_price else step.cost
            heapq.heappush(heap, (price, number, step))

    for number in range(len(queues)):
        push(number)
    while heap and now > budget.enough:
        _, number, step = heapq.heappop(heap)
        left = rest(step)
        price = step.cost / max(now - left, 1e-12)
        if by_price and heap and price > heap[0][0] * (1 + 1e-9):
            # its neighbours have shrunk since, so it saves less than when it was priced
            heapq.heappush(heap, (price, number, step))
        elif left >= budget.least:
            kept[number] -= len(step.units)
            now = left
            yield step
            push(number)


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


def _steps(
    number: int, group: UnitGroup, quantum: int, scores: Scores, options: PruneOptions
) -> Iterator[Step]:
    """Steps of one group, least important units first, down to its floor."""
    size = len(group.units)
    order = group.units[np.argsort(scores[group.units], kind="stable")]
    least = max(1, math.ceil(math.ceil(options.floor * size) / quantum)) * quantum
    kept = size
    while (after := (kept - 1) // quantum * quantum) >= least:
        chosen = slice(size - kept, size - after)
        own = scores[order[chosen]]
        middle = size - (kept + after) / 2
        costs = {"global": own.mean(), "uniform": middle / size, "error": own.sum()}
        yield Step(number, order[chosen], float(costs[options.allocation]))
        kept = after


def describe(
    graph: DependencyGraph,
    scores: Scores,
    options: PruneOptions,
    removed: Bools,
    quanta: Sequence[int],
) -> PruningPlan:
    """Write a choice of units down as a plan."""
    before, after = graph.size(graph.mask([])), graph.size(removed)
    rows, alone = [], list(graph.left_alone())
    for group, quantum in zip(graph.groups, quanta, strict=True):
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
        if next(_steps(0, group, quantum, scores, options), None) is None:
            step = quantum * group.multiplicity
            why = f"{group.width} channels cannot shrink by a step of round_to {step}"
            alone.append(LeftAlone(layer=group.name, reason=why))
    total = sum(row.width_before for row in rows)
    gone = total - sum(row.width_after for row in rows)
    return PruningPlan(
        importance=options.importance,
        allocation=options.allocation,
        round_to=options.round_to,
        requested=Request(**{name: getattr(options, name) for name in TARGETS}),
        achieved=Achieved(
            ratio=gone / total,
            macs=after.macs / max(before.macs, 1),
            params=after.params / max(before.params, 1),
            memory=(after.memory or 0) / max(before.memory or 0, 1),
        ),
        before=before,
        after=after,
        layers=tuple(rows),
        left_alone=tuple(alone),
        removed=graph.indices(removed),
        masked=graph.indices(removed, consumed=True),
    )
