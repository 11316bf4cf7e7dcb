"""The convolutions of a network as values, and the same ones narrower."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nampruner.graph import call_model
from nampruner.latency import evaluating
from nampruner.plan import Record

Kind = Literal["dense", "pointwise", "depthwise", "grouped"]
"""k×k, 1×1, one channel per group, and what lies between."""


class Geometry(Record):
    """All that the time of a convolution depends on, at batch 1."""

    inputs: int
    outputs: int
    groups: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    size: tuple[int, int]
    """Height and width of its input."""

    @property
    def kind(self) -> Kind:
        if self.groups == 1:
            return "pointwise" if self.kernel == (1, 1) else "dense"
        return "depthwise" if self.groups == self.inputs == self.outputs else "grouped"

    @property
    def macs(self) -> float:
        """Multiply–accumulates, borders aside."""
        places = self.size[0] * self.size[1] / (self.stride[0] * self.stride[1])
        kernel = self.kernel[0] * self.kernel[1]
        return places * kernel * self.outputs * self.inputs / self.groups

    def resized(self, inputs: int, outputs: int) -> "Geometry":
        """Return the same convolution of other widths; a depthwise one keeps one per group."""
        widths = {"inputs": inputs, "outputs": outputs}
        if self.kind == "depthwise":
            widths = dict.fromkeys(("inputs", "outputs", "groups"), outputs)
        return self.model_copy(update=widths)


def layers_of(
    model: nn.Module,
    example_inputs: Any,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, Geometry]:
    """Run `model` once in eval mode; return its 2d convolutions, by module, in their order.

    One that runs several times counts as it runs first, one that does not run is left out.
    `forward(model, example_inputs)` replaces the plain call, and may run a copy: what watches the
    layers goes along with it.
    """
    found: dict[str, Geometry] = {}

    def see(name: str, layer: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        if inputs and inputs[0].dim() == 4:
            found.setdefault(name, _geometry(layer, inputs[0]))

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    handles = [layer.register_forward_pre_hook(partial(see, name)) for name, layer in layers]
    try:
        with evaluating(model), torch.no_grad():
            (forward or call_model)(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _geometry(layer: nn.Conv2d, x: Tensor) -> Geometry:
    def pair(values: tuple[int, ...]) -> tuple[int, int]:
        return values[0], values[1]

    return Geometry(
        inputs=layer.in_channels,
        outputs=layer.out_channels,
        groups=layer.groups,
        kernel=pair(layer.kernel_size),
        stride=pair(layer.stride),
        dilation=pair(layer.dilation),
        size=(x.shape[-2], x.shape[-1]),
    )
