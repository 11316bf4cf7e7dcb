"""When each piece of memory of a forward pass is made and when it is read last."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from nampruner.graph.labels import Layers, along, varying

END = 2**62
"""The step of what outlives the forward pass: its inputs, which are the caller's, and outputs."""


@dataclass(eq=False)
class Lifetime:
    """One piece of memory; tensors that are views of one another share it."""

    nbytes: int
    """Of the tensor that it was made for, as is its shape."""
    shape: tuple[int, ...]
    first: int
    """Step in which it is made. A step is a call that makes new memory."""
    last: int | None = None
    """Step in which it is read last; None where nobody reads it: indices of a max pooling."""
    active: bool = False
    """Whether it depends on the network's input; what does not could be computed before."""
    layers: Layers = field(default_factory=list)
    """Labels of a tensor that takes all of it."""

    @staticmethod
    def of(tensor: Tensor, first: int) -> "Lifetime":
        """What is made for a tensor in a step; sparse and nested ones as if they were dense."""
        return Lifetime(_bytes(tensor), () if tensor.is_nested else tuple(tensor.shape), first)

    def look(self, tensor: Tensor, layers: Layers) -> None:
        """Take over the labels of a tensor that takes all of it."""
        if layers and _bytes(tensor) == self.nbytes:
            self.layers = layers


class Liveness:
    """Follows memory through a forward pass, op by op, as the ops read and make it."""

    def __init__(self) -> None:
        self.lifetimes: list[Lifetime] = []
        self._step = 0
        self._of: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def take(self, tensor: Tensor) -> None:
        """An input of the network, there from the start to the end."""
        own = Lifetime.of(tensor, 0)
        own.last, own.active = END, True
        self.lifetimes.append(own)
        self._of[tensor] = own

    def give(self, tensor: Tensor) -> None:
        """An output of the network."""
        if tensor in self._of:
            self._of[tensor].last = END

    def follow(
        self,
        inputs: Sequence[Tensor],
        results: Sequence[Tensor],
        active: WeakIdKeyDictionary,
        labels_of: Callable[[Tensor], Layers],
    ) -> None:
        """One call: what it reads is still needed, what it makes is new unless it shares memory."""
        owners = {_place(tensor): self._of.get(tensor) for tensor in inputs}
        made = [t for t in results if _place(t) not in owners]
        self._step += bool(made)
        for owner in owners.values():
            if owner is not None and owner.last != END:
                owner.last = self._step
        for tensor in made:
            own = Lifetime.of(tensor, self._step)
            if owners.setdefault(_place(tensor), own) is own:
                self.lifetimes.append(own)
        for tensor in (*inputs, *results):
            owner = owners[_place(tensor)]
            if owner is not None:
                self._of[tensor] = owner
                if tensor in active:
                    owner.active = True
                    owner.look(tensor, labels_of(tensor))

    def label(self, start: int, channels: Tensor) -> None:
        """Give what was made since lifetime `start` in a channel-wise module its labels [C]."""
        for own in self.lifetimes[start:]:
            places = [d for d, size in enumerate(own.shape) if size == len(channels) and d > 0]
            if places and not own.layers:
                own.layers = [along(channels, places[0], len(own.shape))]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _place(tensor: Tensor) -> int:
    """What tensors that share memory have in common; itself, where there is no such thing."""
    if tensor.layout is not torch.strided:
        return id(tensor)
    place: int = tensor.untyped_storage()._cdata
    return place


def sides(layers: Layers) -> Layers:
    """Return layers that vary along different dimensions, so that their widths multiply."""
    found: Layers = []
    taken: set[int] = set()
    for layer in layers:
        if not taken & set(varying(layer)):
            taken |= set(varying(layer))
            found.append(layer)
    return found
