"""Detectors in INT8: judged by what they find, and how much of mAP50-95 that costs."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import nn

from nampruner.errors import NamPrunerError, ParityError
from nampruner.export.boxes import overlaps
from nampruner.export.int8 import export_judged
from nampruner.export.judges import FELT, WAY_OUT, Batch
from nampruner.export.onnx import runner_of
from nampruner.int8 import Int8
from nampruner.latency import Array
from nampruner.plan import Parity
from nampruner.yolo.files import describe_export
from nampruner.yolo.images import drawn, images
from nampruner.yolo.library import check_det_dataset, quiet
from nampruner.yolo.network import Exportable, head_of
from nampruner.yolo.training import validate

MEASURE = "mAP50-95"
"""What INT8 may cost a part of: of boxes, and of masks or keypoints where there are any."""


_FACTS = ("names", "channels", "kpt_shape", "flip_idx")
"""What a data YAML says beside where its images are."""


class Precision:
    """Judges a detector: nodes are chosen by labelled calibration images, the proof is on others.

    Args:
        exported: what is exported.
        data: a data YAML; its `train` images are for calibration, `val` for the proof.
        drop: most that may go of any mAP50-95.
        count: calibration images.
        arguments: Ultralytics' own: imgsz, batch …
    """

    def __init__(
        self, exported: Exportable, data: str, drop: float, count: int, arguments: Mapping[str, Any]
    ) -> None:
        self._exported, self._data, self._drop, self._count = exported, data, drop, count
        self._arguments = {**arguments, "device": "cpu", "batch": 1}
        network: Any = exported.network
        head = f"network.model.{len(network.model) - 1}"
        # arithmetic on coordinates: no weights to save, and 8 bits are too coarse for pixels
        self.stays = (f"{head}/*",)
        self.asked = f"all but {drop / 2:.3f} of {MEASURE}"

    def start(self, plain: Path, batches: list[Batch]) -> None:
        self._plain = plain
        self._few = tuple(x[:FELT] for x in batches[0])
        self._want = self._boxes(plain)
        self._seen = self._calibrated(plain)
        if not max(_measured(self._seen).values(), default=0.0):
            raise NamPrunerError(
                f"the network finds nothing in {self._count} training images ({MEASURE} 0), so "
                "INT8 cannot be judged; train it first, or export it as float or half"
            )

    def enough(self, path: Path) -> bool:
        return _lost(self._seen, self._calibrated(path)) <= self._drop / 2

    def error(self, path: Path) -> float:
        """Return how much of float's boxes is missed: overlap and score, weighted by score."""
        pairs = zip(self._want, self._boxes(path), strict=True)
        missed = sum(_missed(want, have) for want, have in pairs)
        return missed / max(sum(float(want[:, 4].sum()) for want in self._want), 1e-9)

    def prove(self, path: Path, parity: Parity) -> None:
        lost = _lost(self._validated(self._plain), self._validated(path))
        if not (lost <= self._drop and np.isfinite(parity.max_relative)):
            raise ParityError(
                f"INT8 costs {lost:.3f} of {MEASURE} on the validation images; {self._drop:.3f} "
                f"is allowed. {WAY_OUT}"
            )

    def _boxes(self, path: Path) -> list[Array]:
        return self._exported.picked(runner_of(path)(self._few))

    def _calibrated(self, path: Path) -> Mapping[str, float]:
        with tempfile.TemporaryDirectory(prefix="nampruner-") as folder:
            return self._validated(path, str(_subset(self._data, self._count, Path(folder))))

    def _validated(self, path: Path, data: str | None = None) -> Mapping[str, float]:
        """Validate a file, under a name by which Ultralytics knows what it is."""
        with tempfile.TemporaryDirectory(prefix="nampruner-") as folder:
            file = Path(shutil.copy(path, Path(folder) / "model.onnx"))
            task = str(self._exported.network.task)
            return validate(file, data or self._data, task=task, **self._arguments)


def _subset(data: str, count: int, folder: Path) -> Path:
    """Write a data YAML whose validation images are those that calibration sees."""
    with quiet():
        known = check_det_dataset(data, False)
    paths = drawn(data, classify=False, count=count, split="train")
    (folder / "seen.txt").write_text("".join(f"{path}\n" for path in paths))
    seen = str(folder / "seen.txt")
    kept = {key: known[key] for key in _FACTS if key in known}
    said = {**kept, "path": str(folder), "train": seen, "val": seen}
    file = folder / "seen.yaml"
    file.write_text(yaml.safe_dump(said), encoding="utf-8")
    return file


def _measured(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if MEASURE in name}


def _lost(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    return max(value - after[name] for name, value in _measured(before).items())


def _missed(want: Array, have: Array) -> float:
    """Return the sum of scores that boxes of one image do not find again."""
    if not len(want):
        return 0.0
    score = np.minimum(want[:, None, 4], have[None, :, 4])
    again = overlaps(want, have) * (want[:, None, 5] == have[None, :, 5]) * score
    return float((want[:, 4] - again.max(1, initial=0.0)).clip(0).sum())


def export_int8(
    model: nn.Module,
    path: str | Path,
    data: str | Path,
    *,
    drop: float = 0.01,
    image_size: int = 640,
    count: int = 128,
) -> Int8:
    """Write a detector as an INT8 ONNX file that is judged by its mAP50-95.

    As `nampruner.export_int8`, but nodes are chosen by what it finds in `count` training images:
    half of `drop` may be lost there. What decodes boxes stays float.

    Args:
        data: a data YAML.
        drop: most that may go of mAP50-95 on the validation images; 0.01 is one point.

    Raises:
        ParityError: more is lost; a file that was there before stays.
        NamPrunerError: the network classifies, finds nothing, or cannot be exported.
    """
    head_of(model)
    if model.task == "classify":
        raise NamPrunerError("the network classifies; use nampruner.export_int8")
    exported = Exportable(model)
    judge = Precision(exported, str(data), drop, count, {"imgsz": image_size})
    seen = images(model, data, image_size=image_size, count=count)
    proof = images(model, data, image_size=image_size, count=64, split="val")
    said = describe_export(model, image_size)
    return export_judged(exported, path, seen, judge, inputs=proof, metadata=said)
