"""A network as a short text: `family:name?key=value&…`."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import yaml

from nampruner.errors import NamPrunerError

OF_WEIGHTS = frozenset(
    {
        *("pretrained", "weights", "weights_backbone", "checkpoint_path"),
        *("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_backbone", "cache_dir"),
    }
)
"""Arguments that fetch or read weights; a checkpoint brings its own."""
_FOLLOW_THE_DATA = {"num_classes", "in_channels", "in_chans", "image_size", "img_size"}


@dataclass(frozen=True)
class Spec:
    """A source taken apart: `family:name?arguments`; family is empty for a built-in network."""

    text: str
    family: str
    name: str
    arguments: dict[str, Any]

    def without(self, keys: Collection[str]) -> str:
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


def refuse_shape(spec: Spec) -> None:
    """See that no argument says what the data decides.

    Raises:
        NamPrunerError: one does.
    """
    clash = sorted(_FOLLOW_THE_DATA & set(spec.arguments))
    if clash:
        raise NamPrunerError(f"{spec.text!r}: {', '.join(clash)} follows the data; leave it out")
