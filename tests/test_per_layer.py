"""Time per layer: traces are split, summed and matched; no time is asserted."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from zoo import image

from nampruner.export import export_onnx, layers_of
from nampruner.figures import layer_times, slowest
from nampruner.latency import Profile, by_layer, profile
from nampruner.latency.profile import runs_of
from nampruner.pipeline.layers import side_by_side


def node(name: str, op: str, dur: int) -> dict[str, Any]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": dur, "args": {"op_name": op}}


def session(name: str) -> dict[str, Any]:
    return {"cat": "Session", "name": name, "dur": 99, "args": {}}


def test_a_trace_is_split_into_its_runs() -> None:
    fence = {"cat": "Node", "name": "a_fence_before", "dur": 50, "args": {"op_name": "Conv"}}
    found = runs_of(
        [
            session("session_initialization"),
            *(node("a", "Conv", 1000), fence, session("SequentialExecutor::Execute")),
            session("model_run"),
            *(node("a", "Conv", 2000), node("in_loop", "Add", 10), node("in_loop", "Add", 20)),
            session("model_run"),
        ]
    )
    assert found == [{("a", "Conv"): 1.0}, {("a", "Conv"): 2.0, ("in_loop", "Add"): 0.03}]


def test_a_layer_takes_the_time_of_its_nodes_run_by_run() -> None:
    runs = [
        {("x/Conv", "Conv"): 1.0, ("x/Mul", "Mul"): 4.0, ("Reorder", "ReorderInput"): 0.5},
        {("x/Conv", "Conv"): 3.0, ("x/Mul", "Mul"): 1.0, ("y/Conv", "Conv"): 6.0},
        {("x/Conv", "Conv"): 2.0, ("x/Mul", "Mul"): 7.0, ("Reorder", "ReorderInput"): 0.7},
    ]

    found = by_layer(runs, lambda name: name.split("/")[0] if "/" in name else None)

    # sums of runs 5, 4, 9; the median of sums is not the sum of medians, 2 + 4
    assert found.layers == {"x": 5.0, "y": 0.0}
    assert found.unmatched == {"ReorderInput": 0.5}
    assert (found.total, found.runs) == (5.5, 3)


def test_every_event_of_a_real_profile_is_told(tmp_path: Path) -> None:
    wide, narrow = (
        nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 16, 1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 5),
        )
        for width in (32, 16)
    )
    files = {"dense": tmp_path / "dense.onnx", "slim": tmp_path / "slim.onnx"}
    for model, path in zip((wide, narrow), files.values(), strict=True):
        export_onnx(model.eval(), path, image(size=16))

    runs = profile(files, image(size=16, batch=1), seconds=0.05)
    layers = {name: by_layer(runs[name], layers_of(path).find) for name, path in files.items()}
    found = side_by_side(layers)

    modules = dict(wide.named_modules())
    for name, each in layers.items():
        assert set(each.layers) <= set(modules)
        assert {"0", "4", "8"} <= set(each.layers)
        # median or not, nothing is lost: run by run, layers and the rest hold every node
        for run in runs[name]:
            alone = by_layer([run], layers_of(files[name]).find)
            assert alone.total == pytest.approx(sum(run.values()))
    assert found.candidates == ("dense", "slim")
    assert all(count >= 5 for count in found.runs)
    for number, total in enumerate(found.total_ms):
        rows = (*found.layers, *found.unmatched)
        assert sum(row.ms[number] or 0.0 for row in rows) == pytest.approx(total)
        assert sum(row.share[number] or 0.0 for row in rows) == pytest.approx(1.0)
    assert not list(Path.cwd().glob("*.json"))


def test_a_file_from_elsewhere_goes_by_its_own_names(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 2]) for n in "xy")
    weight = numpy_helper.from_array(torch.ones(2, 2).numpy(), "onnx::MatMul_7")
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["z"], name="MatMul_0"),
        helper.make_node("Erf", ["z"], ["y"], name="/act/Erf"),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "theirs.onnx"
    onnx.save(model, str(path))

    runs = profile({"theirs": path}, torch.ones(1, 2), seconds=0.01)["theirs"]

    assert set(by_layer(runs, layers_of(path).find).layers) == {"MatMul_0", "/act"}


def test_layers_of_one_name_stand_side_by_side_and_the_others_have_gaps() -> None:
    dense = Profile({"a": 1.0, "b": 4.0, "gone": 3.0}, {"ReorderOutput": 2.0}, 9)
    slim = Profile({"a": 2.0, "b": 0.5}, {}, 7)

    found = side_by_side({"dense": dense, "slim": slim})

    assert [(row.layer, row.ms) for row in found.layers] == [
        ("b", (4.0, 0.5)),
        ("gone", (3.0, None)),
        ("a", (1.0, 2.0)),
    ]
    assert found.layers[1].share == (0.3, None)
    assert [(row.layer, row.ms) for row in found.unmatched] == [("ReorderOutput", (2.0, None))]
    assert (found.total_ms, found.runs) == ((10.0, 2.5), (9, 7))


def test_the_fast_layers_are_added_up() -> None:
    times = {f"l{n}": (float(n), None if n == 2 else 0.5) for n in range(6)}
    assert slowest(times, most=3) == {
        "l5": (5.0, 0.5),
        "l4": (4.0, 0.5),
        "l3": (3.0, 0.5),
        "3 other layers": (3.0, 1.0),
    }
    assert list(slowest(times, most=5)) == ["l5", "l4", "l3", "l2", "l1", "l0"]


def test_the_figure_has_a_bar_per_layer_and_network() -> None:
    figure = layer_times({"a": (1.0, 0.5), "b": (4.0, None)}, ("dense", "slim"))

    (axes,) = figure.axes
    widths = [[bar.get_width() for bar in container] for container in axes.containers]
    assert widths == [[4.0, 1.0], [0.0, 0.5]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["dense: 5 ms", "slim: 0.5 ms"]
