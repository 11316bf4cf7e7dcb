"""What becomes of what was removed: consumer by consumer, then unit by unit."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nampruner.graph import DependencyGraph, UnitGroup
from nampruner.plan import LayerRecovery, PruningPlan, UnitVerdicts, Verdict

_ROUNDING = 1e-5
_CLOSE = 0.1


@dataclass
class Findings:
    """What recovery found out."""

    layers: list[LayerRecovery] = field(default_factory=list)
    errors: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    """Weight of a consumer, dimension of its inputs → how far each input that was removed is from
    what stays, in the plan's order; infinite, or not there, where nobody can say."""


def verdict(error: float | None) -> Verdict:
    """Judge an error, in standard deviations; None is one that nobody knows."""
    if error is None or not error <= _CLOSE:
        return "lossy"
    return "exact" if error <= _ROUNDING else "bounded"


def verdicts(errors: Sequence[float]) -> dict[Verdict, int]:
    """Count the verdicts."""
    return dict(Counter(map(verdict, errors)))


def judged(graph: DependencyGraph, plan: PruningPlan, found: Findings) -> dict[str, Any]:
    """Return what the certificate says of layers and units: layers, verdicts, units."""
    worst = _worst(graph, plan, found.errors)
    rows: list[UnitVerdicts] = []
    counts: Counter[Verdict] = Counter()
    for group in graph.groups:
        gone = _removed(graph, plan, group)
        if gone:
            errors = {index: float(worst[unit]) for index, unit in gone.items()}
            counts.update(verdicts(list(errors.values())))
            rows.append(_row(group.name, errors))
    return {"layers": tuple(found.layers), "verdicts": dict(counts), "units": tuple(rows)}


def _worst(
    graph: DependencyGraph, plan: PruningPlan, errors: Mapping[tuple[str, int], Sequence[float]]
) -> NDArray[np.float64]:
    """Largest error of each unit over its consumers; 0 where it has none."""
    worst = np.zeros(graph.count)
    for number in graph.consumers:
        slot = graph.slots[number]
        gone = plan.removed.get(slot.name, {}).get(slot.dim, [])
        known = errors.get((slot.name, slot.dim), math.inf)
        np.maximum.at(worst, graph.units(slot)[gone], known)
    return worst


def _removed(graph: DependencyGraph, plan: PruningPlan, group: UnitGroup) -> dict[int, int]:
    """First index in the layer that makes them → unit, of the group's units that go."""
    slots = [graph.slots[n] for n in group.slots if n not in graph.consumers]
    makers = [slot for slot in slots if slot.name == f"{group.name}.weight"] or slots
    found: dict[int, int] = {}
    for slot in makers[:1]:
        units, mine = graph.units(slot), set(group.units.tolist())
        for index in plan.removed.get(slot.name, {}).get(slot.dim, []):
            if int(units[index]) in mine:
                mine.remove(int(units[index]))
                found[index] = int(units[index])
    return found


def _row(layer: str, errors: Mapping[int, float]) -> UnitVerdicts:
    def those(wanted: Verdict) -> list[int]:
        return [index for index, error in errors.items() if verdict(error) == wanted]

    return UnitVerdicts(
        layer=layer,
        exact=tuple(those("exact")),
        bounded={index: errors[index] for index in those("bounded")},
        lossy=tuple(those("lossy")),
    )
