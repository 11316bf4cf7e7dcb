"""Label layers: which channel is this, element by element.

A *layer* is an int64 tensor of the same rank as the tensor it describes and broadcastable to its
shape: entry > 0 names a channel of some parameter, 0 says that the position has a fixed width that
no cut may change. A tensor can carry several layers, one for each set of dimensions along which
different families of labels vary (a convolution's weight: its outputs along 0, its inputs along 1).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Layer = Tensor
Layers = list[Layer]


def varying(layer: Layer) -> tuple[int, ...]:
    """Dimensions along which a compact layer has more than one entry."""
    return tuple(d for d, size in enumerate(layer.shape) if size > 1)


def compact(layer: Layer) -> Layer:
    """Shrink to size 1 every dimension along which the layer is constant."""
    for d, size in enumerate(layer.shape):
        if size > 1:
            first = layer.narrow(d, 0, 1)
            if layer.stride(d) == 0 or bool((layer == first).all()):
                layer = first
    return layer


def align(layer: Layer, rank: int) -> Layer:
    """Prepend dimensions of size 1, as broadcasting does."""
    return layer.reshape(*[1] * (rank - layer.dim()), *layer.shape)


def overlap(a: Layer, b: Layer) -> bool:
    """Whether two layers of the same rank vary along a common dimension."""
    return bool(set(varying(a)) & set(varying(b)))


def vector(layers: Sequence[Layer], dim: int, size: int) -> Tensor:
    """Labels along `dim` alone [size]; zeros where nothing is known."""
    for layer in layers:
        if varying(layer) == (dim,):
            return layer.reshape(-1)
    return torch.zeros(size, dtype=torch.int64)


def along(vector_: Tensor, dim: int, rank: int) -> Layer:
    """The layer of the given rank that has `vector_` along `dim`."""
    shape = [1] * rank
    shape[dim] = -1
    return vector_.reshape(shape)
