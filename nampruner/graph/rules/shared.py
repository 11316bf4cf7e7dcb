"""What rules of several families do with the layers they meet."""

from torch import Tensor

from nampruner.graph.labels import (
    Layers,
    overlap,
    varying,
)
from nampruner.graph.tracer import Call


def merge(call: Call, layers: Layers) -> Layers:
    """Tie layers that vary along a common dimension; what stays varies along disjoint ones."""
    merged: Layers = []
    for layer in sorted(layers, key=lambda v: -len(varying(v))):
        met = next((other for other in merged if overlap(other, layer)), None)
        if met is None:
            merged.append(layer)
        elif met is not layer:
            call.tie(met, layer)
    return merged


def only_channels(call: Call, x: Tensor, why: str, keep: tuple[int, ...] = (1,)) -> Layers:
    """Freeze the layers of `x` that vary along other dimensions than `keep`; return the rest."""
    good = []
    for layer in call.labels(x):
        if set(varying(layer)) <= set(keep):
            good.append(layer)
        else:
            call.freeze([layer], why)
    return good
