"""FP16: an ONNX file for GPUs that computes in half precision and takes and gives float32."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import Tensor, nn

from nampruner.errors import ParityError
from nampruner.export.files import published, quiet
from nampruner.export.onnx import graph_of, runner_of, save
from nampruner.export.parity import Inputs, as_tuple, batches_of, compare, require, settled
from nampruner.export.ranges import ranges_of
from nampruner.plan import Parity
from nampruner.progress import Progress, Silent

TOLERANCE = 1e-2
"""Half keeps 11 bits, 5e-4 of a number; some twenty layers add up to several times of it."""
_LARGEST = float(np.finfo(np.float16).max)


def export_fp16(
    model: nn.Module,
    path: Path | str,
    example_inputs: Inputs,
    *,
    inputs: Inputs | None = None,
    tolerance: float = TOLERANCE,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Parity:
    """Write `model` as an ONNX file in half precision, and prove it on `inputs`.

    Inputs and outputs stay float32. On a processor without half arithmetic ONNX Runtime computes
    such a file in float32, so the proof is blind to the rounding of activations; what does not fit
    into half is looked for in the float network. Arguments as for `export_onnx`.

    Raises:
        ParityError: further apart than `tolerance`, or an activation is beyond half's range; a file
            that was there before stays.
        NamPrunerError: the network cannot be exported, or is larger than one file holds.
    """
    example = as_tuple(example_inputs)
    real = example if inputs is None else as_tuple(inputs)
    steps = 3 + len(batches_of(real))
    with (progress or Silent()).bar("export", steps) as bar, settled(model) as here:
        proto = graph_of(here, example, bar)
        _require_range(proto, real)
        with quiet():
            half = convert_float_to_float16(proto, keep_io_types=True)
        bar.advance()
        with published(Path(path), ".onnx") as draft:
            save(half, draft, metadata)
            parity = compare(here, runner_of(draft), real, bar)
            require(parity, tolerance, "the half-precision file")
    return parity


def _require_range(proto: onnx.ModelProto, inputs: tuple[Tensor, ...]) -> None:
    """See that no activation leaves the range of half.

    Raises:
        ParityError: one does; the message names the first.
    """
    with tempfile.TemporaryDirectory(prefix="nampruner-") as folder:
        path = Path(folder) / "float.onnx"
        onnx.save(proto, str(path))
        batches = (tuple(x.cpu() for x in batch) for batch in batches_of(inputs))
        ranges = ranges_of(path, batches)
    for node in proto.graph.node:
        for value in set(node.output) & set(ranges.keys()):
            largest = float(np.max(np.abs(np.stack(ranges[value].range_value))))
            if not largest <= _LARGEST:
                raise ParityError(
                    f"{node.name} gives numbers up to {largest:.3g}, half precision ends at "
                    f"{_LARGEST:g}. Nothing was written; export it as float"
                )
