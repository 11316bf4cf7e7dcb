"""Prune a model in Python: trace → score → select → cut → certify → recover.

A plan that comes out of here has been carried out on a copy and certified. A cut that turns out
wrong costs its channels their freedom, and the plan is made again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nampruner.aiming import settle_on_device
from nampruner.baking import baked
from nampruner.certificate import cost_of
from nampruner.config import TARGETS, PruneOptions
from nampruner.errors import NamPrunerError
from nampruner.graph import Forward, trace
from nampruner.importance import Batches, Custom, score
from nampruner.options import parse
from nampruner.plan import PruningPlan
from nampruner.progress import Progress
from nampruner.recovery import find, fold_constants, judged
from nampruner.settle import Cut


def plan_pruning(
    model: nn.Module,
    example_inputs: Any,
    *,
    importance: str | Custom = "auto",
    batches: Batches | None = None,
    forward: Forward | None = None,
    **options: Any,
) -> PruningPlan:
    """Decide which channels go; `model` is not changed.

    `options` are those of `nampruner prune`: one of `ratio`, `macs`, `params`, `latency`;
    `memory`, alone or beside it as a limit; `allocation`, `round_to`, `floor`, `ignore`.
    `importance` may be a callable, see `nampruner.importance.score`.

    Raises:
        NamPrunerError: an option is wrong.
        GraphError: nothing can be cut.
        CertificateError: no exact cut was found.
    """
    chosen = _options(importance, options)
    model = baked(model)
    graph = trace(model, example_inputs, forward)
    scores = score(model, graph, importance, batches=batches)
    return settle_on_device(model, graph, scores, chosen, example_inputs, forward=forward).plan


def _options(importance: str | Custom, options: dict[str, Any]) -> PruneOptions:
    named = {} if callable(importance) else {"importance": importance}
    chosen = parse(PruneOptions, {**options, **named}, "prune")
    if all(getattr(chosen, target) is None for target in TARGETS):
        raise NamPrunerError(f"no target was given; give one of {', '.join(TARGETS)}: ratio=0.3")
    return chosen


def prune(
    model: nn.Module,
    example_inputs: Any,
    *,
    data: Iterable[Tensor] | None = None,
    importance: str | Custom = "auto",
    batches: Batches | None = None,
    forward: Forward | None = None,
    **options: Any,
) -> Cut:
    """Plan, cut, certify, and recover by `data` (inputs, no labels); without it, fold constants.

    Returns the slim `.model`, its `.plan` and its `.certificate`; `model` is untouched.

    Raises:
        NamPrunerError: see `plan_pruning`.
    """
    chosen = _options(importance, options)
    model = baked(model)
    graph = trace(model, example_inputs, forward)
    calibration = None if data is None else list(data)
    scores = score(model, graph, importance, batches=batches or calibration)
    result = settle_on_device(model, graph, scores, chosen, example_inputs, forward=forward)
    if calibration is not None:
        return restore(result, model, calibration, forward=forward)
    if forward is None:
        found = fold_constants(result.model, model, result.plan, example_inputs)
        return _told(result, judged(result.graph, result.plan, found))
    return result


def _told(result: Cut, facts: dict[str, Any]) -> Cut:
    return replace(result, certificate=result.certificate.model_copy(update=facts))


def restore(
    result: Cut,
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    corrected: bool = True,
    allow_bias: bool = False,
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> Cut:
    """Recover the slim model in place, and let the certificate say what cut and recovery cost.

    `batches` are inputs [N, C, H, W] without labels; an eighth of them is held out of recovery, and
    the cost is measured there. With `corrected` off nothing is recovered,
    only measured.
    """
    images = torch.cat(list(batches))
    held = images[-max(1, len(images) // 8) :].split(128)
    error, agreement = cost_of(model, result.model, held, forward)
    facts: dict[str, Any] = {"output_error_cut": error, "top1_agreement_cut": agreement}
    if corrected:
        seen = [images[: len(images) - len(images) // 8]]
        found = find(
            result.model, model, result.plan, seen, allow_bias=allow_bias, progress=progress
        )
        facts |= judged(result.graph, result.plan, found)
        error, agreement = cost_of(model, result.model, held, forward)
        facts |= {"output_error_recovered": error, "top1_agreement_recovered": agreement}
    return _told(result, facts)
