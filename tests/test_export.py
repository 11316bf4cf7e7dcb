"""ONNX export: the file computes what the model computes, or there is no file."""

import json
import logging
import math
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxslim
import pytest
import timm
import torch
import torchvision
from onnx import TensorProto, helper
from torch import Tensor, nn

from nampruner.errors import NamPrunerError, ParityError
from nampruner.export import export_onnx, read_metadata, run_onnx
from nampruner.export.parity import Gaps


def lively(model: nn.Module) -> nn.Module:
    """Give BN statistics and factors that a wrong export would show."""
    generator = torch.Generator().manual_seed(0)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor, low, high in (
                (part.weight, 0.5, 1.5),
                (part.bias, -0.4, 0.4),
                (part.running_mean, -0.4, 0.4),
                (part.running_var, 0.5, 1.5),
            ):
                tensor.data = low + (high - low) * torch.rand(len(tensor), generator=generator)
    return model


def small() -> nn.Module:
    torch.manual_seed(0)
    return lively(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )
    )


def hooked() -> nn.Module:
    """A network whose BN output is changed by a forward hook, as an attached attention does."""
    model = small()
    gate = nn.BatchNorm2d(8)
    model[1].add_module("gate", lively(gate))
    model[1].register_forward_hook(lambda module, _, output: output * module.gate(output).sigmoid())
    return model


FAMILIES = {
    "resnet18": lambda: timm.create_model("resnet18", num_classes=10),
    "mobilenetv3_small_050": lambda: timm.create_model("mobilenetv3_small_050", num_classes=10),
    "shufflenet_v2_x0_5": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_export_with_parity_at_any_batch_size(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, images = lively(FAMILIES[name]()), torch.randn(5, 3, 64, 64)
    path = tmp_path / "model.onnx"

    parity = export_onnx(model, path, images[:4], inputs=images)

    assert parity.inputs == 5
    assert parity.top1_agreement == 1.0
    assert parity.max_relative <= 1e-4
    expected = model.eval()(images).detach().numpy()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 3, 5):
        (got,) = session.run(None, {"input": images[:batch].numpy()})
        assert np.abs(got - expected[:batch]).max() <= 1e-4 * np.abs(expected).max()


def test_a_forward_hook_is_part_of_the_file(tmp_path: Path) -> None:
    model, images = hooked(), torch.randn(40, 3, 8, 8)

    export_onnx(model, tmp_path / "m.onnx", images[:1], inputs=images)

    (got,) = run_onnx(tmp_path / "m.onnx", images.numpy())
    bare = small().eval()(images).detach().numpy()
    assert np.allclose(got, model.eval()(images).detach().numpy(), atol=1e-5)
    assert np.abs(got - bare).max() > 0.02


def test_parity_numbers_are_those_of_an_independent_comparison(tmp_path: Path) -> None:
    model, images = small(), torch.randn(70, 3, 8, 8)

    parity = export_onnx(model, tmp_path / "m.onnx", images[:2], inputs=images)

    want = model.eval()(images).detach().numpy().astype(np.float64)
    got = onnxruntime.InferenceSession(
        str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"]
    ).run(None, {"input": images.numpy()})[0]
    # Batch sizes differ, and with them the last bit of a sum.
    assert parity.max_abs == pytest.approx(np.abs(want - got).max(), abs=3e-7)
    assert parity.max_relative == pytest.approx(parity.max_abs / np.abs(want).max(), rel=1e-3)
    assert parity.inputs == 70


def test_gaps_are_gathered_over_batches_and_outputs() -> None:
    gaps = Gaps()
    gaps.add(
        [np.array([[1.0, 4.0]]), np.array([10.0])],
        [np.array([[1.5, 4.0]]), np.array([10.0])],
    )
    gaps.add(
        [np.array([[8.0, 2.0]]), np.array([20.0])],
        [np.array([[8.0, 9.0]]), np.array([24.0])],
    )

    parity = gaps.parity(2)

    assert parity.max_abs == 7.0
    assert parity.max_relative == 7.0 / 8.0
    assert parity.top1_agreement == 0.5


def test_outputs_of_zero_and_of_nan_are_not_called_equal() -> None:
    silent, broken = Gaps(), Gaps()
    silent.add([np.zeros((1, 2))], [np.full((1, 2), 1e-9)])
    broken.add([np.array([[np.nan, 1.0]])], [np.array([[np.nan, 1.0]])])
    broken.add([np.array([[1.0, 1.0]])], [np.array([[1.0, 1.0]])])

    assert silent.parity(1).max_relative == math.inf
    assert math.isnan(broken.parity(2).max_relative)


def test_outputs_of_another_shape_are_a_parity_error() -> None:
    with pytest.raises(ParityError, match=r"\(1, 2\).*\(1, 3\)"):
        Gaps().add([np.zeros((1, 2))], [np.zeros((1, 3))])


def test_the_model_and_the_process_are_left_as_they_were(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = hooked().train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    modes = {name: part.training for name, part in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    filters, tf32 = list(warnings.filters), torch.backends.cudnn.allow_tf32

    export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 3, 8, 8))

    assert {name: part.training for name, part in model.named_modules()} == modes
    assert all(torch.equal(weights[name], now) for name, now in model.state_dict().items())
    assert not model[0].weight.requires_grad
    assert model[5].weight.requires_grad
    assert len(model[1]._forward_hooks) == 1
    assert warnings.filters == filters
    assert torch.backends.cudnn.allow_tf32 == tf32
    assert torch.is_grad_enabled()
    assert logging.root.manager.disable == logging.NOTSET
    assert capfd.readouterr().out == ""


def test_metadata_travels_and_no_path_of_the_machine_does(tmp_path: Path) -> None:
    said = {"nampruner.json": json.dumps({"γ": [1, 2]}, ensure_ascii=False), "task": "digits"}

    export_onnx(small(), tmp_path / "m.onnx", torch.randn(1, 3, 8, 8), metadata=said)

    assert read_metadata(tmp_path / "m.onnx") == said
    data = (tmp_path / "m.onnx").read_bytes()
    assert b"site-packages" not in data
    assert str(Path(__file__).parent).encode() not in data
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]


