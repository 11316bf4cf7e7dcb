"""Build a network from a short text.

`resnet20`, `timm:NAME?key=value`, `torchvision:NAME` or `file.py:function`. What was asked for
travels on the model as its lineage, so a checkpoint can build it again.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from nampruner.errors import NamPrunerError, did_you_mean
from nampruner.lineage import remember

BUILT_IN = {"resnet20": 3, "resnet56": 9}
"""Name → residual blocks per stage: depth = 6n + 2."""

_WEIGHTS = {"pretrained", "weights", "weights_backbone", "checkpoint_path"}
_FOLLOW_THE_DATA = {"num_classes", "in_channels", "in_chans", "image_size", "img_size"}


class ResNet(nn.Module):
    """The CIFAR-style residual network (He et al. 2016, §4.2), of any width and input size.

    Three stages of `blocks` basic blocks with `width`, 2·`width` and 4·`width` channels; where a
    shape changes the shortcut is a 1×1 convolution and BN (option B). The names inside are
    torchvision's. Input [N, C, H, W], output [N, num_classes].
    """

    def __init__(self, blocks: int, *, num_classes: int, in_channels: int, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.fc(self.avgpool(features).flatten(1))
        return logits


def _stage(before: int, after: int, blocks: int, *, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or before != after:
        convolution = nn.Conv2d(before, after, 1, stride, bias=False)
        shortcut = nn.Sequential(convolution, nn.BatchNorm2d(after))
    first = BasicBlock(before, after, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(after, after) for _ in range(blocks - 1)))


@dataclass(frozen=True)
class Spec:
    """A source taken apart: `family:name?arguments`; family is empty for a built-in network."""

    text: str
    family: str
    name: str
    arguments: dict[str, Any]

    def without(self, keys: set[str]) -> str:
        """Return the text less the arguments named in `keys`."""
        base, _, query = self.text.partition("?")
        kept = [part for part in query.split("&") if part and part.partition("=")[0] not in keys]
        return f"{base}?{'&'.join(kept)}" if kept else base


def parse_spec(text: str) -> Spec:
    """Take `family:name?key=value&…` apart; values are read as YAML (`false`, `0.1`, `[2, 2]`).

    Raises:
        NamPrunerError: a piece after `?` is no `key=value`.
    """
    base, _, query = text.partition("?")
    family, _, name = base.rpartition(":")
    return Spec(
        text, family, name, dict(_argument(part, text) for part in query.split("&") if part)
    )


def _argument(part: str, text: str) -> tuple[str, Any]:
    key, equals, value = part.partition("=")
    if not key or not equals:
        raise NamPrunerError(f"{text!r}: {part!r} is no argument; write NAME?key=value&key=value")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise NamPrunerError(f"{text!r}: {value!r} is no YAML value; quote it") from None
    if isinstance(parsed, str):
        # YAML 1.1 reads 1e-3 as a word
        try:
            return key, float(parsed)
        except ValueError:
            pass
    return key, parsed


def is_user_file(text: str) -> bool:
    """Say whether `text` has the form `file.py:function`, with or without `?arguments`."""
    return parse_spec(text).family.endswith(".py")


def call_user_function(text: str, *, trust_source: bool, **offered: Any) -> Any:
    """Call `file.py:function?key=value` with what it accepts out of `offered`.

    Raises:
        NamPrunerError: the source is not trusted, or the file or the function is missing.
    """
    spec = parse_spec(text)
    if not trust_source:
        raise NamPrunerError(
            f"{text!r} would run code from {spec.family}; "
            "read that file, then allow it with --trust-source"
        )
    path = Path(spec.family)
    if not path.is_file():
        raise NamPrunerError(f"{text!r}: there is no file {path.resolve()}; give path.py:function")
    _refuse_shape(spec)
    with _importable(path.resolve().parent):
        function = _function(_load(path), spec.name)
        return function(**_accepted(function, offered), **spec.arguments)


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _load(path: Path) -> ModuleType:
    name = f"nampruner_user_{path.stem}"
    loader = SourceFileLoader(name, str(path))
    module = module_from_spec(ModuleSpec(name, loader, origin=str(path)))
    module.__file__ = str(path)
    # dataclasses and pickle look a class up in sys.modules
    sys.modules[name] = module
    loader.exec_module(module)
    return module


def _function(module: ModuleType, name: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise NamPrunerError(
            f"{module.__file__} has no function {name!r}; give one it defines."
            f"{did_you_mean(name, known)}"
        )
    return function  # type: ignore[no-any-return]


def _accepted(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return offered
    return {key: value for key, value in offered.items() if key in parameters}


def _refuse_shape(spec: Spec) -> None:
    clash = sorted(_FOLLOW_THE_DATA & set(spec.arguments))
    if clash:
        raise NamPrunerError(f"{spec.text!r}: {', '.join(clash)} follows the data; leave it out")


def build(
    spec: str, *, num_classes: int, in_channels: int, image_size: int, trust_source: bool = True
) -> nn.Module:
    """Build the network `spec` names, for images [N, in_channels, image_size, image_size].

    The recorded lineage leaves pretrained weights out: a checkpoint brings its own.

    Raises:
        NamPrunerError: the name is unknown, an argument does not fit it, or the source is a user's
            file that is not trusted.
    """
    facts = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    parsed = parse_spec(spec)
    if is_user_file(spec):
        model = call_user_function(spec, trust_source=trust_source, **facts)
    else:
        model = _from_library(parsed, facts)
    if not isinstance(model, nn.Module):
        raise NamPrunerError(f"model {spec!r} gave a {type(model).__name__}; give an nn.Module")
    remember(model, source=parsed.without(_WEIGHTS), arguments=facts)
    return model


def _from_library(spec: Spec, facts: dict[str, int]) -> Any:
    makers = {"": _built_in, "timm": _from_timm, "torchvision": _from_torchvision}
    if spec.family not in makers:
        raise NamPrunerError(
            f"unknown model source {spec.text!r}; give {', '.join(BUILT_IN)}, timm:NAME, "
            f"torchvision:NAME or file.py:function.{did_you_mean(spec.family, makers)}"
        )
    _refuse_shape(spec)
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


def _unknown(spec: Spec) -> NamPrunerError:
    known = _known(spec.family)
    close = get_close_matches(spec.name, known, n=3, cutoff=0.5)
    hint = f" Did you mean {', '.join(known[name] for name in close)}?" if close else ""
    return NamPrunerError(
        f"unknown model {spec.text!r}; give {', '.join(BUILT_IN)}, timm:NAME, torchvision:NAME "
        f"or file.py:function.{hint}"
    )


def _known(family: str) -> dict[str, str]:
    """Return bare name → spec, of one family or, for the empty one, of all."""
    import timm
    from torchvision.models import list_models

    names = {"torchvision": list_models(), "timm": timm.list_models()}
    chosen = [family] if family else ["torchvision", "timm"]
    known = {name: f"{source}:{name}" for source in chosen for name in names[source]}
    return known if family else known | {name: name for name in BUILT_IN}
