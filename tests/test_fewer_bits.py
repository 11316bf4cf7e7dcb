"""INT8 and half: near enough to float or no file, and what cannot be INT8 stays float."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from nampruner import attach_nam, export_fp16, export_int8
from nampruner.errors import NamPrunerError, ParityError
from nampruner.export import export_onnx, layers_of, read_metadata, run_onnx


def classifier(wide: float = 1.0) -> nn.Sequential:
    """Two convolutions and a layer of logits; one channel between the first is `wide` times large.

    The second convolution takes the factor back, so that the outputs do not depend on it.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    with torch.no_grad():
        model[0].weight[0] *= wide
        model[0].bias[0] *= wide
        model[2].weight[:, 0] /= wide
        model[8].weight *= 10
    return model.eval()


def batches(seed: int, count: int = 2, size: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, 8, 8, generator=generator) for _ in range(count)]


def dtypes(path: Path) -> set[int]:
    return {tensor.data_type for tensor in onnx.load(str(path)).graph.initializer}


def weight_of(path: Path, node: str) -> int | None:
    """Return the element type of a layer's weight, through the node that gives it its scale."""
    graph = onnx.load(str(path)).graph
    source = next(n for n in graph.node if n.name == node).input[1]
    scaled = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    return kinds[scaled.get(source, source)]


def test_int8_gives_the_answers_of_the_network_on_images_it_has_not_seen(tmp_path: Path) -> None:
    model, path = classifier(), tmp_path / "int8.onnx"
    unseen = batches(2, 1, 200)

    found = export_int8(model, path, batches(1), inputs=unseen, agreement=0.9)

    (got,) = run_onnx(path, unseen[0].numpy())
    want = model(unseen[0]).detach().numpy()
    assert found.parity.top1_agreement == np.mean(got.argmax(1) == want.argmax(1)) >= 0.9
    assert found.parity.max_abs == pytest.approx(np.abs(got - want).max(), rel=1e-3)
    assert (found.parity.inputs, found.calibration) == (200, 128)
    assert found.kept_float == ()
    assert all(weight_of(path, f"{n}/Conv") == onnx.TensorProto.INT8 for n in (0, 2, 4))


def test_weights_are_scaled_by_channel_and_keep_to_seven_bits(tmp_path: Path) -> None:
    export_int8(classifier(), tmp_path / "m.onnx", batches(1), agreement=0.5)

    tensors = {
        t.name: onnx.numpy_helper.to_array(t)
        for t in onnx.load(tmp_path / "m.onnx").graph.initializer
    }
    weights = [t for t in tensors.values() if t.dtype == np.int8 and t.ndim == 4]
    assert len(weights) == 3
    assert all(np.abs(weight.astype(int)).max() <= 64 for weight in weights)
    assert tensors["2.weight_scale"].shape == (16,)


def test_a_sensitive_layer_stays_float_and_no_other(tmp_path: Path) -> None:
    model, path = classifier(wide=3e4), tmp_path / "int8.onnx"

    found = export_int8(model, path, batches(1), inputs=batches(2), agreement=0.9)

    kept = {each.node for each in found.kept_float}
    assert {"0/Conv", "2/Conv"} <= kept <= {"0/Conv", "1/Relu", "2/Conv"}
    assert all(each.error > 0.1 for each in found.kept_float)
    assert weight_of(path, "2/Conv") == onnx.TensorProto.FLOAT
    assert weight_of(path, "4/Conv") == onnx.TensorProto.INT8
    assert found.parity.top1_agreement >= 0.9


class Residual(nn.Module):
    """relu(x + branch(x))"""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.branch(x))


def residual() -> nn.Sequential:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Residual(), *head)


