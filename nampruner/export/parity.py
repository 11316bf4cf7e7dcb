"""How far two runtimes are apart on real inputs; what is too far is no export."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nampruner.errors import ParityError
from nampruner.export.boxes import BoxGaps, Detector, require_boxes
from nampruner.latency import Array, device_of, evaluating
from nampruner.plan import Parity
from nampruner.progress import Bar
from nampruner.twins import twin

Inputs = Tensor | tuple[Tensor, ...]
Runner = Callable[[tuple[Tensor, ...]], list[Array]]
"""A batch on the CPU → every output [n, …]."""

BATCH = 32
"""Inputs per pass of the parity check; bounds its memory."""


def as_tuple(inputs: Inputs) -> tuple[Tensor, ...]:
    """Return the arguments of one call."""
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)


def pair_of(example: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return a batch of two, on the CPU: at batch 1 a tracer takes the batch for any other 1."""
    return tuple(torch.cat([x[:1], x[:1]]).cpu() for x in example)


@contextmanager
def settled(model: nn.Module) -> Iterator[nn.Module]:
    """Lend `model` in eval mode and on the CPU, where files are proven; elsewhere it is a copy.

    A GPU's float32 may be TF32, which alone is further from the file than the tolerance.
    """
    here = model if device_of(model).type == "cpu" else twin(model, lambda _, t: t.cpu()).cpu()
    with evaluating(here):
        yield here


def tensors_of(output: Any) -> list[Tensor]:
    """Flatten what a network returns, in the order the exporter gives its outputs."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [tensor for part in output for tensor in tensors_of(part)]
    return []


def arrays_of(output: Any) -> list[Array]:
    """Flatten what a network returns into arrays; numpy has no bfloat16."""
    found = (y.detach().cpu() for y in tensors_of(output))
    return [(y.float() if y.dtype is torch.bfloat16 else y).numpy() for y in found]


def batches_of(inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Cut inputs [M, …] into batches; the first input goes alone, to prove batch 1 too."""
    count = len(inputs[0])
    edges = [0, *range(1, count, BATCH), count]
    return [tuple(x[start:stop] for x in inputs) for start, stop in pairwise(edges)]


def compare(model: nn.Module, other: Runner, inputs: tuple[Tensor, ...], bar: Bar) -> Parity:
    """Compare `model`, which is `settled`, with `other` on `inputs` [M, …], batch by batch."""
    gaps = gaps_of(model)
    for batch in batches_of(inputs):
        here = tuple(x.cpu() for x in batch)
        gaps.add(arrays_of(model(*here)), other(here))
        bar.advance()
    return gaps.parity(len(inputs[0]))


class Gaps:
    """Differences between two runtimes, gathered batch by batch; one entry per output."""

    def __init__(self) -> None:
        self._gap: dict[int, float] = {}
        self._scale: dict[int, float] = {}
        self._same = self._compared = 0

    def add(self, expected: list[Array], got: list[Array]) -> None:
        """Take in one batch: every output [n, …] from both sides.

        Raises:
            ParityError: the outputs differ in number or shape, or there are none.
        """
        shapes, others = [y.shape for y in expected], [y.shape for y in got]
        if shapes != others or not shapes:
            raise ParityError(f"PyTorch gives outputs {shapes}, the export {others}")
        for index, (want, have) in enumerate(zip(expected, got, strict=True)):
            # np.max, unlike max, hands a NaN on; the tolerance then refuses it.
            gap = np.abs(want.astype(np.float64) - have).max(initial=0)
            scale = np.abs(want).max(initial=0)
            self._gap[index] = float(np.max([gap, self._gap.get(index, 0.0)]))
            self._scale[index] = float(np.max([scale, self._scale.get(index, 0.0)]))
        if expected[0].ndim > 1:
            same = expected[0].argmax(1) == got[0].argmax(1)
            self._same += int(same.sum())
            self._compared += same.size

    def parity(self, inputs: int) -> Parity:
        """Return the worst output; agreement is that of the first output over dimension 1."""
        relative = [
            gap / self._scale[index] if self._scale[index] else (0.0 if gap == 0 else np.inf)
            for index, gap in self._gap.items()
        ]
        return Parity(
            max_abs=float(np.max(list(self._gap.values()), initial=0.0)),
            max_relative=float(np.max(relative, initial=0.0)),
            top1_agreement=self._same / self._compared if self._compared else 1.0,
            inputs=inputs,
        )


class _BoxedGaps(Gaps):
    """The same of a detector, with the boxes that its outputs come to."""

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self._model = model
        self._boxes = BoxGaps(thresholded=model.ordered)

    def add(self, expected: list[Array], got: list[Array]) -> None:
        want, have = self._model.picked(expected), self._model.picked(got)
        pairs = [self._boxes.add(mine, its) for mine, its in zip(want, have, strict=True)]
        if not self._model.ordered:  # rows that are nearly alike may have changed places
            ours, theirs = (np.concatenate(side) for side in zip(*pairs, strict=True))
            expected, got = [ours, *expected[1:]], [theirs, *got[1:]]
        super().add(expected, got)

    def parity(self, inputs: int) -> Parity:
        found = {"top1_agreement": None, "boxes": self._boxes.parity()}
        return super().parity(inputs).model_copy(update=found)


def gaps_of(model: nn.Module) -> Gaps:
    """Return what gathers the differences of a network; those of a detector see its boxes too."""
    return _BoxedGaps(model) if isinstance(model, Detector) and model.boxed else Gaps()


def require(parity: Parity, tolerance: float, what: str) -> None:
    """See that the export is near enough.

    Raises:
        ParityError: it is not; `what` names the runtime.
    """
    if not parity.max_relative <= tolerance:  # so written, a NaN is refused
        agreement = parity.top1_agreement
        said = "" if agreement is None else f" (top-1 agreement {agreement:.2%})"
        raise ParityError(
            f"{what} and PyTorch differ by {parity.max_relative:.2g} of the largest output "
            f"on {parity.inputs} inputs{said}; {tolerance:g} is allowed. Nothing was written"
        )
    if parity.boxes is not None:
        require_boxes(parity.boxes, tolerance, what)
