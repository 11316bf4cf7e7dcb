"""What the other channels cannot predict: importance from second moments, no labels, no training.

If a channel of a consumer's input is removed, the best linear use of the others leaves a residual.
Its variance is 1 / (S⁻¹)ⱼⱼ with S the covariance of the channels; weighted by what the consumer
does with the channel, and by how much the network's outputs move with the consumer's, it is the
error that recovery cannot undo. Channels are eliminated greedily, cheapest first; each elimination
re-expresses the channel by those that stay, which updates S⁻¹ and the weights' Gram matrix by one
Schur step (Hassibi & Stork 1993, Optimal Brain Surgeon, applied to whole channels).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from nampruner.errors import NamPrunerError
from nampruner.graph import DependencyGraph, UnitGroup
from nampruner.modes import evaluating

_ROWS = 4096
"""Positions sampled per batch and consumer."""
_JITTER = 1e-6
"""Added to the covariance, relative to its mean variance: duplicates stay invertible."""
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class _Seen:
    """What a consumer saw."""

    units: NDArray[np.int64]
    """Unit of every input channel [C]."""
    count: float = 0.0
    total: Any = 0.0
    """Σ x [C]."""
    square: Any = 0.0
    """Σ x xᵀ [C, C]."""
    reach: Any = 0.0
    """Σ over images and positions of (∂output/∂y)² per output channel [O]."""
    images: int = 0
    handles: list[Any] = field(default_factory=list)


def reconstruction(
    model: nn.Module, graph: DependencyGraph, batches: Iterable[Tensor] | None
) -> NDArray[np.float64]:
    """Score every unit by the error that its elimination adds to the network's outputs.

    Within a group the scores rise in the order of elimination: their running sum is the predicted
    error of each width. Between groups they compare (squared outputs). `batches` are inputs
    [N, C, H, W]. A unit that no plain convolution or linear layer consumes gets the median score.

    Raises:
        NamPrunerError: there are no batches.
    """
    seen = _watch(model, graph, batches)
    scores = np.full(graph.count, np.nan)
    for group in graph.groups:
        systems = [s for name, c in seen.items() if (s := _system(model, name, c, group))]
        if systems:
            order, cost = eliminate(systems)
            scores[group.units[order]] = np.maximum.accumulate(cost)
    known = scores[~np.isnan(scores)]
    scores[np.isnan(scores)] = np.median(known) if len(known) else 1.0
    return scores


def eliminate(systems: list[tuple[Tensor, Tensor]]) -> tuple[NDArray[np.int64], Any]:
    """Order of elimination and the error each step adds, both [C].

    `systems` holds, per consumer, the covariance S and the Gram matrix G of its weights, [C, C].
    The error of dropping channel j is Σ Gⱼⱼ / (S⁻¹)ⱼⱼ over the consumers.
    """
    inverses = [torch.linalg.inv(covariance) for covariance, _ in systems]
    grams = [gram.clone() for _, gram in systems]
    size = len(grams[0])
    names = torch.arange(size)
    order, costs = np.zeros(size, dtype=np.int64), np.zeros(size)
    for step in range(size):
        m = size - step
        cost = torch.zeros(m, dtype=torch.float64)
        for inverse, gram in zip(inverses, grams, strict=True):
            cost += (gram[:m, :m].diagonal() / inverse[:m, :m].diagonal()).clamp_min(0).cpu()
        j = int(cost.argmin())
        order[step], costs[step] = int(names[j]), float(cost[j])
        names[[j, m - 1]] = names[[m - 1, j]]
        for inverse, gram in zip(inverses, grams, strict=True):
            _drop(inverse, gram, j, m)
    return order, costs


def _drop(inverse: Tensor, gram: Tensor, j: int, m: int) -> None:
    """One Schur step, in place: channel j of m moves to the end and is re-expressed by the rest."""
    last = m - 1
    for matrix in (inverse, gram):
        matrix[[j, last]] = matrix[[last, j]]
        matrix[:, [j, last]] = matrix[:, [last, j]]
    column, pivot = inverse[:last, last].clone(), inverse[last, last].clone()
    use = -column / pivot
    row, own = gram[:last, last].clone(), gram[last, last]
    gram[:last, :last].addr_(use, row).addr_(row, use).addr_(use, use, alpha=float(own))
    inverse[:last, :last].addr_(column, column, alpha=-1 / float(pivot))


def _system(
    model: nn.Module, name: str, seen: _Seen, group: UnitGroup
) -> tuple[Tensor, Tensor] | None:
    """Covariance and weighted Gram matrix of the group's channels at one consumer."""
    place = {unit: index for index, unit in enumerate(seen.units.tolist())}
    index = [place.get(unit, -1) for unit in group.units.tolist()]
    if -1 in index or not seen.count:
        return None
    covariance = seen.square / seen.count - torch.outer(seen.total, seen.total) / seen.count**2
    covariance = covariance[index][:, index]
    jitter = _JITTER * covariance.diagonal().mean().clamp_min(1e-12)
    covariance += jitter * torch.eye(len(index), dtype=torch.float64, device=covariance.device)
    weight: Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
    rows = weight.detach().double().reshape(*weight.shape[:2], -1)
    rows = rows[:, index] * (seen.reach / seen.images).sqrt()[:, None, None]
    return covariance, torch.einsum("oct,odt->cd", rows, rows)


def _watch(
    model: nn.Module, graph: DependencyGraph, batches: Iterable[Tensor] | None
) -> dict[str, _Seen]:
    seen = {name: _Seen(units) for name, units in _consumers(model, graph).items()}
    handles = [
        model.get_submodule(name).register_forward_hook(_hook(entry))
        for name, entry in seen.items()
    ]
    count = 0
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            for batch in batches or ():
                images = batch.to(device, copy=True).requires_grad_(True)
                out = next(t for t in tree_flatten(model(images))[0] if t.is_floating_point())
                probe = torch.randn(out.shape, generator=generator).to(out)
                torch.autograd.backward((out * probe).sum(), inputs=[images])
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise NamPrunerError("importance reconstruction needs inputs; pass `batches`")
    return seen


def _consumers(model: nn.Module, graph: DependencyGraph) -> dict[str, NDArray[np.int64]]:
    """Plain convolutions and linear layers whose input channels can go, one index per unit."""
    modules = dict(model.named_modules())
    found = {}
    for number in sorted(graph.consumers):
        slot = graph.slots[number]
        path, _, key = slot.name.rpartition(".")
        module = modules[path]
        plain = isinstance(module, nn.Linear) or (isinstance(module, _CONV) and module.groups == 1)
        units = graph.units(slot)
        if key == "weight" and slot.dim == 1 and plain and len(set(units.tolist())) == len(units):
            found[path] = units
    return found


def _hook(seen: _Seen) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        conv = isinstance(module, _CONV)
        with torch.no_grad():
            x = inputs[0].movedim(1, -1) if conv else inputs[0]
            rows = x.reshape(-1, x.shape[-1])
            pick = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:_ROWS]
            rows = rows[pick.to(rows.device)].double()
            seen.count += len(rows)
            seen.total = seen.total + rows.sum(0)
            seen.square = seen.square + rows.T @ rows
            seen.images += out.shape[0]

        def reach(gradient: Tensor) -> None:
            flat = gradient.movedim(1, -1) if conv else gradient
            square = flat.double().square().reshape(-1, flat.shape[-1]).sum(0)
            seen.reach = seen.reach + square

        if out.requires_grad:
            out.register_hook(reach)

    return hook
