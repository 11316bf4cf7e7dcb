"""Normalization, pooling, padding, sums: what mixes channels freezes them."""

import torch
from torch import Tensor

from nampruner.graph.labels import (
    Layers,
    varying,
    vector,
)
from nampruner.graph.rules.shared import only_channels
from nampruner.graph.tracer import Call


def batch_norm(call: Call) -> list[Layers]:
    """γ, β, mean and variance go with their channel."""
    x = call.args[0]
    layers = call.labels(x)
    channels = vector(layers, 1, x.shape[1])
    for tensor in call.args[1:5]:
        if isinstance(tensor, Tensor) and tensor.numel() > 1:
            call.tie(vector(call.labels(tensor), 0, tensor.shape[0]), channels)
    if call.argument(5, "training") is True:
        # statistics of this very tensor, as in weight standardization
        only_channels(call, x, "normalization over channels")
    return [layers]


def layer_norm(call: Call) -> list[Layers]:
    """Statistics over the last dimensions mix the channels that lie there."""
    x, shape = call.args[:2]
    return [_normalized(call, x, range(x.dim() - len(shape), x.dim()))]


def group_norm(call: Call) -> list[Layers]:
    """Statistics over groups of channels and all positions: groups go whole, one group stays."""
    x, weight, bias = call.args[:3]
    groups = call.args[6]
    channels = vector(call.labels(x), 1, x.shape[1])
    if groups == 1 or not bool((channels > 0).any()):
        return [_normalized(call, x, range(1, x.dim()))]
    grouped = channels.view(groups, -1)
    call.tie(grouped, grouped[:, :1])
    for tensor in (weight, bias):
        if tensor is not None:
            call.tie(vector(call.labels(tensor), 0, tensor.shape[0]), channels)
    call.literal(groups, grouped[:, 0])
    call.literal(x.shape[1], channels)
    return [only_channels(call, x, "normalization over labelled positions")] * 3


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
    if isinstance(given, int):
        dims = {given % x.dim()}
    elif isinstance(given, list | tuple) and given:
        dims = {d % x.dim() for d in given}
    else:
        dims = set(range(x.dim()))
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
