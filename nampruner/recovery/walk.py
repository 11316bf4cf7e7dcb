"""Two passes that make a cut harmless.

The original network runs once and leaves, for every consumer, what its fit needs at sampled
positions. Then the slim network runs once on the same images, and each consumer is fitted just
before it computes: it sees inputs that all consumers before it have already corrected, so errors do
not pile up. Each BN gets the statistics of what reaches it. Labels are never needed.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from nampruner.lineage import AddedBias, lineage
from nampruner.lineage import remember as note
from nampruner.modes import evaluating
from nampruner.plan import LayerRecovery, PruningPlan
from nampruner.progress import Bar, Progress, Silent
from nampruner.recovery.refit import Cut, Memory, others, refit, remember, units
from nampruner.recovery.rows import features_per_channel, is_consumer, is_linear, sides
from nampruner.recovery.survey import Survey, run, survey
from nampruner.surgery import add_bias

_BN = nn.modules.batchnorm._BatchNorm
_BUDGET_BYTES = 1.2e9
"""What the activations alive at one time may take; fewer images are walked where they would not."""


@dataclass
class _Walk:
    model: nn.Module
    slim: nn.Module
    plan: PruningPlan
    seen: Survey
    bar: Bar
    allow_bias: bool
    memory: dict[str, Memory | None] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    statistics: dict[str, list[Tensor]] = field(default_factory=dict)
    """BN → in the original, of the channels that stay [C']: mean and variance seen, and kept."""
    done: list[LayerRecovery] = field(default_factory=list)
    biased: list[str] = field(default_factory=list)
    """Consumers that were given a bias."""
    downstream: bool = False
    """Whether anything before this point of the slim network has changed."""

    def cut(self, name: str) -> Cut:
        outs, ins = sides(self.model.get_submodule(name))
        gone = self.plan.removed.get(f"{name}.weight", {})
        return Cut(gone.get(outs, []), gone.get(ins, []))


def recover(
    slim: nn.Module,
    model: nn.Module,
    plan: PruningPlan,
    batches: Iterable[Tensor],
    *,
    allow_bias: bool = False,
    progress: Progress | None = None,
) -> tuple[LayerRecovery, ...]:
    """Correct `slim` in place so that it computes what `model` computes, without training.

    `batches` are inputs [N, C, H, W] without labels. They are walked as one batch, of as many
    images as fit into about 1.2 GB of activations. Returns how well each consumer that lost inputs
    is re-expressed. A constant goes into a consumer's bias or the BN behind it; where there is
    neither, none is fitted, unless `allow_bias` lets a bias be added.
    """
    names = [name for name, module in slim.named_modules() if is_consumer(module)]
    norms = [name for name, module in slim.named_modules() if isinstance(module, _BN)]
    shown = (progress or Silent()).bar("recover", len(names))
    with shown as bar, evaluating(slim, model), torch.no_grad():
        given = list(batches)
        device = next(model.parameters()).device
        seen = survey(model, given[0][:1].to(device))
        images = torch.cat(given)[: _affordable(seen)].to(device)
        walk = _Walk(model, slim, plan, seen, bar, allow_bias)
        watched = [(name, _watch(walk, name)) for name in names]
        run(model, images, after=watched + [(name, _observe(walk, name)) for name in norms])
        fits = [(name, _fit(walk, name)) for name in names]
        run(slim, images, before=fits + [(name, _calibrate(walk, name)) for name in norms])
    _record_biases(slim, walk.biased)
    return tuple(walk.done)


def _record_biases(slim: nn.Module, names: list[str]) -> None:
    """A checkpoint must know which layers have a bias that their architecture has not."""
    if names:
        history = lineage(slim)
        added = tuple(AddedBias(module=name, after=len(history.plans)) for name in names)
        note(slim, biases=(*history.biases, *added))


def _affordable(seen: Survey) -> int:
    """Images whose activations fit: a residual, an input, an output and one on the way."""
    return max(16, int(_BUDGET_BYTES / max(4 * seen.bytes_per_image, 1)))


def _watch(walk: _Walk, name: str) -> Callable[..., None]:
    narrow, cut = walk.slim.get_submodule(name), walk.cut(name)

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        walk.calls[name] = walk.calls.get(name, 0) + 1
        if walk.calls[name] == 1:
            each = 1
            if is_linear(module):
                hint = walk.seen.positions.get(name, 0)
                each = features_per_channel(inputs[0].shape[-1], cut.inputs, hint)
            walk.memory[name] = remember(module, narrow, cut, inputs[0], out, each)

    return hook


def _fit(walk: _Walk, name: str) -> Callable[..., None]:
    dense, cut = walk.model.get_submodule(name), walk.cut(name)

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        walk.bar.advance()
        seen = walk.memory.pop(name, None)
        walk.downstream |= bool(cut.inputs)
        # a module that runs twice would need one weight for two places: it keeps the cut one
        if seen is None or not walk.downstream or walk.calls[name] > 1:
            return
        if walk.allow_bias and module.bias is None and name not in walk.seen.behind:
            add_bias(module)
            walk.biased.append(name)
        errors = units(module, seen, inputs[0])
        fit = refit(dense, module, cut, seen, inputs[0], shift=name in walk.seen.behind)
        if cut.inputs:
            walk.done.append(
                LayerRecovery(
                    layer=name,
                    removed=len(cut.inputs),
                    explained=fit.explained,
                    method=seen.method,
                    verdict=_verdict(fit.worst),
                    bound=fit.worst,
                    units={} if errors is None else Counter(map(_verdict, errors.tolist())),
                )
            )

    return hook


def _verdict(worst: float) -> Literal["exact", "bounded", "lossy"]:
    if worst <= 1e-5:
        return "exact"
    return "bounded" if worst <= 0.1 else "lossy"


def _observe(walk: _Walk, name: str) -> Callable[..., None]:
    gone = walk.plan.removed.get(f"{name}.running_mean", {}).get(0, [])

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        walk.calls[name] = walk.calls.get(name, 0) + 1
        if isinstance(module.running_mean, Tensor) and isinstance(module.running_var, Tensor):
            now = (*_moments(inputs[0]), module.running_mean, module.running_var)
            walk.statistics[name] = [t[others(t.shape[0], gone)].double() for t in now]

    return hook


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x.double(), [d for d in range(x.dim()) if d != 1])
    return mean, var


def _calibrate(walk: _Walk, name: str) -> Callable[..., None]:
    """The original's statistics, moved as far as what reaches the BN has moved.

    Where nothing moved they stay what they were, however few the images are.
    """

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # one BN for two places would need two statistics: it keeps what it has
        if not walk.downstream or name not in walk.statistics or walk.calls[name] > 1:
            return
        mean, var = _moments(inputs[0])
        was, varied, running_mean, running_var = walk.statistics[name]
        eps: float = module.eps  # type: ignore[assignment]
        moved = (running_var + eps) * (var + eps) / (varied + eps) - eps
        module.running_mean.copy_(running_mean + mean - was)  # type: ignore[operator]
        module.running_var.copy_(moved.clamp_min(0))  # type: ignore[operator]

    return hook
