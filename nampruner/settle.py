"""Select, cut and certify until the cut is exact.

A cut can fail where a module holds a width as a number that was not found, or where a rule was
wrong. Then the groups of channels at fault are searched for, frozen, and the plan is made again.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nampruner.budget import Device
from nampruner.certificate import certify, culprits
from nampruner.config import PruneOptions
from nampruner.errors import CertificateError
from nampruner.graph import DependencyGraph, Forward, UnitGroup
from nampruner.graph.graph import Bools
from nampruner.importance import Scores
from nampruner.lineage import lineage
from nampruner.plan import Certificate, PruningPlan, Repair
from nampruner.selection import select
from nampruner.surgery import cut, find_repairs

_NARROW = ("convolution", "split", "split_with_sizes", "slice", "native_group_norm")
_REPAIRS = (_NARROW, (*_NARROW, "view", "_unsafe_view", "reshape"), ())
"""Which literals to repair: first those that surely count channels, then all, then none."""


@dataclass(frozen=True)
class Cut:
    """A plan, carried out and certified."""

    model: nn.Module
    plan: PruningPlan
    certificate: Certificate
    graph: DependencyGraph
    """Of the original, with what could not be cut exactly frozen."""


def settle(
    model: nn.Module,
    graph: DependencyGraph,
    scores: Scores,
    options: PruneOptions,
    example_inputs: Any,
    forward: Forward | None = None,
    device: Device | None = None,
) -> Cut:
    """Select, cut and certify; freeze what is at fault and select again until the cut is exact.

    Raises:
        GraphError, CertificateError: see `nampruner.pruning.plan_pruning`.
    """
    trial = _Trial(model, example_inputs, forward)
    while True:
        plan = select(graph, scores, options, device)
        plan = plan.model_copy(update={"baked": lineage(model).baked})
        attempt = trial.attempt(graph, plan)
        if isinstance(attempt, Cut):
            return attempt
        graph = _without_culprits(trial, graph, plan, attempt)


@dataclass(frozen=True)
class _Trial:
    """Carries plans out on copies of one model."""

    model: nn.Module
    inputs: Any
    forward: Forward | None

    def attempt(self, graph: DependencyGraph, plan: PruningPlan) -> Cut | CertificateError:
        """Carry the plan out, repairing as few literals as make it exact."""
        removed = _removed_units(graph, plan)
        failures: dict[tuple[Repair, ...], CertificateError] = {}
        for ops in _REPAIRS:
            repairs = find_repairs(self.model, graph, removed, ops)
            if repairs in failures:
                continue
            found = self._certified(graph, plan.model_copy(update={"repairs": repairs}))
            if isinstance(found, Cut):
                return self._without_coincidences(found)
            failures[repairs] = found
        # with the most repairs it came furthest
        return failures[max(failures, key=len)]

    def _certified(self, graph: DependencyGraph, plan: PruningPlan) -> Cut | CertificateError:
        slim = cut(self.model, plan)
        try:
            proof = certify(self.model, slim, plan, self.inputs, self.forward)
        except CertificateError as error:
            return error
        return Cut(slim, plan, proof, graph)

    def _without_coincidences(self, found: Cut) -> Cut:
        """Where attributes of one module held the same number, undo the repairs none needs."""
        repairs = found.plan.repairs
        alike = Counter((repair.module, repair.before) for repair in repairs)
        for repair in repairs:
            if alike[repair.module, repair.before] > 1:
                fewer = tuple(r for r in found.plan.repairs if r != repair)
                plan = found.plan.model_copy(update={"repairs": fewer})
                again = self._certified(found.graph, plan)
                if isinstance(again, Cut):
                    found = again
                    alike[repair.module, repair.before] -= 1
        return found


def _removed_units(graph: DependencyGraph, plan: PruningPlan) -> Bools:
    removed = graph.mask([])
    for slot in graph.slots:
        removed[graph.units(slot)[plan.removed.get(slot.name, {}).get(slot.dim, [])]] = True
    return removed


def _without_culprits(
    trial: _Trial, graph: DependencyGraph, plan: PruningPlan, failure: CertificateError
) -> DependencyGraph:
    """Freeze the groups whose cut is not exact."""
    removed = _removed_units(graph, plan)

    def attempt(groups: Iterable[UnitGroup]) -> Cut | CertificateError:
        part = graph.mask([u for g in groups for u in g.units[removed[g.units]]])
        lists = {"removed": graph.indices(part), "masked": graph.indices(part, consumed=True)}
        return trial.attempt(graph, plan.model_copy(update=lists))

    def holds(groups: Sequence[UnitGroup]) -> bool:
        return isinstance(attempt(groups), Cut)

    good = [group for group in graph.groups if removed[group.units].any()]
    suspects: list[list[UnitGroup]] = []
    found: Cut | CertificateError = failure
    while good and isinstance(found, CertificateError):
        # a network that does not run tells where; what only computes something else does not
        near = _near(graph, good, found.module)
        suspects += [[group] for group in near] if near else [good]
        good = [group for group in good if near and group not in near]
        found = attempt(good)
    bad: list[UnitGroup] = []
    for part in suspects:
        wrong = culprits(part, holds, good)
        good = [*good, *(group for group in part if group not in wrong)]
        bad += wrong
    if not bad:
        raise failure
    for group in bad:
        graph = graph.freeze(group.units, f"a cut here is not exact ({failure})")
    return graph


def _near(
    graph: DependencyGraph, groups: Sequence[UnitGroup], module: str | None
) -> list[UnitGroup]:
    """The groups that touch a module, or else the closest module around it that any touches."""
    while module:
        slots = {i for i, s in enumerate(graph.slots) if s.name.rpartition(".")[0] == module}
        counted = graph.mask([])
        for width in graph.widths:
            if width.module == module:
                for units in width.counted:
                    counted[units] = True
        near = [g for g in groups if slots & set(g.slots) or counted[g.units].any()]
        if near:
            return near
        module = module.rpartition(".")[0]
    return []
