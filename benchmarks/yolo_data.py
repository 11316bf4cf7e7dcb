"""Fashion-MNIST items on cloudy canvases, as a detection set in Ultralytics' form."""

from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from torch.utils.data import Dataset

from nampruner.config import DataOptions
from nampruner.data import load_data

CLASSES = [
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
]
_MOST_ITEMS = 8
_SMALLEST, _LARGEST = 1 / 8, 1 / 3
"""Side of an item's square, as a part of the canvas."""
_CLOUD = 16
"""Pixels per random value of the background."""


def canvases(folder: Path, counts: dict[str, int], pixels: int) -> Path:
    """Write `counts` images of `pixels` each per split, and return the data YAML.

    Training items come from the training images, the others from the test images.
    """
    file = folder / "data.yaml"
    if file.exists():
        return file
    data = load_data(DataOptions(data="fashion-mnist"), seed=0)
    items = {"train": data.train.dataset, "val": data.test.dataset}
    for split, count in counts.items():
        draw = np.random.default_rng([pixels, split == "train"])
        for part in ("images", "labels"):
            (folder / part / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            canvas, boxes = _scene(items[split], draw, pixels)
            Image.fromarray(canvas).save(
                folder / "images" / split / f"{number:05d}.jpg", quality=85
            )
            (folder / "labels" / split / f"{number:05d}.txt").write_text("".join(boxes))
    splits = {split: f"images/{split}" for split in counts}
    file.write_text(yaml.safe_dump({"path": str(folder.resolve()), **splits, "names": CLASSES}))
    return file


def _scene(
    items: "Dataset[tuple[object, int]]", draw: np.random.Generator, pixels: int
) -> tuple[np.ndarray, list[str]]:
    """Return a canvas [H, W, 3] and its label lines; items do not overlap."""
    canvas = _clouds(draw, pixels).copy()
    taken = np.zeros((pixels, pixels), bool)
    lines = []
    for _ in range(draw.integers(1, _MOST_ITEMS + 1)):
        side = int(pixels * draw.uniform(_SMALLEST, _LARGEST))
        x, y = (int(v) for v in draw.integers(0, pixels - side, 2))
        place = np.s_[y : y + side, x : x + side]
        if taken[place].any():
            continue
        taken[place] = True
        item, label = _item(items, int(draw.integers(len(items))), side)  # type: ignore[arg-type]
        tint = draw.uniform(0.6, 1.0, 3)
        canvas[place] = np.where(item[..., None] > 10, item[..., None] * tint, canvas[place])
        rows, columns = np.nonzero(item > 10)
        left, right = x + columns.min(), x + columns.max() + 1
        top, bottom = y + rows.min(), y + rows.max() + 1
        box = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
        lines.append(f"{label} " + " ".join(f"{v / pixels:.5f}" for v in box) + "\n")
    return canvas.clip(0, 255).astype(np.uint8), lines


def _clouds(draw: np.random.Generator, pixels: int) -> np.ndarray:
    """Return a background [pixels, pixels, 3] in 0 … 255."""
    few = draw.normal(80, 40, (pixels // _CLOUD + 1, pixels // _CLOUD + 1, 3)).clip(0, 255)
    picture = Image.fromarray(few.astype(np.uint8))
    return np.asarray(picture.resize((pixels, pixels), Image.Resampling.BICUBIC), dtype=np.float32)


def _item(items: "Dataset[tuple[object, int]]", index: int, side: int) -> tuple[np.ndarray, int]:
    """Return one item [side, side] in 0 … 255 and its class."""
    image, label = items[index]
    grey = np.asarray(image, dtype=np.float32).squeeze()
    grey = (grey - grey.min()) / (grey.max() - grey.min() + 1e-6) * 255
    picture = Image.fromarray(grey.astype(np.uint8)).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(picture, dtype=np.float32), int(label)
