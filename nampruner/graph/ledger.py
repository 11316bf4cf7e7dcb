"""What the rules find out while the network runs."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nampruner.graph.labels import Layer, Layers, along

_MANY = 2**16
"""Pairs that are worth sorting, to keep each only once: a weight may be tied element by element."""


@dataclass(frozen=True)
class Slot:
    """One dimension of one parameter or buffer; its labels are start … start + size - 1."""

    name: str
    dim: int
    start: int
    size: int


@dataclass(frozen=True, eq=False)
class Contraction:
    """A convolution or matrix product: factor · kept(outputs) · kept(inputs) MACs."""

    module: str
    factor: float
    """Positions · kernel elements, at batch 1."""
    outputs: Tensor
    """Labels of the outputs [O]."""
    inputs: Tensor
    """Labels of the inputs that each output sums over [I]."""


@dataclass(frozen=True, eq=False)
class Literal:
    """A number an op was called with that equals a width, and so may be hard-coded somewhere."""

    module: str
    op: str
    before: int | tuple[int, ...]
    counted: tuple[Tensor, ...]
    """Per number, the labels whose survivors it should count."""


@dataclass
class Ledger:
    """What the rules found out."""

    slots: list[Slot] = field(default_factory=list)
    labels: int = 1
    ties: list[Tensor] = field(default_factory=list)
    """Pairs of labels that go together [2, n]."""
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    consumed: list[Tensor] = field(default_factory=list)
    """Labels of weights' input slices: zeroing these slices masks a channel."""
    silenced: list[Tensor] = field(default_factory=list)
    """Labels that meet in a product of two activations: their producers are zeroed instead."""
    contractions: list[Contraction] = field(default_factory=list)
    literals: list[Literal] = field(default_factory=list)
    counting: bool = True
    """Off in a second run, so that no product is counted twice."""

    def fresh(self, name: str, tensor: Tensor) -> Layers:
        """New labels along every dimension of a parameter or buffer."""
        layers = []
        for dim, size in enumerate(tensor.shape):
            if size > 1:
                self.slots.append(Slot(name, dim, self.labels, size))
                ids = torch.arange(self.labels, self.labels + size)
                layers.append(along(ids, dim, tensor.dim()))
                self.labels += size
        return layers

    def tie(self, a: Layer, b: Layer, why: str) -> None:
        """The labels that meet go together; one that meets a fixed width is frozen."""
        a, b = (x.reshape(-1) for x in torch.broadcast_tensors(a, b))
        both = (a > 0) & (b > 0) & (a != b)
        if bool(both.any()):
            self.ties.append(self._pairs(a[both], b[both]))
        one = (a > 0) ^ (b > 0)
        if bool(one.any()):
            self.freeze([torch.where(a > 0, a, b)[one]], why)

    def _pairs(self, a: Tensor, b: Tensor) -> Tensor:
        if a.numel() <= _MANY:
            return torch.stack([a, b])
        keys = torch.unique(a * self.labels + b)
        return torch.stack([keys // self.labels, keys % self.labels])

    def freeze(self, layers: Layers, why: str) -> None:
        """These channels cannot go."""
        self.frozen += [(torch.unique(layer), why) for layer in layers]
