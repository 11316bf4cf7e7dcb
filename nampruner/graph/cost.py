"""MACs and parameters as functions of the widths."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from nampruner.graph.graph import DependencyGraph

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Cost:
    """Sizes are sums of products of widths, and each width is affine in the kept units per group.

    A width is fixed + counts · kept, with kept [groups] the units that stay in each group.
    """

    factors: NDArray[np.float64]
    outputs: tuple[NDArray[np.float64], NDArray[np.float64]]
    """Of every product: counts [products, groups] and fixed part [products]."""
    inputs: tuple[NDArray[np.float64], NDArray[np.float64]]
    parameters: tuple[tuple[float, tuple[tuple[NDArray[np.float64], float], ...]], ...]
    """Of every parameter that can shrink: constant factor, and (counts, fixed) per dimension."""
    constant: float
    """Elements of the parameters that cannot shrink."""

    @staticmethod
    def of(graph: "DependencyGraph") -> "Cost":
        group_of = np.full(graph.count, -1)
        for number, group in enumerate(graph.groups):
            group_of[group.units] = number

        def affine(units: Ints) -> tuple[NDArray[np.float64], float]:
            owner = group_of[units]
            counts = np.bincount(owner[owner >= 0], minlength=len(graph.groups)).astype(float)
            for number, group in enumerate(graph.groups):
                counts[number] /= len(group.units)
            return counts, float((owner < 0).sum())

        def stacked(sides: list[Ints]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            rows = [affine(units) for units in sides]
            if not rows:
                return np.zeros((0, len(graph.groups))), np.zeros(0)
            return np.stack([r[0] for r in rows]), np.array([r[1] for r in rows])

        parameters, constant = [], 0.0
        dims: dict[str, dict[int, tuple[NDArray[np.float64], float]]] = {}
        for slot in graph.slots:
            counts, rest = affine(graph.units(slot))
            if counts.any():
                dims.setdefault(slot.name, {})[slot.dim] = (counts, rest)
        for name, shape in graph.shapes.items():
            moving = dims.get(name, {})
            still = float(np.prod([n for d, n in enumerate(shape) if d not in moving]))
            if moving:
                parameters.append((still, tuple(moving.values())))
            else:
                constant += still
        return Cost(
            np.array([p.factor for p in graph.products]),
            stacked([p.outputs for p in graph.products]),
            stacked([p.inputs for p in graph.products]),
            tuple(parameters),
            constant,
        )

    def macs(self, kept: NDArray[np.float64]) -> float:
        """Multiply–accumulates at batch 1."""
        outputs = self.outputs[0] @ kept + self.outputs[1]
        inputs = self.inputs[0] @ kept + self.inputs[1]
        return float((self.factors * outputs * inputs).sum())

    def params(self, kept: NDArray[np.float64]) -> float:
        """Elements of all parameters."""
        total = self.constant
        for still, dims in self.parameters:
            for counts, rest in dims:
                still *= float(counts @ kept + rest)
            total += still
        return total
