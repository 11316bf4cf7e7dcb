"""Load a data set by name: split, normalized, and augmented for training."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from nampruner.config import DataOptions
from nampruner.data.images import Prepare
from nampruner.data.sources import Splits, load_splits
from nampruner.errors import NamPrunerError
from nampruner.models import call_user_function, is_user_file

__all__ = ["Data", "load_data"]

_STATISTICS_IMAGES = 1024


@dataclass(frozen=True)
class Data:
    """Three loaders of (images [N, C, H, W] float32, labels [N] int64) and what they hold.

    `train` is shuffled and augmented; `plain` holds the training images in a fixed random order,
    not augmented. `mean` and `std` are per channel, of pixels in [0, 1].
    """

    name: str
    train: DataLoader[Any]
    validation: DataLoader[Any]
    test: DataLoader[Any]
    plain: DataLoader[Any]
    num_classes: int
    in_channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] | None = None

    def calibration(self, n: int) -> Iterator[Tensor]:
        """Yield batches of at most `n` training inputs, without labels, always the same ones."""
        return _first(self.plain, n)

    def example_input(self, batch: int = 1) -> Tensor:
        """Return real images [batch, C, H, W]."""
        return torch.cat(list(self.calibration(batch)))

    def test_inputs(self, n: int) -> Tensor:
        """Return the first `n` test images [n, C, H, W], or all where there are fewer."""
        return torch.cat(list(_first(self.test, n)))

    @classmethod
    def from_loaders(
        cls,
        train: DataLoader[Any],
        validation: DataLoader[Any],
        test: DataLoader[Any],
        *,
        name: str,
    ) -> Self:
        """Describe loaders that already normalize; calibration reads `train` as it is.

        Raises:
            NamPrunerError: a batch is not (square images [N, C, H, W], labels [N]).
        """
        images = _checked_images(train, name)
        names = getattr(train.dataset, "classes", None)
        classes = len(names) if names else 1 + max(int(labels.max()) for _, labels in train)
        channels = images.shape[1]
        return cls(
            *(name, train, validation, test, train, classes, channels, images.shape[-1]),
            mean=(0.0,) * channels,
            std=(1.0,) * channels,
            class_names=tuple(names) if names else None,
        )


def _first(loader: DataLoader[Any], n: int) -> Iterator[Tensor]:
    for images, _ in loader:
        yield images[:n]
        n -= len(images)
        if n <= 0:
            return


def _checked_images(loader: DataLoader[Any], name: str) -> Tensor:
    batch = next(iter(loader))
    if isinstance(batch, list | tuple) and len(batch) == 2:
        images, labels = batch
        if isinstance(images, Tensor) and isinstance(labels, Tensor):
            square = images.ndim == 4 and images.shape[2] == images.shape[3]
            if square and labels.shape == (len(images),):
                return images
    raise NamPrunerError(
        f"data {name!r}: a loader must give (images [N, C, H, W] with H = W, labels [N])"
    )


def load_data(options: DataOptions, *, seed: int, trust_source: bool = True) -> Data:
    """Load the data set `options` names; `seed` fixes splits, order and augmentation.

    `file.py:function` is called with what it accepts out of image_size, batch_size, workers and
    seed, and returns a `Data` or three loaders (train, validation, test).

    Raises:
        NamPrunerError: the data set is unknown, missing, damaged, or a user's file not trusted.
    """
    if is_user_file(options.data):
        return _from_user(options, seed=seed, trust_source=trust_source)
    splits = load_splits(options.data, image_size=options.image_size, seed=seed)
    return _with_loaders(splits, options, seed)


def _from_user(options: DataOptions, *, seed: int, trust_source: bool) -> Data:
    offered = options.model_dump(include={"image_size", "batch_size", "workers"})
    found = call_user_function(options.data, trust_source=trust_source, seed=seed, **offered)
    if isinstance(found, Data):
        return found
    if isinstance(found, list | tuple) and len(found) == 3:
        return Data.from_loaders(*found, name=options.data)
    raise NamPrunerError(
        f"data {options.data!r} gave a {type(found).__name__}; "
        "give three loaders (train, validation, test) or a nampruner Data"
    )


def _with_loaders(splits: Splits, options: DataOptions, seed: int) -> Data:
    channels, _, native = splits.train[0][0].shape
    size = options.image_size or native
    chance = torch.Generator().manual_seed(seed)
    order = torch.randperm(_length(splits.train), generator=chance)
    ordered = Subset(splits.train, order.tolist())
    mean, std = _statistics(ordered, options)
    prepare = Prepare(mean, std, size)
    augment = replace(prepare, padding=max(1, size // 8), flip=splits.flip)
    return Data(
        name=options.data,
        train=_loader(splits.train, augment, options, chance=chance),
        validation=_loader(splits.validation, prepare, options),
        test=_loader(splits.test, prepare, options),
        plain=_loader(ordered, prepare, options),
        num_classes=len(splits.class_names),
        in_channels=channels,
        image_size=size,
        mean=mean,
        std=std,
        class_names=splits.class_names,
    )


def _length(dataset: Dataset[Any]) -> int:
    return len(dataset)  # type: ignore[arg-type]


def _loader(
    dataset: Dataset[Any],
    prepare: Any,
    options: DataOptions,
    *,
    chance: torch.Generator | None = None,
) -> DataLoader[Any]:
    shuffled = chance is not None
    return DataLoader(
        dataset,
        options.batch_size,
        shuffle=shuffled,
        generator=chance,
        collate_fn=prepare,
        num_workers=options.workers,
        # a last batch of one image would break BN
        drop_last=shuffled and _length(dataset) >= options.batch_size,
        pin_memory=torch.cuda.is_available(),
    )


def _statistics(
    dataset: Dataset[Any], options: DataOptions
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel, of pixels in [0, 1]."""
    as_is = Prepare((0.0,), (1.0,))
    loader = _loader(dataset, as_is, options)
    images = torch.cat(list(_first(loader, _STATISTICS_IMAGES))).double()
    std, mean = torch.std_mean(images, dim=(0, 2, 3), correction=0)
    # a channel without contrast stays as it is
    return tuple(mean.tolist()), tuple(std.clamp(min=1 / 255).tolist())
