"""Build one network for `reach.py`, with an input, and say what it is; shared by both sides."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from reach_networks import Network
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import nampruner

CLASSES = 100
BATCH = 2
SIZES = (64, 96, 128, 224)
"""Input sizes to try, in pixels, before the one the network was made for."""
PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum"}
ATTENTION = {"scaled_dot_product_attention", "multi_head_attention_forward"}
T = TypeVar("T")


class Log:
    """What is known so far: facts, seconds and errors by step."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.facts: dict[str, Any] = {"seconds": {}, "errors": {}, "running": None}

    def note(self, **facts: Any) -> None:
        self.facts |= facts
        draft = self.file.with_suffix(".draft")
        draft.write_text(json.dumps(self.facts))
        draft.replace(self.file)

    def attempt(self, step: str, act: Callable[[], T]) -> T | None:
        """Do one step; None, and the error on record, where it fails."""
        self.note(running=step)
        start = time.perf_counter()
        try:
            return act()
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            self.facts["errors"][step] = f"{type(error).__name__}: {lines[0][:400]}"
            return None
        finally:
            self.facts["seconds"][step] = round(time.perf_counter() - start, 4)
            self.note(running=f"after {step}")


def tensors(outputs: Any) -> list[Tensor]:
    return [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]


def difference(wanted: list[Tensor], got: list[Tensor]) -> float:
    """Largest |a - b| over the largest |a|, worst output; NaN and other shapes are infinite."""
    if [t.shape for t in wanted] != [t.shape for t in got]:
        return float("inf")
    worst = 0.0
    for a, b in zip(wanted, got, strict=True):
        gap = float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
        worst = max(worst, gap if gap == gap else float("inf"))
    return worst


def build(network: Network) -> tuple[nn.Module, Tensor]:
    """The network with random BN statistics, in eval mode, and the smallest input that it takes.

    Raises:
        Exception: what the network says about the size that it was made for.
    """
    sizes = list(SIZES)
    while True:
        torch.manual_seed(0)
        size = sizes.pop(0)
        try:
            model = nampruner.build(
                network.source, num_classes=CLASSES, in_channels=3, image_size=size
            ).eval()
            if not sizes and size == SIZES[-1]:
                sizes += _made_for(model, size)
            images = torch.randn(BATCH, 3, size, size)
            with torch.no_grad():
                model(images)
        except Exception:
            if not sizes:
                raise
        else:
            randomise(model)
            return model, images


def _made_for(model: nn.Module, tried: int) -> list[int]:
    settings = getattr(model, "default_cfg", None) or {}
    size = settings.get("input_size", (3, tried, tried))[-1]
    return [size] if size > tried else []


def randomise(model: nn.Module) -> None:
    """BN statistics as after a training: fresh ones hide a wrong cut."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, _BatchNorm)):
            for tensor, shift, spread in (
                (norm.weight, 0.5, None),
                (norm.bias, 0.0, 0.3),
                (norm.running_mean, 0.0, 0.3),
                (norm.running_var, 0.5, None),
            ):
                if tensor is not None and spread is None:
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + shift)
                elif tensor is not None:
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)


def kind_of(model: nn.Module, images: Tensor) -> str:
    """`hybrid` where there is a LayerNorm or attention, else `CNN`.

    Attention is a class that is called so, or a product of two activations: with an input that
    requires a gradient and parameters that do not, a tensor that requires one is an activation.
    """
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) or "Attention" in type(module).__name__:
            return "hybrid"
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        with _Products() as seen:
            model(images.clone().requires_grad_() * 1)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return "hybrid" if seen.attends else "CNN"


class _Products(TorchFunctionMode):
    attends = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in ATTENTION or (name in PRODUCTS and _activations(args, kwargs) > 1):
            self.attends = True
        return func(*args, **(kwargs or {}))


def _activations(*values: Any) -> int:
    return sum(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(values))


def output_layers(model: nn.Module, images: Tensor) -> set[str]:
    """Layers whose outputs reach the network's output with no other layer between.

    Their widths are the network's interface. Walks the autograd graph back from the outputs, up to
    the first convolution or product with a weight on each way.
    """
    names = {id(p): name.rpartition(".")[0] for name, p in model.named_parameters()}
    with torch.enable_grad():
        todo = [t.grad_fn for t in tree_leaves(model(images)) if isinstance(t, Tensor)]
    found: set[str] = set()
    visited: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        parents = [parent for parent, _ in node.next_functions]
        if re.match(r"Convolution|Addmm|Mm|Bmm|Linear", node.name()):
            weights = [v for p in parents for v in _leaf(p)]
            found |= {names[id(v)] for v in weights if id(v) in names}
            if weights:
                continue
        todo += parents
    return found


def _leaf(node: Any) -> list[Tensor]:
    """The parameter behind a node, at most a transposition away."""
    if node is not None and node.name().startswith("TBackward"):
        node = node.next_functions[0][0]
    variable = getattr(node, "variable", None)
    return [] if variable is None else [variable]
