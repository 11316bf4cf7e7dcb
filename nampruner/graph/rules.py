"""What each family of ATen ops does to the labels: one small function per family, one table.

A rule takes the `Call` and returns the layers of each result. It may tie labels that must go
together, freeze channels that an op mixes, note a contraction (where a removed channel stops
mattering) and note literals (numbers that may be hard-coded widths). An op that is not in the table
freezes what touches it: a wrong guess is never made.
"""

from itertools import pairwise

import torch
from torch import Tensor

from nampruner.graph.labels import (
    Layer,
    Layers,
    align,
    along,
    compact,
    overlap,
    varying,
    vector,
)
from nampruner.graph.tracer import Call, Rule


def unknown(call: Call) -> list[Layers]:
    """No rule: everything that touches it keeps its width."""
    for tensor in call.tensors:
        call.freeze(call.labels(tensor), "no rule for this op")
    return []


# -- elementwise -----------------------------------------------------------------------------------


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


def overwrite(call: Call) -> list[Layers]:
    """`copy_`: the source's labels replace the destination's."""
    source: Tensor = call.args[1]
    rank = call.results[0].dim()
    return [[align(v, rank) for v in call.labels(source)]]


def fixed(call: Call) -> list[Layers]:
    """A new tensor whose values owe nothing to the channels it was made beside."""
    return [[] for _ in call.results]


# -- contractions ----------------------------------------------------------------------------------


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


def only_channels(call: Call, x: Tensor, why: str, keep: tuple[int, ...] = (1,)) -> Layers:
    """Freeze the layers of `x` that vary along other dimensions than `keep`; return the rest."""
    good = []
    for layer in call.labels(x):
        if set(varying(layer)) <= set(keep):
            good.append(layer)
        else:
            call.freeze([layer], why)
    return good


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


# -- normalization, pooling, reductions ------------------------------------------------------------


def batch_norm(call: Call) -> list[Layers]:
    """γ, β, mean and variance go with their channel."""
    x = call.args[0]
    layers = call.labels(x)
    channels = vector(layers, 1, x.shape[1])
    for tensor in call.args[1:5]:
        if isinstance(tensor, Tensor) and tensor.numel() > 1:
            call.tie(vector(call.labels(tensor), 0, tensor.shape[0]), channels)
    return [layers]


def layer_norm(call: Call) -> list[Layers]:
    """Statistics over the last dimensions mix the channels that lie there."""
    x, shape = call.args[:2]
    return [_normalized(call, x, range(x.dim() - len(shape), x.dim()))]


def group_norm(call: Call) -> list[Layers]:
    """Statistics over groups of channels and all positions."""
    x = call.args[0]
    return [_normalized(call, x, range(1, x.dim()))]


def _normalized(call: Call, x: Tensor, dims: range) -> Layers:
    mixed = [v for v in call.labels(x) if set(varying(v)) & set(dims)]
    call.freeze(mixed, "normalization over channels")
    for tensor in call.tensors[1:]:
        call.freeze(call.labels(tensor), "normalization over channels")
    return [v for v in call.labels(x) if not set(varying(v)) & set(dims)]


def spatial(call: Call) -> list[Layers]:
    """Pooling, interpolation, reflection: positions change, channels do not."""
    x = call.args[0]
    return [only_channels(call, x, "acts across labelled positions", (0, 1))] * len(call.results)


