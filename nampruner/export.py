"""ONNX: write, simplify, check, and prove on real inputs; the only place that knows onnx.

A file appears under its final name only after ONNX Runtime has computed what PyTorch computes, so
`model.onnx` on disk is always a file that was right. INT8 belongs between `_simplified` and
`_published`: another proto, the same proof.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxslim
import torch
from torch import Tensor, nn

from nampruner.errors import NamPrunerError, ParityError
from nampruner.latency import Array, device_of, evaluating, feeds, open_session
from nampruner.plan import Parity
from nampruner.progress import Bar, Progress, Silent

Inputs = Tensor | tuple[Tensor, ...]

_BATCH = 32
"""Inputs per pass of the parity check; bounds its memory."""
_LARGEST_BYTES = 2**31 - 1
"""protobuf holds no more in one file."""


def export_onnx(
    model: nn.Module,
    path: Path | str,
    example_inputs: Inputs,
    *,
    inputs: Inputs | None = None,
    tolerance: float = 1e-4,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Parity:
    """Write `model` as one ONNX file with a free batch size, and prove it on `inputs`.

    The model is exported in eval mode and left as it was: modes, device, gradients, hooks.

    Args:
        example_inputs: a batch [N, …], or a tuple of them; only its shape and type matter.
        inputs: real inputs [M, …] for the proof; the example inputs where there are none.
        tolerance: largest difference allowed, relative to the largest output.
        metadata: what the file shall say of itself, for `read_metadata`.

    Returns:
        How close ONNX Runtime (CPU) comes to PyTorch on `inputs`.

    Raises:
        ParityError: further apart than `tolerance`; a file that was there before stays.
        NamPrunerError: the network cannot be exported, or is larger than one file holds.
    """
    example = _as_tuple(example_inputs)
    real = example if inputs is None else _as_tuple(inputs)
    steps = 3 + -(-(len(real[0]) - 1) // _BATCH)
    with (progress or Silent()).bar("export", steps) as bar, _settled(model):
        proto = _traced(model, example)
        bar.advance()
        proto = _simplified(proto)
        _describe(proto, metadata or {})
        bar.advance()
        with _published(proto, Path(path)) as draft:
            parity = _parity(draft, model, real, bar)
            _require(parity, tolerance)
    return parity


def read_metadata(path: Path | str) -> dict[str, str]:
    """Return what an ONNX file says of itself: key → text.

    Raises:
        NamPrunerError: there is no such file, or ONNX Runtime cannot open it.
    """
    return dict(open_session(path).get_modelmeta().custom_metadata_map)


def run_onnx(
    path: Path | str, inputs: Array, *, batch_size: int = _BATCH, threads: int = 0
) -> list[Array]:
    """Run an ONNX file (CPU) on `inputs` [N, …] in batches.

    Args:
        batch_size: inputs per pass; a file made for a fixed batch size is run at that one.

    Returns:
        Every output of the network [N, …].

    Raises:
        NamPrunerError: the file cannot be run, or does not take such inputs.
    """
    session = open_session(path, threads)
    fixed = session.get_inputs()[0].shape[0]
    size = fixed if isinstance(fixed, int) else batch_size
    batches = [inputs[start : start + size] for start in range(0, len(inputs), size)]
    outputs = [session.run(None, feeds(session, batch)) for batch in batches]
    return [np.concatenate(parts) for parts in zip(*outputs, strict=True)]


def _as_tuple(inputs: Inputs) -> tuple[Tensor, ...]:
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)


@contextmanager
def _settled(model: nn.Module) -> Iterator[None]:
    """Eval mode and full float32 precision; both put back afterwards."""
    # TF32 alone would put PyTorch further from the file than the tolerance.
    precise = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with evaluating(model), precise:
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' deprecations and dumps to themselves: the user hears it from us."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


def _traced(model: nn.Module, example: tuple[Tensor, ...]) -> onnx.ModelProto:
    """Export at batch 2: at batch 1 a tracer cannot tell the batch from any other 1."""
    device = device_of(model)
    pair = tuple(torch.cat([x[:1], x[:1]]).to(device) for x in example)
    batch = torch.export.Dim("batch")
    outputs = len(_tensors(model(*pair)))
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                pair,
                dynamo=True,
                verbose=False,
                input_names=_names("input", len(pair)),
                output_names=_names("output", outputs),
                dynamic_shapes=tuple({0: batch} for _ in pair),
            )
    except torch.onnx.OnnxExporterError as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise NamPrunerError(
            f"{type(model).__name__} cannot be exported with a free batch size: {cause}; "
            "its forward must not depend on values or on the number of inputs"
        ) from error
    return cast(torch.onnx.ONNXProgram, program).model_proto


def _names(word: str, number: int) -> list[str]:
    return [word] if number == 1 else [f"{word}_{index}" for index in range(number)]


def _simplified(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Fold and fuse what needs no input, and check the result.

    Raises:
        NamPrunerError: the weights do not fit into one file.
    """
    if proto.ByteSize() > _LARGEST_BYTES:
        raise NamPrunerError(
            f"the network takes {proto.ByteSize() / 1e9:.1f} GB; one ONNX file holds 2 GB"
        )
    with _quiet():
        slim: onnx.ModelProto = onnxslim.slim(proto)
    onnx.checker.check_model(slim, full_check=True)
    return slim


