"""Scores per unit: larger means keep.

Every score is an array [units] in float64, indexed by the graph's unit numbers. A unit spans layers
(a residual stream has a BN in each block), so a score is a mean over the places that it touches.
"""

from collections.abc import Callable, Iterable
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from nampruner.errors import NamPrunerError
from nampruner.graph import DependencyGraph
from nampruner.modes import evaluating
from nampruner.nam import ChannelNAM
from nampruner.reconstruction import reconstruction

Scores = NDArray[np.float64]
Batches = Iterable[Tensor] | Iterable[tuple[Tensor, Tensor]]
"""Inputs, or inputs with their labels."""
Custom = Callable[[nn.Module, DependencyGraph], Scores]


def score(
    model: nn.Module,
    graph: DependencyGraph,
    method: str | Custom = "auto",
    *,
    batches: Batches | None = None,
    seed: int = 0,
) -> Scores:
    """Score every unit of `graph`.

    `auto` is `nam` where NAM is attached, else `bn`. `taylor` needs `batches` of (inputs, targets),
    `reconstruction` of inputs. A callable gets the model and the graph and returns an array
    [graph.count].

    Raises:
        NamPrunerError: the method is unknown or lacks what it needs.
    """
    if callable(method):
        return _checked(np.asarray(method(model, graph), dtype=np.float64), graph)
    if method == "auto":
        method = "nam" if _nam_places(model) else "bn"
    if method == "taylor":
        return taylor(model, graph, batches)
    if method == "reconstruction":
        return reconstruction(model, graph, None if batches is None else map(_inputs, batches))
    if method == "random":
        return np.random.default_rng(seed).random(graph.count)
    named: dict[str, Custom] = {"nam": nam, "bn": bn, "magnitude": magnitude}
    if method not in named:
        known = ", ".join(["auto", *named, "reconstruction", "taylor", "random"])
        raise NamPrunerError(f"importance {method!r} is unknown; use one of {known}")
    return named[method](model, graph)


def _checked(scores: Scores, graph: DependencyGraph) -> Scores:
    if scores.shape != (graph.count,) or not np.isfinite(scores).all():
        raise NamPrunerError(
            f"the importance function returned an array {scores.shape} with "
            f"{int((~np.isfinite(scores)).sum())} values that are not finite; it must return "
            f"finite scores [{graph.count}], one per unit"
        )
    return scores


def _inputs(batch: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return batch if isinstance(batch, Tensor) else batch[0]


def bn(model: nn.Module, graph: DependencyGraph) -> Scores:
    """Mean |γ| of the unit's BNs (Liu et al. 2017, Network Slimming).

    A unit without a BN is scored by its share of its layers' weights, times the mean |γ| of the
    network, so that it competes in the same ranking.
    """
    found, seen = _mean(graph, _host_places(model))
    level = float(found[seen].mean()) if seen.any() else 1.0
    return np.where(seen, found, magnitude(model, graph) * level)


def nam(model: nn.Module, graph: DependencyGraph) -> Scores:
    """Host |γ| × (1 + C·w)/2, w = |γ|/Σ|γ| the NAM weight (Liu et al. 2021, eq. 2).

    NAM weights sum to 1 in their layer: C·w makes layers comparable, its mean is 1. The gate of a
    channel with w = 0 still passes half (sigmoid(0) = ½): NAM alone never certifies a dead channel,
    the BN before it does, hence the product with a factor that never falls below ½. Units that no
    NAM sees keep the factor 1.
    """
    weights, seen = _mean(graph, _nam_places(model))
    return bn(model, graph) * np.where(seen, (1 + weights) / 2, 1.0)


def magnitude(model: nn.Module, graph: DependencyGraph) -> Scores:
    """L2 norm of the unit's weights (Fang et al. 2023, DepGraph), relative to its group's mean."""
    total = np.zeros(graph.count)
    for _, units, values in _weights(model, graph, lambda p: _wide(p).square()):
        np.add.at(total, units, values)
    return _relative(graph, np.sqrt(total))


def taylor(model: nn.Module, graph: DependencyGraph, batches: Batches | None) -> Scores:
    """|Σ gradient × weight| of the unit's producers (Molchanov et al. 2019, eq. 8), relative."""
    if batches is None:
        raise NamPrunerError("importance taylor needs labelled batches; pass `batches`")
    gradients = _gradients(model, batches)
    total = np.zeros(graph.count)
    for slot, units, values in _weights(model, graph, lambda p: p.detach() * gradients[p]):
        if slot not in graph.consumers:
            np.add.at(total, units, values)
    return _relative(graph, np.abs(total))


def _gradients(model: nn.Module, batches: Batches) -> dict[Tensor, Tensor]:
    parameters: list[Tensor] = [p for p in model.parameters() if p.dim() > 1]
    total = {p: torch.zeros_like(p) for p in parameters}
    device = next(model.parameters()).device
    flags = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    try:
        with evaluating(model):
            for inputs, targets in batches:
                loss = F.cross_entropy(model(inputs.to(device)), targets.to(device))
                grads = torch.autograd.grad(loss, parameters, allow_unused=True)
                for p, grad in zip(parameters, grads, strict=True):
                    total[p] += 0 if grad is None else grad
    finally:
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)
    return total


def _weights(
    model: nn.Module, graph: DependencyGraph, value: Callable[[Tensor], Tensor]
) -> list[tuple[int, NDArray[np.int64], Scores]]:
    """Of every weight's slots: number, units along it, and `value` summed per index."""
    parameters = dict(model.named_parameters())
    rows = []
    for name, slots in groupby(enumerate(graph.slots), lambda pair: pair[1].name):
        p = parameters.get(name)
        if p is None or p.dim() < 2:
            continue
        values = value(p).flatten(2).sum(2) if p.dim() > 2 else value(p)
        for number, slot in slots:
            if slot.dim < 2:
                sums = _wide(values).sum(1 - slot.dim).double()
                rows.append((number, graph.units(slot), sums.cpu().numpy()))
    return rows


def _relative(graph: DependencyGraph, total: Scores) -> Scores:
    out = np.ones(graph.count)
    for group in graph.groups:
        mean = total[group.units].mean()
        out[group.units] = total[group.units] / mean if mean > 0 else 0.0
    return out


def _mean(graph: DependencyGraph, places: dict[str, Scores]) -> tuple[Scores, NDArray[np.bool_]]:
    """Mean over the places of each unit, and which units have any."""
    total, times = np.zeros(graph.count), np.zeros(graph.count)
    for slot in graph.slots:
        if slot.name in places:
            np.add.at(total, graph.units(slot), places[slot.name])
            np.add.at(times, graph.units(slot), 1)
    return total / np.maximum(times, 1), times > 0


def _nam_places(model: nn.Module) -> dict[str, Scores]:
    """C·w of every channel NAM, under the name of its scale factor."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, ChannelNAM):
            gamma = _abs(module.bn.weight)
            share = gamma / max(gamma.sum(), np.finfo(float).tiny)
            found[f"{path}.bn.weight"] = share * len(gamma)
    return found


def _host_places(model: nn.Module) -> dict[str, Scores]:
    """|γ| of every BN that is not a NAM's own."""
    inner = set(_nam_places(model))
    return {
        f"{path}.weight": _abs(module.weight)
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.weight is not None
        and f"{path}.weight" not in inner
    }


def _abs(tensor: Tensor) -> Scores:
    values: Scores = tensor.detach().abs().double().cpu().numpy()
    return values


def _wide(parameter: Tensor) -> Tensor:
    """At least single precision: the square of a small half is zero."""
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
