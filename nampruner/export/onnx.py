"""ONNX: write, simplify, check, and prove on real inputs; the only place that knows onnx.

A file appears under its final name only after ONNX Runtime has computed what PyTorch computes, so
`model.onnx` on disk is always a file that was right. Nodes are named after the modules they come
from. INT8 and half are made of the same graph.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxslim
import torch
from torch import Tensor, nn

from nampruner.errors import NamPrunerError
from nampruner.export.files import not_exported, published, quiet
from nampruner.export.names import name_nodes
from nampruner.export.parity import (
    BATCH,
    Inputs,
    Runner,
    as_tuple,
    batches_of,
    compare,
    pair_of,
    require,
    settled,
    tensors_of,
)
from nampruner.latency import Array, feeds, open_session
from nampruner.nam import fold_nam, nam_modules
from nampruner.plan import Parity
from nampruner.progress import Bar, Progress, Silent

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

    The model is exported in eval mode and left as it was: modes, device, gradients, hooks. NAM is
    folded, see `nampruner.fold_nam`; the proof is against the model as it was given.

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
    example = as_tuple(example_inputs)
    real = example if inputs is None else as_tuple(inputs)
    steps = 2 + len(batches_of(real))
    with (progress or Silent()).bar("export", steps) as bar, settled(model) as here:
        proto = graph_of(here, example, bar)
        with published(Path(path), ".onnx") as draft:
            save(proto, draft, metadata)
            parity = compare(here, runner_of(draft), real, bar)
            require(parity, tolerance, "ONNX Runtime")
    return parity


def graph_of(model: nn.Module, example: tuple[Tensor, ...], bar: Bar) -> onnx.ModelProto:
    """Return a model that is `settled` as a graph, NAM folded, simplified and checked.

    Raises:
        NamPrunerError: the network cannot be exported, or is larger than one file holds.
    """
    proto = _traced(fold_nam(model).model if nam_modules(model) else model, example)
    name_nodes(proto.graph)
    bar.advance()
    proto = _simplified(proto)
    bar.advance()
    return proto


def save(proto: onnx.ModelProto, path: Path, metadata: Mapping[str, str] | None) -> None:
    """Write a graph, and what it shall say of itself."""
    onnx.helper.set_model_props(proto, dict(metadata or {}))
    onnx.save(proto, str(path))


def runner_of(path: Path) -> Runner:
    """Return what runs a file in ONNX Runtime (CPU) on as many threads as PyTorch has."""
    return partial(_run, open_session(path, torch.get_num_threads()))


def run_onnx(
    path: Path | str, inputs: Array, *, batch_size: int = BATCH, threads: int = 0
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


def _traced(model: nn.Module, example: tuple[Tensor, ...]) -> onnx.ModelProto:
    pair = pair_of(example)
    batch = torch.export.Dim("batch")
    outputs = len(tensors_of(model(*pair)))
    try:
        with quiet():
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
        raise not_exported(model, str(error.__cause__ or error)) from error
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
    with quiet():
        slim: onnx.ModelProto = onnxslim.slim(proto)
    onnx.checker.check_model(slim, full_check=True)
    return slim


def _run(session: Any, batch: tuple[Tensor, ...]) -> list[Array]:
    found: list[Array] = session.run(None, feeds(session, *(x.numpy() for x in batch)))
    return found
