"""The least squares behind recovery.

A consumer of the slim network is fitted to what the original one computed. Its weight moves from
the cut weight only as far as the data demands (ridge), so what the data does not determine stays.
All moments are float64. Shapes: n rows (sampled positions), g groups, f features, o targets.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_RIDGES = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for the ridge, relative to the mean variance of the features …"""
_STEADY = 1e-2
"""… and the smallest where more than"""
_EXACT = 1e-6
"""of the variance is left anyway."""


@dataclass(frozen=True)
class Fit:
    """targets ≈ features · weight + intercept."""

    weight: Tensor
    """[g, f, o]"""
    intercept: Tensor
    """[g, o]"""
    explained: float
    """Share of what the prior misses that is given back, on rows not used in the fit."""
    errors: Tensor
    """Largest error left on those rows, over the target's standard deviation [g, o]."""

    @property
    def worst(self) -> float:
        """The largest of the errors."""
        return float(self.errors.max()) if self.errors.numel() else 0.0


def ridge(features: Tensor, targets: Tensor, prior: Tensor, *, centred: bool = True) -> Fit:
    """Fit targets [g, n, o] by features [g, n, f], pulled towards `prior` [g, f, o].

    minimize ‖Y - X W - b‖² + ρ·tr(XᵀX)/f·‖W - W₀‖². The ridge ρ is the one of a few powers of ten
    that predicts the second half of the rows best when fitted on the first. A feature that never
    varies keeps its prior weight; duplicates share theirs. Without `centred`, b is 0.
    """
    x, y, w = features.double(), targets.double(), prior.double()
    half = x.shape[1] // 2
    missed = y - x @ w
    first = _Moments.of(x[:, :half], missed[:, :half], centred=centred)
    strength, left = _choose(first, x[:, half:], missed[:, half:])
    spread = missed[:, half:] - first.mean_r.unsqueeze(1)
    total, scale = float(spread.square().sum()), float(y.square().sum())
    explained = max(0.0, 1.0 - float(left.square().sum()) / total) if total > 1e-24 * scale else 1.0
    errors = left.abs().amax(1) / _spans(y)
    whole = _Moments.of(x, missed, centred=centred)
    change = whole.solve(strength)
    intercept = whole.mean_r - (whole.mean_x.unsqueeze(1) @ change).squeeze(1)
    return Fit(w + change, intercept, explained, errors)


def misses(features: Tensor, targets: Tensor, *, centred: bool = True) -> Tensor:
    """Largest error of each target [g, o] on the second half of the rows, fitted on the first.

    In standard deviations of the target; each takes the ridge that suits it best.
    """
    x, y = features.double(), targets.double()
    half = x.shape[1] // 2
    first = _Moments.of(x[:, :half], y[:, :half], centred=centred)
    lefts = (_left(first, x[:, half:], y[:, half:], strength) for strength in _RIDGES)
    return torch.stack([left.abs().amax(1) for left in lefts]).amin(0) / _spans(y)


def _spans(y: Tensor) -> Tensor:
    """Standard deviations [g, o], none of them 0."""
    return y.std(1).clamp_min(1e-6 * float(y.std().nan_to_num()) + 1e-30)


@dataclass(frozen=True)
class _Moments:
    mean_x: Tensor
    mean_r: Tensor
    xx: Tensor
    xr: Tensor

    @staticmethod
    def of(x: Tensor, r: Tensor, *, centred: bool) -> "_Moments":
        mean_x, mean_r = (t.mean(1) if centred else torch.zeros_like(t[:, 0]) for t in (x, r))
        away = x - mean_x.unsqueeze(1)
        left = away.transpose(1, 2)
        return _Moments(mean_x, mean_r, left @ away, left @ (r - mean_r.unsqueeze(1)))

    def solve(self, strength: float) -> Tensor:
        """Change of the weight [g, f, o]; none where the system is singular beyond help."""
        diagonal = self.xx.diagonal(dim1=1, dim2=2)
        scale = diagonal.mean(1).clamp_min(torch.finfo(torch.float64).tiny)
        eye = torch.eye(diagonal.shape[1], dtype=torch.float64, device=diagonal.device)
        system = self.xx + (strength * scale)[:, None, None] * eye
        factor, failed = torch.linalg.cholesky_ex(system)
        if bool(failed.any()):
            return torch.zeros_like(self.xr)
        return torch.cholesky_solve(self.xr, factor)


def _choose(moments: _Moments, x: Tensor, r: Tensor) -> tuple[float, Tensor]:
    """The ridge that predicts these rows best, and the errors [g, n, o] it leaves.

    A small ridge is for what can be predicted exactly. Elsewhere it would buy the last of the error
    with large weights on directions in which the features hardly vary: right for these statistics,
    but training on would start far from a minimum.
    """
    missed = {s: float(_left(moments, x, r, s).square().sum()) for s in _RIDGES}
    best = min(missed, key=missed.__getitem__)
    if missed[best] > _EXACT * float((r - moments.mean_r.unsqueeze(1)).square().sum()):
        best = min((s for s in _RIDGES if s >= _STEADY), key=missed.__getitem__)
    return best, _left(moments, x, r, best)


def _left(moments: _Moments, x: Tensor, r: Tensor, strength: float) -> Tensor:
    """Errors [g, n, o] that the fit with this ridge leaves on these rows."""
    away, spread = x - moments.mean_x.unsqueeze(1), r - moments.mean_r.unsqueeze(1)
    return spread - away @ moments.solve(strength)
