"""From what the rules found out to the graph: ties are closed, labels become units."""

from collections.abc import Callable, Iterable

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from nampruner.graph.graph import DependencyGraph, Ints, Product, Width
from nampruner.graph.ledger import Contraction, Ledger
from nampruner.graph.liveness import Lifetime, sides
from nampruner.graph.memory import Held

Units = Callable[[Tensor], Ints]


def build(
    ledger: Ledger, lifetimes: Iterable[Lifetime], model: nn.Module, batch: int
) -> DependencyGraph:
    """Close the ties (connected components) and turn what was found out into the value."""
    unit_of = _components(ledger)

    def units(labels: Tensor) -> Ints:
        found: Ints = unit_of[labels.reshape(-1).numpy()]
        return found

    frozen: dict[int, str] = {}
    for labels, why in ledger.frozen:
        for unit in np.unique(units(labels)).tolist():
            frozen.setdefault(unit, why)
    frozen.pop(0, None)
    return DependencyGraph(
        slots=tuple(ledger.slots),
        unit_of=unit_of,
        frozen=frozen,
        consumers=_masked_slots(ledger),
        products=tuple(_product(c, units) for c in ledger.contractions),
        widths=tuple(
            Width(w.module, w.op, w.before, tuple(units(v) for v in w.counted))
            for w in ledger.literals
        ),
        shapes={name: tuple(p.shape) for name, p in model.named_parameters()},
        held=tuple(
            Held(each.nbytes / batch, tuple(map(units, sides(each.layers))), each.first, each.last)
            for each in lifetimes
            if each.active and each.last is not None
        ),
        itemsize=_itemsize(model),
    )


def _itemsize(model: nn.Module) -> float:
    weights = list(model.parameters())
    return sum(p.nbytes for p in weights) / max(sum(p.numel() for p in weights), 1)


def _product(contraction: Contraction, units: Units) -> Product:
    return Product(
        contraction.module,
        contraction.factor,
        units(contraction.outputs),
        units(contraction.inputs),
    )


def _components(ledger: Ledger) -> Ints:
    nothing = np.zeros((2, 0), dtype=np.int64)
    a, b = np.concatenate([nothing, *(t.numpy() for t in ledger.ties)], axis=1)
    size = (ledger.labels, ledger.labels)
    links = coo_matrix((np.ones(len(a), dtype=bool), (a, b)), shape=size)
    found = connected_components(links, directed=False)[1].astype(np.int64)
    # label 0 meets nothing, so its component is its own; it becomes unit 0
    return np.where(found == found[0], 0, found + (found < found[0]))


def _masked_slots(ledger: Ledger) -> frozenset[int]:
    starts = np.array([slot.start for slot in ledger.slots])

    def owners(labels: list[Tensor]) -> set[int]:
        used = [np.unique(v[v > 0].numpy()) for v in labels]
        hits = np.concatenate(used or [np.zeros(0, dtype=np.int64)])
        return set(np.unique(np.searchsorted(starts, hits, side="right") - 1).tolist())

    silenced = owners(ledger.silenced)
    modules = {ledger.slots[i].name.rpartition(".")[0] for i in silenced}
    # a producer that is silenced loses its bias too
    biases = {
        i
        for i, slot in enumerate(ledger.slots)
        if slot.name.rpartition(".")[0] in modules and slot.name.endswith("bias")
    }
    return frozenset(owners(ledger.consumed) | silenced | biases)
