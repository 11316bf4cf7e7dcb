"""Detectors in INT8: what decodes boxes stays float, and mAP50-95 says what is near enough."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from boxes import SIZE, boxes, tiny
from torch import nn

import nampruner
from nampruner import yolo
from nampruner.cli import call
from nampruner.errors import NamPrunerError, ParityError
from nampruner.yolo import precision

HEAD = "network.model.5"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return boxes(tmp_path_factory.mktemp("boxes"))


def fresh(data: Path) -> nn.Module:
    spec = f"yolo:{tiny(data.parent)}"
    torch.manual_seed(0)
    return nampruner.build(spec, num_classes=3, in_channels=3, image_size=SIZE)


@pytest.fixture(scope="module")
def trained(data: Path) -> nn.Module:
    """A detector that finds most of the boxes."""
    short: dict[str, Any] = {"imgsz": SIZE, "batch": 4, "device": "cpu", "amp": False, "nbs": 4}
    short |= {"mosaic": 0.0, "warmup_epochs": 0.0, "val": False, "epochs": 30}
    project = str(data.parent / "runs")
    return yolo.train(
        fresh(data), data, strength=0, optimizer="SGD", project=project, **short
    ).model


def metrics(model: Any, data: Path) -> float:
    found = yolo.validate(model, data, task="detect", imgsz=SIZE, batch=1, device="cpu")
    return found["metrics/mAP50-95(B)"]


def quantized(path: Path) -> set[str]:
    """Return the nodes whose weights are INT8."""
    graph = onnx.load(str(path)).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    scaled = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    found = {}
    for node in graph.node:
        if node.op_type == "Conv":
            found[node.name] = kinds.get(scaled.get(node.input[1], node.input[1]))
    return {name for name, kind in found.items() if kind == onnx.TensorProto.INT8}


def test_a_checkpoint_becomes_int8_and_keeps_its_map(
    trained: nn.Module, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best, out = yolo.save(trained, tmp_path / "best.pt"), tmp_path / "int8.onnx"
    line = ["export", str(best), "--data", str(data), "--image-size", str(SIZE), "--int8"]
    assert call([*line, "--drop", "0.05", "--out", str(out), "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)

    gain = exported["int8"]
    before, after = (gain[name]["mAP50-95"] for name in ("metrics_float", "metrics"))
    assert before > 0.1
    assert after >= before - 0.05
    assert metrics(out, data) == pytest.approx(after)
    assert before == pytest.approx(metrics(trained, data), abs=1e-3)
    assert exported["size_bytes"] == out.stat().st_size
    assert gain["calibration"] == 8
    assert "top1_agreement" not in exported["parity"]
    assert 0 < exported["parity"]["max_relative"] < 0.2

    graph = onnx.load(str(out)).graph
    rounded = {n.input[0] for n in graph.node if n.op_type == "QuantizeLinear"}
    decoding = {name for n in graph.node if n.name.startswith(f"{HEAD}/") for name in n.output}
    for node in graph.node:
        if set(node.input) & decoding:
            decoding |= set(node.output)
    assert graph.output[0].name in decoding
    assert not decoding & rounded
    assert f"{HEAD}.dfl.conv/Conv" not in quantized(out)
    assert "network.model.0.conv/Conv" in quantized(out)

    for more, message in (
        (["--agreement", "0.9"], "--agreement is for classifiers"),
        (["--parity-inputs", "3"], "--parity-inputs does not apply to --int8"),
    ):
        assert call([*line, *more, "--out", str(tmp_path / "no.onnx")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no.onnx").exists()


def test_what_int8_cannot_carry_stays_float(trained: nn.Module, data: Path, tmp_path: Path) -> None:
    import copy

    model: Any = copy.deepcopy(trained)
    with torch.no_grad():  # a channel that nobody reads and that drowns the others
        model.model[0].bn.weight[0] *= 1e4
        model.model[1].conv.weight[:, 0] = 0
    found = yolo.export_int8(
        model, tmp_path / "int8.onnx", data, drop=0.1, image_size=SIZE, count=8
    )
    kept = {each.node for each in found.kept_float}
    assert any(node.startswith(("network.model.0", "network.model.1")) for node in kept)
    assert len(kept) < found.quantized
    assert metrics(tmp_path / "int8.onnx", data) >= metrics(model, data) - 0.1


def judged(monkeypatch: pytest.MonkeyPatch, data: Path, int8: float, plain: float = 0.5) -> None:
    """Let a validation give these on other images than those of calibration."""
    seen: list[str] = []

    def validate(path: Path, where: str, **_: Any) -> Mapping[str, float]:
        assert path.suffix == ".onnx"
        if where == str(data):
            seen.append(where)
        value = int8 if len(seen) == 2 else plain
        return {"metrics/mAP50-95(B)": value, "metrics/mAP50(B)": 0.0}

    monkeypatch.setattr(precision, "validate", validate)


def test_more_than_may_be_lost_is_refused_and_the_older_file_stays(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "int8.onnx"
    path.write_bytes(b"older")
    judged(monkeypatch, data, 0.47)
    given: Any = {"image_size": SIZE, "count": 4}
    with pytest.raises(ParityError, match=r"costs 0\.030 of mAP50-95 .* 0\.020 is allowed"):
        yolo.export_int8(fresh(data), path, data, drop=0.02, **given)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]
    judged(monkeypatch, data, 0.47)
    assert yolo.export_int8(fresh(data), path, data, drop=0.04, **given).calibration == 4


def test_what_finds_nothing_or_classifies_is_not_judged(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(monkeypatch, data, 0.0, plain=0.0)
    with pytest.raises(NamPrunerError, match="finds nothing in 4 training images"):
        yolo.export_int8(fresh(data), tmp_path / "m.onnx", data, image_size=SIZE, count=4)
    model = nampruner.build("yolo:yolov8n-cls.yaml", num_classes=3, in_channels=3, image_size=SIZE)
    with pytest.raises(NamPrunerError, match=r"use nampruner\.export_int8"):
        yolo.export_int8(model, tmp_path / "m.onnx", data)
    assert not list(tmp_path.iterdir())
