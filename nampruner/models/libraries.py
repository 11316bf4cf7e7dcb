"""Networks by name: the built-in ones, timm's and torchvision's."""

import inspect
from difflib import get_close_matches
from typing import Any

from torch import nn

from nampruner.errors import NamPrunerError
from nampruner.models.resnet import BUILT_IN, ResNet
from nampruner.models.spec import Spec, refuse_shape

FAMILIES = ("", "timm", "torchvision", "yolo")
FORMS = (
    f"{', '.join(BUILT_IN)}, timm:NAME, torchvision:NAME, yolo:NAME.yaml, yolo:FILE.pt, "
    "file.py:function or package.module:Class"
)
"""What a spec may look like, for messages."""


def from_library(spec: Spec, facts: dict[str, int]) -> Any:
    """Build a built-in network, or one of timm or torchvision.

    Raises:
        NamPrunerError: the name is unknown, or an argument does not fit it.
    """
    makers = {
        "": _built_in,
        "timm": _from_timm,
        "torchvision": _from_torchvision,
        "yolo": _from_yolo,
    }
    refuse_shape(spec)
    try:
        return makers[spec.family](spec, facts)
    except NamPrunerError:
        raise
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        # what a library says about a wrong argument or a failed download is the best there is
        raise NamPrunerError(f"model {spec.text!r} cannot be built: {error}") from error


def _built_in(spec: Spec, facts: dict[str, int]) -> nn.Module:
    if spec.name not in BUILT_IN:
        raise _unknown(spec)
    width = spec.arguments.get("width", 16)
    unknown = sorted(set(spec.arguments) - {"width"})
    if unknown or not isinstance(width, int) or width < 1:
        raise NamPrunerError(
            f"model {spec.text!r}: {spec.name} takes one argument, width, a number of channels ≥ 1"
        )
    classes, channels = facts["num_classes"], facts["in_channels"]
    return ResNet(BUILT_IN[spec.name], num_classes=classes, in_channels=channels, width=width)


def _from_timm(spec: Spec, facts: dict[str, int]) -> Any:
    import timm

    if not timm.is_model(spec.name.partition(".")[0]):
        raise _unknown(spec)
    given = {"num_classes": facts["num_classes"], "in_chans": facts["in_channels"]}
    settings = timm.models.get_pretrained_cfg(spec.name, allow_unregistered=True)
    if settings is None or not settings.fixed_input_size:
        return timm.create_model(spec.name, **given, **spec.arguments)
    try:
        sized = {**given, "img_size": facts["image_size"]}
        return timm.create_model(spec.name, **sized, **spec.arguments)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(spec.name, **given, **spec.arguments)


def _from_torchvision(spec: Spec, facts: dict[str, int]) -> Any:
    from torchvision.models import get_model, get_model_builder, list_models

    if spec.name not in list_models():
        raise _unknown(spec)
    if facts["in_channels"] != 3:
        raise NamPrunerError(
            f"model {spec.text!r} takes images of 3 channels, the data has {facts['in_channels']}; "
            "give the data in RGB, or take the network from timm, which fits any number"
        )
    arguments = dict(spec.arguments)
    if "weights_backbone" in inspect.signature(get_model_builder(spec.name)).parameters:
        # torchvision would download a backbone nobody asked for
        arguments.setdefault("weights_backbone", None)
    return get_model(spec.name, num_classes=facts["num_classes"], **arguments)


def _from_yolo(spec: Spec, facts: dict[str, int]) -> nn.Module:
    from nampruner import yolo

    given: dict[str, Any] = {key: facts[key] for key in ("num_classes", "in_channels")}
    if spec.name.endswith(".pt"):
        return yolo.load(spec.name, **given)
    return yolo.build(spec.name, **given, **spec.arguments)


def _unknown(spec: Spec) -> NamPrunerError:
    known = _known(spec.family)
    close = get_close_matches(spec.name, known, n=3, cutoff=0.5)
    hint = f" Did you mean {', '.join(known[name] for name in close)}?" if close else ""
    return NamPrunerError(f"unknown model {spec.text!r}; give {FORMS}.{hint}")


def _known(family: str) -> dict[str, str]:
    """Return bare name → spec, of one family or, for the empty one, of all."""
    import timm
    from torchvision.models import list_models

    names = {"torchvision": list_models(), "timm": timm.list_models()}
    chosen = [family] if family else ["torchvision", "timm"]
    known = {name: f"{source}:{name}" for source in chosen for name in names[source]}
    return known if family else known | {name: name for name in BUILT_IN}
