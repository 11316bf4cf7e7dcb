"""The sparsity penalty p·Σ|γ| + p·Σ|λ| on scale factors (NAM, eq. 4; Liu et al. 2017, eq. 1).

Two ways to minimize it beside the training loss:

- *subgradient*, the published one: p·sign(γ) joins the gradient. A γ that should vanish ends up
  jittering around zero and never gets there.
- *proximal*: after the optimizer's step, γ is pulled towards zero by t = lr·p / (1 - momentum)
  and stays at exactly zero once it gets there (soft threshold; Parikh, Boyd 2014, §6.5.2). t is
  the way that p·sign(γ) in the gradient makes γ go per step under SGD with momentum.
"""

import warnings
from collections.abc import Iterator
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from nampruner.errors import NamPrunerError, NoEffectWarning, did_you_mean
from nampruner.nam import ChannelNAM, SpatialNAM

Method = Literal["proximal", "subgradient"]


class SparsityPenalty:
    """Pulls scale factors towards zero: NAM's γ and λ, and γ of the host network's BN layers.

    Either `attach` it to the optimizer, once, or in a loop of your own call `step(lr)` after every
    `optimizer.step()`. Frozen factors (requires_grad False) are left alone. Build it anew after a
    cut. The strength rises linearly from 0 over `warmup_steps` optimizer steps; `momentum` is
    that of the optimizer, for `step`.

    Warns:
        NoEffectWarning: `model` has no scale factor of the kinds asked for.

    Raises:
        NamPrunerError: an option is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float = 1e-3,
        *,
        method: Method = "proximal",
        nam: bool = True,
        bn: bool = True,
        warmup_steps: int = 0,
        momentum: float = 0.9,
    ) -> None:
        _check(strength, method, warmup_steps, momentum)
        self.strength = strength
        self.method = method
        self.warmup_steps = warmup_steps
        self.momentum = momentum
        self.steps = 0
        """Optimizer steps so far."""
        self._layers = tuple(_scaled_layers(model, nam=nam, bn=bn))
        if not self._layers:
            warnings.warn(
                f"the penalty has no scale factor to act on (nam={nam}, bn={bn}); attach NAM, or "
                "use a network with batch normalization",
                NoEffectWarning,
                stacklevel=2,
            )

    @property
    def current_strength(self) -> float:
        """The coefficient p in force at this step of the warm-up."""
        if self.steps >= self.warmup_steps:
            return self.strength
        return self.strength * self.steps / self.warmup_steps

    def factors(self) -> tuple[nn.Parameter, ...]:
        """Return the scale factors under the penalty, each [C] or [H·W]."""
        weights = (cast(nn.Parameter, layer.weight) for layer in self._layers)
        return tuple(dict.fromkeys(weight for weight in weights if weight.requires_grad))

    def step(self, lr: float) -> None:
        """Shrink every factor by lr·p / (1 - momentum), once, after `optimizer.step()`.

        Proximal: to zero at most. Subgradient: against its sign, decoupled from the gradient.
        """
        for factor in self.factors():
            self._shrink(factor, lr, self.momentum)
        self.steps += 1

    def add_gradient(self) -> None:
        """Add p·sign(factor) to the gradients, once, just before `optimizer.step()`.

        The published form, instead of `step`. Under a GradScaler, unscale the gradients first.
        """
        for factor in self.factors():
            self._add_gradient(factor, 1.0)
        self.steps += 1

    def loss(self) -> Tensor:
        """Return p·Σ|γ| + p·Σ|λ| [], differentiable; to be looked at, not to be added as well."""
        sums = [factor.abs().sum() for factor in self.factors()]
        return self.current_strength * (torch.stack(sums).sum() if sums else torch.zeros(()))

    @torch.no_grad()
    def zeros(self) -> tuple[int, int]:
        """Return how many factors are exactly zero, and how many there are."""
        factors = self.factors()
        zero = sum(int((factor == 0).sum()) for factor in factors)
        return zero, sum(factor.numel() for factor in factors)

    def attach(self, optimizer: Optimizer) -> tuple[RemovableHandle, ...]:
        """Make every step of `optimizer` carry the penalty, until the handles are removed.

        lr and momentum are those of the parameter group that holds the factor, at each step. The
        hooks run inside `optimizer.step()`: once per step under gradient accumulation, after
        unscaling and clipping, and not at all when a GradScaler skips the step. Attach to the
        torch optimizer itself, before accelerate wraps it.

        Warns:
            NoEffectWarning: `optimizer` holds none of the factors.
            UserWarning: subgradient under an adaptive optimizer, which normalizes it away.
        """
        if self._layers and not any(self._held(optimizer)):
            warnings.warn(
                "the optimizer holds none of the penalized scale factors; give it "
                "model.parameters(), and build it after attaching NAM or cutting",
                NoEffectWarning,
                stacklevel=2,
            )
        if self.method == "subgradient" and any("betas" in g for g in optimizer.param_groups):
            warnings.warn(
                "an adaptive optimizer normalizes the subgradient away, all factors sink alike; "
                "use method='proximal'",
                UserWarning,
                stacklevel=2,
            )
        after = optimizer.register_step_post_hook(self._after_step)
        if self.method == "proximal":
            return (after,)
        return optimizer.register_step_pre_hook(self._before_step), after

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs: the steps of the warm-up."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.steps = int(state["steps"])

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Optimizer pre-hook: the subgradient."""
        # A fused optimizer unscales inside its kernel: the gradients are still scaled here.
        scale = getattr(optimizer, "grad_scale", None)
        for factor, _ in self._held(optimizer):
            self._add_gradient(factor, 1.0 if scale is None else scale)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Optimizer post-hook: the proximal step, and one more step counted."""
        # A fused optimizer also skips inside its kernel; `found_inf` tells.
        if getattr(optimizer, "found_inf", None):
            return
        if self.method == "proximal":
            for factor, group in self._held(optimizer):
                self._shrink(factor, float(group["lr"]), float(group.get("momentum", 0.0)))
        self.steps += 1

    def _held(self, optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        penalized = set(self.factors())
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in penalized:
                    yield parameter, group

    @torch.no_grad()
    def _shrink(self, factor: nn.Parameter, lr: float, momentum: float) -> None:
        threshold = lr * self.current_strength / (1.0 - momentum)
        if self.method == "proximal":
            factor.copy_(F.softshrink(factor, threshold))
        else:
            factor.sub_(factor.sign(), alpha=threshold)

    @torch.no_grad()
    def _add_gradient(self, factor: nn.Parameter, scale: float | Tensor) -> None:
        pull = factor.sign() * (self.current_strength * scale)
        factor.grad = pull if factor.grad is None else factor.grad.add_(pull)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two optimizer groups: weights decay; γ, β, λ and biases (all 1-D) do not.

    Decay would pull on every factor alike and hide which of them the penalty sends to zero.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _scaled_layers(model: nn.Module, *, nam: bool, bn: bool) -> Iterator[nn.Module]:
    attention = {m.bn for m in model.modules() if isinstance(m, ChannelNAM)}
    for module in model.modules():
        if isinstance(module, SpatialNAM) or module in attention:
            if nam:
                yield module
        elif bn and isinstance(module, _BatchNorm) and module.affine:
            yield module


def _check(strength: float, method: str, warmup_steps: int, momentum: float) -> None:
    if not strength >= 0:
        raise NamPrunerError(f"strength = {strength}; give a number of at least 0, such as 1e-3")
    if method not in get_args(Method):
        raise NamPrunerError(
            f"method = {method!r}; give proximal or subgradient."
            f"{did_you_mean(method, get_args(Method))}"
        )
    if warmup_steps < 0:
        raise NamPrunerError(f"warmup_steps = {warmup_steps}; give 0 for none, or more")
    if not 0 <= momentum < 1:
        raise NamPrunerError(f"momentum = {momentum}; give what the optimizer has, in [0, 1)")


def fitting_strength(lr: float, steps: float, *, momentum: float = 0.9, fall: float = 0.8) -> float:
    """Return the strength at which a scale factor that no gradient holds falls by `fall`.

    The penalty moves a factor by lr·p/(1 - momentum) a step, so a fixed p is weak in a short run
    and strong in a long one. `lr` is the mean rate over `steps`. A fall of a whole 1 would also
    bring those to zero that nothing speaks against, and with them every NAM weight.
    """
    return fall * (1.0 - momentum) / max(lr * steps, 1e-12)
