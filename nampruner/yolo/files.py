"""YOLO networks in `.pt` files that plain Ultralytics opens, and in pickle-free folders.

A pruned network's file has a tripwire: stock training would rebuild the network from its YAML,
and so grow everything back that was cut, without a word. The first row of that YAML names no layer
but says what to do instead. Prediction, validation and export do not read it.
"""

import copy
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from nampruner import checkpoint
from nampruner.errors import NamPrunerError
from nampruner.lineage import Lineage, lineage, remember
from nampruner.nam import NAM, ChannelNAM
from nampruner.nam.attach import apply_nam
from nampruner.yolo.library import DEFAULT_CFG_DICT, quiet, tasks
from nampruner.yolo.network import TASKS, channels_of, check_whole, classes_of, head_of
from nampruner.yolo.row import NAMRow
from nampruner.yolo.source import source_of

PENALTY = "nampruner_penalty"
"""Attribute of a network in training: what `nampruner.yolo.train` was asked for, plain values."""
_LINEAGE = "nampruner_lineage"
_FIRST = "nampruner_first_module"
_STOP = (
    "this network was changed by nampruner, and stock training would rebuild it from its YAML "
    "without that change. Train it with nampruner.yolo.train(nampruner.yolo.load('FILE.pt'), "
    "data=...), or with YOLO('FILE.pt').train(trainer=nampruner.yolo.trainer('TASK'), ...)"
)


def save(model: nn.Module, path: str | Path) -> Path:
    """Write `model` to a `.pt` file for Ultralytics, or to a folder without pickle.

    A `.pt` without NAM needs no nampruner to predict, val or export. Weights keep their dtype.

    Raises:
        NamPrunerError: the name has another ending; for a folder see `nampruner.save`.
    """
    path = Path(path)
    if not path.suffix:
        names: Any = model.names
        return checkpoint.save(model, path, classes=tuple(names[i] for i in sorted(names)))
    if path.suffix != ".pt":
        raise NamPrunerError(f"{path}: give a name that ends in .pt, or a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {
        "model": packed(model),
        "ema": None,
        "epoch": -1,
        "optimizer": None,
        "train_args": {"task": model.task, "imgsz": _image_size(model)},
        "date": datetime.now().astimezone().isoformat(),
        "license": "AGPL-3.0 (https://ultralytics.com/license)",
    }
    torch.save(entry, path)
    return path


def packed(model: nn.Module) -> nn.Module:
    """Return a copy whose pickle needs nothing of nampruner beyond NAM, with the tripwire set."""
    slim: Any = copy.deepcopy(model)
    history = lineage(slim)
    vars(slim).pop("_nampruner_lineage", None)
    setattr(slim, _LINEAGE, history.model_dump_json())
    slim.criterion = None
    slim.args = dict(slim.args if isinstance(slim.args, dict) else vars(slim.args))
    if history.plans or history.nam:
        slim.yaml = copy.deepcopy(slim.yaml)
        first = slim.yaml["backbone"][0]
        slim.yaml[_FIRST], first[2] = first[2], _STOP.replace("TASK", slim.task)
    network: nn.Module = slim
    return network


def load(
    path: str | Path, *, num_classes: int | None = None, in_channels: int | None = None
) -> nn.Module:
    """Read a network from a `.pt` file or a folder: float32, eval mode, everything trainable.

    A `.pt` is read without running code: only layers of torch, Ultralytics and nampruner are let
    in. Nothing is ever downloaded. `num_classes` and `in_channels` are what it must have.

    Raises:
        NamPrunerError: there is no such file, it holds something else, or a fused or quantized
            network, or one for other data.
    """
    model = _opened(Path(path))
    for what, has, wants in (
        ("classes", classes_of(model), num_classes),
        ("channels", channels_of(model), in_channels),
    ):
        if wants is not None and has != wants:
            raise NamPrunerError(misfit(has, what, wants))
    return model


