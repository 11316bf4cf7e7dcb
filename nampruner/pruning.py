"""Prune a model in Python: trace → score → select → cut → certify → recover.

A plan that comes out of here has been carried out on a copy and certified. A cut that turns out
wrong costs its channels their freedom, and the plan is made again.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nampruner.certificate import Forward, certify, cost_of, culprits
from nampruner.config import TARGETS, PruneOptions, parse
from nampruner.errors import CertificateError, NamPrunerError
from nampruner.graph import DependencyGraph, UnitGroup, trace
from nampruner.importance import Batches, Custom, Scores, score
from nampruner.plan import Certificate, PruningPlan, Repair
from nampruner.progress import Progress
from nampruner.recovery import fold_constants, recover
from nampruner.selection import select
from nampruner.surgery import cut, find_repairs

_NARROW = ("convolution", "split", "split_with_sizes", "slice")
_REPAIRS = (_NARROW, (*_NARROW, "view", "_unsafe_view", "reshape"), ())
"""Which literals to repair: first those that surely count channels, then all, then none."""


@dataclass(frozen=True)
class Cut:
    """A plan, carried out and certified."""

    model: nn.Module
    plan: PruningPlan
    certificate: Certificate


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

    `options` are those of `nampruner prune`: one of `ratio`, `macs`, `params`; and
    `allocation`, `round_to`, `floor`, `ignore`. `importance` may be a callable, see
    `nampruner.importance.score`.

    Raises:
        NamPrunerError: an option is wrong.
        GraphError: nothing can be cut.
        CertificateError: no exact cut was found.
    """
    chosen = _options(importance, options)
    graph = trace(model, example_inputs, forward)
    scores = score(model, graph, importance, batches=batches)
    return settle(model, graph, scores, chosen, example_inputs, forward).plan


def _options(importance: str | Custom, options: dict[str, Any]) -> PruneOptions:
    named = {} if callable(importance) else {"importance": importance}
    chosen = parse(PruneOptions, {**options, **named}, "prune")
    if all(getattr(chosen, target) is None for target in TARGETS):
        raise NamPrunerError(f"no target was given; give one of {', '.join(TARGETS)}: ratio=0.3")
    return chosen


def settle(
    model: nn.Module,
    graph: DependencyGraph,
    scores: Scores,
    options: PruneOptions,
    example_inputs: Any,
    forward: Forward | None = None,
) -> Cut:
    """Select, cut and certify; freeze what is at fault and select again until the cut is exact.

    Raises:
        GraphError, CertificateError: see `plan_pruning`.
    """
    while True:
        plan = select(graph, scores, options)
        attempt = _attempt(model, graph, plan, example_inputs, forward)
        if isinstance(attempt, Cut):
            return attempt
        graph = _without_culprits(model, graph, plan, example_inputs, forward, attempt)


def _attempt(
    model: nn.Module,
    graph: DependencyGraph,
    plan: PruningPlan,
    inputs: Any,
    forward: Forward | None,
) -> Cut | CertificateError:
    """Carry the plan out, repairing as few literals as make it exact."""
    removed = _removed_units(graph, plan)
    tried, failure = set(), CertificateError("nothing was tried")
    for ops in _REPAIRS:
        repairs = find_repairs(model, graph, removed, ops)
        if repairs in tried:
            continue
        tried.add(repairs)
        attempt = _certified(model, plan, repairs, inputs, forward)
        if isinstance(attempt, Cut):
            return _without_coincidences(model, attempt, inputs, forward)
        failure = attempt
    return failure


def _certified(
    model: nn.Module,
    plan: PruningPlan,
    repairs: tuple[Repair, ...],
    inputs: Any,
    forward: Forward | None,
) -> Cut | CertificateError:
    candidate = plan.model_copy(update={"repairs": repairs})
    slim = cut(model, candidate)
    try:
        return Cut(slim, candidate, certify(model, slim, candidate, inputs, forward))
    except CertificateError as error:
        return error


def _without_coincidences(
    model: nn.Module, found: Cut, inputs: Any, forward: Forward | None
) -> Cut:
    """Where attributes of one module held the same number, undo the repairs that none needs."""
    repairs = found.plan.repairs
    alike = Counter((repair.module, repair.before) for repair in repairs)
    for repair in repairs:
        if alike[repair.module, repair.before] > 1:
            fewer = tuple(r for r in found.plan.repairs if r != repair)
            attempt = _certified(model, found.plan, fewer, inputs, forward)
            if isinstance(attempt, Cut):
                found = attempt
                alike[repair.module, repair.before] -= 1
    return found


def _removed_units(graph: DependencyGraph, plan: PruningPlan) -> Any:
    removed = graph.mask([])
    for slot in graph.slots:
        removed[graph.units(slot)[plan.removed.get(slot.name, {}).get(slot.dim, [])]] = True
    return removed


def _without_culprits(
    model: nn.Module,
    graph: DependencyGraph,
    plan: PruningPlan,
    inputs: Any,
    forward: Forward | None,
    failure: CertificateError,
) -> DependencyGraph:
    removed = _removed_units(graph, plan)

    def holds(groups: Any) -> bool:
        part = graph.mask([u for g in groups for u in g.units[removed[g.units]]])
        lists = {
            "removed": graph.indices(part),
            "masked": graph.indices(part, consumed=True),
        }
        smaller = plan.model_copy(update=lists)
        return isinstance(_attempt(model, graph, smaller, inputs, forward), Cut)

    touched: list[UnitGroup] = [g for g in graph.groups if removed[g.units].any()]
    bad = culprits(touched, holds)
    if not bad:
        raise failure
    for group in bad:
        graph = graph.freeze(group.units, f"a cut here is not exact ({failure})")
    return graph


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
    graph = trace(model, example_inputs, forward)
    calibration = None if data is None else list(data)
    scores = score(model, graph, importance, batches=batches or calibration)
    result = settle(model, graph, scores, chosen, example_inputs, forward)
    if calibration is not None:
        return restore(result, model, calibration)
    if forward is None:
        fold_constants(result.model, model, result.plan, example_inputs)
    return result


def restore(
    result: Cut,
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    corrected: bool = True,
    allow_bias: bool = False,
    progress: Progress | None = None,
) -> Cut:
    """Recover the slim model in place, and let the certificate say what cut and recovery cost.

    `batches` are inputs [N, C, H, W] without labels; an eighth of them is held out of recovery, and
    the cost is measured there. With `corrected` off nothing is recovered,
    only measured.
    """
    images = torch.cat(list(batches))
    held = images[-max(1, len(images) // 8) :].split(128)
    error, agreement = cost_of(model, result.model, held)
    facts: dict[str, Any] = {"output_error_cut": error, "top1_agreement_cut": agreement}
    if corrected:
        seen = [images[: len(images) - len(images) // 8]]
        facts["layers"] = recover(
            result.model, model, result.plan, seen, allow_bias=allow_bias, progress=progress
        )
        error, agreement = cost_of(model, result.model, held)
        facts |= {"output_error_recovered": error, "top1_agreement_recovered": agreement}
    return replace(result, certificate=result.certificate.model_copy(update=facts))
