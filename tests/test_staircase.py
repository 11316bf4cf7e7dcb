"""The staircase: tables are injected, so that steps, savings and the cache are arithmetic."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from zoo import image

from nampruner.budget import Device
from nampruner.config import PruneOptions
from nampruner.errors import NamPrunerError
from nampruner.export.single import write_convolution
from nampruner.graph import DependencyGraph, trace
from nampruner.latency import profile
from nampruner.selection import quantum, select
from nampruner.staircase import Bench, Geometry, layers_of, module_steps, savings, staircase
from nampruner.staircase.device import cache_folder, fingerprint


class Separable(nn.Module):
    """Dense, pointwise, depthwise and grouped convolutions; `wide` and `deep` share a width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, stride=2, padding=1)
        self.dense = nn.Conv2d(64, 64, 3, padding=1)
        self.wide = nn.Conv2d(64, 96, 1)
        self.deep = nn.Conv2d(96, 96, 3, padding=1, groups=96)
        self.narrow = nn.Conv2d(96, 64, 1)
        self.grouped = nn.Conv2d(64, 64, 3, padding=1, groups=4)
        self.head = nn.Conv2d(64, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = self.dense(x).relu()
        x = self.deep(self.wide(x).relu()).relu()
        return self.head(self.grouped(self.narrow(x)).relu())


STEP = {"dense": 16, "pointwise": 8, "depthwise": 4, "grouped": 8}


def blocked(width: int, block: int) -> int:
    return math.ceil(width / block)


def treads(each: Geometry) -> float:
    """Time that follows whole blocks of channels; depthwise falls off a cliff between them."""
    block = STEP[each.kind]
    if each.kind == "depthwise":
        return each.outputs * (1.0 if each.outputs % block == 0 else 5.0) + 3.0
    return blocked(each.inputs, block) * blocked(each.outputs, block) * block**2 / 64 + 3.0


class Clock:
    """Answers from a formula, and remembers what was asked."""

    def __init__(
        self,
        formula: Callable[[Geometry], float] = treads,
        eight: Callable[[Geometry], float] | None = None,
    ) -> None:
        self.formula = formula
        self.eight = eight or formula
        self.asked: list[tuple[Geometry, ...]] = []

    def __call__(self, geometries: Sequence[Geometry], int8: bool) -> list[float]:
        self.asked.append(tuple(geometries))
        return [(self.eight if int8 else self.formula)(each) for each in geometries]


@pytest.fixture
def layers() -> dict[str, Geometry]:
    return layers_of(Separable().train(), image())


@pytest.fixture
def graph() -> DependencyGraph:
    return trace(Separable(), image())


def test_layers_are_read_off_one_run(layers: dict[str, Geometry]) -> None:
    height, width = image().shape[-2:]
    kinds = ["dense", "dense", "pointwise", "depthwise", "pointwise", "grouped", "pointwise"]
    assert [layer.kind for layer in layers.values()] == kinds
    assert list(layers) == [name for name, _ in Separable().named_children()]
    assert layers["stem"].size == (height, width)
    assert layers["deep"].size == (height // 2, width // 2)
    assert layers["stem"].macs == height * width / 4 * 9 * 3 * 64
    assert layers["deep"].macs == height * width / 4 * 9 * 96
    thin = layers["deep"].resized(0, 92)
    assert (thin.inputs, thin.outputs, thin.groups) == (92, 92, 92)
    assert layers["dense"].resized(48, 32).macs == layers["dense"].macs * 48 * 32 / 64**2


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_steps_are_those_of_the_time(
    noise: float, layers: dict[str, Geometry], tmp_path: Path
) -> None:
    dice = np.random.default_rng(0)
    clock = Clock(lambda each: treads(each) * (1 + noise * dice.uniform(-1, 1)), treads)
    found = staircase(layers.values(), Bench(clock=clock, folder=tmp_path))

    assert found.steps == {"dense": 16, "pointwise": 8, "depthwise": 4}
    steps = module_steps(layers, found)
    assert steps["deep"] == 4
    assert steps["narrow"] == 8
    assert "grouped" not in steps


def test_time_in_proportion_has_no_step_and_flat_time_the_largest(
    layers: dict[str, Geometry], tmp_path: Path
) -> None:
    even = Bench(clock=Clock(lambda each: each.macs), folder=tmp_path / "even")
    flat = Bench(clock=Clock(lambda each: 1.0), folder=tmp_path / "flat")
    assert set(staircase(layers.values(), even).steps.values()) == {1}
    # widths of 64 and 96 are measured down to 32 below: nothing was gained in two steps of 16
    assert set(staircase(layers.values(), flat).steps.values()) == {32}


def test_sets_are_measured_once_per_device(
    layers: dict[str, Geometry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    clock = Clock()
    first = staircase(layers.values(), Bench(clock=clock))
    assert all(len({each.size for each in asked}) == 1 for asked in clock.asked)
    once = len(clock.asked)

    assert staircase(layers.values(), Bench(clock=clock)) == first
    assert len(clock.asked) == once
    (kept,) = cache_folder().iterdir()
    assert kept.parent == tmp_path / "nampruner"
    staircase(layers.values(), Bench(clock=clock, threads=2))
    assert len(clock.asked) == 2 * once
    kept.write_text('{"half": ')
    assert staircase(layers.values(), Bench(clock=clock)) == first
    assert len(clock.asked) == 3 * once


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    layers: dict[str, Geometry], tmp_path: Path
) -> None:
    blocked_path = tmp_path / "file"
    blocked_path.write_text("")
    assert staircase(layers.values(), Bench(clock=Clock(), folder=blocked_path)).steps


def test_only_the_largest_shapes_of_a_kind_are_measured(tmp_path: Path) -> None:
    shape = {"groups": 1, "kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1)}
    many = [
        Geometry(inputs=32, outputs=32, size=(size, size), **shape)
        for size in range(1, 9)
        for _ in range(9 - size)
    ]
    clock = Clock()
    found = staircase(many, Bench(clock=clock, folder=tmp_path))
    # size² · (9 - size) is largest at 6, 7 and 5, then 8
    assert [(s.geometry.size[0], s.layers) for s in found.stairs if not s.int8] == [
        (6, 3),
        (5, 4),
        (7, 2),
        (4, 5),
    ]
    narrow = many[0].resized(4, 4)
    assert staircase([narrow], Bench(clock=clock, folder=tmp_path)).steps == {}


def test_the_fingerprint_changes_with_what_times_depend_on() -> None:
    assert fingerprint("a") == fingerprint("a")
    assert fingerprint("a") != fingerprint("b")


# --- auto rounding -----------------------------------------------------------------------------

STEPS = {"stem": 16, "dense": 16, "wide": 8, "deep": 4, "narrow": 8, "head": 8}


def test_a_group_takes_the_largest_step_of_its_layers(graph: DependencyGraph) -> None:
    found = {group.name: quantum(graph, group, STEPS) for group in graph.groups}
    # `dense` is read by `wide`, `wide` and `deep` are tied, a unit of `narrow` is one of 4 groups
    assert {name: found[name] for name in ("stem", "dense", "wide")} == {
        "stem": 16,
        "dense": 16,
        "wide": 8,
    }
    assert all(quantum(graph, group, {}) == quantum(graph, group, 8) for group in graph.groups)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7])
def test_auto_never_removes_more_and_lands_on_steps(graph: DependencyGraph, ratio: float) -> None:
    scores = np.random.default_rng(1).random(graph.count)
    options = PruneOptions(ratio=ratio, round_to="auto")
    plan = select(graph, scores, options, Device(STEPS))

    assert plan.round_to == "auto"
    assert plan.achieved.ratio <= ratio
    widths = {row.layer: (row.width_before, row.width_after) for row in plan.layers}
    for name, step in (("stem", 16), ("dense", 16), ("wide", 8)):
        before, after = widths[name]
        assert after == before or after % step == 0
    if ratio >= 0.3:
        assert any(after < before for before, after in widths.values())
    with pytest.raises(NamPrunerError, match="nothing was; give a device"):
        select(graph, scores, options)


# --- savings -----------------------------------------------------------------------------------


def test_savings_are_what_the_narrower_layers_would_take(
    graph: DependencyGraph, layers: dict[str, Geometry], tmp_path: Path
) -> None:
    bench, scores = Bench(clock=Clock(), folder=tmp_path), np.ones(graph.count)
    groups = {group.name: group for group in graph.groups}
    scores[groups["dense"].units] = np.arange(64)
    rows = {row.layer: row for row in savings(graph, scores, layers, bench, STEPS)}
    total = sum(treads(layer) for layer in layers.values())
    dense, wide, deep, narrow = (layers[name] for name in ("dense", "wide", "deep", "narrow"))

    def gone(before: Geometry, inputs: int, outputs: int) -> float:
        return treads(before) - treads(before.resized(inputs, outputs))

    assert rows["dense"].step == 16
    assert rows["dense"].share == pytest.approx(treads(dense) / total)
    assert rows["dense"].saved == pytest.approx((gone(dense, 64, 48) + gone(wide, 48, 96)) / total)
    every = sum(scores[group.units].sum() for group in groups.values())
    assert rows["dense"].paid == pytest.approx(sum(range(16)) / every)
    assert rows["wide"].share == pytest.approx((treads(wide) + treads(deep)) / total)
    assert rows["wide"].saved == pytest.approx(
        (gone(wide, 64, 88) + gone(deep, 88, 88) + gone(narrow, 88, 64)) / total
    )


def test_one_narrower_channel_can_cost_time(
    graph: DependencyGraph, layers: dict[str, Geometry], tmp_path: Path
) -> None:
    bench = Bench(clock=Clock(), folder=tmp_path)
    rows = savings(graph, np.ones(graph.count), layers, bench, 1)
    saved = {row.layer: row.saved for row in rows}
    assert saved["wide"] < 0  # the depthwise one leaves its tread


# --- what is measured --------------------------------------------------------------------------


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("weight", "groups", "stride"),
    [((8, 4, 3, 3), 1, 2), ((8, 4, 1, 1), 1, 1), ((6, 1, 5, 5), 6, 1), ((8, 2, 3, 3), 4, 1)],
)
def test_the_file_holds_that_convolution(
    weight: tuple[int, int, int, int], groups: int, stride: int, int8: bool, tmp_path: Path
) -> None:
    path = tmp_path / "one.onnx"
    how = {"strides": (stride, stride), "dilations": (1, 1), "groups": groups}
    write_convolution(path, weight, (10, 12), **how, int8=int8)
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    shapes = {value.name: tuple(value.dims) for value in model.graph.initializer}
    assert shapes["weight"] == weight
    assert shapes["first"] == (weight[1] * groups, 1, 1, 1)
    kinds = {v.name: v.data_type for v in model.graph.initializer}
    assert kinds["weight"] == (onnx.TensorProto.INT8 if int8 else onnx.TensorProto.FLOAT)


def test_eight_bits_run_in_kernels_of_eight_bits(tmp_path: Path) -> None:
    path, x = tmp_path / "one.onnx", np.ones((1, 1, 6, 6), np.float32)
    how = {"strides": (1, 1), "dilations": (1, 1), "groups": 1, "int8": True}
    write_convolution(path, (16, 16, 3, 3), (6, 6), **how)
    (run, *_) = profile({"one": path}, x, seconds=0.01)["one"]
    ops = [op for _, op in run]
    assert ops.count("QLinearConv") == 2
    assert not {"Conv", "Relu", "GlobalAveragePool"} & set(ops)


def in_sixteens(each: Geometry) -> float:
    return blocked(each.inputs, 16) * blocked(each.outputs, 16) + 3.0


def test_a_step_is_one_in_float_and_in_int8(layers: dict[str, Geometry], tmp_path: Path) -> None:
    bench = Bench(clock=Clock(treads, in_sixteens), folder=tmp_path)
    found = staircase(layers.values(), bench)

    assert found.steps_in(int8=False) == {"dense": 16, "pointwise": 8, "depthwise": 4}
    assert found.steps_in(int8=True) == dict.fromkeys(("dense", "pointwise", "depthwise"), 16)
    assert found.steps == dict.fromkeys(("dense", "pointwise", "depthwise"), 16)
    fine = Bench(clock=Clock(treads, lambda each: each.macs), folder=tmp_path / "fine")
    assert staircase(layers.values(), fine).steps == found.steps_in(int8=False)


def test_float_and_int8_are_kept_apart_in_one_file(
    layers: dict[str, Geometry], tmp_path: Path
) -> None:
    clock = Clock(treads, in_sixteens)
    first = staircase(layers.values(), Bench(clock=clock, folder=tmp_path))
    once = len(clock.asked)
    assert staircase(layers.values(), Bench(clock=clock, folder=tmp_path)) == first
    assert len(clock.asked) == once
    assert len(list(tmp_path.iterdir())) == 1
    # what was kept before there was INT8 is still known
    (kept,) = tmp_path.iterdir()
    old = json.loads(kept.read_text())
    old["measured"] = [
        {key: value for key, value in turns.items() if key != "int8"}
        for turns in old["measured"]
        if not turns["int8"]
    ]
    kept.write_text(json.dumps(old))
    assert staircase(layers.values(), Bench(clock=clock, folder=tmp_path)) == first
    assert len(clock.asked) == once + once // 2


def test_onnxruntime_is_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: dict[str, Geometry]
) -> None:
    from nampruner.staircase import bench

    monkeypatch.setattr(bench, "_SECONDS", 0.01)
    monkeypatch.setattr(bench, "_ROUNDS", 2)
    found = staircase(layers.values(), Bench(folder=tmp_path))
    assert set(found.steps) == {"dense", "pointwise", "depthwise"}
    assert all(ms > 0 for stairs in found.stairs for ms in stairs.ms)
    assert all(len(stairs.ms) == len(stairs.widths) >= 5 for stairs in found.stairs)