def describe_export(model: nn.Module, image_size: int) -> dict[str, str]:
    """Return what an exported file must say for Ultralytics to run it, by `imgsz=image_size`."""
    network: Any = model
    said: dict[str, Any] = {
        "task": network.task,
        "stride": int(max(network.stride)),
        "batch": 1,
        "imgsz": [image_size, image_size],
        "names": dict(network.names),
        "channels": channels_of(model),
        "end2end": bool(getattr(network, "end2end", False)),
        "kpt_shape": list(getattr(head_of(model), "kpt_shape", ())),
    }
    return {key: str(value) for key, value in said.items() if value != []}


def misfit(has: int, what: str, wants: int) -> str:
    """Return the message for a network that was made for other data."""
    return (
        f"the network has {has} {what}, the data {wants}; give the data it was made for, or train "
        "a network for this data before it is pruned"
    )


def _opened(path: Path) -> nn.Module:
    if not path.is_dir():
        return _network(entry_of(path), path)
    model: Any = checkpoint.load(path)
    classes = checkpoint.read(path).classes
    if classes:
        model.names = dict(enumerate(classes))
    network: nn.Module = model
    return network


def _network(entry: dict[str, Any], path: Path) -> nn.Module:
    """Take the network out of what a `.pt` file holds."""
    if entry.get("modelopt"):
        raise NamPrunerError(
            f"{path} is quantized (QAT); give the checkpoint from before, and quantize the slim "
            "network at export"
        )
    found: Any = entry.get("ema") or entry.get("model")
    if not hasattr(found, "yaml"):
        raise NamPrunerError(f"{path} holds no YOLO network; give a .pt that Ultralytics trained")
    found.float().eval()
    found.task = getattr(found, "task", None) or tasks.guess_model_task(found)
    if found.task not in TASKS:
        raise NamPrunerError(f"{path} is for {found.task}; nampruner prunes {', '.join(TASKS)}")
    found.args = {**DEFAULT_CFG_DICT, **entry.get("train_args", {}), "task": found.task}
    check_whole(found)
    for name, parameter in found.named_parameters():
        # dfl holds the numbers 0, 1, 2 …, which are never trained
        parameter.requires_grad_(".dfl." not in name)
    _unpack(found, path)
    network: nn.Module = found
    return network


def _unpack(model: Any, path: Path) -> None:
    layers = model.yaml
    if _FIRST in layers:
        layers["backbone"][0][2] = layers.pop(_FIRST)
    vars(model).pop(PENALTY, None)
    text = vars(model).pop(_LINEAGE, None)
    facts = {"num_classes": classes_of(model), "in_channels": channels_of(model)}
    if text is None:
        remember(model, source=source_of(model), arguments=facts)
        return
    try:
        remember(model, **dict(Lineage.model_validate_json(text)))
    except ValidationError as error:
        raise NamPrunerError(f"{path}: what nampruner wrote is damaged; save it again") from error


def entry_of(path: Path) -> dict[str, Any]:
    """Return what a `.pt` file holds, read without running code.

    Raises:
        NamPrunerError: it is not there, or holds what is not let in.
    """
    if not path.is_file() or path.suffix != ".pt":
        raise NamPrunerError(
            f"there is no YOLO checkpoint {path}; give a .pt file that is there (nothing is "
            "downloaded), or build from a name: yolov8n.yaml"
        )
    ours: list[Any] = [NAM, ChannelNAM, NAMRow, apply_nam]
    try:
        with quiet(), torch.serialization.safe_globals(ours):
            entry, _ = tasks.torch_safe_load(path, safe_only=True)
    except Exception as error:  # a damaged or hostile pickle fails in any way there is
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise NamPrunerError(
            f"{path} cannot be read without running code from it ({first}); give a .pt that "
            "Ultralytics or nampruner.yolo.save wrote"
        ) from error
    return dict(entry)


def _image_size(model: nn.Module) -> int:
    return int(lineage(model).arguments.get("image_size") or 640)
