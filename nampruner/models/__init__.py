"""Build a network from a short text, with weights of anybody's.

`resnet20`, `timm:NAME?key=value`, `torchvision:NAME`, `yolo:NAME.yaml`, `file.py:function` or
`package.module:Class`.
What was asked for travels on the model as its lineage, so a checkpoint can build it again.

spec.py       the text taken apart          user.py      code of the user's, and who trusts it
libraries.py  built-in, timm, torchvision   weights.py   state dicts from files
"""

from pathlib import Path

from torch import nn

from nampruner.errors import NamPrunerError, did_you_mean
from nampruner.lineage import lineage, remember
from nampruner.models.libraries import FAMILIES, FORMS, from_library
from nampruner.models.resnet import BUILT_IN, ResNet
from nampruner.models.spec import OF_WEIGHTS, Spec, parse_spec
from nampruner.models.user import call_user_function, is_user_file, runs_user_code
from nampruner.models.weights import load_weights, read_weights

__all__ = [
    "BUILT_IN",
    "OF_WEIGHTS",
    "ResNet",
    "Spec",
    "build",
    "call_user_function",
    "is_user_file",
    "load_weights",
    "parse_spec",
    "read_weights",
    "runs_user_code",
]


def build(
    spec: str,
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    trust_source: bool = True,
    weights: str | Path | None = None,
) -> nn.Module:
    """Build the network `spec` names, for images [N, in_channels, image_size, image_size].

    `weights` is a file, see `load_weights`. The recorded lineage leaves all weights out: a
    checkpoint brings its own, and never asks for that file again.

    Raises:
        NamPrunerError: the name is unknown, an argument does not fit it, the source is a user's
            code that is not trusted, or the weights do not fit.
    """
    facts = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    parsed = parse_spec(spec)
    if runs_user_code(spec):
        model = call_user_function(spec, trust_source=trust_source, **facts)
    elif parsed.family in FAMILIES:
        model = from_library(parsed, facts)
    else:
        raise NamPrunerError(
            f"unknown model source {spec!r}; give {FORMS}.{did_you_mean(parsed.family, FAMILIES)}"
        )
    if not isinstance(model, nn.Module):
        raise NamPrunerError(f"model {spec!r} gave a {type(model).__name__}; give an nn.Module")
    if weights is not None:
        load_weights(model, weights)
    # what a .pt holds is built from its description; its weights come with the checkpoint
    source = lineage(model).source if parsed.family == "yolo" else parsed.without(OF_WEIGHTS)
    remember(model, source=source, arguments=facts)
    return model
