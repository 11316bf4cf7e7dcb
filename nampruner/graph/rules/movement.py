"""Ops that move data move the labels, by running themselves on them."""

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from nampruner.graph.labels import (
    Layer,
    Layers,
    along,
    compact,
    overlap,
    varying,
    vector,
)
from nampruner.graph.rules.elementwise import unknown
from nampruner.graph.rules.shared import merge, only_channels
from nampruner.graph.tracer import Call


def move(call: Call) -> list[Layers]:
    """Run the same op on the labels."""
    return [[_same_op(call, layer) for layer in call.labels(call.args[0])]]


def _same_op(call: Call, layer: Layer) -> Layer:
    # labels stay on the CPU, an index may lie beside its tensor on a GPU
    args, kwargs = tree_map_only(Tensor, Tensor.cpu, (call.args[1:], call.kwargs))
    out: Layer = call.function(layer.expand(call.args[0].shape), *args, **kwargs)
    return out


def reshape(call: Call) -> list[Layers]:
    """`view`: merged dimensions keep their labels; a split one is tied across its outer part."""
    shape = call.results[0].shape
    merged: Layers = []
    for layer in call.labels(call.args[0]):
        moved = compact(layer.expand(call.args[0].shape).reshape(shape))
        dims = varying(moved)
        for outer, _ in pairwise(dims) if len(dims) > len(varying(layer)) else ():
            first = moved.narrow(outer, 0, 1)
            call.tie(moved, first)
            moved = first
        for d in varying(moved):
            if len(varying(moved)) == 1:
                call.literal(shape[d], moved.reshape(-1))
        merged.append(moved)
    return [merge(call, merged)]


def restride(call: Call) -> list[Layers]:
    """`as_strided` that moves nothing, as pooling to 1x1 does for channels_last."""
    x, out = call.args[0], call.results[0]
    still = x.shape == out.shape and x.is_contiguous() and out.is_contiguous()
    # done in place, `x` is `out` already, but its labels have the sizes it had
    if still and all(_fits(layer, out.shape) for layer in call.labels(x)):
        return [call.labels(x)]
    return unknown(call)


def _fits(layer: Layer, shape: torch.Size) -> bool:
    return layer.dim() == len(shape) and all(map(lambda a, b: a in (1, b), layer.shape, shape))


def take(call: Call) -> list[Layers]:
    """`slice`: the bounds count survivors; equal parts lose equal positions."""
    x = call.args[0]
    dim = call.argument(1, "dim", 0) % x.dim()
    size, width = x.shape[dim], call.results[0].shape[dim]
    start = min(max(_wrap(call.argument(2, "start") or 0, size), 0), size)
    for layer in call.labels(x):
        if dim in varying(layer) and width < size:
            _bounds(call, layer, dim, start, width)
            if size % width == 0 and start % width == 0:
                call.tie(layer.narrow(dim, start, width), layer.narrow(dim, 0, width))
    return move(call)


def _wrap(index: int, size: int) -> int:
    return index + size if index < 0 else index


def _bounds(call: Call, layer: Layer, dim: int, start: int, width: int) -> None:
    if call.argument(4, "step", 1) != 1:
        call.freeze([layer], "strided slice over channels")
    elif varying(layer) == (dim,):
        labels = layer.reshape(-1)
        for bound in (start, start + width):
            if 0 < bound < labels.numel():
                call.literal(bound, labels[:bound])


def split(call: Call) -> list[Layers]:
    """`split`, `chunk`, `unbind`: equal parts lose equal positions, others are literals."""
    x = call.args[0]
    parts: list[Layers] = [[] for _ in call.results]
    for layer in call.labels(x):
        pieces = call.function(layer.expand(x.shape), *call.args[1:], **call.kwargs)
        pieces = [compact(piece) for piece in pieces]
        _split_widths(call, x, layer, pieces)
        for own, piece in zip(parts, pieces, strict=True):
            own.append(piece)
    return parts


def _split_widths(call: Call, x: Tensor, layer: Layer, pieces: list[Layer]) -> None:
    if call.op == "unbind":
        return
    dim = call.argument(2, "dim", 0) % x.dim()
    if dim not in varying(layer):
        return
    if len({piece.shape for piece in pieces}) == 1:
        for piece in pieces[1:]:
            call.tie(pieces[0], piece)
    if varying(layer) == (dim,):
        sizes = call.args[1]
        counted = [piece.reshape(-1) for piece in pieces]
        if isinstance(sizes, int):
            call.literal(sizes, counted[0])
            # the size of a part is often computed from a width that the module holds
            call.literal(x.shape[dim], layer.reshape(-1))
        else:
            call.literal(tuple(sizes), *counted)
            for size, labels in zip(sizes, counted, strict=True):
                call.literal(size, labels)


