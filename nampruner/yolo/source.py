"""YOLO networks from names: `yolov8n.yaml`, `yolo11s-seg.yaml`, `yolov8n-nam.yaml`, a YAML file."""

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nampruner.errors import NamPrunerError, did_you_mean
from nampruner.lineage import remember
from nampruner.modes import evaluating
from nampruner.yolo.library import DEFAULT_CFG_DICT, ROOT, YAML, quiet, tasks
from nampruner.yolo.network import TASKS, head_of
from nampruner.yolo.row import insert_rows, register

_NAM = "-nam"
_CLASSES = {
    "detect": "DetectionModel",
    "segment": "SegmentationModel",
    "pose": "PoseModel",
    "obb": "OBBModel",
    "classify": "ClassificationModel",
}
_OWN = re.compile(r"yolov?\d")
_SCALED = re.compile(r"^(yolov?\d+)[nslmx](?=$|-)")
_ACTIVATION = re.compile(r"(torch\.)?nn\.[A-Za-z0-9]+\([\w=., -]*\)")


def build(
    name: str, *, num_classes: int, in_channels: int = 3, kpt_shape: list[int] | None = None
) -> nn.Module:
    """Build the network that `name` describes, with random weights, in train mode.

    `name` is one that Ultralytics knows, with a scale (`yolov8n.yaml`, `yolo11s-seg.yaml`), the
    same with `-nam` at its end (a NAM row before each input of the head), or a YAML file.
    `kpt_shape` is that of the data, for pose: [points, 2 or 3].

    Raises:
        NamPrunerError: no such description, or it asks for what no network needs.
    """
    register()
    layers = describe(name)
    task = _task(layers, name)
    given: dict[str, Any] = {"ch": in_channels, "nc": num_classes, "verbose": False}
    if kpt_shape is not None:
        if task != "pose":
            raise NamPrunerError(f"{name!r} finds no keypoints: leave kpt_shape out")
        given["data_kpt_shape"] = tuple(kpt_shape)
    with quiet():
        network: Any = getattr(tasks, _CLASSES[task])(layers, **given)
    network.task, network.args = task, {**DEFAULT_CFG_DICT, "model": name, "task": task}
    model: nn.Module = network
    if task == "classify" and any(row[2] == "NAM" for row in _rows(layers)):
        with evaluating(model), torch.no_grad():
            model(torch.zeros(1, in_channels, 64, 64))
    end = f"?kpt_shape={[*kpt_shape]}".replace(" ", "") if kpt_shape is not None else ""
    facts = {"num_classes": num_classes, "in_channels": in_channels}
    remember(model, source=f"yolo:{name}{end}", arguments=facts)
    return model


def describe(name: str) -> dict[str, Any]:
    """Return what a model YAML holds, and its name and scale.

    Raises:
        NamPrunerError: no such description, or it asks for what no network needs.
    """
    path = Path(name)
    known = {file.stem: file for file in (ROOT / "cfg" / "models").rglob("yolo*.yaml")}
    stem = path.name.removesuffix(".yaml").removesuffix(".yml")
    plain = stem.removesuffix(_NAM)
    file = known.get(plain) or known.get(_SCALED.sub(r"\1", plain))
    if path.is_file() and (path.parent != Path() or file is None):
        layers = YAML.load(path)
        plain = stem
    elif file is None or path.name != name or path.suffix not in (".yaml", ".yml"):
        raise NamPrunerError(
            f"there is no YOLO network {name!r}; give a name such as yolov8n.yaml or "
            f"yolo11n-seg.yaml, or a file: path/to/model.yaml, path/to/weights.pt"
            f"{did_you_mean(plain, [stem for stem in known if _OWN.match(stem)])}"
        )
    else:
        layers = YAML.load(file)
    _check(layers, name)
    if plain != stem:
        layers = insert_rows(layers)
    return {**layers, "scale": tasks.guess_model_scale(plain), "yaml_file": path.name}


def write_nam_yaml(name: str, folder: str | Path = ".") -> Path:
    """Write `NAME-nam.yaml`, a model YAML with NAM, for `YOLO(…)` in a program of one's own.

    From the description that is installed with Ultralytics, so it has all scales: of
    `yolov8-nam.yaml`, `YOLO("yolov8n-nam.yaml")` takes scale n after `import nampruner.yolo`.

    Raises:
        NamPrunerError: there is no such description.
    """
    stem = Path(name).name.removesuffix(".yaml").removesuffix(_NAM)
    layers = describe(f"{stem}{_NAM}.yaml")
    target = Path(folder) / (_SCALED.sub(r"\1", stem) + f"{_NAM}.yaml")
    for key in ("scale", "yaml_file"):
        layers.pop(key)
    target.parent.mkdir(parents=True, exist_ok=True)
    YAML.save(target, layers)
    return target


def source_of(model: nn.Module) -> str | None:
    """Return the spec that builds this architecture again, or None if no known name does."""
    network: Any = model
    layers = dict(network.yaml)
    name = str(layers.get("yaml_file", ""))
    end, shape = "", getattr(head_of(model), "kpt_shape", None)
    if shape is not None:
        end = f"?kpt_shape=[{','.join(str(int(n)) for n in shape)}]"
    try:
        described = describe(Path(name).name)
    except NamPrunerError:
        return None
    rows = [described[part] for part in ("backbone", "head")]
    same = rows == [layers.get(part) for part in ("backbone", "head")]
    return f"yolo:{Path(name).name}{end}" if same else None


def _rows(layers: dict[str, Any]) -> list[list[Any]]:
    return [*layers["backbone"], *layers["head"]]


def _task(layers: dict[str, Any], name: str) -> str:
    task = tasks.guess_model_task(layers)
    if task not in TASKS:
        raise NamPrunerError(f"{name!r} is for {task}; nampruner prunes {', '.join(TASKS)}")
    return str(task)


def _check(layers: Any, name: str) -> None:
    """See that a description only names layers: Ultralytics would call whatever it names."""
    if not isinstance(layers, dict) or not {"backbone", "head", "nc"} <= set(layers):
        raise NamPrunerError(f"{name!r} is no model YAML: it needs nc, backbone and head")
    for row in _rows(layers):
        if not isinstance(row, list) or len(row) != 4 or not _is_layer(str(row[2])):
            raise NamPrunerError(
                f"{name!r}: {row!r} is no layer; a row is [from, repeats, module, arguments], and "
                "module a torch.nn class or one of Ultralytics"
            )
    act = layers.get("activation")
    if act is not None and not _ACTIVATION.fullmatch(str(act)):
        raise NamPrunerError(f"{name!r}: activation {act!r}; write it as nn.SiLU()")


def _is_layer(module: str) -> bool:
    if module.startswith("torchvision.ops."):
        return module.removeprefix("torchvision.ops.").isidentifier()
    home = nn if module.startswith("nn.") else tasks
    found = getattr(home, module.removeprefix("nn."), None)
    return inspect.isclass(found) and issubclass(found, nn.Module)
