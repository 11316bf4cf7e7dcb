"""Convolutions and matrix products: where a removed channel stops mattering."""

import torch
from torch import Tensor

from nampruner.graph.labels import (
    Layers,
    along,
    varying,
    vector,
)
from nampruner.graph.rules.shared import merge, only_channels
from nampruner.graph.tracer import Call


def convolution(call: Call) -> list[Layers]:
    """Consume the inputs at the weight's input slices; the outputs get the weight's labels."""
    x, weight, bias = call.args[:3]
    transposed, groups = call.args[6], call.args[8]
    only_channels(call, x, "convolution across labelled positions")
    inputs = vector(call.labels(x), 1, x.shape[1])
    rows = vector(call.labels(weight), 0, weight.shape[0])
    columns = vector(call.labels(weight), 1, weight.shape[1])
    if groups == 1:
        outputs, ours = (columns, rows) if transposed else (rows, columns)
        consume(call, inputs, ours, weight)
        summed = inputs
    elif transposed:
        outputs, summed = transposed_groups(call, inputs, rows, columns, groups)
    else:
        outputs, summed = grouped(call, inputs, rows, columns, groups)
    if bias is not None and outputs.numel() > 1:
        call.tie(vector(call.labels(bias), 0, bias.shape[0]), outputs)
    out = call.results[0]
    kernel = weight[0, 0].numel()
    sites = (x if transposed else out).numel() / (x if transposed else out).shape[1]
    call.contraction(sites * kernel, outputs, summed)
    return [[along(outputs, 1, out.dim())]]


def consume(call: Call, inputs: Tensor, ours: Tensor, weight: Tensor) -> None:
    """Tie the incoming channels to the weight's input slices."""
    if inputs.numel() > 1:
        call.tie(inputs, ours, f"meets an input of fixed width: {call.where}")
        call.consume(ours, weight)


def grouped(
    call: Call, inputs: Tensor, rows: Tensor, columns: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """Grouped convolution: whole groups go where they are narrow, else equal positions in each.

    Narrow groups (depthwise is the narrowest) are removed whole, which keeps their width and so
    their speed; in wide ones the same positions leave every group. Returns outputs and summands.
    """
    ins, outs = inputs.view(groups, -1), rows.view(groups, -1)
    if groups >= ins.shape[1]:
        first = ins[:, :1]
        call.tie(ins, first)
        call.tie(outs, first)
        call.freeze([columns], "whole groups go, their width stays")
        call.literal(groups, ins[:, 0])
        return rows, torch.zeros(ins.shape[1], dtype=torch.int64)
    call.tie(ins, columns.view(1, -1))
    call.tie(outs, outs[:1])
    call.consume(columns, call.args[1])
    return rows, columns


def transposed_groups(
    call: Call, inputs: Tensor, rows: Tensor, columns: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """Grouped transposed convolution: depthwise ones lose whole groups, others stay."""
    call.tie(inputs, rows)
    width = inputs.numel() // groups
    if width == 1 and columns.numel() == 1:
        call.literal(groups, rows)
        return rows, torch.zeros(1, dtype=torch.int64)
    call.freeze([inputs, rows, columns], "grouped transposed convolution")
    size = columns.numel() * groups
    return torch.zeros(size, dtype=torch.int64), torch.zeros(width, dtype=torch.int64)


def matmul(call: Call) -> list[Layers]:
    """`mm`, `bmm` and their kin with a bias: contract the last dimension of a with b's first."""
    *bias, a, b = call.args[:3] if "add" in call.op else call.args[:2]
    return [contract(call, a, b, bias[0] if bias else None)]


def linear(call: Call) -> list[Layers]:
    """`linear` and `_linear` kernels that were not taken apart: x Wᵀ + bias."""
    x, weight = call.args[:2]
    bias = call.argument(2, "bias")
    rank = x.dim()
    inputs = [v for v in call.labels(x) if rank - 1 in varying(v)]
    only = vector(inputs, rank - 1, x.shape[-1])
    call.freeze([v for v in inputs if varying(v) != (rank - 1,)], "mixed in a product")
    ours, outputs = (vector(call.labels(weight), d, weight.shape[d]) for d in (1, 0))
    consume(call, only, ours, weight)
    if bias is not None and outputs.numel() > 1:
        call.tie(vector(call.labels(bias), 0, bias.shape[0]), outputs)
    call.contraction(x.numel() / x.shape[-1], outputs, only)
    rest = [v for v in call.labels(x) if rank - 1 not in varying(v)]
    return [[*rest, along(outputs, rank - 1, rank)]]


def contract(call: Call, a: Tensor, b: Tensor, bias: Tensor | None) -> Layers:
    """a […, n, k] · b […, k, m] → […, n, m]."""
    rank = a.dim()
    row, col = rank - 2, rank - 1
    left = [v for v in call.labels(a) if col in varying(v)]
    right = [v.transpose(row, col) for v in call.labels(b) if row in varying(v)]
    call.freeze([v for v in left if row in varying(v)], "mixed in a product")
    call.freeze([v for v in right if row in varying(v)], "mixed in a product")
    meet(call, left, right, a, b)
    rest_a = [v for v in call.labels(a) if col not in varying(v)]
    rest_b = [v for v in call.labels(b) if row not in varying(v)]
    out = call.results[0]
    outputs = vector(rest_b, col, out.shape[-1])
    if bias is not None and bias.dim() == 1 and bias.numel() > 1:
        call.tie(vector(call.labels(bias), 0, bias.shape[0]), outputs)
    summed = vector(left, col, a.shape[-1])
    call.contraction(out.numel() / out.shape[-1], outputs, summed)
    return merge(call, rest_a + rest_b)


def meet(call: Call, left: Layers, right: Layers, a: Tensor, b: Tensor) -> None:
    """Tie what is summed over, and say on which side a removed channel is masked."""
    if not left and not right:
        return
    if not left or not right:
        call.freeze(left + right, "meets a fixed width")
        return
    for mine in left:
        for other in right:
            call.tie(mine, other)
    sides = ((a, left), (b, right))
    weights = [side for side in sides if call.is_weight(side[0])]
    for tensor, layers in weights or sides:
        for layer in layers:
            call.consume(layer.reshape(-1), tensor)


def attention(call: Call) -> list[Layers]:
    """Fused scaled dot-product attention: v's labels come out, q's and k's are contracted."""
    q, k, v = call.args[:3]
    last = q.dim() - 1
    lq, lk = ([x for x in call.labels(t) if last in varying(x)] for t in (q, k))
    meet(call, lq, lk, q, k)
    if call.kwargs.get("scale") is None:
        call.freeze(lq + lk, "the scale of attention follows the head's width")
    pairs = q.numel() // q.shape[-1] * k.shape[-2]
    one = torch.zeros(1, dtype=torch.int64)
    call.contraction(pairs, one, vector(lq, last, q.shape[-1]))
    call.contraction(pairs, vector(call.labels(v), last, v.shape[-1]), one)
    for tensor in (q, k, v):
        tokens = [x for x in call.labels(tensor) if last - 1 in varying(x)]
        call.freeze(tokens, "attention over labelled positions")
    return [[x for x in call.labels(v) if last - 1 not in varying(x)]]
