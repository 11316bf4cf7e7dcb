"""The whole way as one file: every option of `run`, written down, read and merged with flags."""

from pathlib import Path
from typing import Any

from pydantic import model_validator

from nampruner.config import TARGETS, RunCommand
from nampruner.errors import NamPrunerError
from nampruner.options import Options, parse

_YOLO = {
    "nam": "channel",
    "image_size": 640,
    "batch_size": 16,
    "workers": 8,
    "epochs": 100,
    "lr": 0.01,
    "momentum": 0.937,
    "label_smoothing": 0.0,
    "calibration": 128,
    "finetune_epochs": 25,
    "finetune_lr": 0.01,
}
"""What a network of Ultralytics takes where nothing is said: its training is another one."""


class Recipe(RunCommand):
    """The whole way; `recipe.yaml` is this class written down. It always has a target."""

    @model_validator(mode="before")
    @classmethod
    def _of_its_kind(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not str(values.get("model")).startswith("yolo:"):
            return values
        return {**_YOLO, **values}

    @model_validator(mode="before")
    @classmethod
    def _some_target(cls, values: Any) -> Any:
        if not isinstance(values, dict) or any(values.get(name) is not None for name in TARGETS):
            return values
        return {**values, "ratio": 0.3}


def merged(base: dict[str, Any], given: Options, source: str) -> Recipe:
    """Return the recipe `base` with what was `given` explicitly, which goes first.

    A target that is given replaces the one in `base`, of whatever kind.

    Raises:
        NamPrunerError: see `parse`.
    """
    changes = given.model_dump(exclude_unset=True)
    if any(changes.get(name) is not None for name in TARGETS):
        # a target in time brings rounding of its own
        dropped = (*TARGETS, "round_to") if changes.get("latency") is not None else TARGETS
        base = {key: value for key, value in base.items() if key not in dropped}
    return parse(Recipe, {**base, **changes}, source)


def read_recipe(path: Path) -> Recipe:
    """Read a `recipe.yaml`.

    Raises:
        NamPrunerError: the file is missing, is not a YAML mapping, or holds a wrong option.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NamPrunerError(f"recipe {path}: {error.strerror}; give a YAML file") from None
    except yaml.YAMLError as error:
        raise NamPrunerError(f"recipe {path}: not valid YAML ({error})") from None
    if not isinstance(values, dict):
        raise NamPrunerError(f"recipe {path}: holds no `option: value` lines")
    return parse(Recipe, values, f"recipe {path}")
