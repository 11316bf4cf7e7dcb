"""Two passes that make a cut harmless.

The original network runs once and leaves, for every consumer, its outputs at sampled positions.
Then the slim network runs once on the same images, and each consumer is fitted to them just before
it computes: it sees inputs that all consumers before it have already corrected, so errors do not
pile up. Each BN gets the statistics of what reaches it. Labels are never needed.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nampruner.plan import LayerRecovery, PruningPlan
from nampruner.progress import Bar, Progress, Silent
from nampruner.recovery.fit import ridge
from nampruner.recovery.rows import Sites, grid, is_consumer, outputs, patches, taps

_BN = nn.modules.batchnorm._BatchNorm
_MOST_FEATURES = 2500
"""Wider systems would cost more than they give; such a consumer keeps its cut weight."""


@dataclass
class _Memory:
    """What the original network showed of one consumer."""

    sites: Sites
    targets: Tensor
    """Outputs at the sites [n, O], channels that stay."""
    calls: int = 1


@dataclass
class _Walk:
    model: nn.Module
    plan: PruningPlan
    bar: Bar
    memory: dict[str, _Memory] = field(default_factory=dict)
    done: list[LayerRecovery] = field(default_factory=list)
    downstream: bool = False
    """Whether anything before this point of the slim network has changed."""


def recover(
    slim: nn.Module,
    model: nn.Module,
    plan: PruningPlan,
    batches: Iterable[Tensor],
    *,
    progress: Progress | None = None,
) -> tuple[LayerRecovery, ...]:
    """Correct `slim` in place so that it computes what `model` computes, without training.

    `batches` are inputs [N, C, H, W] without labels; they are walked as one batch, so memory is
    that of one forward pass on all of them. Returns how well each consumer that lost inputs is
    re-expressed.
    """
    device = next(slim.parameters()).device
    images = torch.cat([batch.to(device) for batch in batches])
    training = [m for net in (slim, model) for m in net.modules() if m.training]
    names = [name for name, module in slim.named_modules() if is_consumer(module)]
    with (progress or Silent()).bar("recover", len(names)) as bar, torch.no_grad():
        walk = _Walk(model.eval(), plan, bar)
        _hooked(model, images, [(n, _watch(walk, n, slim)) for n in names], after=True)
        fits = [(n, _fit_before(walk, n)) for n in names]
        norms = [(n, _calibrate(walk)) for n, m in slim.named_modules() if isinstance(m, _BN)]
        _hooked(slim.eval(), images, fits + norms, after=False)
    for module in training:
        module.training = True
    return tuple(walk.done)


def _hooked(
    net: nn.Module, images: Tensor, hooks: list[tuple[str, Callable[..., None]]], *, after: bool
) -> None:
    modules = dict(net.named_modules())
    handles = [
        modules[name].register_forward_hook(hook)
        if after
        else modules[name].register_forward_pre_hook(hook)
        for name, hook in hooks
    ]
    try:
        net(images)
    finally:
        for handle in handles:
            handle.remove()


def _watch(walk: _Walk, name: str, slim: nn.Module) -> Callable[..., None]:
    """Keep the original consumer's outputs at sampled positions."""
    narrow = slim.get_submodule(name)
    gone = set(walk.plan.removed.get(f"{name}.weight", {}).get(0, []))

    def hook(module: nn.Module, inputs: Any, out: Tensor) -> None:
        if name in walk.memory:
            walk.memory[name].calls += 1
            return
        width = _features(narrow)
        sites = Sites.sample(grid(module, out), _rows(width), seed=len(walk.memory))
        stay = [i for i in range(module.weight.shape[0]) if i not in gone]  # type: ignore[index]
        walk.memory[name] = _Memory(sites, outputs(module, out, sites)[:, stay].clone())

    return hook


def _features(module: nn.Module) -> int:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight[0].numel()


def _rows(features: int) -> int:
    return max(1024, min(16 * features, 16384))


def _fit_before(walk: _Walk, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen = walk.memory.pop(name, None)
        walk.bar.advance()
        removed = walk.plan.removed.get(f"{name}.weight", {}).get(1, [])
        walk.downstream |= bool(removed)
        if seen is None or seen.calls > 1 or not walk.downstream:
            return
        if _features(module) > _MOST_FEATURES or len(seen.targets) < 2 * _features(module):
            return
        explained = _refit(module, inputs[0], seen)
        if removed:
            method = "taps" if taps(module) > 1 else "affine"
            walk.done.append(
                LayerRecovery(layer=name, removed=len(removed), explained=explained, method=method)
            )

    return hook


def _refit(module: nn.Module, x: Tensor, seen: _Memory) -> float:
    """Fit the consumer's weight and bias; return the share explained."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    groups = getattr(module, "groups", 1)
    rows = patches(module, x, seen.sites)
    n = rows.shape[0]
    features = rows.reshape(n, groups, -1).transpose(0, 1)
    targets = seen.targets.reshape(n, groups, -1).transpose(0, 1)
    prior = weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)
    fit = ridge(features, targets, prior)
    weight.copy_(fit.weight.transpose(1, 2).reshape(weight.shape))
    if isinstance(module.bias, Tensor):
        module.bias.copy_(fit.intercept.flatten())
    return fit.explained


def _calibrate(walk: _Walk) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if walk.downstream and isinstance(module.running_mean, Tensor):
            x = inputs[0].double()
            dims = [d for d in range(x.dim()) if d != 1]
            var, mean = torch.var_mean(x, dims)
            module.running_mean.copy_(mean)
            module.running_var.copy_(var)  # type: ignore[operator]

    return hook
