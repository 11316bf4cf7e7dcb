"""One convolution as an ONNX file, to be timed; no torch and no tracing, so it takes a moment."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_OPSET, _IR = 17, 8


def write_convolution(
    path: Path,
    weight: tuple[int, int, int, int],
    size: tuple[int, int],
    *,
    strides: tuple[int, int],
    dilations: tuple[int, int],
    groups: int,
) -> None:
    """Write a network [1, 1, H, W] → [1, O, 1, 1] whose work is one convolution with a ReLU.

    A 1x1 convolution makes its inputs and a global pool takes its outputs: so it starts and ends
    in the runtime's own memory layout, as inside of a network.

    Args:
        weight: shape of the weight: outputs, inputs per group, kernel height and width.
        size: H and W of its input.
    """
    outputs, per_group, *kernel = weight
    pads = [d * (k - 1) // 2 for d, k in zip(dilations, kernel, strict=True)]
    how: dict[str, Any] = {
        "strides": strides,
        "dilations": dilations,
        "group": groups,
        "pads": [*pads, *pads],
    }
    nodes = [
        helper.make_node("Conv", ["input", "first"], ["x"]),
        helper.make_node("Conv", ["x", "weight", "bias"], ["y"], **how),
        helper.make_node("Relu", ["y"], ["z"]),
        helper.make_node("GlobalAveragePool", ["z"], ["output"]),
    ]
    weights = [
        _noise("first", (per_group * groups, 1, 1, 1)),
        _noise("weight", weight),
        _noise("bias", (outputs,)),
    ]
    ends = [_value("input", [1, 1, *size]), _value("output", [1, outputs, 1, 1])]
    graph = helper.make_graph(nodes, "convolution", ends[:1], ends[1:], weights)
    opset = [helper.make_opsetid("", _OPSET)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=_IR), str(path))


def _value(name: str, shape: list[int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _noise(name: str, shape: tuple[int, ...]) -> onnx.TensorProto:
    """Return values near 1: zeros and tiny ones have times of their own."""
    values = np.random.default_rng(0).uniform(0.5, 1.5, shape) / np.prod(shape[1:])
    return numpy_helper.from_array(values.astype(np.float32), name)
