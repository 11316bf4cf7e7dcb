"""What is peculiar to a YOLO network: its heads, and what a cut of it must not meet."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nampruner.errors import NamPrunerError
from nampruner.export.boxes import Detector
from nampruner.latency import Array
from nampruner.yolo.expectation import Expectation
from nampruner.yolo.library import DFL, is_qat
from nampruner.yolo.picks import boxes_of, picks

TASKS = ("detect", "segment", "pose", "obb", "classify")
_FIRST = "scores"


def forward(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """Run `model` in eval mode and return what its heads put out, not decoded; scores first.

    What `trace`, `plan_pruning` and `prune` take as `forward`. Boxes are not decoded, none is
    picked, and the feature maps that the head passes on do not count as outputs.

    Raises:
        NamPrunerError: the network is fused or quantized, or no YOLO.
    """
    check_whole(model)
    with _raw_outputs(head_of(model)):
        out = model(images)
    found = dict(_raw(out[1] if isinstance(out, tuple) else out, ""))
    first = [name for name in found if name.endswith(_FIRST)]
    return tuple(found[name] for name in (*first, *(n for n in found if n not in first)))


@contextmanager
def _raw_outputs(head: Any) -> Iterator[None]:
    """Let a head give what it computes, and pick nothing."""
    # where it is a property, both heads run either way
    switched = isinstance(getattr(type(head), "end2end", None), property)
    before, picks = head.export, switched and head.end2end
    head.export = False
    if picks:
        head.end2end = False
    try:
        yield
    finally:
        head.export = before
        if picks:
            head.end2end = True


def _raw(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key != "feats":
                yield from _raw(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _raw(inner, f"{name}.{number}")


class Exportable(Detector):
    """A copy of a network, for `nampruner.export_onnx`: images [N, C, H, W] in, tensors out.

    Boxes as Ultralytics' own export has them (for end-to-end heads [N, picks, 6 or more], else
    [N, 4 + classes, anchors]), or with `decoded` off the heads as `forward` gives them. Batch size
    is free; H and W are those of the example. Of two heads only the one in use is there.
    """

    def __init__(self, model: nn.Module, *, decoded: bool = True) -> None:
        super().__init__()
        self.network = copy.deepcopy(model).eval()
        self.decoded = decoded
        self.boxed = decoded and model.task != "classify"
        self.ordered = not (decoded and picks(model))
        head = head_of(self.network)
        head.export = decoded
        if decoded and hasattr(head, "fuse"):
            head.fuse()  # drops what only training needs
        # anchors kept from an earlier call would fix the batch size
        head.dynamic = True
        if isinstance(getattr(head, "dfl", None), DFL):
            head.dfl = Expectation(head.reg_max).to(head.dfl.conv.weight)

    def forward(self, images: Tensor) -> Any:
        return self.network(images) if self.decoded else forward(self.network, images)

    def picked(self, outputs: list[Array]) -> list[Array]:
        return boxes_of(self.network, outputs)


def head_of(model: nn.Module) -> Any:
    """Return the last layer.

    Raises:
        NamPrunerError: `model` is no network of Ultralytics.
    """
    layers = getattr(model, "model", None)
    if not isinstance(layers, nn.Sequential) or not hasattr(layers[-1], "export"):
        raise NamPrunerError(
            f"{type(model).__name__} is no YOLO network; give the torch module: of a YOLO object "
            "that is its .model"
        )
    return layers[-1]


def check_whole(model: nn.Module) -> None:
    """See that BN layers and plain weights are there.

    Raises:
        NamPrunerError: they were fused or quantized.
    """
    if is_qat(model):
        raise NamPrunerError(
            "the YOLO network is quantized (int8, QAT); give the one from before, and quantize the "
            "slim one at export"
        )
    head_of(model)
    network: Any = model
    if network.is_fused():
        raise NamPrunerError(
            "the YOLO network is fused: its BN layers are gone into the convolutions; give the "
            "checkpoint from before fuse() (predict, val and export fuse a copy in memory)"
        )


def classes_of(model: nn.Module) -> int:
    """Return the number of classes that the head tells apart."""
    head = head_of(model)
    return int(head.linear.out_features if hasattr(head, "linear") else head.nc)


def channels_of(model: nn.Module) -> int:
    """Return the number of channels of an image."""
    network: Any = model
    return int(network.yaml.get("channels", 3))
