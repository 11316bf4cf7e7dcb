"""The time of a network as a function of its widths, from a few measured widths of each layer."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from nampruner.graph import DependencyGraph
from nampruner.progress import Progress
from nampruner.staircase.bench import Bench, Turns
from nampruner.staircase.geometry import Geometry

Floats = NDArray[np.float64]
Layers = Mapping[str, Geometry]


class Timetable:
    """Milliseconds of all convolutions, given the units that stay in each group.

    On the steps of the device, time is close to a + b·out + c·in + d·out·in; every layer is
    measured at its own width and at about half of it, in both directions.
    """

    def __init__(
        self,
        layers: Layers,
        steps: Mapping[str, int],
        bench: Bench,
        progress: Progress | None = None,
    ) -> None:
        self._layers = layers
        sets = {name: _variants(layer, steps.get(name, 1)) for name, layer in layers.items()}
        found = bench.times(sets.values(), progress)
        fitted = {turns.geometries: _fit(turns) for turns in found}
        self._curves = {name: fitted[variants] for name, variants in sets.items()}

    def __call__(self, graph: DependencyGraph) -> Callable[[Floats], float]:
        """Return the function of the units [groups] that stay in each group of `graph`."""
        places = [n for n, p in enumerate(graph.products) if p.module in self._layers]
        curves = np.array([self._curves[graph.products[n].module] for n in places])
        curves = curves.reshape(len(places), 4)
        cost = graph.cost
        full = np.array([len(group.units) for group in graph.groups], dtype=np.float64)
        outputs, inputs = (np.maximum(w(full), 1)[places] for w in (cost.outputs, cost.inputs))

        def time(kept: Floats) -> float:
            out, into = cost.outputs(kept)[places] / outputs, cost.inputs(kept)[places] / inputs
            return float((curves * _terms(out, into)).sum())

        return time


def _variants(layer: Geometry, step: int) -> tuple[Geometry, ...]:
    """Return a layer as it is and with about half of its outputs, its inputs, and both."""
    if layer.kind == "grouped":
        return (layer,)
    outputs, inputs = (_half(width, step) for width in (layer.outputs, layer.inputs))
    pairs = [(a, b) for a in (layer.inputs, inputs) for b in (layer.outputs, outputs)]
    return tuple(dict.fromkeys(layer.resized(a, b) for a, b in pairs))


def _half(width: int, step: int) -> int:
    half = round(width / 2 / step) * step
    return half if 0 < half < width else width


def _terms(out: Floats, into: Floats) -> Floats:
    """Return 1, out, in and out·in [n, 4] for widths as parts of the whole."""
    return np.stack([np.ones_like(out), out, into, out * into], axis=-1)


def _fit(turns: Turns) -> Floats:
    """Return the four factors of a layer's curve; the smallest where fewer widths were measured."""
    whole = turns.geometries[0]
    if whole.kind == "grouped":  # in proportion to its MACs
        return np.array([0.0, 0.0, 0.0, turns.ms[0]])
    out = np.array([each.outputs / whole.outputs for each in turns.geometries])
    into = np.array([each.inputs / whole.inputs for each in turns.geometries])
    if whole.kind == "depthwise":  # each output has its one input, whatever the width
        into = np.ones_like(out)
    found: Floats = np.linalg.lstsq(_terms(out, into), np.array(turns.ms), rcond=None)[0]
    return found