def pad(call: Call) -> list[Layers]:
    """Constant padding; padded channels have a fixed width."""
    x, amounts = call.args[:2]
    out = []
    for layer in call.labels(x):
        full = layer.expand([n if d in varying(layer) else 1 for d, n in enumerate(x.shape)])
        widths = []
        for d in range(x.dim() - 1, x.dim() - 1 - len(amounts) // 2, -1):
            i = 2 * (x.dim() - 1 - d)
            widths += list(amounts[i : i + 2]) if d in varying(layer) else [0, 0]
        out.append(torch.nn.functional.pad(full, widths))
    return [out]


def reduction(call: Call) -> list[Layers]:
    """Sums over positions keep the channels; sums over channels mix them."""
    x = call.args[0]
    given = call.argument(1, "dim")
    every = range(x.dim())
    dims = (
        {d % x.dim() for d in (given if isinstance(given, list | tuple) else [given])}
        if (isinstance(given, int) or (isinstance(given, list | tuple) and len(given)))
        else set(every)
    )
    mixed = [v for v in call.labels(x) if dims & set(varying(v))]
    call.freeze(mixed, "mixes channels")
    kept = [v for v in call.labels(x) if not dims & set(varying(v))]
    if call.results and call.results[0].dim() < x.dim():
        kept = [v.reshape([n for d, n in enumerate(v.shape) if d not in dims]) for v in kept]
    return [kept] * len(call.results)


def softmax(call: Call) -> list[Layers]:
    """A softmax, cumulative sum or sort along channels mixes them."""
    x = call.args[0]
    dim = call.argument(1, "dim", -1) % x.dim()
    mixed = [v for v in call.labels(x) if dim in varying(v)]
    call.freeze(mixed, "acts across channels")
    return [[v for v in call.labels(x) if dim not in varying(v)]] * len(call.results)


# -- moving data -----------------------------------------------------------------------------------


def move(call: Call) -> list[Layers]:
    """Run the same op on the labels."""
    return [[_same_op(call, layer) for layer in call.labels(call.args[0])]]


def _same_op(call: Call, layer: Layer) -> Layer:
    out: Layer = call.function(layer.expand(call.args[0].shape), *call.args[1:], **call.kwargs)
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
        else:
            call.literal(tuple(sizes), *counted)


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
    """`index`, `index_select`, `gather`: picked by number, so these channels keep their places."""
    x = call.args[0]
    out: Layers = []
    for layer in call.labels(x):
        try:
            moved = _same_op(call, layer)
        except (RuntimeError, IndexError):
            moved = layer[:0]
        if compact(moved).unique().numel() < layer.unique().numel() or moved.dim() != x.dim():
            call.freeze([layer], "picked by number")
        else:
            call.freeze([layer], "picked by number") if len(varying(layer)) else None
            out.append(moved)
    return [out]


def shuffle_pixels(call: Call) -> list[Layers]:
    """`pixel_shuffle` [C·r², H, W] → [C, rH, rW]: the r² inputs of an output go together."""
    x, factor = call.args[:2]
    labels = vector(call.labels(x), 1, x.shape[1])
    if call.op == "pixel_unshuffle":
        return [[along(labels.repeat_interleave(factor * factor), 1, x.dim())]]
    groups = labels.view(-1, factor * factor)
    call.tie(groups, groups[:, :1])
    return [[along(groups[:, 0], 1, x.dim())]]


def _table() -> dict[str, Rule]:
    families: dict[Rule, str] = {
        elementwise: """
            add sub rsub mul div pow maximum minimum fmod remainder atan2 where lerp
            addcmul addcdiv relu relu6 silu sigmoid hardtanh hardswish hardsigmoid
            gelu leaky_relu tanh mish elu celu selu clamp clamp_min clamp_max neg
            abs exp expm1 log log1p sqrt rsqrt square reciprocal erf sin cos sign
            floor ceil round softplus log_sigmoid_forward threshold logit heaviside
            _to_copy to clone dropout native_dropout bernoulli detach alias
            lift_fresh contiguous zeros_like ones_like empty_like full_like
            rand_like randn_like masked_fill _prelu_kernel prelu rrelu_with_noise gt
            lt ge le eq ne logical_and logical_or logical_not bitwise_and bitwise_or
            isnan isinf isfinite nan_to_num fill zero type_as positive trunc
            fake_quantize_per_tensor_affine _fused_dropout hardshrink softshrink""",
        overwrite: "copy",
        fixed: "new_zeros new_ones new_empty new_full size sym_size item _local_scalar_dense",
        convolution: "convolution _convolution mkldnn_convolution cudnn_convolution",
        matmul: "mm addmm bmm baddbmm",
        linear: "linear mkldnn_linear",
        attention: """
            _scaled_dot_product_flash_attention_for_cpu
            _scaled_dot_product_flash_attention
            _scaled_dot_product_efficient_attention
            _scaled_dot_product_cudnn_attention""",
        batch_norm: """
            native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm
            _native_batch_norm_legit _batch_norm_with_update _batch_norm_no_update""",
        layer_norm: "native_layer_norm",
        group_norm: "native_group_norm",
        spatial: """
            max_pool1d max_pool2d max_pool3d max_pool2d_with_indices
            max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d
            _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d
            adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d
            upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d
            upsample_linear1d upsample_bilinear2d upsample_trilinear3d
            upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
            reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
            replication_pad2d replication_pad3d grid_sampler_2d""",
        pad: "constant_pad_nd",
        reduction: """
            mean sum amax amin max min var var_mean std std_mean norm
            linalg_vector_norm logsumexp prod any all argmax argmin median""",
        softmax: "_softmax _log_softmax cumsum cumprod sort topk glu",
        move: """
            permute transpose t unsqueeze squeeze flip roll repeat select expand
            narrow movedim unfold repeat_interleave diagonal rot90 numpy_T mT""",
        reshape: "view _unsafe_view reshape flatten unflatten _reshape_alias",
        take: "slice",
        split: "split split_with_sizes unbind chunk unsafe_split unsafe_chunk split_copy",
        concatenate: "cat concat",
        stack: "stack",
        pick: "index index_select gather",
        shuffle_pixels: "pixel_shuffle pixel_unshuffle",
    }
    table: dict[str, Rule] = {op: rule for rule, ops in families.items() for op in ops.split()}
    return {**table, "?": unknown}


RULES: dict[str, Rule] = _table()
"""ATen op (without overload and in-place underscore) → rule; `?` is the rule for all others."""
