"""Which module a node of an ONNX graph comes from: weights carry its path, and so do our nodes."""

import re
from ast import literal_eval
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

_SCOPES = "pkg.torch.onnx.name_scopes"
"""Where the exporter notes the modules that a node lies in, from the outermost one."""

_ENDING = re.compile(r"_(nchwc|nhwc|quant|token_\d+|\d+)$")
"""What ONNX Runtime puts behind the name of a node that it changed."""


def name_nodes(graph: onnx.GraphProto) -> None:
    """Name every node `module/Op`, in place: of its weight, else as the exporter noted."""
    weights = {tensor.name for tensor in graph.initializer}
    used: Counter[str] = Counter()
    for node in graph.node:
        noted = {entry.key: entry.value for entry in node.metadata_props}.get(_SCOPES, "[]")
        module = _of_weights(node, weights) or ["", *literal_eval(noted)[:-1]][-1]
        name = f"{module}/{node.op_type}"
        used[name] += 1
        node.name = name if used[name] == 1 else f"{name}_{used[name]}"


@dataclass(frozen=True)
class Layers:
    """Where the nodes of one graph come from."""

    by_node: Mapping[str, str]
    """Node → module."""
    by_value: Mapping[str, str]
    """Value → module of the layer with weights that it comes from, through what is fused to it."""

    def find(self, name: str) -> str | None:
        """Return the module of a node as ONNX Runtime names it; None for one that it put in.

        A node that was fused is named after its last value; both get endings.
        """
        while name:
            found = self.by_node.get(name) or self.by_value.get(name)
            shorter = _ENDING.sub("", name)
            if found or shorter == name:
                return found
            name = shorter
        return None


def layers_of(path: Path) -> Layers:
    """Read which module each node of an ONNX file comes from."""
    return _layers(onnx.load(str(path), load_external_data=False).graph)


def _layers(graph: onnx.GraphProto) -> Layers:
    weights = {tensor.name for tensor in graph.initializer}
    by_node = {node.name: module_of(node, weights) for node in graph.node}
    origins: dict[str, tuple[int, str]] = {}
    for number, node in enumerate(graph.node):
        # what has no weight is fused, if at all, to the layer that computed the last of its inputs
        own = (number, by_node[node.name])
        before = [origins[value] for value in node.input if value in origins]
        origin = own if _of_weights(node, weights) or not before else max(before)
        origins.update(dict.fromkeys(node.output, origin))
    return Layers(by_node, {value: module for value, (_, module) in origins.items()})


def module_of(node: onnx.NodeProto, weights: Container[str]) -> str:
    """Return the module of a node: of its first weight, else the one that it is named after."""
    named = node.name.rpartition("/")[0]
    return _of_weights(node, weights) or named or node.name or node.op_type


def _of_weights(node: onnx.NodeProto, weights: Container[str]) -> str:
    paths = (name.rpartition(".")[0] for name in node.input if name in weights)
    return next(filter(None, paths), "")
