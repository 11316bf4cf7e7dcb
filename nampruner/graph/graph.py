"""The dependency graph as a value: units, what they touch, what is frozen, what a width costs.

It knows no ratio, no score and no library. Arrays of labels are int64; unit 0 is the fixed width.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nampruner.graph.cost import Cost, Floats
from nampruner.graph.ledger import Slot
from nampruner.graph.memory import Held, Memory
from nampruner.plan import LeftAlone, Size

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Product:
    """A contraction in units: factor · kept(outputs) · kept(inputs) MACs."""

    module: str
    factor: float
    outputs: Ints
    inputs: Ints


@dataclass(frozen=True, eq=False)
class Width:
    """Numbers some op in `module` was called with, and the units that each counts."""

    module: str
    op: str
    before: int | tuple[int, ...]
    counted: tuple[Ints, ...]

    def after(self, removed: Bools) -> int | tuple[int, ...]:
        """The numbers once `removed` units are gone."""
        kept = tuple(int((~removed[units]).sum()) for units in self.counted)
        return kept[0] if isinstance(self.before, int) else kept


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """Units that touch the same slots: interchangeable channels of the same layers."""

    name: str
    """The first layer that produces them."""
    units: Ints
    multiplicity: int
    """Channels of that layer per unit: 1, or more where channels are tied to one another."""
    produced: tuple[int, ...]
    """The same for every layer that produces them."""
    slots: Mapping[int, int]
    """Slot number → indices of that slot per unit."""

    @property
    def width(self) -> int:
        return len(self.units) * self.multiplicity


@dataclass(frozen=True, eq=False)
class DependencyGraph:
    """What goes together when a channel goes."""

    slots: tuple[Slot, ...]
    unit_of: Ints
    """Label → unit."""
    frozen: Mapping[int, str]
    """Unit → why it cannot go."""
    consumers: frozenset[int]
    """Slots whose removed slices are zeroed in the masked network."""
    products: tuple[Product, ...]
    widths: tuple[Width, ...]
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    """Parameter → shape; buffers are not counted as parameters."""
    held: tuple[Held, ...] = field(repr=False)
    """What the forward pass makes, at batch 1."""
    itemsize: float
    """Bytes per parameter."""

    def units(self, slot: Slot) -> Ints:
        """Units of a slot, index by index [size]."""
        found: Ints = self.unit_of[slot.start : slot.start + slot.size]
        return found

    def freeze(self, units: Iterable[int], reason: str) -> "DependencyGraph":
        """The same graph with more units frozen."""
        more = {int(unit): reason for unit in units}
        return replace(self, frozen={**more, **self.frozen})

    @cached_property
    def count(self) -> int:
        """Number of units, the fixed one included."""
        return int(self.unit_of.max()) + 1

    @cached_property
    def groups(self) -> tuple[UnitGroup, ...]:
        """All groups with a channel to spare, in the order of the forward pass."""
        kind, slots = self._kinds()
        members: dict[int, list[Ints]] = {}
        producers: dict[int, dict[str, int]] = {}
        for product in self.products:
            kinds = kind[product.outputs]
            for k in _in_order(kinds):
                if k >= 0:
                    units = product.outputs[kinds == k]
                    members.setdefault(k, []).append(units)
                    often = int((units == units[0]).sum())
                    producers.setdefault(k, {}).setdefault(product.module, often)
        found = {k: _in_order(np.concatenate(parts)) for k, parts in members.items()}
        return tuple(
            _group(units, producers[k], slots[k]) for k, units in found.items() if len(units) > 1
        )

    def _kinds(self) -> tuple[Ints, list[dict[int, int]]]:
        """Unit → number of its kind, or -1 where it cannot go; kind → slots it touches."""
        free = self._producible()
        unit, touched = self._touches()
        starts = np.flatnonzero(np.diff(unit, prepend=-1))
        ends = np.append(starts[1:], len(unit))
        kind = np.full(self.count, -1)
        numbers: dict[bytes, int] = {}
        slots: list[dict[int, int]] = []
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            u = unit[start]
            if free[u]:
                rows = touched[start:end]
                kind[u] = numbers.setdefault(rows.tobytes(), len(slots))
                if kind[u] == len(slots):
                    slots.append(dict(rows.tolist()))
        return kind, slots

    def _producible(self) -> Bools:
        free = np.zeros(self.count, dtype=bool)
        for product in self.products:
            free[product.outputs] = True
        free[list(self.frozen)] = False
        free[0] = False
        return free

    def _touches(self) -> tuple[Ints, Ints]:
        """Per unit and slot, in order: the unit, and slot and number of indices [n, 2]."""
        slot = np.repeat(np.arange(len(self.slots)), [s.size for s in self.slots])
        unit = np.concatenate([self.units(s) for s in self.slots])
        pairs, times = np.unique(unit * len(self.slots) + slot, return_counts=True)
        unit, slot = np.divmod(pairs, len(self.slots))
        return unit, np.stack([slot, times], axis=1)

    def left_alone(self) -> tuple[LeftAlone, ...]:
        """Every layer none of whose outputs can go, with the reason."""
        free = {int(u) for group in self.groups for u in group.units}
        rows: dict[str, str] = {}
        partly: set[str] = set()
        for product in self.products:
            units = product.outputs.tolist()
            if any(u in free for u in units):
                partly.add(product.module)
            if product.module in rows or product.module in partly:
                continue
            reasons = Counter(self.frozen[u] for u in units if u in self.frozen)
            tied = "its channels are all tied together" if any(units) else "has a fixed width"
            rows[product.module] = reasons.most_common(1)[0][0] if reasons else tied
        return tuple(
            LeftAlone(layer=name, reason=why) for name, why in rows.items() if name not in partly
        )

    def mask(self, removed: Iterable[int]) -> Bools:
        """Units as a boolean array [count]."""
        out = np.zeros(self.count, dtype=bool)
        out[list(removed)] = True
        return out

    def indices(self, removed: Bools, *, consumed: bool = False) -> dict[str, dict[int, list[int]]]:
        """Parameter or buffer → dimension → indices of the removed units (in consumers only)."""
        out: dict[str, dict[int, list[int]]] = {}
        for number, slot in enumerate(self.slots):
            if consumed and number not in self.consumers:
                continue
            gone = np.flatnonzero(removed[self.units(slot)])
            if len(gone):
                out.setdefault(slot.name, {})[slot.dim] = gone.tolist()
        return out

    @cached_property
    def group_of(self) -> Ints:
        """Unit → number of its group; -1 where it cannot go."""
        found = np.full(self.count, -1, dtype=np.int64)
        for number, group in enumerate(self.groups):
            found[group.units] = number
        return found

    @cached_property
    def sizes(self) -> Floats:
        """Units of every group."""
        return np.array([len(group.units) for group in self.groups], dtype=np.float64)

    @cached_property
    def cost(self) -> Cost:
        """MACs and parameters as functions of the groups' widths."""
        return Cost.of(self)

    @cached_property
    def memory(self) -> Memory:
        """Bytes of weights and of what lives beside them, likewise."""
        return Memory.of(self)

    def size(self, removed: Bools) -> Size:
        """MACs, parameters and memory (batch 1) once `removed` units are gone."""
        kept = np.array([int((~removed[g.units]).sum()) for g in self.groups], dtype=np.float64)
        return Size(
            params=round(self.cost.params(kept)),
            macs=round(self.cost.macs(kept)),
            memory=round(self.memory.peak(kept)),
        )


def _in_order(values: Ints) -> list[int]:
    """Distinct values in the order in which they come."""
    first = np.unique(values, return_index=True)[1]
    found: list[int] = values[np.sort(first)].tolist()
    return found


def _group(units: list[int], producers: dict[str, int], slots: dict[int, int]) -> UnitGroup:
    name, multiplicity = next(iter(producers.items()))
    return UnitGroup(name, np.array(units), multiplicity, tuple(producers.values()), slots)
