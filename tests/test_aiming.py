"""Targets in time: the clock is a formula, so that reaching one is arithmetic."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_staircase import STEPS, Clock, Separable, treads
from torch import Tensor, nn
from zoo import image

from nampruner import aiming
from nampruner.aiming import Shot, aim, known_device, next_share, read_latency, settle_on_device
from nampruner.budget import Device
from nampruner.config import PruneCommand, PruneOptions
from nampruner.errors import NamPrunerError
from nampruner.graph import DependencyGraph, trace
from nampruner.latency.fresh import measure_fresh
from nampruner.lineage import lineage
from nampruner.plan import Latency
from nampruner.pruning import plan_pruning
from nampruner.recipe import Recipe, merged
from nampruner.selection import select
from nampruner.settle import Cut, settle
from nampruner.staircase import Bench, Timetable, layers_of


@pytest.fixture
def model() -> nn.Module:
    return Separable().eval()


@pytest.fixture
def graph(model: nn.Module) -> DependencyGraph:
    return trace(model, image())


def scores_of(graph: DependencyGraph) -> Any:
    return np.random.default_rng(0).random(graph.count)


def table(model: nn.Module, folder: Path, clock: Clock | None = None) -> Timetable:
    bench = Bench(clock=clock or Clock(), folder=folder)
    return Timetable(layers_of(model, image()), STEPS, bench)


def network_ms(model: nn.Module) -> float:
    """What the formula says of a network's own convolutions, with a part that no width changes."""
    return 40.0 + sum(treads(layer) for layer in layers_of(model, image()).values())


def taken(ms: float) -> Latency:
    return Latency(median_ms=ms, spread_ms=0.0, runs=9, threads=1, batch=1, runtime="formula")


# --- the table ---------------------------------------------------------------------------------


def test_the_table_is_the_time_of_the_network_at_any_width_on_a_step(
    model: nn.Module, graph: DependencyGraph, tmp_path: Path
) -> None:
    time = table(model, tmp_path)(graph)
    full = np.array([len(group.units) for group in graph.groups], dtype=np.float64)
    layers = layers_of(model, image()).values()
    assert time(full) == pytest.approx(sum(treads(layer) for layer in layers))

    options = PruneOptions(ratio=0.4, round_to="auto")
    cut = settle(model, graph, scores_of(graph), options, image(), None, Device(STEPS))
    kept = [
        row.width_after / (row.width_before / n)
        for row, n in zip(cut.plan.layers, full, strict=True)
    ]
    slim = layers_of(cut.model, image()).values()
    grouped = next(layer for layer in layers if layer.kind == "grouped")
    narrow = next(layer for layer in slim if layer.kind == "grouped")
    # a grouped layer is in proportion to its MACs, for no narrower one was measured
    by_hand = sum(treads(layer) for layer in slim if layer.kind != "grouped")
    by_hand += treads(grouped) * narrow.macs / grouped.macs
    assert time(np.array(kept)) == pytest.approx(by_hand)


def test_the_budget_is_kept_by_the_table_and_dear_steps_go_first(
    model: nn.Module, graph: DependencyGraph, tmp_path: Path
) -> None:
    time = table(model, tmp_path)
    full = np.array([len(group.units) for group in graph.groups], dtype=np.float64)
    options = PruneOptions(latency="70%", allocation="error")
    for share in (0.9, 0.7, 0.5):
        plan = select(graph, np.ones(graph.count), options, Device(STEPS, time, share))
        kept = [
            r.width_after / (r.width_before / n) for r, n in zip(plan.layers, full, strict=True)
        ]
        left = time(graph)(np.array(kept)) / time(graph)(full)
        assert share <= left < 1.0
    with pytest.raises(NamPrunerError, match="no time was measured"):
        select(graph, np.ones(graph.count), options, Device(STEPS))


