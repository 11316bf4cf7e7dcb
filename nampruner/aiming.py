"""Reach a target in time as it is measured: plan by the table, cut, export, measure, correct.

The table knows convolutions only, so what it says of a network is a first guess. How much of the
time it may leave is moved until the exported network takes what was asked.
"""

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor, nn

from nampruner.budget import Device
from nampruner.config import PruneOptions
from nampruner.errors import NamPrunerError
from nampruner.export import export_onnx, exportable, exported_run, has_form
from nampruner.graph import DependencyGraph, Forward
from nampruner.importance import Scores
from nampruner.latency import compare
from nampruner.latency.fresh import measure_fresh
from nampruner.lineage import lineage, remember
from nampruner.plan import Latency
from nampruner.progress import Progress, Silent
from nampruner.settle import Cut, settle
from nampruner.staircase import Bench, Timetable, layers_of, module_steps, staircase

Stopwatch = Callable[[nn.Module], tuple[Latency, Latency]]
"""A slim network → time of the dense one and of itself, measured in turns."""

WITHIN = 0.03
"""Nearer to the target than this part of it is near enough."""
_TRIES = 5
"""Networks that are exported and timed."""
_MOST_CUTS = 12
"""Plans that are carried out: near shares may give the same widths."""
_LEAST_SHARE = 0.02
_FEWEST_PASSES, _MOST_PASSES = 2, 5
"""Fresh processes per network: one may lie better in memory than the next."""


@dataclass(frozen=True)
class Shot:
    """One cut and what it took."""

    share: float
    """Of the time in the table, what was allowed to remain."""
    measured: float
    """Of the dense network's time, what remains."""
    wanted: float
    cut: Cut

    @property
    def miss(self) -> float:
        """How far it is from the target, as a part of it."""
        return abs(self.measured / self.wanted - 1)


def aim(
    shoot: Callable[[float], Cut],
    stopwatch: Stopwatch,
    latency: str,
    progress: Progress | None = None,
) -> Cut:
    """Return the cut whose measured time comes nearest to `latency`.

    Args:
        shoot: share of the time in the table that may remain → the cut that keeps it.
        latency: what may remain, see `read_latency`.

    Raises:
        NamPrunerError: the target cannot be read, or the network is that fast as it is.
    """
    shots: list[Shot] = []
    share = read_latency(latency, None) or 0.5
    for _ in range(_MOST_CUTS):
        cut = shoot(share)
        if any(cut.plan.layers == shot.cut.plan.layers for shot in shots):
            share = _further(share, shots[-1])
            continue
        dense, slim = stopwatch(cut.model)
        wanted = read_latency(latency, dense.median_ms) or 1.0
        shots.append(Shot(share, 1 / compare(dense, slim).speedup, wanted, cut))
        if shots[-1].miss <= WITHIN or len(shots) == _TRIES:
            break
        share = next_share(shots)
    best = min(shots, key=lambda shot: shot.miss)
    _tell(best, progress or Silent())
    achieved = best.cut.plan.achieved.model_copy(update={"latency": best.measured})
    plan = best.cut.plan.model_copy(update={"achieved": achieved})
    # the checkpoint's plan is the one that the network carries
    remember(best.cut.model, plans=(*lineage(best.cut.model).plans[:-1], plan))
    return replace(best.cut, plan=plan)


def next_share(shots: list[Shot]) -> float:
    """Return the share to try next: on the line through the nearest shots on both sides.

    All of the time in the table leaves all of the measured time, so one side is always known.
    """
    wanted = shots[-1].wanted
    points = [(1.0, 1.0), *((shot.share, shot.measured) for shot in shots)]
    above = min((p for p in points if p[1] > wanted), key=lambda p: (p[1], p[0]))
    below = max((p for p in points if p[1] <= wanted), key=lambda p: p[1], default=None)
    if below is not None:
        part = (wanted - below[1]) / (above[1] - below[1])
        share = below[0] + part * (above[0] - below[0])
    elif above[1] < 1:
        share = 1 - (1 - wanted) * (1 - above[0]) / (1 - above[1])
    else:  # nothing was saved yet
        share = 0.7 * min(shot.share for shot in shots)
    return max(share, _LEAST_SHARE)


def _further(share: float, last: Shot) -> float:
    """Return a share a tenth further on the way, where this one changed no width."""
    moved = 0.9 * share if last.measured > last.wanted else share + 0.1 * (1 - share)
    return max(moved, _LEAST_SHARE)


