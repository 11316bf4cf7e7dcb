"""A label per image: the loaders, the loop and the loss of nampruner."""

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from nampruner import models
from nampruner.checkpoint import InputSpec
from nampruner.config import ExportCommand
from nampruner.data import load_data
from nampruner.errors import NamPrunerError
from nampruner.export.judges import Judge, TopOne
from nampruner.importance import Batches
from nampruner.latency import feeds, open_session
from nampruner.penalty import SparsityPenalty, fitting_strength
from nampruner.pipeline.task import Judged
from nampruner.progress import Progress
from nampruner.recipe import Recipe
from nampruner.training import FitSettings, check_match, evaluate, fit, resolve_device

EXAMPLES = 4


class Classifiers:
    """Any network that gives logits [N, classes]; see `Task`."""

    forward = None
    classifies = True

    def __init__(self, recipe: Recipe, *, trust: bool) -> None:
        if recipe.yolo_args:
            raise NamPrunerError("--yolo-args is for networks of Ultralytics: --model yolo:NAME")
        self.recipe, self.trust = recipe, trust
        self.data = load_data(recipe, seed=recipe.seed, trust_source=trust)
        self.name, self.classes = self.data.name, self.data.class_names

    @property
    def input(self) -> InputSpec:
        data = self.data
        return InputSpec(
            channels=data.in_channels,
            height=data.image_size,
            width=data.image_size,
            mean=data.mean,
            std=data.std,
        )

    def build(self) -> nn.Module:
        return models.build(
            self.recipe.model,
            num_classes=self.data.num_classes,
            in_channels=self.data.in_channels,
            image_size=self.data.image_size,
            trust_source=self.trust,
        )

    def check(self, model: nn.Module) -> None:
        check_match(model, self.data)

    def examples(self) -> Tensor:
        return self.data.example_input(EXAMPLES)

    def calibration(self) -> list[Tensor]:
        return list(self.data.calibration(self.recipe.calibration))

    def scoring(self) -> Batches:
        batches = -(-self.recipe.calibration // self.recipe.batch_size)
        return list(islice(self.data.plain, batches))

    def proof(self, count: int) -> Tensor:
        return self.data.test_inputs(count)

    def held_out(self) -> Iterable[Tensor]:
        return (images for images, _ in self.data.test)

    def train(self, model: nn.Module, work: Path, progress: Progress) -> nn.Module:
        settings = FitSettings.sparse(self.recipe, self.recipe)
        penalty = self._penalty(model)
        fit(model, self.data, settings, penalty=penalty, folder=work, progress=progress)
        return model

    def _penalty(self, model: nn.Module) -> SparsityPenalty | None:
        recipe = self.recipe
        if recipe.strength == 0:
            return None
        steps = recipe.epochs * len(self.data.train)
        warmup = round(recipe.penalty_warmup * steps)
        strength = recipe.strength
        if strength is None:
            # the mean rate of a one-cycle schedule is about half of its peak
            strength = fitting_strength(recipe.lr / 2, steps - warmup / 2, momentum=recipe.momentum)
        return SparsityPenalty(
            model,
            strength,
            method=recipe.penalty,
            nam=recipe.penalize_nam,
            bn=recipe.penalize_bn,
            warmup_steps=warmup,
            momentum=recipe.momentum,
        )

    def finetune(self, model: nn.Module, work: Path, progress: Progress) -> nn.Module:
        settings = FitSettings.finetuning(self.recipe, self.recipe, self.recipe)
        fit(model, self.data, settings, folder=work, progress=progress)
        return model

    def evaluate(self, model: nn.Module, progress: Progress) -> Judged:
        return self._judged(model, resolve_device(self.recipe.device), progress)

    def evaluate_onnx(self, path: Path, progress: Progress) -> Judged:
        model = _OnnxModel(path)
        self.check(model)
        return self._judged(model, torch.device("cpu"), progress)

    def _judged(self, model: nn.Module, device: torch.device, progress: Progress) -> Judged:
        found = evaluate(model, self.data.test, device=device, progress=progress)
        return Judged(**found.model_dump())

    def judge(self, exported: nn.Module, options: ExportCommand) -> Judge:
        return top_one(options)

    def metadata(self, model: nn.Module) -> Mapping[str, str]:
        return {}


def top_one(options: ExportCommand) -> Judge:
    """Return the judge of classifiers.

    Raises:
        NamPrunerError: an option is for detectors.
    """
    if "drop" in options.model_fields_set:
        raise NamPrunerError("--drop is for detectors, which are judged by mAP; give --agreement")
    return TopOne(options.agreement)


class _OnnxModel(nn.Module):
    """An ONNX file as a module, so that the one evaluation loop takes it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._session = open_session(path)

    def forward(self, images: Tensor) -> Tensor:
        outputs = self._session.run(None, feeds(self._session, images.numpy()))
        return torch.from_numpy(outputs[0])
