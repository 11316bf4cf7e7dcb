"""ONNX Runtime: open a file, name its inputs; the only place that knows onnxruntime."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from nampruner.errors import NamPrunerError

Array = np.ndarray[Any, Any]

VERSION = f"onnxruntime {onnxruntime.__version__}"
_ORT_TYPES = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16"}


def open_session(
    path: Path | str, threads: int = 0, *, cuda: bool = False, trace: Path | None = None
) -> Any:
    """Open an ONNX file in ONNX Runtime.

    Args:
        threads: threads inside one operation; 0 leaves the choice to ONNX Runtime.
        cuda: run on the GPU where this ONNX Runtime can, else on the CPU.
        trace: where the profile goes, a prefix; without it, nothing is profiled.

    Raises:
        NamPrunerError: there is no such file, or ONNX Runtime cannot run it.
    """
    if not Path(path).is_file():
        raise NamPrunerError(f"{path}: no such file; give an ONNX file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if trace is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(trace)
    # A pool that spins on after its run would slow down whoever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    wanted = ["CUDAExecutionProvider"] if cuda else []
    there = onnxruntime.get_available_providers()
    providers = [name for name in wanted if name in there] + ["CPUExecutionProvider"]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime's own classes have no public base but this one
        reason = str(error).splitlines()[0]
        raise NamPrunerError(f"{path}: ONNX Runtime cannot open it ({reason})") from None


def feeds(session: Any, *inputs: Array) -> dict[str, Array]:
    """Name `inputs` as the session does.

    Raises:
        NamPrunerError: their number, an element type or a size is not what the file was made for.
    """
    slots = session.get_inputs()
    if len(slots) != len(inputs):
        raise NamPrunerError(f"the ONNX file takes {len(slots)} inputs, {len(inputs)} were given")
    for slot, array in zip(slots, inputs, strict=True):
        _check_input(slot, array)
    return {slot.name: array for slot, array in zip(slots, inputs, strict=True)}


def _check_input(slot: Any, array: Array) -> None:
    fits = len(slot.shape) == array.ndim and all(
        size == wanted for size, wanted in zip(array.shape, slot.shape, strict=True)
        if isinstance(wanted, int)
    )  # fmt: skip
    dtype = _ORT_TYPES.get(slot.type, str(array.dtype))
    if not fits or dtype != str(array.dtype):
        raise NamPrunerError(
            f"input {slot.name!r} is {dtype} {slot.shape} in the ONNX file, "
            f"given was {array.dtype} {list(array.shape)}; give inputs of that type and size"
        )
