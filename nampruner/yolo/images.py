"""Unlabelled images as a YOLO network gets them: letterboxed, RGB, in [0, 1]."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from nampruner.errors import NamPrunerError
from nampruner.yolo.library import (
    LetterBox,
    LoadImagesAndVideos,
    check_cls_dataset,
    check_det_dataset,
    classify_transforms,
    quiet,
)

_BATCH = 16
Split = Literal["train", "val"]


def images(
    model: nn.Module,
    source: str | Path,
    *,
    image_size: int = 640,
    count: int = 256,
    split: Split = "train",
) -> list[Tensor]:
    """Return batches [N, 3, image_size, image_size] of at most `count` images, without labels.

    `source` is a folder, a file, a glob or a `.txt` list of images, or a data YAML (for
    classification the folder of the data set), whose `split` is taken. Images are drawn at even
    distances, so that they are of all of the set. What `nampruner.prune` takes as `data`.

    Raises:
        NamPrunerError: no image is there.
    """
    classify = bool(model.task == "classify")
    return read_images(source, classify=classify, image_size=image_size, count=count, split=split)


def read_images(
    source: str | Path, *, classify: bool, image_size: int, count: int, split: Split
) -> list[Tensor]:
    """Do what `images` does where there is no network yet."""
    chosen = drawn(source, classify=classify, count=count, split=split)
    fit = _fitting(classify, image_size)
    tensors = []
    with quiet():
        for path in chosen:
            for _, pictures, _ in LoadImagesAndVideos(path, channels=3):
                tensors += [fit(picture) for picture in pictures]
    return list(torch.stack(tensors).split(_BATCH))


def drawn(source: str | Path, *, classify: bool, count: int, split: Split) -> list[str]:
    """Return the paths of the images that `read_images` reads."""
    paths = _paths(source, classify, split)
    return [paths[i] for i in np.linspace(0, len(paths) - 1, min(count, len(paths)), dtype=int)]


def _fitting(classify: bool, size: int) -> Any:
    if classify:
        transform = classify_transforms(size)
        return lambda picture: transform(_picture(picture))
    box = LetterBox(new_shape=(size, size), auto=False)

    def letterboxed(picture: Any) -> Tensor:
        rgb = np.ascontiguousarray(box(image=picture)[..., ::-1].transpose(2, 0, 1))
        return torch.from_numpy(rgb).float() / 255

    return letterboxed


def _picture(bgr: Any) -> Any:
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(bgr[..., ::-1]))


def _paths(source: str | Path, classify: bool, split: Split) -> list[str]:
    try:
        with quiet():
            found = _split(source, classify, split)
            files = [str(f) for part in found for f in LoadImagesAndVideos(part).files]
    except Exception as error:  # Ultralytics raises all kinds, and they say what is wrong
        raise NamPrunerError(
            f"no images in {source}: {str(error).splitlines()[0]}; give a folder of images, a list "
            "of them, or a data YAML"
        ) from error
    return sorted(files)


def _split(source: str | Path, classify: bool, split: Split) -> list[str]:
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        parts = check_det_dataset(path, autodownload=False)[split]
        return [str(part) for part in (parts if isinstance(parts, list) else [parts])]
    if classify and (path / "train").is_dir():
        return [str(Path(check_cls_dataset(path)[split]) / "**" / "*.*")]
    return [str(path)]
