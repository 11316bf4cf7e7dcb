"""Fold what removed channels always say into what stays; no data is needed.

A channel behind γ = 0 is act(β) everywhere. Its share of a consumer's output is then constant, and
goes into the consumer's bias, or is taken off the mean of the BN behind it. Where nothing is padded
this is exact; a zero-padded border misses the constant there.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from nampruner.modes import evaluating
from nampruner.plan import LayerRecovery, PruningPlan
from nampruner.recovery.rows import has_taps, is_consumer
from nampruner.recovery.survey import survey
from nampruner.recovery.verdicts import Findings, verdicts


def fold_constants(
    slim: nn.Module, model: nn.Module, plan: PruningPlan, example_inputs: Any
) -> Findings:
    """Fold constant channels in place, straight after the cut; tell which consumers lost any.

    Constant is what noise in the shape of `example_inputs`, a tensor [N, C, …], does not move.
    Other inputs than one tensor are left alone.
    """
    found = Findings()
    if not isinstance(example_inputs, Tensor) or not example_inputs.is_floating_point():
        return found
    generator = torch.Generator().manual_seed(0)
    shape = (4, *example_inputs.shape[1:])
    noise = torch.randn(shape, generator=generator).to(example_inputs)
    with evaluating(model):
        seen = survey(model, noise)
    for name, (values, same) in seen.constants.items():
        gone = plan.removed.get(f"{name}.weight", {})
        module, lost = model.get_submodule(name), gone.get(1, [])
        if not is_consumer(module) or not has_taps(module) or getattr(module, "groups", 1) > 1:
            continue
        index = [i for i in lost if same[i] and values[i] != 0]
        folded = bool(index) and _shift(
            slim, name, seen.behind, _share(module, index, values, gone)
        )
        # a border reads zeros, not the constant; a channel that is 0 everywhere says nothing
        exact = [
            bool(same[i] and (values[i] == 0 or (folded and not seen.borders[name]))) for i in lost
        ]
        if folded or any(exact):
            found.layers.append(_row(name, exact, seen.borders[name]))
            found.errors[f"{name}.weight", 1] = [0.0 if one else math.inf for one in exact]
    return found


def _row(name: str, exact: list[bool], border: float) -> LayerRecovery:
    return LayerRecovery(
        layer=name,
        removed=len(exact),
        explained=None,
        method="constant",
        border=border,
        verdict="exact" if all(exact) else "lossy",
        bound=0.0 if all(exact) else None,
        units=verdicts([0.0 if one else math.inf for one in exact]),
    )


def _share(
    module: nn.Module, index: list[int], values: Tensor, gone: dict[int, list[int]]
) -> Tensor:
    """What these inputs add to every output that stays [O']."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    taps = weight[:, index].reshape(weight.shape[0], len(index), -1).sum(-1)
    missing = set(gone.get(0, []))
    stay = [i for i in range(weight.shape[0]) if i not in missing]
    return (taps @ values[index].to(taps))[stay]


@torch.no_grad()
def _shift(slim: nn.Module, name: str, behind: dict[str, str], share: Tensor) -> bool:
    bias = slim.get_submodule(name).bias
    if isinstance(bias, Tensor):
        bias += share
        return True
    mean = slim.get_submodule(behind[name]).running_mean if name in behind else None
    if isinstance(mean, Tensor):
        mean -= share
        return True
    return False
