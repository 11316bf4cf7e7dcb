"""MACs and parameters as functions of the widths."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

if TYPE_CHECKING:
    from nampruner.graph.graph import DependencyGraph

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Widths:
    """Many widths at once, each affine in the units [groups] that stay: fixed + counts · kept.

    A layer touches few groups, so counts [widths, groups] is sparse: its size grows with the
    network, not with its square.
    """

    counts: csr_array
    fixed: Floats

    @staticmethod
    def of(sides: Sequence[Ints], group_of: Ints, sizes: Floats) -> "Widths":
        """Count the units [n] of every side by group; -1 in `group_of` is a fixed width."""
        owners = [group_of[units] for units in sides]
        row = np.repeat(np.arange(len(sides)), [len(owner) for owner in owners])
        column = np.concatenate([*owners, np.zeros(0, dtype=np.int64)])
        free = column >= 0
        shape = (len(sides), len(sizes))
        # entries at one place add up
        counts = csr_array((np.ones(free.sum()), (row[free], column[free])), shape=shape)
        counts.data /= sizes[counts.indices]
        fixed = np.bincount(row[~free], minlength=len(sides)).astype(np.float64)
        return Widths(counts, fixed)

    def __call__(self, kept: Floats) -> Floats:
        found: Floats = self.counts @ kept + self.fixed
        return found


@dataclass(frozen=True, eq=False)
class Cost:
    """Sizes are sums of products of widths, given the units `kept` [groups] in each group."""

    factors: Floats
    outputs: Widths
    """Of every product."""
    inputs: Widths
    still: Floats
    """Of every parameter that can shrink, the product of the dimensions that cannot."""
    dims: Widths
    """The dimensions that can, one parameter after the other."""
    starts: Ints
    """Where the dimensions of each parameter start."""
    constant: float
    """Elements of the parameters that cannot shrink."""

    @staticmethod
    def of(graph: "DependencyGraph") -> "Cost":
        group_of, sizes = graph.group_of, graph.sizes
        moving: dict[str, dict[int, Ints]] = {}
        for slot in graph.slots:
            units = graph.units(slot)
            if slot.name in graph.shapes and bool((group_of[units] >= 0).any()):
                moving.setdefault(slot.name, {})[slot.dim] = units
        still = {
            name: float(np.prod([n for d, n in enumerate(shape) if d not in moving.get(name, {})]))
            for name, shape in graph.shapes.items()
        }
        lengths = [len(dims) for dims in moving.values()]
        return Cost(
            np.array([p.factor for p in graph.products]),
            Widths.of([p.outputs for p in graph.products], group_of, sizes),
            Widths.of([p.inputs for p in graph.products], group_of, sizes),
            np.array([still[name] for name in moving]),
            Widths.of([u for dims in moving.values() for u in dims.values()], group_of, sizes),
            np.cumsum([0, *lengths[:-1]], dtype=np.int64)[: len(lengths)],
            sum(size for name, size in still.items() if name not in moving),
        )

    def macs(self, kept: Floats) -> float:
        """Multiply–accumulates at batch 1."""
        return float((self.factors * self.outputs(kept) * self.inputs(kept)).sum())

    def params(self, kept: Floats) -> float:
        """Elements of all parameters."""
        if not len(self.still):
            return self.constant
        shrunk = np.multiply.reduceat(self.dims(kept), self.starts)
        return self.constant + float(self.still @ shrunk)
