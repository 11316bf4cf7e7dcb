"""What lies in memory together, as a function of the widths.

A static estimate: tensors are made and read in the order of the traced ops, each lives until it is
read last, inputs and outputs as long as the pass. A runtime that fuses ops makes fewer of them; one
that reuses memory badly, or needs workspace, takes more.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_array

from nampruner.graph.cost import Cost, Floats, Ints, Widths

if TYPE_CHECKING:
    from nampruner.graph.graph import DependencyGraph


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor that depends on the input: bytes at batch 1, and the steps in which it lives."""

    nbytes: float
    sides: tuple[Ints, ...]
    """Units along the dimensions that can shrink."""
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Memory:
    """Bytes at batch 1, given the units `kept` [groups] in each group."""

    still: Floats
    """Of every tensor, the bytes of the dimensions that cannot shrink."""
    dims: Widths
    """The dimensions that can, one tensor after the other."""
    starts: Ints
    """Where the dimensions of each tensor start."""
    live: csr_array
    """Which tensors live in which step [steps, tensors]."""
    cost: Cost
    itemsize: float
    """Bytes per parameter."""

    @staticmethod
    def of(graph: "DependencyGraph") -> "Memory":
        one = np.zeros(1, dtype=np.int64)  # a width of 1 that is fixed
        dims = [held.sides or (one,) for held in graph.held]
        whole = [np.prod([len(units) for units in each]) for each in dims]
        lengths = np.array([len(each) for each in dims], dtype=np.int64)
        return Memory(
            np.array([h.nbytes / n for h, n in zip(graph.held, whole, strict=True)]),
            Widths.of([units for each in dims for units in each], graph.group_of, graph.sizes),
            np.cumsum(lengths) - lengths,
            _live(graph.held),
            graph.cost,
            graph.itemsize,
        )

    def steps(self, kept: Floats) -> Floats:
        """Weights and what lives in each step [steps]."""
        weights = self.itemsize * self.cost.params(kept)
        if not len(self.still):
            return np.array([weights])
        tensors = self.still * np.multiply.reduceat(self.dims(kept), self.starts)
        found: Floats = self.live @ tensors + weights
        return found

    def peak(self, kept: Floats) -> float:
        """Weights and the most that ever lives beside them."""
        return float(self.steps(kept).max())


def _live(held: tuple[Held, ...]) -> csr_array:
    """Steps after which nothing is let go are left out: the next one holds all that they do."""
    count = 1 + max((each.first for each in held), default=0)
    spans = [(each.first, min(each.last, count - 1)) for each in held]
    deaths = np.array([last for _, last in spans], dtype=np.int64)
    peaks = np.flatnonzero(np.bincount(deaths, minlength=count))
    row, column = [], []
    for number, (first, last) in enumerate(spans):
        inside = np.arange(*np.searchsorted(peaks, [first, last + 1]))
        row.append(inside)
        column.append(np.full(len(inside), number))
    rows, columns = (np.concatenate([np.zeros(0, dtype=np.int64), *x]) for x in (row, column))
    return csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(peaks), len(held)))
