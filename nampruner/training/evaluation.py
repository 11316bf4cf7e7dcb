"""Classify a set of images and count; see that model and data belong together."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from nampruner.data import Data
from nampruner.errors import NamPrunerError
from nampruner.progress import Progress, Silent
from nampruner.training.surroundings import home, placed
from nampruner.training.values import Evaluation


def evaluate(
    model: nn.Module,
    loader: DataLoader[Any],
    *,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Classify every image of `loader`, in eval mode, on `device` or where the model is.

    Raises:
        NamPrunerError: the outputs are no logits [N, classes], or a label is none of the classes.
    """
    device = device or home(model)
    loss, right, count = 0.0, 0, 0
    bar = (progress or Silent()).bar("evaluate", len(loader))
    with placed(model, device), torch.no_grad(), bar as step:
        model.eval()
        for images, labels in loader:
            found = logits(model(images.to(device)))
            _require_classes(int(labels.max()) + 1, found)
            target = labels.to(device)
            loss += float(F.cross_entropy(found, target, reduction="sum"))
            right += int(number_right(found, target))
            count += len(labels)
            step.advance(loss=loss / count, accuracy=right / count)
    return Evaluation(accuracy=right / count, loss=loss / count, images=count)


def number_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Count the images whose largest logit is their label's; a tensor, to spare a GPU the wait."""
    return (logits.argmax(1) == labels).sum()


def logits(output: Any) -> Tensor:
    """Return what a model gave if it is logits [N, classes].

    Raises:
        NamPrunerError: it is something else.
    """
    if isinstance(output, Tensor) and output.ndim == 2:
        return output
    shape = f" {list(output.shape)}" if isinstance(output, Tensor) else ""
    raise NamPrunerError(
        f"the model gives a {type(output).__name__}{shape}, not logits [N, classes]; give a "
        "classifier (one with auxiliary heads: without them, as by ?aux_logits=false)"
    )


def check_match(model: nn.Module, data: Data) -> None:
    """See that the model takes the data's images and tells its classes apart.

    Raises:
        NamPrunerError: it does not; the message says what each of the two expects.
    """
    images = data.example_input(2)
    shape = list(images.shape[1:])
    with placed(model, home(model)), torch.no_grad():
        model.eval()
        try:
            output = model(images.to(home(model)))
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise NamPrunerError(
                f"the model does not take the images {shape} of {data.name!r} ({error}); give data "
                "it was made for, or another --image-size"
            ) from error
    _require_classes(data.num_classes, logits(output))


def _require_classes(wanted: int, logits: Tensor) -> None:
    if logits.shape[1] < wanted:
        raise NamPrunerError(
            f"the model tells {logits.shape[1]} classes apart, the data has {wanted}; "
            "build the model for this data, or give the data it was made for"
        )