# --- reaching a target -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "dense_ms", "fraction"),
    [("60%", None, 0.6), ("0.6", 9.0, 0.6), (" 5 ms ", 8.0, 0.625), ("5ms", None, None)],
)
def test_amounts_of_time(given: str, dense_ms: float | None, fraction: float | None) -> None:
    assert read_latency(given, dense_ms) == fraction


@pytest.mark.parametrize(
    ("given", "dense_ms", "message"),
    [
        ("soon", None, "give 60%, 0.6 or 5ms"),
        ("120%", None, "less than all of the time"),
        ("0ms", 8.0, "less than all of the time"),
        ("9ms", 8.0, "takes 8 ms as it is"),
        ("2.1G", None, "is no time"),
    ],
)
def test_what_is_no_target_in_time(given: str, dense_ms: float | None, message: str) -> None:
    with pytest.raises(NamPrunerError, match=message):
        read_latency(given, dense_ms)


def shot(share: float, measured: float, wanted: float = 0.5) -> Shot:
    return Shot(share, measured, wanted, None)  # type: ignore[arg-type]


def test_the_next_share_lies_on_the_line_through_the_nearest_shots() -> None:
    # too slow: half of the table's time gone took a fourth of the measured, so all must go …
    assert next_share([shot(0.5, 0.75)]) == pytest.approx(0.02)
    assert next_share([shot(0.5, 0.6)]) == pytest.approx(1 - 0.5 * 0.5 / 0.4)
    # too fast: between it and the network as it is
    assert next_share([shot(0.5, 0.4)]) == pytest.approx(0.5 + 0.5 * 0.1 / 0.6)
    # one on either side, whatever else was tried
    tried = [shot(0.1, 0.1), shot(0.3, 0.4), shot(0.5, 0.6), shot(0.8, 0.9)]
    assert next_share(tried) == pytest.approx(0.4)
    assert next_share([shot(0.9, 1.05)]) == pytest.approx(0.63)


@pytest.mark.parametrize("latency", ["80%", "0.7", "60%", "150ms"])
def test_a_target_is_reached_as_it_is_measured(
    latency: str, model: nn.Module, graph: DependencyGraph, tmp_path: Path
) -> None:
    whole = network_ms(model)
    options = PruneOptions(latency=latency, allocation="uniform", round_to=4)
    device = Device(STEPS, table(model, tmp_path))
    shots: list[float] = []

    def shoot(share: float) -> Cut:
        shots.append(share)
        at = Device(device.steps, device.time, share)
        return settle(model, graph, scores_of(graph), options, image(), None, at)

    found = aim(shoot, lambda slim: (taken(whole), taken(network_ms(slim))), latency)

    wanted = read_latency(latency, whole)
    assert wanted
    measured = network_ms(found.model) / whole
    assert found.plan.achieved.latency == pytest.approx(measured)
    assert lineage(found.model).plans == (found.plan,)
    assert found.plan.requested.latency == latency
    assert measured == pytest.approx(wanted, rel=0.05)
    assert 1 < len(shots) <= 5  # the part that no width changes is not in the table


def test_what_cannot_be_reached_is_told(
    model: nn.Module, graph: DependencyGraph, tmp_path: Path
) -> None:
    class Ear:
        heard = ""

        def note(self, text: str) -> None:
            self.heard = text

    ear = Ear()
    options = PruneOptions(latency="5%")
    device = Device(STEPS, table(model, tmp_path))

    def shoot(share: float) -> Cut:
        at = Device(device.steps, device.time, share)
        return settle(model, graph, scores_of(graph), options, image(), None, at)

    whole = network_ms(model)
    aim(shoot, lambda slim: (taken(whole), taken(network_ms(slim))), "5%", ear)  # type: ignore[arg-type]
    assert "5.0% was asked for, and no cut was found that is nearer" in ear.heard


@pytest.fixture
def _formula_for_a_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        Bench, "_onnxruntime", lambda self, each, int8: [treads(geometry) for geometry in each]
    )


