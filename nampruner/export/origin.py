"""How a network was built before anything was cut: the module, and the expression that makes it."""

import ast
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nampruner import models
from nampruner.errors import NamPrunerError
from nampruner.export.code import call_of
from nampruner.lineage import Lineage
from nampruner.models import resnet
from nampruner.models.user import user_call

COPY = "original"
"""Name under which a user's file goes with `model.py`."""


@dataclass(frozen=True)
class Origin:
    """A network as it was before NAM and before any cut, and how to make it again."""

    module: nn.Module
    call: str
    """The expression that builds it."""
    imports: tuple[str, ...] = ()
    """Statements that `call` needs."""
    carried: tuple[Any, ...] = ()
    """Functions and classes whose source goes into `model.py`."""
    packages: tuple[str, ...] = ()
    """What must be installed, beside torch and safetensors."""
    file: Path | None = None
    """A user's file that is copied."""


def origin_of(past: Lineage, original: str | None) -> Origin:
    """Build the original that `past` records, or that the caller names.

    Raises:
        NamPrunerError: nobody says how it was built, it is user code that nobody trusts, or it
            cannot be built so.
    """
    source = original or past.source
    if source is None:
        raise NamPrunerError(
            "nobody recorded how this network was built before the cut; pass original=, the "
            "expression that builds it, such as \"timm.create_model('resnet18', num_classes=10)\", "
            "or export onnx or pt2"
        )
    facts: dict[str, Any] = dict(past.arguments)
    if models.runs_user_code(source):
        return _from_user(source, facts, trust=original is not None)
    if original is not None and original != past.source:
        return _from_expression(original)
    spec = models.parse_spec(models.parse_spec(source).without(models.OF_WEIGHTS))
    if spec.family == "":
        return _built_in(spec, facts)
    if spec.family == "yolo":
        raise NamPrunerError(
            f"{source} cannot go into a model.py; nampruner.yolo.save(model, 'x.pt') gives a file "
            "that Ultralytics opens without nampruner"
        )
    return _from_timm(spec, facts) if spec.family == "timm" else _from_torchvision(spec, facts)


def _built_in(spec: models.Spec, facts: dict[str, Any]) -> Origin:
    blocks = models.BUILT_IN[spec.name]
    arguments = {key: facts[key] for key in ("num_classes", "in_channels")} | spec.arguments
    return Origin(
        _built(spec, facts),
        call_of("ResNet", blocks, **arguments),
        ("from torchvision.models.resnet import BasicBlock",),
        (resnet._stage, resnet.ResNet),
        ("torchvision",),
    )


def _from_timm(spec: models.Spec, facts: dict[str, Any]) -> Origin:
    import timm

    module = _built(spec, facts)
    arguments = {"num_classes": facts["num_classes"], "in_chans": facts["in_channels"]}
    settings = timm.models.get_pretrained_cfg(spec.name, allow_unregistered=True)
    if settings is not None and settings.fixed_input_size:
        try:
            sized = {**arguments, "img_size": facts["image_size"]}
            timm.create_model(spec.name, **sized, **spec.arguments)
            arguments = sized
        except TypeError:
            pass  # as `models.build` does: some do not take it
    call = call_of("timm.create_model", spec.name, **arguments, **spec.arguments)
    return Origin(module, call, ("import timm",), packages=("timm",))


def _from_torchvision(spec: models.Spec, facts: dict[str, Any]) -> Origin:
    from torchvision.models import get_model_builder

    module = _built(spec, facts)
    arguments = {"num_classes": facts["num_classes"], **spec.arguments}
    if "weights_backbone" in signature(get_model_builder(spec.name)).parameters:
        arguments["weights_backbone"] = None
    call = call_of("get_model", spec.name, **arguments)
    statement = "from torchvision.models import get_model"
    return Origin(module, call, (statement,), packages=("torchvision",))


def _built(spec: models.Spec, facts: dict[str, Any]) -> nn.Module:
    return models.build(spec.text, **facts, trust_source=False)


def _from_user(source: str, facts: dict[str, Any], *, trust: bool) -> Origin:
    if not trust:
        raise NamPrunerError(
            f"the export would run code from {source!r}; read it, then pass original={source!r} "
            "(on the command line: --trust-source)"
        )
    spec = models.parse_spec(source)
    with user_call(source, trust_source=True, **facts) as (function, arguments):
        module = function(**arguments)
    if models.is_user_file(source):
        call = call_of(f"{COPY}.{spec.name}", **arguments)
        return Origin(module, call, file=Path(spec.family))
    call = call_of(f"{spec.family}.{spec.name}", **arguments)
    return Origin(module, call, (f"import {spec.family}",), packages=(spec.family.split(".")[0],))


def _from_expression(text: str) -> Origin:
    """Build what the caller's expression says, and import what it calls."""
    try:
        body = ast.parse(text, mode="eval").body
    except SyntaxError:
        body = None
    dotted = ast.unparse(body.func) if isinstance(body, ast.Call) else ""
    package = "torch" if dotted.startswith("nn.") else _importable(dotted)
    if package is None:
        raise NamPrunerError(
            f"original = {text!r}; give a call of something that can be imported, such as "
            "package.module.Net(width=8)"
        )
    root = package.partition(".")[0]
    # the caller wrote this code; no checkpoint ever did
    module = eval(text, {"torch": torch, "nn": nn, root: import_module(root)})
    if not isinstance(module, nn.Module):
        raise NamPrunerError(f"original = {text!r} gives a {type(module).__name__}, no nn.Module")
    return Origin(module, text.strip(), (f"import {package}",), packages=(root,))


def _importable(dotted: str) -> str | None:
    """Return the longest part of a dotted name that is a module."""
    parts = dotted.split(".")
    for stop in range(len(parts) - 1, 0, -1):
        try:
            import_module(".".join(parts[:stop]))
        except ModuleNotFoundError:
            continue
        return ".".join(parts[:stop])
    return None
