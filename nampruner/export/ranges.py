"""The range of every activation of an ONNX graph on real inputs."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from onnxruntime.quantization import CalibrationDataReader, create_calibrator
from torch import Tensor

from nampruner.export.files import quiet
from nampruner.latency import Array, open_session


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Iterable[dict[str, Array]]) -> None:
        self._left = iter(feeds)

    def get_next(self) -> dict[str, Array] | None:
        return next(self._left, None)


def ranges_of(
    path: Path, batches: Iterable[tuple[Tensor, ...]], ops: Sequence[str] | None = None
) -> Any:
    """Run an ONNX file and return value → least and largest number, as ONNX Runtime keeps them.

    Args:
        batches: inputs [N, …] on the CPU.
        ops: kinds of nodes whose inputs and outputs are watched; None for all.
    """
    names = [slot.name for slot in open_session(path).get_inputs()]
    feeds = ({n: x.numpy() for n, x in zip(names, batch, strict=True)} for batch in batches)
    with quiet():
        augmented = path.with_name(f"{path.name}.augmented")
        try:
            calibrator = create_calibrator(path, ops, augmented_model_path=str(augmented))
            calibrator.collect_data(_Reader(feeds))
            return calibrator.compute_data()
        finally:
            augmented.unlink(missing_ok=True)
