"""Ops that act position by position, and those that owe nothing to what they meet."""

from torch import Tensor

from nampruner.graph.labels import (
    Layers,
    align,
    varying,
)
from nampruner.graph.rules.shared import merge
from nampruner.graph.tracer import Call


def unknown(call: Call) -> list[Layers]:
    """No rule: everything that touches it keeps its width."""
    for tensor in call.tensors:
        call.freeze(call.labels(tensor), "no rule for this op")
    return []


def elementwise(call: Call) -> list[Layers]:
    """Tie the labels that meet (residual add, gate × features)."""
    rank = max(t.dim() for t in call.results)
    operands = [t for t in call.tensors if t.dim() <= rank]
    layers = [[align(v, rank) for v in call.labels(t)] for t in operands]
    merged = merge(call, [layer for own in layers for layer in own])
    for tensor, own in zip(operands, layers, strict=True):
        shape = [1] * (rank - tensor.dim()) + list(tensor.shape)
        known = {d for layer in own for d in varying(layer)}
        for layer in merged:
            if any(shape[d] > 1 and d not in known for d in varying(layer)):
                call.freeze([layer], "meets a fixed width")
    return [merged] * len(call.results)


def overwrite(call: Call) -> list[Layers]:
    """`copy_`: the source's labels replace the destination's."""
    source: Tensor = call.args[1]
    rank = call.results[0].dim()
    return [[align(v, rank) for v in call.labels(source)]]


def fixed(call: Call) -> list[Layers]:
    """A new tensor whose values owe nothing to the channels it was made beside."""
    return [[] for _ in call.results]
