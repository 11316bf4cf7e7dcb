"""The boxes that an exported detector's outputs come to: by Ultralytics' own suppression."""

from typing import Any

import torch
from torch import nn

from nampruner.export.boxes import LEAST_SCORE, MOST_BOXES
from nampruner.latency import Array
from nampruner.yolo.library import non_max_suppression

_OVERLAP = 0.7
"""As in Ultralytics' prediction."""
_PATIENCE_S = 60.0
"""Per image; what takes longer would be dropped without a word."""


def boxes_of(network: nn.Module, outputs: list[Array]) -> list[Array]:
    """Return the boxes of each image [n, 6 or more]: x1, y1, x2, y2, score, class, …

    Of a network that picks by itself, all it gives. Rotated ones are given upright: x, y, width and
    height as if the angle were 0; it is among what follows.
    """
    known: Any = network
    if picks(network):
        return [image.copy() for image in outputs[0]]
    rotated = known.task == "obb"
    found = non_max_suppression(
        torch.from_numpy(outputs[0].copy()),
        conf_thres=LEAST_SCORE,
        iou_thres=_OVERLAP,
        max_det=MOST_BOXES,
        nc=int(known.model[-1].nc),
        rotated=rotated,
        max_time_img=_PATIENCE_S,
    )
    return [_upright(image.numpy()) if rotated else image.numpy() for image in found]


def picks(network: nn.Module) -> bool:
    """Whether the head picks boxes by itself and sorts them by score."""
    return bool(getattr(network, "end2end", False))


def _upright(boxes: Array) -> Array:
    """Turn centre and size into corners."""
    found, half = boxes.copy(), boxes[:, 2:4] / 2
    found[:, :2], found[:, 2:4] = boxes[:, :2] - half, boxes[:, :2] + half
    return found
