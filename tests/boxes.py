"""A set of boxes for YOLO, and a detector that learns it in seconds; skips where there is none."""

import importlib.util
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_aiming import taken
from test_staircase import treads

from nampruner.plan import Latency
from nampruner.staircase import Bench

# Ultralytics writes its settings where this says, and at home otherwise
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="yolo-settings-"))
os.environ["YOLO_VERBOSE"] = "false"
if importlib.util.find_spec("ultralytics") is None:
    pytest.skip("needs the extra: pip install 'nampruner[yolo]'", allow_module_level=True)
BEFORE = Image.open, torch.save
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import nampruner.yolo  # noqa: F401

SIZE = 64
TINY = """
nc: 3
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, C2f, [32, True]]
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, C2f, [64, True]]
head:
  - [[2, 4], 1, Detect, [nc]]
"""


def boxes(folder: Path) -> Path:
    """Write eight images of one bright rectangle each, of three classes: its colour."""
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for part in ("images", "labels"):
            (folder / part / split).mkdir(parents=True)
        for number in range(8):
            canvas = np.zeros((SIZE, SIZE, 3), np.uint8)
            x, y = draw.integers(0, 32, 2)
            canvas[y : y + 24, x : x + 28, number % 3] = 255
            Image.fromarray(canvas).save(folder / "images" / split / f"{number}.png")
            box = ((x + 14) / SIZE, (y + 12) / SIZE, 28 / SIZE, 24 / SIZE)
            text = " ".join(f"{value:.4f}" for value in box)
            (folder / "labels" / split / f"{number}.txt").write_text(f"{number % 3} {text}\n")
    file = folder / "data.yaml"
    file.write_text(
        f"path: {folder}\ntrain: images/train\nval: images/val\nnames: [red, green, blue]\n"
    )
    return file


def tiny(folder: Path) -> Path:
    """Write the YAML of a small detector."""
    file = folder / "tiny.yaml"
    file.write_text(TINY)
    return file


def formula(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """Let a convolution take what a formula says, a network one millisecond per megabyte."""

    def timed(files: dict[str, Path], image: Any, *, threads: int) -> dict[str, Latency]:
        assert image.shape == (1, 3, SIZE, SIZE)
        sizes = {name: file.stat().st_size / 2**20 for name, file in files.items()}
        return {name: taken(size) for name, size in sizes.items()}

    patch.setenv("XDG_CACHE_HOME", str(cache))
    patch.setattr(Bench, "_onnxruntime", lambda self, each, int8: [treads(one) for one in each])
    patch.setattr("nampruner.aiming.measure_fresh", timed)
