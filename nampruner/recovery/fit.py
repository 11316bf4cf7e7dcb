"""The least squares behind recovery.

A consumer of the slim network is fitted to what the original one returned: its weight moves from
the cut weight only as far as the data demands (ridge), so what the data does not determine stays.
All moments are float64. Shapes: n rows (sampled positions), g groups, f features, o outputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for the ridge, relative to the mean variance of the features."""


@dataclass(frozen=True)
class Fit:
    """targets ≈ features · weight + intercept."""

    weight: Tensor
    """[g, f, o]"""
    intercept: Tensor
    """[g, o]"""
    explained: float
    """Share of what the cut weight misses that is given back, on rows not used in the fit."""


def ridge(features: Tensor, targets: Tensor, prior: Tensor) -> Fit:
    """Fit targets [g, n, o] by features [g, n, f], pulled towards `prior` [g, f, o].

    minimize ‖Y - X W - b‖² + ρ·tr(XᵀX)/f·‖W - W₀‖². The ridge ρ is the one of a few powers of ten
    that predicts the second half of the rows best when fitted on the first. A feature that never
    varies keeps its prior weight; duplicates share theirs.
    """
    x, y = features.double(), targets.double()
    half = x.shape[1] // 2
    missed = y - x @ prior.double()
    ridge_, explained = _choose(x[:, :half], missed[:, :half], x[:, half:], missed[:, half:])
    change, mean_x, mean_r = _solve(_Moments.of(x, missed), ridge_)
    intercept = mean_r - (mean_x.unsqueeze(1) @ change).squeeze(1)
    return Fit(prior.double() + change, intercept, explained)


@dataclass(frozen=True)
class _Moments:
    mean_x: Tensor
    mean_r: Tensor
    xx: Tensor
    xr: Tensor

    @staticmethod
    def of(x: Tensor, r: Tensor) -> "_Moments":
        mean_x, mean_r = x.mean(1), r.mean(1)
        centred = x - mean_x.unsqueeze(1)
        xx = centred.transpose(1, 2) @ centred
        xr = centred.transpose(1, 2) @ (r - mean_r.unsqueeze(1))
        return _Moments(mean_x, mean_r, xx, xr)


def _solve(moments: _Moments, ridge_: float) -> tuple[Tensor, Tensor, Tensor]:
    """Change of the weight [g, f, o], with the means of features and residuals."""
    diagonal = moments.xx.diagonal(dim1=1, dim2=2)
    scale = diagonal.mean(1).clamp_min(torch.finfo(torch.float64).tiny)
    eye = torch.eye(diagonal.shape[1], dtype=torch.float64, device=diagonal.device)
    system = moments.xx + (ridge_ * scale)[:, None, None] * eye
    factor, failed = torch.linalg.cholesky_ex(system)
    if bool(failed.any()):
        return torch.zeros_like(moments.xr), moments.mean_x, moments.mean_r
    return torch.cholesky_solve(moments.xr, factor), moments.mean_x, moments.mean_r


def _choose(x: Tensor, r: Tensor, x_new: Tensor, r_new: Tensor) -> tuple[float, float]:
    """The ridge that predicts the held-out rows best, and the share that it explains there."""
    moments = _Moments.of(x, r)
    spread = r_new - moments.mean_r.unsqueeze(1)
    total = float(spread.square().sum())
    if total == 0.0 or x.shape[1] < 2:
        return _RIDGES[0], 1.0
    best, least = _RIDGES[-1], float("inf")
    for candidate in _RIDGES:
        change, mean_x, _ = _solve(moments, candidate)
        left = float((spread - (x_new - mean_x.unsqueeze(1)) @ change).square().sum())
        if left < least:
            best, least = candidate, left
    return best, max(0.0, 1.0 - least / total)
