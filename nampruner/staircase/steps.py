"""The rounding step of each kind of layer: below it, fewer channels are no less time."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import get_args

from nampruner.plan import Record
from nampruner.progress import Progress
from nampruner.staircase.bench import Bench, Turns
from nampruner.staircase.geometry import Geometry, Kind

STEPS = (32, 16, 8, 4, 2, 1)
_MOST_PER_KIND = 4
"""Layer shapes of one kind that are measured: those with the most MACs."""
_ENOUGH = 0.5
"""A step is one where it saves at least this part of what time in proportion would."""


class Stairs(Record):
    """One convolution at widths that go down from `widths[0]`, inputs and outputs alike."""

    geometry: Geometry
    """At its full width."""
    layers: int
    """How many layers of the network are like it."""
    widths: tuple[int, ...]
    ms: tuple[float, ...]
    int8: bool = False
    """As INT8 networks run it, or in float."""

    def at(self, width: int) -> float | None:
        """Milliseconds at a width; None where it was not measured."""
        return dict(zip(self.widths, self.ms, strict=True)).get(width)


class Staircase(Record):
    """How time follows width on this device, for the layers of one network."""

    threads: int
    stairs: tuple[Stairs, ...]

    @property
    def steps(self) -> dict[Kind, int]:
        """Rounding step of each kind that was measured: one in float and in INT8.

        Steps are powers of 2, so the larger one is a multiple of the other.
        """
        ours, theirs = self.steps_in(int8=False), self.steps_in(int8=True)
        return {kind: max(step, theirs.get(kind, 1)) for kind, step in ours.items()}

    def steps_in(self, *, int8: bool) -> dict[Kind, int]:
        """Rounding step of each kind that was measured in one of both."""
        found = [stairs for stairs in self.stairs if stairs.int8 is int8]
        kinds = {stairs.geometry.kind for stairs in found}
        return {
            kind: _step([stairs for stairs in found if stairs.geometry.kind == kind])
            for kind in get_args(Kind)
            if kind in kinds
        }


def _step(ours: list[Stairs]) -> int:
    """Go down from the widest step until one does not pay; the last that did is it.

    From B channels, removing s must save at least half of what it would if B - s lay on the
    line between B and B - 2s: on a flat tread it saves nothing, before a cliff less than that.
    """
    measured = [step for step in STEPS if any(_triple(each, step) for each in ours)]
    found = 2 * measured[0]
    for step in measured:
        triples = [(each.layers, *t) for each in ours if (t := _triple(each, step))]
        saved = sum(layers * (full - less) for layers, full, less, _ in triples)
        line = sum(layers * (full - least) / 2 for layers, full, _, least in triples)
        if line <= 0 or saved < _ENOUGH * line:
            break
        found = step
    return found


def _triple(stairs: Stairs, step: int) -> tuple[float, float, float] | None:
    """Return the times at full width, one and two steps below; None where one is missing."""
    base = stairs.widths[0]
    full, less, least = (stairs.at(base - n * step) for n in range(3))
    return None if full is None or less is None or least is None else (full, less, least)


def staircase(
    layers: Iterable[Geometry], bench: Bench, progress: Progress | None = None
) -> Staircase:
    """Measure what the layers of a network take at other widths, in float and in INT8.

    Of each kind, the largest are measured.
    """
    alike = Counter(base for layer in layers if (base := _base(layer)))
    chosen: list[Geometry] = []
    for kind in get_args(Kind):
        ours = [geometry for geometry in alike if geometry.kind == kind]
        ours.sort(key=lambda geometry: -geometry.macs * alike[geometry])
        chosen += ours[:_MOST_PER_KIND]
    sets = [tuple(base.resized(width, width) for width in _widths(base)) for base in chosen]
    found = [*bench.times(sets, progress), *bench.times(sets, progress, int8=True)]
    return Staircase(threads=bench.threads, stairs=tuple(_stairs(turns, alike) for turns in found))


def _base(layer: Geometry) -> Geometry | None:
    """Return a layer with equal widths in and out, a multiple of a power of two, to go down from.

    None where it is too narrow for steps, or where groups of several channels have none.
    """
    width = min(layer.inputs, layer.outputs)
    unit = next((2 * step for step in STEPS if width >= 4 * step and step > 1), None)
    if unit is None or layer.kind == "grouped":
        return None
    return layer.resized(width // unit * unit, width // unit * unit)


def _widths(base: Geometry) -> list[int]:
    width = base.outputs
    fitting = [step for step in STEPS if width % (2 * step) == 0 and width > 2 * step]
    less = {width - n * step for step in fitting for n in (1, 2)}
    return [width, *sorted(less, reverse=True)]


def _stairs(turns: Turns, alike: Mapping[Geometry, int]) -> Stairs:
    base = turns.geometries[0]
    widths = tuple(each.outputs for each in turns.geometries)
    return Stairs(geometry=base, layers=alike[base], widths=widths, ms=turns.ms, int8=turns.int8)


def module_steps(layers: Mapping[str, Geometry], found: Staircase) -> dict[str, int]:
    """Return module → rounding step, for the layers whose kind was measured."""
    steps = found.steps
    return {name: steps[layer.kind] for name, layer in layers.items() if layer.kind in steps}