def concatenate(call: Call) -> list[Layers]:
    """`cat`: labels follow one another; along the other dimensions they are tied."""
    tensors: list[Tensor] = [t for t in call.args[0] if t.numel() or t.dim() > 1]
    rank = tensors[0].dim()
    dim = call.argument(1, "dim", 0) % rank
    joined = [v for t in tensors for v in call.labels(t) if dim in varying(v)]
    out: Layers = []
    if joined:
        out.append(_joined(call, tensors, dim))
    beside = [[v for v in call.labels(t) if dim not in varying(v)] for t in tensors]
    for first in beside[0]:
        for own in beside[1:]:
            met = next((v for v in own if overlap(first, v)), None)
            call.tie(first, first * 0 if met is None else met)
        out.append(first)
    for own in beside[1:]:
        call.freeze([v for v in own if not any(overlap(v, f) for f in beside[0])], "fixed width")
    return [out]


def _joined(call: Call, tensors: list[Tensor], dim: int) -> Layer:
    pieces = []
    for tensor in tensors:
        own = [v for v in call.labels(tensor) if dim in varying(v)]
        call.freeze(own[1:], "several families of channels are concatenated")
        shape = list(tensor.shape)
        pieces.append(own[0] if own else torch.zeros([1] * tensor.dim(), dtype=torch.int64))
        pieces[-1] = pieces[-1].expand(shape)
    return torch.cat(pieces, dim)


def stack(call: Call) -> list[Layers]:
    """`stack` makes a branch axis: branches have one shape, so equal positions go together."""
    tensors: list[Tensor] = list(call.args[0])
    dim = call.argument(1, "dim", 0) % (tensors[0].dim() + 1)
    merged = merge(call, [v for t in tensors for v in call.labels(t)])
    for tensor in tensors:
        known = {d for v in call.labels(tensor) for d in varying(v)}
        for layer in merged:
            if any(d not in known for d in varying(layer)):
                call.freeze([layer], "meets a fixed width")
    return [[layer.unsqueeze(dim) for layer in merged]]


def pick(call: Call) -> list[Layers]:
    """`index`, `index_select`, `gather`: channels picked by number keep their places."""
    x, where = call.args[:2]
    if isinstance(where, int):
        touched = {where % x.dim()}
    else:
        touched = {d for d, index in enumerate(where) if index is not None}
    out: Layers = []
    for layer in call.labels(x):
        if touched & set(varying(layer)):
            call.freeze([layer], "picked by number")
        else:
            out.append(_same_op(call, layer))
    return [out]


def halves(call: Call) -> list[Layers]:
    """`glu` gates the first half with the second: equal positions go together."""
    x = call.args[0]
    dim = call.argument(1, "dim", -1) % x.dim()
    out: Layers = []
    for layer in call.labels(x):
        if dim in varying(layer):
            first, second = layer.chunk(2, dim)
            call.tie(first, second)
            layer = first
        out.append(layer)
    return [merge(call, out)]


def patches(call: Call) -> list[Layers]:
    """`im2col` [N, C, H, W] → [N, C·k², L] and back: the k² elements of a channel go together."""
    x = call.args[0]
    elements = math.prod(call.args[2 if call.op == "col2im" else 1])
    only_channels(call, x, "unfolded across labelled positions")
    labels = vector(call.labels(x), 1, x.shape[1])
    if call.op == "im2col":
        return [[along(labels.repeat_interleave(elements), 1, x.dim() - 1)]]
    channels = labels.view(-1, elements)
    call.tie(channels, channels[:, :1])
    return [[along(channels[:, 0], 1, x.dim() + 1)]]


def shuffle_pixels(call: Call) -> list[Layers]:
    """`pixel_shuffle` [C·r², H, W] → [C, rH, rW]: the r² inputs of an output go together."""
    x, factor = call.args[:2]
    labels = vector(call.labels(x), 1, x.shape[1])
    if call.op == "pixel_unshuffle":
        return [[along(labels.repeat_interleave(factor * factor), 1, x.dim())]]
    groups = labels.view(-1, factor * factor)
    call.tie(groups, groups[:, :1])
    return [[along(groups[:, 0], 1, x.dim())]]
