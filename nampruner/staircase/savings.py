"""Where pruning helps at all: what one step of width saves, layer by layer."""

from collections.abc import Iterable, Mapping

import numpy as np

from nampruner.graph import DependencyGraph, UnitGroup
from nampruner.importance import Scores
from nampruner.plan import Record
from nampruner.progress import Progress
from nampruner.selection import quantum
from nampruner.staircase.bench import Bench, Turns
from nampruner.staircase.geometry import Geometry

Layers = Mapping[str, Geometry]
Change = dict[str, tuple[int, int]]
"""Module → channels that leave its inputs and its outputs."""


class GroupTime(Record):
    """One group of channels, named after the first layer that produces it."""

    layer: str
    width: int
    step: int
    """Channels that go at a time."""
    share: float
    """Of the time of all convolutions: those whose outputs these channels are."""
    saved: float
    """Part of the time of all convolutions that goes with the first step."""
    paid: float
    """Part of the sum of all scores that goes with it: of the error that reconstruction predicts,
    if it made the scores."""


def savings(
    graph: DependencyGraph,
    scores: Scores,
    layers: Layers,
    bench: Bench,
    steps: Mapping[str, int] | int,
    progress: Progress | None = None,
) -> tuple[GroupTime, ...]:
    """Time every convolution of a network as it is and one step narrower.

    `scores` [units] say what goes first; `steps` are the rounding steps by module, see
    `nampruner.selection.quantum`.
    """
    units = [quantum(graph, group, steps) for group in graph.groups]
    changes = [
        _change(graph, group, layers, number)
        for group, number in zip(graph.groups, units, strict=True)
    ]
    times = _Times(layers, changes, bench, progress)
    total = sum(times.full(module) for module in layers)
    every = sum(float(scores[group.units].sum()) for group in graph.groups)
    return tuple(
        GroupTime(
            layer=group.name,
            width=group.width,
            step=number * group.multiplicity,
            share=sum(
                times.full(module) * part
                for module, part in _produced(graph, group, layers).items()
            )
            / total,
            saved=sum(times.saved(module, change[module]) for module in change) / total,
            paid=_first(group, scores, number) / every if every else 0.0,
        )
        for group, number, change in zip(graph.groups, units, changes, strict=True)
    )


def _change(graph: DependencyGraph, group: UnitGroup, layers: Layers, units: int) -> Change:
    """Return what `units` of a group take from the convolutions that they pass through.

    Nothing, where the group has no such step to spare.
    """
    found: Change = {}
    if units >= len(group.units):
        return found
    for module, dim, each in _weights(graph, group, layers):
        less_in, less_out = found.get(module, (0, 0))
        if dim == 0:
            found[module] = (less_in, units * each)
        else:
            found[module] = (units * each * layers[module].groups, less_out)
    return found


def _first(group: UnitGroup, scores: Scores, units: int) -> float:
    """Return the scores of the units that go first; nothing, where there is no step to spare."""
    if units >= len(group.units):
        return 0.0
    return float(np.sort(scores[group.units])[:units].sum())


def _produced(graph: DependencyGraph, group: UnitGroup, layers: Layers) -> dict[str, float]:
    """Return module → the part of its outputs that belongs to the group."""
    return {
        module: len(group.units) * each / layers[module].outputs
        for module, dim, each in _weights(graph, group, layers)
        if dim == 0
    }


def _weights(
    graph: DependencyGraph, group: UnitGroup, layers: Layers
) -> Iterable[tuple[str, int, int]]:
    """Yield module, dimension and indices per unit for every convolution weight in the group."""
    for number, each in group.slots.items():
        slot = graph.slots[number]
        module, _, name = slot.name.rpartition(".")
        if name == "weight" and module in layers and slot.dim < 2:
            yield module, slot.dim, each


class _Times:
    """Every layer as it is and narrower, alike layers measured once."""

    def __init__(
        self, layers: Layers, changes: list[Change], bench: Bench, progress: Progress | None
    ) -> None:
        self._layers = layers
        variants: dict[Geometry, dict[Geometry, None]] = {g: {} for g in layers.values()}
        for change in changes:
            for module, less in change.items():
                narrow = _narrower(layers[module], less)
                if narrow is not None:
                    variants[layers[module]][narrow] = None
        sets = [(whole, *narrow) for whole, narrow in variants.items()]
        self._sets: dict[Geometry, Turns] = dict(
            zip(variants, bench.times(sets, progress), strict=True)
        )

    def full(self, module: str) -> float:
        return self._sets[self._layers[module]].ms[0]

    def saved(self, module: str, less: tuple[int, int]) -> float:
        """Return the milliseconds that go with these channels."""
        layer = self._layers[module]
        turns, narrow = self._sets[layer], _narrower(layer, less)
        if narrow is None:  # in proportion, where the narrower layer was not measured
            return turns.ms[0] * max(less[0] / layer.inputs, less[1] / layer.outputs)
        return turns.ms[0] - turns.ms[turns.geometries.index(narrow)]


def _narrower(layer: Geometry, less: tuple[int, int]) -> Geometry | None:
    """Return the layer without these inputs and outputs; None where no such layer can be made."""
    inputs, outputs = layer.inputs - less[0], layer.outputs - less[1]
    if layer.kind == "grouped" or min(inputs, outputs) < 1:
        return None
    return layer.resized(inputs, outputs)
