"""Fit one consumer: what to keep of the original, and what to make of it in the slim network.

*taps*: its outputs at sampled positions, fitted by the patches they are made of; right at
zero-padded borders too. *affine*: its inputs at sampled positions, each re-expressed by those that
stay; one map for all taps, so it needs far fewer rows, and it serves transposed convolutions and
flattened maps.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nampruner.recovery.fit import Fit, misses, ridge
from nampruner.recovery.rows import (
    Sites,
    grid,
    has_taps,
    is_linear,
    others,
    patches,
    sides,
    zeros_around,
)

_UNIT_ROWS = 2048
"""Positions at which the removed inputs themselves are looked at."""
_WIDEST = 2500
"""Features of a system; a wider one would cost more than it gives."""
_ENDS = (torch.amin, torch.amax)


@dataclass(frozen=True)
class Cut:
    """What a plan removes from one consumer."""

    outputs: list[int]
    inputs: list[int]


@dataclass(frozen=True)
class Memory:
    """What the original network showed of one consumer."""

    method: Literal["taps", "affine"]
    each: int
    """Neighbouring inputs of a linear layer that make one channel; 1 elsewhere."""
    sites: Sites
    targets: Tensor
    """taps: outputs that stay [n, O']; affine: all inputs [n, C]."""


def remember(
    dense: nn.Module, slim: nn.Module, cut: Cut, x: Tensor, out: Tensor, each: int
) -> Memory | None:
    """Keep what the fit needs; None where neither way fits the layer."""
    weight: Tensor = slim.weight  # type: ignore[assignment]
    groups = int(getattr(dense, "groups", 1))
    features = weight[0].numel()
    positions = grid(dense, out)
    rows = max(1024, min(16 * features, 16384))
    if has_taps(dense) and features <= _WIDEST and positions.numel() >= 2 * features:
        sites = Sites.sample(positions, rows, seed=features)
        stay = others(out.shape[-1 if is_linear(dense) else 1], cut.outputs)
        return Memory("taps", each, sites, sites.of(dense, out)[:, stay].clone())
    channels = _channelled(dense, x, each)
    if groups == 1 and channels.shape[1] <= _WIDEST:
        rows = max(1024, min(16 * channels.shape[1], 16384))
        sites = Sites.sample(grid(nn.Identity(), channels), rows, seed=features)
        return Memory("affine", each, sites, sites.of(nn.Identity(), channels).clone())
    return None


def judge(dense: nn.Module, cut: Cut, x: Tensor, each: int, *, shift: bool) -> Tensor | None:
    """How far each removed input is from what those that stay say of it [R], in deviations.

    The largest error of the best affine prediction on positions not used in the fit. They are drawn
    from the map as it is padded: a constant is none at a border. Exactly 0 for what never varies,
    if the layer can `shift` its outputs or the value is 0. None in grouped layers, and where the
    prediction would be too wide.
    """
    index = sorted({i // each for i in cut.inputs})
    channels = _channelled(dense, x, each)
    if not index or int(getattr(dense, "groups", 1)) > 1 or channels.shape[1] > _WIDEST:
        return None
    around = zeros_around(dense) or [(0, 0)] * (channels.dim() - 2)
    sizes = [n + sum(zeros) for n, zeros in zip(channels.shape[2:], around, strict=True)]
    places = Sites.sample(torch.Size([len(channels), *sizes]), _UNIT_ROWS, seed=len(cut.inputs))
    rows = places.under(channels, [ahead for ahead, _ in around])
    gone, kept = rows[:, index], rows[:, others(rows.shape[1], index)]
    errors = misses(kept[None], gone[None], centred=shift)[0]
    low, high = (f(channels, [d for d in range(channels.dim()) if d != 1]) for f in _ENDS)
    anywhere = shift and not any(map(any, around))
    still = ((low == high) & ((low == 0) | anywhere))[index]
    # what did not vary where it was looked at, but does elsewhere, was not predicted
    errors[gone.amin(0) == gone.amax(0)] = float("inf")
    return errors.clamp_min(torch.finfo(torch.float64).tiny).masked_fill(still, 0.0)


def _channelled(module: nn.Module, x: Tensor, each: int) -> Tensor:
    """The input with its channels in dimension 1: [N, C, …]."""
    return x.reshape(-1, x.shape[-1] // each, each) if is_linear(module) else x


def refit(
    dense: nn.Module, slim: nn.Module, cut: Cut, seen: Memory, x: Tensor, *, shift: bool
) -> Fit:
    """Fit the slim consumer in place, given the inputs `x` that reach it.

    `shift` says whether a constant can be added to its outputs: by its bias, or by the statistics
    of a BN that follows.
    """
    fit_ = _taps if seen.method == "taps" else _affine
    return fit_(dense, slim, cut, seen, x, shift)


def _taps(dense: nn.Module, slim: nn.Module, cut: Cut, seen: Memory, x: Tensor, shift: bool) -> Fit:
    weight: Tensor = slim.weight  # type: ignore[assignment]
    groups = int(getattr(slim, "groups", 1))
    rows = patches(slim, x, seen.sites)
    features = rows.reshape(len(rows), groups, -1).transpose(0, 1)
    targets = seen.targets.reshape(len(rows), groups, -1).transpose(0, 1)
    prior = weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)
    if not shift and slim.bias is None:
        fit = ridge(features, targets, prior, centred=False)
    else:
        fit = ridge(features, targets, prior)
    weight.copy_(fit.weight.transpose(1, 2).reshape(weight.shape))
    if isinstance(slim.bias, Tensor):
        slim.bias.copy_(fit.intercept.flatten())
    return fit


def _affine(
    dense: nn.Module, slim: nn.Module, cut: Cut, seen: Memory, x: Tensor, shift: bool
) -> Fit:
    whole: Tensor = dense.weight  # type: ignore[assignment]
    weight: Tensor = slim.weight  # type: ignore[assignment]
    outs, ins = sides(dense)
    kept = _channelled(slim, x, seen.each)
    rows = seen.sites.of(nn.Identity(), kept)
    stay = others(seen.targets.shape[1], [i // seen.each for i in cut.inputs])
    prior = torch.zeros(1, len(stay), seen.targets.shape[1], dtype=torch.float64, device=x.device)
    prior[0, range(len(stay)), stay] = 1.0
    fit = ridge(rows[None], seen.targets[None], prior, centred=shift or slim.bias is not None)
    rest = torch.tensor(others(whole.shape[outs], cut.outputs), device=x.device)
    kernel = whole.index_select(outs, rest).double().movedim((outs, ins), (0, 1))
    kernel = kernel.reshape(kernel.shape[0], seen.targets.shape[1], -1)
    moved = torch.einsum("oct,kc->okt", kernel, fit.weight[0])
    shape = weight.movedim((outs, ins), (0, 1)).shape
    weight.copy_(moved.reshape(shape).movedim((0, 1), (outs, ins)))
    if isinstance(slim.bias, Tensor):
        slim.bias.copy_(_constant(dense, fit.intercept[0], kept)[rest])
    return fit


def _constant(dense: nn.Module, values: Tensor, like: Tensor) -> Tensor:
    """What the layer makes of a map that is constant in each channel [C], on average [O].

    A border, or a stride of a transposed convolution, lets an output see some of the taps only.
    """
    whole = values.to(like)[None, :, *[None] * (like.dim() - 2)].expand(1, -1, *like.shape[2:])
    out: Tensor = dense(whole.reshape(1, -1) if is_linear(dense) else whole)
    return out.flatten(2).mean(2)[0] if out.dim() > 2 else out[0]