def read_latency(given: str, dense_ms: float | None) -> float | None:
    """Read `60%`, `0.6` or `5ms` as what may remain of the dense network's time.

    Returns:
        The fraction; None for an absolute time while `dense_ms` is not known.

    Raises:
        NamPrunerError: not a time, or not below the dense network's.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%|ms)?\s*", given.lower())
    if match is None:
        raise NamPrunerError(f"latency = {given!r} is no time; give 60%, 0.6 or 5ms")
    value, unit = float(match.group(1)), match.group(2)
    if unit == "ms" and dense_ms is None:
        return None
    fraction = value / (dense_ms or 1) if unit == "ms" else value / 100 if unit == "%" else value
    if not 0 < fraction < 1:
        now = "" if dense_ms is None else f", and the network takes {dense_ms:.3g} ms as it is"
        raise NamPrunerError(f"latency = {given!r}: less than all of the time must remain{now}")
    return fraction


def _tell(shot: Shot, progress: Progress) -> None:
    said = f"{shot.measured:.1%} of the time remains, measured; {shot.wanted:.1%} was asked for"
    progress.note(said if shot.miss <= WITHIN else f"{said}, and no cut was found that is nearer")


def known_device(
    model: nn.Module,
    options: PruneOptions,
    example_inputs: Any,
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> Device | None:
    """Measure what the options need to know of this device; None where they need nothing.

    Times are measured once per device and kept in the user's cache.
    """
    if options.round_to != "auto" and options.latency is None:
        return None
    # a target that cannot be read is an error before anything is measured
    share = 1.0 if options.latency is None else read_latency(options.latency, None) or 0.5
    layers = layers_of(model, example_inputs, exported_run(model, forward))
    bench = Bench(threads=options.threads)
    steps = module_steps(layers, staircase(layers.values(), bench, progress))
    if options.latency is None:
        return Device(steps)
    return Device(steps, Timetable(layers, steps, bench, progress), share)


def settle_on_device(
    model: nn.Module,
    graph: DependencyGraph,
    scores: Scores,
    options: PruneOptions,
    example_inputs: Any,
    *,
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> Cut:
    """Settle, by what was measured on this device where the options ask for that.

    Raises:
        NamPrunerError: a target in time, and nobody knows how the network is exported: it takes
            more than one tensor, or has a `forward` of its own and is none of Ultralytics'.
        GraphError, CertificateError: see `nampruner.settle.settle`.
    """
    own = forward is not None and not has_form(model)
    if options.latency is not None and (own or not isinstance(example_inputs, Tensor)):
        raise NamPrunerError(
            "a target in time is that of the exported network, whose plain call takes one tensor; "
            "wrap it in a module of that kind and leave forward out, or give another target"
        )
    device = known_device(model, options, example_inputs, forward, progress)

    def shoot(share: float) -> Cut:
        at = device and replace(device, share=share)
        return settle(model, graph, scores, options, example_inputs, forward, at)

    if options.latency is None:
        return shoot(1.0)
    with tempfile.TemporaryDirectory(prefix="nampruner-") as folder:
        stopwatch = exported_times(model, example_inputs, Path(folder), threads=options.threads)
        return aim(shoot, stopwatch, options.latency, progress)


def exported_times(
    model: nn.Module, example_inputs: Tensor, folder: Path, *, threads: int
) -> Stopwatch:
    """Return what exports a slim network and times it beside the dense one, in a fresh process."""
    files = {name: folder / f"{name}.onnx" for name in ("dense", "slim")}
    export_onnx(exportable(model), files["dense"], example_inputs)
    image: Any = example_inputs[:1].detach().cpu().numpy()

    def times(slim: nn.Module) -> tuple[Latency, Latency]:
        export_onnx(exportable(slim), files["slim"], example_inputs)
        passes: list[tuple[Latency, Latency]] = []
        while not _certain(passes):
            found = measure_fresh(files, image, threads=threads)
            passes.append((found["dense"], found["slim"]))
        return together([dense for dense, _ in passes]), together([slim for _, slim in passes])

    return times


def _certain(passes: list[tuple[Latency, Latency]]) -> bool:
    """Whether the ratio of both is known well enough to aim by, or as well as it will be."""
    if not _FEWEST_PASSES <= len(passes) < _MOST_PASSES:
        return len(passes) >= _MOST_PASSES
    dense, slim = (together(list(each)) for each in zip(*passes, strict=True))
    verdict = compare(dense, slim)
    return verdict.high - verdict.low <= 2 * WITHIN * verdict.speedup


def together(passes: list[Latency]) -> Latency:
    """Put the turns of one network from several processes together."""
    turns = tuple(ms for each in passes for ms in each.turns_ms)
    runs, spread = sum(each.runs for each in passes), max(each.spread_ms for each in passes)
    middle = median(each.median_ms for each in passes)
    update = {"turns_ms": turns, "runs": runs, "spread_ms": spread, "median_ms": middle}
    return passes[0].model_copy(update=update)
