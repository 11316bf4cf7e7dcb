"""What sets one kind of network apart: its images, its training, its measures, what is exported.

classifiers.py   a label per image: the loaders, the loop and the loss of nampruner
yolo.py          Ultralytics' networks, trained and judged by Ultralytics
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from nampruner.checkpoint import InputSpec
from nampruner.config import ExportCommand
from nampruner.export.judges import Judge
from nampruner.graph import Forward
from nampruner.importance import Batches
from nampruner.progress import Progress
from nampruner.recipe import Recipe
from nampruner.results import Quality


class Judged(Quality):
    """How good a network is, and on how many images that was seen."""

    loss: float | None = None
    """Mean cross-entropy in nats, of a classifier."""
    images: int | None = None


class Task(Protocol):
    """One data set and one way to work on it, under the options of one recipe."""

    @property
    def name(self) -> str:
        """Return the name of the data set."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Return the names of what is told apart."""

    @property
    def input(self) -> InputSpec:
        """Return what images look like to the network."""

    @property
    def classifies(self) -> bool:
        """Return whether what is exported gives scores of classes."""

    @property
    def forward(self) -> Forward | None:
        """Return how the graph runs a network, where that is not the plain call."""

    def build(self) -> nn.Module:
        """Build the recipe's network for these images, with the weights to start from."""

    def check(self, model: nn.Module) -> None:
        """See that `model` takes these images and tells their classes apart."""

    def examples(self) -> Tensor:
        """Return a few images [N, C, H, W] on which a network is traced and a cut certified."""

    def calibration(self) -> list[Tensor]:
        """Return training images without labels, in batches: what recovery may look at."""

    def scoring(self) -> Batches:
        """Return about as many for scores that look at data, with labels where there are any."""

    def proof(self, count: int) -> Tensor:
        """Return the first `count` held-out images [count, C, H, W], or all."""

    def held_out(self) -> Iterable[Tensor]:
        """Return all held-out images, in batches, without labels."""

    def train(self, model: nn.Module, work: Path, progress: Progress) -> nn.Module:
        """Train under the penalty, from where the same training in `work` was broken off."""

    def finetune(self, model: nn.Module, work: Path, progress: Progress) -> nn.Module:
        """Train on without it, likewise."""

    def evaluate(self, model: nn.Module, progress: Progress) -> Judged:
        """Judge a network on the held-out images."""

    def evaluate_onnx(self, path: Path, progress: Progress) -> Judged:
        """Judge an ONNX file."""

    def judge(self, exported: nn.Module, options: ExportCommand) -> Judge:
        """Return who says whether INT8 is near enough to float.

        Raises:
            NamPrunerError: an option is for another kind of network.
        """

    def metadata(self, model: nn.Module) -> Mapping[str, str]:
        """Return what an ONNX file says to others beside the record."""


YOLO = "yolo:"
"""What the spec of such a network begins with."""


def open_task(recipe: Recipe, *, trust: bool) -> Task:
    """Find the images of a recipe; `trust` allows to run a user's `file.py`.

    Raises:
        NamPrunerError: they are not there, or an option does not apply to this kind of network.
    """
    if recipe.model.startswith(YOLO):
        from nampruner.pipeline.yolo import Yolo

        return Yolo(recipe)
    from nampruner.pipeline.classifiers import Classifiers

    return Classifiers(recipe, trust=trust)
