"""From pixels to what the network sees: sets of uint8 images, and the collate step.

A batch is resized, cropped, flipped and normalized as a whole, which costs little beside training.
Chance comes from torch's global generator, which a loader seeds in its worker processes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate
from torchvision.transforms.v2 import functional as pixels

_LARGEST_NATIVE = 224


class TensorSet(Dataset[tuple[Tensor, Tensor]]):
    """Images [N, C, H, W] and labels [N] in memory; a batch is one indexing."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


class PictureSet(Dataset[tuple[Tensor, int]]):
    """A set of (PIL image, label) as uint8 [C, size, size]: shorter side to size, centre cropped.

    Colour and size follow the first picture where the caller does not say.
    """

    def __init__(self, pictures: Any, *, like: "PictureSet | None" = None, size: int | None = None):
        self.pictures = pictures
        first = (like.pictures if like else pictures)[0][0]
        self.mode = "L" if first.mode in ("1", "L", "LA") else "RGB"
        self.size = size or min(_LARGEST_NATIVE, *first.size)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture, label = self.pictures[index]
        image = pixels.pil_to_tensor(picture.convert(self.mode))
        return pixels.center_crop(pixels.resize(image, [self.size]), [self.size]), label


@dataclass(frozen=True)
class Prepare:
    """The collate step: a batch of uint8 images becomes what the network sees."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None = None
    padding: int = 0
    flip: bool = False

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        images, labels = batch if isinstance(batch, tuple) else default_collate(batch)
        if self.size and images.shape[-1] != self.size:
            images = pixels.resize(images, [self.size, self.size])
        if self.padding:
            images = random_crop(images, self.padding)
        if self.flip:
            images = random_flip(images)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (images.float() / 255 - mean) / std, labels


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Shift every image [N, C, H, W] by its own offset up to `padding`; what comes in is black."""
    count, channels, height, width = images.shape
    padded = F.pad(images, [padding] * 4)
    top, left = torch.randint(2 * padding + 1, (2, count, 1))
    rows = (top + torch.arange(height)).view(count, 1, height, 1)
    columns = (left + torch.arange(width)).view(count, 1, 1, width)
    each, every = torch.arange(count).view(-1, 1, 1, 1), torch.arange(channels).view(1, -1, 1, 1)
    return padded[each, every, rows, columns]


def random_flip(images: Tensor) -> Tensor:
    """Mirror about half of the images [N, C, H, W], left to right."""
    mirrored = torch.rand(len(images)) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
