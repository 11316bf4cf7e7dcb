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
    first, second = (
        _Moments.of(x[:, rows], missed[:, rows], centred=centred)
        for rows in (slice(half), slice(half, None))
    )
    elsewhere = second.about(first)
    strength = _choose(first, elsewhere)
    left = _left(first, x[:, half:], missed[:, half:], strength)
    total, scale = float(elsewhere.rr.sum()), float(y.square().sum())
    explained = max(0.0, 1.0 - float(left.square().sum()) / total) if total > 1e-24 * scale else 1.0
    whole = first.and_(second)
    change = whole.solve(strength)
    intercept = whole.mean_r - (whole.mean_x.unsqueeze(1) @ change).squeeze(1)
    return Fit(w + change, intercept, explained, left.abs().amax(1) / _spans(y))


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
    """Second moments of features x and residuals r about their means, summed over the rows."""

    count: int
    mean_x: Tensor
    mean_r: Tensor
    xx: Tensor
    """[g, f, f]"""
    xr: Tensor
    """[g, f, o]"""
    rr: Tensor
    """[g, o]"""

    @staticmethod
    def of(x: Tensor, r: Tensor, *, centred: bool) -> "_Moments":
        """Take moments about the means of these rows, or about 0."""
        mean_x, mean_r = (t.mean(1) if centred else torch.zeros_like(t[:, 0]) for t in (x, r))
        away, spread = x - mean_x.unsqueeze(1), r - mean_r.unsqueeze(1)
        left = away.transpose(1, 2)
        xx, xr, rr = left @ away, left @ spread, spread.square().sum(1)
        return _Moments(x.shape[1], mean_x, mean_r, xx, xr, rr)

    def about(self, other: "_Moments") -> "_Moments":
        """Return these moments about the means of others."""
        return self._moved(other.mean_x, other.mean_r)

    def and_(self, other: "_Moments") -> "_Moments":
        """Return the moments of both sets of rows, about the means of all."""
        count = self.count + other.count
        share = other.count / count
        means = (
            self.mean_x + share * (other.mean_x - self.mean_x),
            self.mean_r + share * (other.mean_r - self.mean_r),
        )
        one, two = self._moved(*means), other._moved(*means)
        return _Moments(count, *means, one.xx + two.xx, one.xr + two.xr, one.rr + two.rr)

    def _moved(self, mean_x: Tensor, mean_r: Tensor) -> "_Moments":
        x, r = (self.mean_x - mean_x)[:, :, None], (self.mean_r - mean_r)[:, None]
        return _Moments(
            self.count,
            mean_x,
            mean_r,
            self.xx + self.count * (x @ x.transpose(1, 2)),
            self.xr + self.count * (x @ r),
            self.rr + self.count * r[:, 0].square(),
        )

    def solve(self, strength: float) -> Tensor:
        """Change of the weight [g, f, o]; none where the system is singular beyond help."""
        diagonal = self.xx.diagonal(dim1=1, dim2=2)
        scale = diagonal.mean(1).clamp_min(torch.finfo(torch.float64).tiny)
        system = self.xx.clone()
        system.diagonal(dim1=1, dim2=2).add_((strength * scale)[:, None])
        factor, failed = torch.linalg.cholesky_ex(system)
        if bool(failed.any()):
            return torch.zeros_like(self.xr)
        return torch.cholesky_solve(self.xr, factor)

    def missed(self, change: Tensor) -> float:
        """Return the squared error that this change of the weight leaves on these rows."""
        gain = (change * (2 * self.xr - self.xx @ change)).sum()
        return max(float(self.rr.sum() - gain), 0.0)


def _choose(moments: _Moments, elsewhere: _Moments) -> float:
    """The ridge that predicts other rows best; their moments are about the same means.

    A small ridge is for what can be predicted exactly. Elsewhere it would buy the last of the error
    with large weights on directions in which the features hardly vary: right for these statistics,
    but training on would start far from a minimum.
    """
    missed = {s: elsewhere.missed(moments.solve(s)) for s in _RIDGES if s >= _STEADY}
    telling = {s: elsewhere.missed(moments.solve(s)) for s in _RIDGES[:2]}
    if min(telling.values()) <= _EXACT * float(elsewhere.rr.sum()):
        missed |= telling
    return min(missed, key=missed.__getitem__)


def _left(moments: _Moments, x: Tensor, r: Tensor, strength: float) -> Tensor:
    """Errors [g, n, o] that the fit with this ridge leaves on these rows."""
    away, spread = x - moments.mean_x.unsqueeze(1), r - moments.mean_r.unsqueeze(1)
    return spread - away @ moments.solve(strength)
