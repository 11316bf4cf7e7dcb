"""Boxes: whether two runtimes find the same ones, beside what their outputs are apart.

Outputs that are near can still come to other boxes: a score near the threshold, or two boxes that
overlap with scores nearly alike, of which one goes. Such a tie is told apart from a difference by
the scores in it.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment
from torch import nn

from nampruner.errors import ParityError
from nampruner.latency import Array
from nampruner.plan import BoxParity

LEAST_SCORE = 0.05
"""Of a box that counts; lower than what anybody predicts with."""
MOST_BOXES = 300
"""Of one image."""
_SAME = 0.9
"""Two boxes with a larger intersection over union are taken for one."""
_RIVALS = 0.5
"""… and with a larger one than this only one of them may stay."""
_MOST_TIES = 0.25
"""Of the boxes of both sides; a network without training comes to half of it."""


class Detector(nn.Module):
    """A network that finds boxes, and says which ones its outputs come to."""

    boxed = True
    """Whether its outputs are boxes."""
    ordered = True
    """Whether the place of an output means something; where boxes are sorted by score it does not.
    """

    def picked(self, outputs: list[Array]) -> list[Array]:
        """Return the boxes of each image [n, 6 or more]: x1, y1, x2, y2, score, class, …

        Those with a score of at least `LEAST_SCORE`, or if outputs are not `ordered` all of them.
        """
        raise NotImplementedError


class BoxGaps:
    """Differences between the boxes of two runtimes, gathered image by image."""

    def __init__(self, *, thresholded: bool) -> None:
        self._thresholded = thresholded
        self._boxes = self._pairs = 0
        self._iou: list[float] = []
        self._shift: list[float] = []
        self._score: list[float] = []
        self._ties: list[float] = []

    def add(self, want: Array, have: Array) -> tuple[Array, Array]:
        """Take in the boxes of one image from both sides; return those that are the same, paired.

        Boxes are [n, 6 or more]: x1, y1, x2, y2, score, class, …
        """
        overlap = overlaps(want, have)
        ours, theirs = _pairs(want, have, overlap)
        mine, its = want[ours], have[theirs]
        self._boxes += len(want)
        self._pairs += len(mine)
        self._iou += overlap[ours, theirs].tolist()
        self._shift += np.abs(mine[:, :4] - its[:, :4]).max(1, initial=0).tolist()
        self._score += np.abs(mine[:, 4] - its[:, 4]).tolist()
        self._ties += self._left(want, have, overlap, ours)
        self._ties += self._left(have, want, overlap.T, theirs)
        return mine, its

    def _left(self, boxes: Array, others: Array, overlap: Array, paired: Array) -> list[float]:
        """Return for every box that has no pair how far its score is from a tie."""
        full = len(others) >= MOST_BOXES or not self._thresholded
        cut = others[:, 4].min(initial=np.inf) if full else LEAST_SCORE
        found = []
        for index in set(range(len(boxes))) - set(paired.tolist()):
            rivals = others[overlap[index] >= _RIVALS, 4]
            gaps = np.abs(np.append(rivals, cut) - boxes[index, 4])
            found.append(float(gaps.min()))
        return found

    def parity(self) -> BoxParity:
        """Return the worst of everything."""
        return BoxParity(
            boxes=self._boxes,
            pairs=self._pairs,
            ties=len(self._ties),
            worst_iou=min(self._iou, default=1.0),
            worst_shift=max(self._shift, default=0.0),
            worst_score=max(self._score, default=0.0),
            worst_tie=max(self._ties, default=0.0),
        )


def overlaps(first: Array, second: Array) -> Array:
    """Return the intersection over union of boxes [n, ≥ 4] and [m, ≥ 4] as [n, m]."""
    a, b = first[:, None, :4].astype(np.float64), second[None, :, :4].astype(np.float64)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    common = sides.clip(0).prod(-1)
    whole = sum((x[..., 2:] - x[..., :2]).clip(0).prod(-1) for x in (a, b)) - common
    near = np.abs(a - b).max(-1, initial=0) < 1
    found: Array = np.where(whole > 0, common / np.where(whole > 0, whole, 1), near)
    return found


def _pairs(want: Array, have: Array, overlap: Array) -> tuple[Array, Array]:
    """Return the indices of boxes of one class that are one and the same, nearest scores first."""
    alike = want[:, None, 5] == have[None, :, 5]
    apart = np.abs(want[:, None, 4] - have[None, :, 4])
    ours, theirs = linear_sum_assignment(1 - overlap + apart + 2 * ~alike)
    same = alike[ours, theirs] & (overlap[ours, theirs] >= _SAME)
    return ours[same], theirs[same]


def require_boxes(found: BoxParity, tolerance: float, what: str) -> None:
    """See that the boxes are the same, but for ties; `tolerance` is that of the outputs.

    Raises:
        ParityError: they are not; `what` names the runtime.
    """
    least, most = max(_SAME, 1 - 25 * tolerance), max(1e-3, tolerance)
    far = found.worst_score > most or found.worst_tie > most
    # each side may have one box more
    many = found.ties > max(2, _MOST_TIES * 2 * found.boxes)
    if found.worst_iou < least or far or many:
        raise ParityError(
            f"{what} and PyTorch find other boxes: of {found.boxes}, {found.pairs} are the same, "
            f"with an overlap of at least {found.worst_iou:.3f} ({least:.3f} is asked) and scores "
            f"up to {found.worst_score:.2g} apart ({most:.2g} is allowed); {found.ties} have no "
            f"counterpart, by up to {found.worst_tie:.2g} of score. Nothing was written"
        )