@pytest.mark.usefixtures("_formula_for_a_clock")
def test_the_whole_chain_with_a_formula_for_a_clock(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = network_ms(model)
    monkeypatch.setattr(
        aiming,
        "exported_times",
        lambda *_, **__: lambda slim: (taken(whole), taken(network_ms(slim))),
    )
    plan = plan_pruning(model, image(), latency="75%", importance="magnitude")
    assert plan.round_to == "auto"
    assert plan.achieved.latency == pytest.approx(0.75, rel=0.08)
    with pytest.raises(NamPrunerError, match="plain call takes one tensor"):
        plan_pruning(model, (image(),), latency="75%", importance="magnitude")


@pytest.mark.usefixtures("_formula_for_a_clock")
def test_steps_of_time_need_no_plain_call(model: nn.Module) -> None:
    given: Any = {"round_to": "auto", "ratio": 0.3, "importance": "magnitude"}
    plain = plan_pruning(model, image(), **given)
    assert plain.layers == plan_pruning(model, (image(),), **given).layers

    def forward(network: nn.Module, named: dict[str, Tensor]) -> Tensor:
        return 2 * network(named["picture"])

    found = plan_pruning(model, {"picture": image()}, forward=forward, **given)
    assert found.layers == plain.layers
    with pytest.raises(NamPrunerError, match="plain call takes one tensor"):
        plan_pruning(model, image(), forward=lambda net, x: net(x), latency="75%")


def test_onnxruntime_in_a_process_of_its_own(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aiming, "_MOST_PASSES", 1)
    times = aiming.exported_times(model, image(), tmp_path, threads=1)
    dense, slim = times(model)
    assert dense.batch == slim.batch == 1
    assert dense.runtime.startswith("onnxruntime ")
    with pytest.raises(NamPrunerError, match=r"could not be timed.*no such file"):
        measure_fresh({"none": tmp_path / "none.onnx"}, np.zeros((1, 3, 8, 8), np.float32))


def test_nothing_is_measured_where_nothing_needs_it(
    model: nn.Module, graph: DependencyGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aiming, "Bench", None)
    options = PruneOptions(ratio=0.2)
    assert known_device(model, options, image()) is None
    assert settle_on_device(model, graph, scores_of(graph), options, image()).plan.removed


def test_a_target_in_time_brings_the_steps_of_time() -> None:
    assert PruneOptions(latency="60%").round_to == "auto"
    assert PruneOptions(latency="60%", round_to=4).round_to == 4
    assert PruneOptions(ratio=0.3).round_to == 8
    old = Recipe(ratio=0.3).model_dump(exclude_none=True)
    recipe = merged(old, PruneCommand(latency="60%"), "here")
    assert (recipe.latency, recipe.round_to, recipe.ratio) == ("60%", "auto", None)
    assert merged(old, PruneCommand(latency="60%", round_to=4), "here").round_to == 4


@pytest.mark.parametrize(("noise", "passes"), [(0.0, 2), (0.5, 5)])
def test_what_is_not_certain_is_measured_again(
    noise: float, passes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rng, done = np.random.default_rng(0), []

    def measured(files: Any, image: Any, *, threads: int) -> dict[str, Latency]:
        done.append(threads)
        return {name: noisy(2.0 if name == "dense" else 1.0) for name in files}

    def noisy(ms: float) -> Latency:
        turns = ms * (1 + noise * rng.random(20))
        fields = {"median_ms": float(np.median(turns)), "turns_ms": tuple(turns.tolist())}
        return taken(ms).model_copy(update=fields)

    monkeypatch.setattr(aiming, "export_onnx", lambda *_: None)
    monkeypatch.setattr(aiming, "measure_fresh", measured)
    dense, slim = aiming.exported_times(nn.Identity(), image(), tmp_path, threads=1)(nn.Identity())
    assert len(done) == passes
    assert len(dense.turns_ms) == len(slim.turns_ms) == 20 * passes
    assert dense.runs == 9 * passes
    assert dense.median_ms / slim.median_ms == pytest.approx(2.0, rel=noise or 1e-9)