def _describe(proto: onnx.ModelProto, metadata: Mapping[str, str]) -> None:
    onnx.helper.set_model_props(proto, dict(metadata))


@contextmanager
def _published(proto: onnx.ModelProto, path: Path) -> Iterator[Path]:
    """Give the file under a draft name; it gets its own name when the block ends well."""
    if path.is_dir():
        raise NamPrunerError(f"{path} is a folder; give the name of a file, such as model.onnx")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        onnx.save(proto, str(draft))
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _tensors(output: Any) -> list[Tensor]:
    """Flatten what a network returns, in the order the exporter gives its outputs."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [tensor for part in output for tensor in _tensors(part)]
    return []


def _parity(path: Path, model: nn.Module, inputs: tuple[Tensor, ...], bar: Bar) -> Parity:
    """Compare ONNX Runtime with PyTorch; the first input goes alone, to prove batch 1 too."""
    session, device = open_session(path, torch.get_num_threads()), device_of(model)
    gaps = _Gaps()
    for start, stop in _batches(len(inputs[0])):
        batch = tuple(x[start:stop] for x in inputs)
        expected = [y.cpu().numpy() for y in _tensors(model(*(x.to(device) for x in batch)))]
        got = session.run(None, feeds(session, *(x.cpu().numpy() for x in batch)))
        gaps.add(expected, got)
        bar.advance()
    return gaps.parity(len(inputs[0]))


def _batches(count: int) -> list[tuple[int, int]]:
    edges = [0, *range(1, count, _BATCH), count]
    return list(pairwise(edges))


class _Gaps:
    """Differences between two runtimes, gathered batch by batch; one entry per output."""

    def __init__(self) -> None:
        self._gap: dict[int, float] = {}
        self._scale: dict[int, float] = {}
        self._same = self._compared = 0

    def add(self, expected: list[Array], got: list[Array]) -> None:
        """Take in one batch: every output [n, …] from both sides.

        Raises:
            ParityError: the outputs differ in number or shape.
        """
        shapes, others = [y.shape for y in expected], [y.shape for y in got]
        if shapes != others:
            raise ParityError(f"PyTorch gives outputs {shapes}, the ONNX file {others}")
        for index, (want, have) in enumerate(zip(expected, got, strict=True)):
            # np.max, unlike max, hands a NaN on; the tolerance then refuses it.
            gap = np.abs(want.astype(np.float64) - have).max(initial=0)
            scale = np.abs(want).max(initial=0)
            self._gap[index] = float(np.max([gap, self._gap.get(index, 0.0)]))
            self._scale[index] = float(np.max([scale, self._scale.get(index, 0.0)]))
        if expected and expected[0].ndim > 1:
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


def _require(parity: Parity, tolerance: float) -> None:
    if not parity.max_relative <= tolerance:  # so written, a NaN is refused
        raise ParityError(
            f"ONNX Runtime and PyTorch differ by {parity.max_relative:.2g} of the largest output "
            f"on {parity.inputs} inputs (top-1 agreement {parity.top1_agreement:.2%}); "
            f"{tolerance:g} is allowed. Nothing was written"
        )