def test_a_wrong_file_is_refused_and_the_older_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(proto: onnx.ModelProto) -> onnx.ModelProto:
        weight = next(w for w in proto.graph.initializer if len(w.dims) == 4)
        array = onnx.numpy_helper.to_array(weight).copy()
        array[0] *= 1.01
        weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
        return proto

    monkeypatch.setattr(onnxslim, "slim", spoil)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"older")

    with pytest.raises(ParityError, match=r"differ by .* 0.0001 is allowed"):
        export_onnx(small(), path, torch.randn(2, 3, 8, 8))

    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_network_that_gives_nan_is_refused(tmp_path: Path) -> None:
    model = small()
    model[5].bias.data[0] = math.nan

    with pytest.raises(ParityError, match="nan"):
        export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 3, 8, 8))

    assert not list(tmp_path.iterdir())


class DependsOnValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_cannot_be_exported_is_one_clear_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NamPrunerError, match="DependsOnValues cannot be exported"):
        export_onnx(DependsOnValues(), tmp_path / "m.onnx", torch.randn(2, 3))

    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


class TwoInTwoOut(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"sum": x + y.mean(1, keepdim=True), "product": x * 2}


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    x, y = torch.randn(3, 4), torch.randn(3, 5)

    parity = export_onnx(TwoInTwoOut(), tmp_path / "m.onnx", (x, y))

    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    total, product = session.run(None, {"input_0": x.numpy(), "input_1": y.numpy()})
    assert parity.inputs == 3
    assert np.allclose(total, (x + y.mean(1, keepdim=True)).numpy())
    assert np.allclose(product, 2 * x.numpy())


def relu_file(path: Path, batch: int | str) -> Path:
    """Write y = relu(x) on [batch, 2] without this package."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [batch, 2]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", [x], [y])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), str(path))
    return path


@pytest.mark.parametrize("batch", [2, "n"])
def test_run_onnx_works_in_batches_of_the_file(batch: int | str, tmp_path: Path) -> None:
    inputs = np.arange(-6, 6, dtype=np.float32).reshape(6, 2)

    (got,) = run_onnx(relu_file(tmp_path / "r.onnx", batch), inputs, batch_size=4)

    assert np.array_equal(got, np.maximum(inputs, 0))


@pytest.mark.parametrize(
    "inputs",
    [np.zeros((4, 3), np.float32), np.zeros((4, 2), np.float64), np.zeros((4, 2, 1), np.float32)],
)
def test_inputs_that_do_not_fit_are_named(inputs: np.ndarray, tmp_path: Path) -> None:
    path = relu_file(tmp_path / "r.onnx", "n")
    with pytest.raises(NamPrunerError, match=r"'x' is float32 \['n', 2\] in the ONNX file"):
        run_onnx(path, inputs)


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"\xff" * 100)
    with pytest.raises(NamPrunerError, match="no such file"):
        read_metadata(tmp_path / "missing.onnx")
    with pytest.raises(NamPrunerError, match=r"damaged\.onnx: ONNX Runtime cannot open it"):
        read_metadata(damaged)


def test_a_folder_is_no_file_name(tmp_path: Path) -> None:
    with pytest.raises(NamPrunerError, match="is a folder"):
        export_onnx(small(), tmp_path, torch.randn(2, 3, 8, 8))
