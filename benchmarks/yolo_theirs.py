"""torch-pruning on an Ultralytics detector, with the rewrite of C2f that it needs."""

import copy
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch_pruning as tp
from bisection import largest_within
from torch import Tensor, nn
from ultralytics.nn.modules.block import C2f

_MEMORY = 8 << 30
"""Bytes that it may take: its graph of a network with attention took more than 20 GB."""


@contextmanager
def limited() -> Iterator[None]:
    """Let this process take `_MEMORY` more than it has, so that it fails and is not killed."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + _MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class TwoConvolutions(nn.Module):
    """A C2f whose first convolution is two, so that no output of it is split.

    torch-pruning follows a split only where the halves lose the same channels.
    """

    def __init__(self, block: C2f) -> None:
        super().__init__()
        width = block.c
        self.first = _rows(block.cv1, slice(0, width))
        self.second = _rows(block.cv1, slice(width, 2 * width))
        self.m, self.cv2 = block.m, block.cv2
        self.i, self.f, self.type = block.i, block.f, block.type

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x), self.second(x)]
        for bottleneck in self.m:
            parts.append(bottleneck(parts[-1]))
        joined: Tensor = self.cv2(torch.cat(parts, 1))
        return joined


def _rows(block: nn.Module, rows: slice) -> nn.Module:
    """Return the convolution, its BN and its activation for some of the output channels."""
    part = copy.deepcopy(block)
    for tensors in (part.conv._parameters, part.bn._parameters, part.bn._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and tensor.dim() > 0:
                cut = tensor.detach()[rows].clone()
                tensors[name] = nn.Parameter(cut) if isinstance(tensor, nn.Parameter) else cut
    part.conv.out_channels = part.bn.num_features = len(part.bn.weight)
    return part


def rewritten(model: nn.Module) -> nn.Module:
    """Return a copy that computes the same with every C2f, or class with its forward, rewritten."""
    other = copy.deepcopy(model)
    for name, block in list(other.named_modules()):
        if isinstance(block, C2f) and type(block).forward is C2f.forward:
            parent, _, last = name.rpartition(".")
            setattr(other.get_submodule(parent), last, TwoConvolutions(block))
    return other


def cut(model: nn.Module, example: Tensor, fraction: float, method: str) -> nn.Module:
    """Cut the same ratio everywhere, the head left whole as usual, to at most `fraction` of MACs.

    Raises:
        Exception: whatever torch-pruning raises where it cannot do a network.
        RuntimeError: no ratio gets there.
    """
    with limited():
        return largest_within(fraction, lambda ratio: _at(model, example, ratio, method))


def _at(model: nn.Module, example: Tensor, ratio: float, method: str) -> tuple[nn.Module, float]:
    slim = rewritten(model)
    for parameter in slim.parameters():
        parameter.requires_grad_(True)
    before, _ = tp.utils.count_ops_and_params(slim, example)
    importance = getattr(tp.importance, f"{method}Importance")()
    pruner = tp.pruner.BasePruner(
        slim, example, importance, pruning_ratio=ratio, ignored_layers=[slim.model[-1]]
    )
    pruner.step()
    return slim.eval(), tp.utils.count_ops_and_params(slim, example)[0] / before
