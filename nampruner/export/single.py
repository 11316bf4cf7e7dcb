"""One convolution as an ONNX file, to be timed; no torch and no tracing, so it takes a moment."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_OPSET, _IR = 17, 8
_STEP = 1 / 64
"""Between two numbers of INT8; any would take the same time."""


def write_convolution(
    path: Path,
    weight: tuple[int, int, int, int],
    size: tuple[int, int],
    *,
    strides: tuple[int, int],
    dilations: tuple[int, int],
    groups: int,
    int8: bool = False,
) -> None:
    """Write a network [1, 1, H, W] → [1, O, 1, 1] whose work is one convolution with a ReLU.

    A 1x1 convolution makes its inputs and a global pool takes its outputs: so it starts and ends
    in the runtime's own memory layout, as inside of a network.

    Args:
        weight: shape of the weight: outputs, inputs per group, kernel height and width.
        size: H and W of its input.
        int8: as `nampruner.export_int8` writes it: uint8 between its layers, int8 weights per
            output channel in 7 bits.
    """
    outputs, per_group, *kernel = weight
    pads = [d * (k - 1) // 2 for d, k in zip(dilations, kernel, strict=True)]
    how: dict[str, Any] = {
        "strides": strides,
        "dilations": dilations,
        "group": groups,
        "pads": [*pads, *pads],
    }
    net = _Net(int8)
    x = net.conv(net.between("input"), "first", (per_group * groups, 1, 1, 1))
    y = net.conv(net.between(x), "weight", weight, bias=True, **how)
    z = net.between(net.node("Relu", y))
    net.between(net.node("GlobalAveragePool", z, output="" if int8 else "output"), output="output")
    ends = [_value("input", [1, 1, *size]), _value("output", [1, outputs, 1, 1])]
    graph = helper.make_graph(net.nodes, "convolution", ends[:1], ends[1:], net.weights)
    opset = [helper.make_opsetid("", _OPSET)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=_IR), str(path))


class _Net:
    """Nodes in a row, each in float or between numbers of 8 bits."""

    def __init__(self, int8: bool) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._int8 = int8

    def node(self, op: str, *inputs: str, output: str = "", **how: Any) -> str:
        """Add a node; return the name of its output."""
        name = output or f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **how))
        return name

    def conv(
        self, x: str, name: str, shape: tuple[int, ...], *, bias: bool = False, **how: Any
    ) -> str:
        """Add a convolution with weights of its own."""
        own = [self._weight(name, _noise(shape))]
        if bias:
            own.append(self._weight("bias", _noise(shape[:1])))
        return self.node("Conv", x, *own, **how)

    def between(self, x: str, output: str = "") -> str:
        """Round what one layer hands to the next."""
        if not self._int8:
            return x
        scale = [
            self._constant(f"{x}_scale", np.float32(_STEP)),
            self._constant(f"{x}_zero", np.uint8(0)),
        ]
        inner = self.node("QuantizeLinear", x, *scale)
        return self.node("DequantizeLinear", inner, *scale, output=output)

    def _weight(self, name: str, values: np.ndarray[Any, np.dtype[np.float32]]) -> str:
        if not self._int8:
            return self._constant(name, values)
        # a bias is added to 32 bits, in the steps of a product; weights take 7 of 8 bits
        kind, step, most = (np.int32, _STEP**2, 2**20) if values.ndim == 1 else (np.int8, _STEP, 63)
        steps = np.full(len(values), step, np.float32)
        inner = (values / np.abs(values).max() * most).round().astype(kind)
        own = [
            self._constant(name, inner),
            self._constant(f"{name}_scale", steps),
            self._constant(f"{name}_zero", np.zeros(len(values), kind)),
        ]
        return self.node("DequantizeLinear", *own, axis=0)

    def _constant(self, name: str, values: Any) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name


def _value(name: str, shape: list[int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _noise(shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return values near 1: zeros and tiny ones have times of their own."""
    values = np.random.default_rng(0).uniform(0.5, 1.5, shape) / np.prod(shape[1:])
    return values.astype(np.float32)
