"""torch-pruning on one network: build, prune, run, and compare with the masked network.

As it comes: no argument is given that only a person who knows the network could give.
"""

import copy
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from reach_build import Log, difference, output_layers, tensors
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

RATIO = 0.3
TOLERANCE = 1e-6
"""In float64; looser than the 1e-9 which nampruner asks of itself."""


class NotCheckedError(Exception):
    """It cannot be told which channels were removed."""


def theirs(model: nn.Module, images: Tensor, log: Log) -> None:
    """Measure torch-pruning and write down what came out."""
    pruner = log.attempt("graph", lambda: _pruner(model, images, log))
    if pruner is None:
        return
    model.double()
    _make_distinct(model)
    original = copy.deepcopy(model)
    log.attempt("prune", pruner.step)
    if "prune" in log.facts["errors"]:
        return
    outputs = log.attempt("forward", lambda: _run(model, images))
    if outputs is not None:
        log.note(shrunk=_shrunk(original, model))
        log.attempt("exact", lambda: _check(original, model, images, log))


def _pruner(model: nn.Module, images: Tensor, log: Log) -> Any:
    """A BasePruner, which builds the graph and walks all groups; the graph's own time is noted."""
    modules = dict(model.named_modules())
    ignored = [modules[name] for name in output_layers(model, images)]
    build_dependency = tp.DependencyGraph.build_dependency

    def timed(graph: Any, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        built = build_dependency(graph, *args, **options)
        log.note(graph_seconds=round(time.perf_counter() - start, 4))
        return built

    tp.DependencyGraph.build_dependency = timed
    return tp.pruner.BasePruner(
        model, images, tp.importance.MagnitudeImportance(),
        pruning_ratio=RATIO, ignored_layers=ignored,
    )  # fmt: skip


def _make_distinct(model: nn.Module) -> None:
    """Move every weight by a millionth of its size, so that a value tells where it came from."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.rand(p.shape, generator=generator, dtype=torch.float64)
            p.add_(noise * 1e-6 * p.abs().mean().clamp_min(1e-6))


def _run(model: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return tensors(model(images.double()))


def _shrunk(original: nn.Module, slim: nn.Module) -> int:
    """Convolutions that lost an output channel."""
    pairs = zip(original.modules(), slim.modules(), strict=True)
    return sum(
        isinstance(old, _ConvNd) and old.out_channels > new.out_channels for old, new in pairs
    )


def _check(original: nn.Module, slim: nn.Module, images: Tensor, log: Log) -> None:
    """Compare with the original in which the removed inputs of every consumer are zero.

    Raises:
        RuntimeError: the outputs differ, or nothing was removed.
        NotCheckedError: see there.
    """
    masked = copy.deepcopy(original)
    zeroed = sum(_mask(old, new) for old, new in zip(masked.modules(), slim.modules(), strict=True))
    if not zeroed:
        raise RuntimeError("no input of any layer was removed")
    error = difference(_run(masked, images), _run(slim, images))
    log.note(error=min(error, 1e300))
    if not error <= TOLERANCE:
        raise RuntimeError(f"pruned and masked differ by {error:.1e} (relative)")


def _mask(old: nn.Module, new: nn.Module) -> int:
    """Zero what `new` lacks of the inputs of `old`; return how many."""
    zeroed = 0
    for key, dim in _consumes(old):
        before, after = getattr(old, key).data, getattr(new, key).data
        if before.shape[dim] != after.shape[dim]:
            gone = torch.ones(before.shape[dim], dtype=torch.bool)
            gone[_kept(before, after, dim)] = False
            before.index_fill_(dim, gone.nonzero().flatten(), 0)
            zeroed += int(gone.sum())
    return zeroed


def _consumes(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Weights that sum over their inputs, and the dimension of these."""
    if isinstance(module, _ConvNd | nn.Linear):
        yield "weight", 0 if isinstance(module, _ConvTransposeNd) else 1
    elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        yield "in_proj_weight", 1


def _kept(before: Tensor, after: Tensor, dim: int) -> Tensor:
    """Indices along `dim` of `before` that `after` still has, found by value.

    Raises:
        NotCheckedError: `after` holds numbers that `before` does not.
    """
    values = before.flatten().numpy()
    order = np.argsort(values)
    lines = after.movedim(dim, 0).flatten(1)[:, 0].numpy()
    place = order[np.searchsorted(values, lines, sorter=order).clip(max=len(values) - 1)]
    if not np.array_equal(values[place], lines):
        raise NotCheckedError("weights were changed as well as cut")
    return torch.from_numpy(np.unravel_index(place, before.shape)[dim].astype(np.int64))