class Noise(nn.Module):
    """Every layer has one channel that drowns the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Conv2d(4, 4, 1, bias=False) for _ in range(4)))
        with torch.no_grad():
            for first, second in zip(self.layers[:-1], self.layers[1:], strict=True):
                first.weight[0] *= 1e6
                second.weight[:, 0] /= 1e6

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


def test_what_int8_would_break_is_refused_and_the_older_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    path.write_bytes(b"older")
    images = [torch.randn(64, 4, 6, 6, generator=torch.Generator().manual_seed(0))]

    with pytest.raises(ParityError, match=r"even with .* nodes in float; .*more calibration"):
        export_int8(Noise().eval(), path, images)

    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_the_floor_holds_for_inputs_of_the_proof(tmp_path: Path) -> None:
    far = [1e4 * batch for batch in batches(3, 1)]  # beyond all calibrated ranges

    with pytest.raises(ParityError, match=r"agree on the top-1 answer of .* of 64 inputs; 99.00%"):
        export_int8(classifier(), tmp_path / "m.onnx", batches(1), inputs=far)

    assert not list(tmp_path.iterdir())


def test_int8_needs_inputs_and_classes(tmp_path: Path) -> None:
    with pytest.raises(NamPrunerError, match="needs calibration inputs"):
        export_int8(classifier(), tmp_path / "m.onnx", [])
    with pytest.raises(NamPrunerError, match="no classes"):
        export_int8(nn.Conv2d(3, 1, 3), tmp_path / "m.onnx", batches(1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["int8", "fp16"])
def test_nam_and_metadata_go_along_and_the_model_stays(kind: str, tmp_path: Path) -> None:
    model, (images,) = residual().train(), batches(1, 1, 16)
    sites = attach_nam(model, images, at=("1.branch.1",))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = {"nampruner": json.dumps({"γ": 1}), "task": "digits"}
    path = tmp_path / "m.onnx"

    if kind == "int8":
        export_int8(model, path, [images], agreement=0.0, metadata=said)
    else:
        export_fp16(model, path, images, metadata=said)

    assert read_metadata(path).items() >= said.items()
    assert model.training
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    ops = [node.op_type for node in onnx.load(str(path)).graph.node]
    assert ops.count("Sigmoid") == 2 * len(sites)


def test_half_is_half_inside_and_float_outside(tmp_path: Path) -> None:
    model, images, path = classifier(), batches(1, 1)[0], tmp_path / "half.onnx"

    parity = export_fp16(model, path, images[:2], inputs=images)

    assert 0 < parity.max_relative <= 1e-2
    assert parity.inputs == 64
    assert onnx.TensorProto.FLOAT not in dtypes(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert {slot.type for slot in (*session.get_inputs(), *session.get_outputs())} == {
        "tensor(float)"
    }
    with pytest.raises(ParityError, match="the half-precision file"):
        export_fp16(model, path, images[:2], inputs=images, tolerance=1e-7)


def test_what_leaves_the_range_of_half_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=r"0/Conv gives numbers up to .*65504"):
        export_fp16(classifier(wide=1e6), tmp_path / "half.onnx", batches(1)[0])

    assert not list(tmp_path.iterdir())


def test_nodes_are_named_after_their_modules(tmp_path: Path) -> None:
    model = residual()
    export_onnx(model, tmp_path / "m.onnx", batches(1)[0])

    names = [node.name for node in onnx.load(str(tmp_path / "m.onnx")).graph.node]

    assert len(set(names)) == len(names)
    assert {"0/Conv", "1.branch.0/Conv", "1/Add", "1.relu/Relu", "4/Gemm"} <= set(names)
    assert {name.rpartition("/")[0] for name in names} <= set(dict(model.named_modules()))
    graph = onnx.load(str(tmp_path / "m.onnx")).graph
    (value,) = next(node for node in graph.node if node.op_type == "Relu").output
    layers = layers_of(tmp_path / "m.onnx")
    assert layers.find("1/Add") == "1"
    assert layers.find(f"{value}_nchwc") == "1.branch.0"  # the convolution that it was fused to
    assert layers.find("ReorderOutput_token_9") is None
