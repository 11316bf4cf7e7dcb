"""NAM as a row of a model YAML: `- [-1, 1, NAM, []]`."""

from typing import Any

import torch
from torch import Tensor, nn

from nampruner.errors import NamPrunerError
from nampruner.nam import NAM
from nampruner.yolo.library import tasks

_GAMMA = "nam.channel.bn.weight"


class NAMRow(nn.Module):
    """gain · M_c(x) on x [N, C, H, W], built when it first meets a map or a state dict.

    A module that Ultralytics does not know is not told its number of channels. A detector runs once
    while it is built; `nampruner.yolo.build` does the same for a classifier. Channel attention
    alone: spatial λ would fix the input size, which changes between training and validation.
    """

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        if not isinstance(gain, int | float):
            raise NamPrunerError(
                f"NAM row: [{gain!r}]; write NAM, [] or NAM, [gain], gain a number"
            )
        self.gain = float(gain)
        self.nam: NAM | None = None

    def forward(self, x: Tensor) -> Tensor:
        nam = self.nam or self._build(x.shape[1], x)
        gated: Tensor = nam(x)
        return gated

    def _build(self, channels: int, like: Tensor) -> NAM:
        nam = NAM(channels, 1, 1, parts="channel", gain=self.gain)
        # the constants with which Ultralytics sets up every BN of a network it builds
        norm: Any = nam.channel.get_submodule("bn")
        norm.eps, norm.momentum = 1e-3, 0.03
        self.nam = nam.to(like.device).train(self.training)
        return nam

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        gamma = state_dict.get(prefix + _GAMMA)
        if self.nam is None and gamma is not None:
            self._build(len(gamma), torch.empty(0))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def register() -> None:
    """Let model YAMLs name NAM in this process."""
    tasks.NAM = NAMRow


def insert_rows(layers: dict[str, Any]) -> dict[str, Any]:
    """Return the model description `layers` with a NAM row behind each layer that feeds the head.

    Layers that point at others by number are told their new ones; who read such a layer reads what
    NAM makes of it.
    """
    rows = [list(row) for row in (*layers["backbone"], *layers["head"])]
    sources = [_absolute(row[0], number) for number, row in enumerate(rows)]
    fed = sorted(set(sources[-1]))
    moved = [number + sum(layer <= number for layer in fed) for number in range(len(rows))]
    parts: dict[str, list[Any]] = {"backbone": [], "head": []}
    for number, row in enumerate(rows):
        if row[0] != -1:
            given = row[0] if isinstance(row[0], list) else [row[0]]
            pairs = zip(given, sources[number], strict=True)
            new = [-1 if old == -1 else moved[layer] for old, layer in pairs]
            row[0] = new if isinstance(row[0], list) else new[0]
        part = parts["backbone" if number < len(layers["backbone"]) else "head"]
        part.append(row)
        if number in fed:
            part.append([-1, 1, "NAM", []])
    return {**layers, **parts}


def _absolute(source: int | list[int], number: int) -> list[int]:
    given = source if isinstance(source, list) else [source]
    return [number + layer if layer < 0 else layer for layer in given]
