"""Who says whether INT8 is near enough to float: one judge for each kind of network."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from nampruner.errors import NamPrunerError, ParityError
from nampruner.export.onnx import runner_of
from nampruner.export.parity import Gaps
from nampruner.latency import Array
from nampruner.plan import Parity

Batch = tuple[Tensor, ...]

FELT = 32
"""Calibration inputs on which the error of one node alone is measured."""
WAY_OUT = (
    "Nothing was written; give more calibration inputs or ask for less, or export it as float or "
    "half"
)
_JUDGED = 512
"""Calibration inputs on which agreement is judged while nodes are chosen."""


class Judge(Protocol):
    """Compares INT8 files with the float one."""

    @property
    def stays(self) -> Sequence[str]:
        """Return globs of nodes `module/Op` that are float, with all that follows them."""

    @property
    def asked(self) -> str:
        """Return what has to be kept on calibration inputs: `99.50% of the top-1 answers`."""

    def start(self, plain: Path, batches: list[Batch]) -> None:
        """Look at the float file and the calibration inputs.

        Raises:
            NamPrunerError: there is nothing that could be judged.
        """

    def enough(self, path: Path) -> bool:
        """Return whether an INT8 file keeps on calibration inputs what is asked."""

    def error(self, path: Path) -> float:
        """Return how far the outputs of a file are from float, on a few calibration inputs."""

    def prove(self, path: Path, parity: Parity) -> None:
        """See that an INT8 file keeps enough on inputs it has not seen, see `parity`.

        Raises:
            ParityError: it does not.
        """


class TopOne:
    """For classifiers: the share of inputs whose top-1 answer is that of the float network."""

    stays = ()

    def __init__(self, agreement: float) -> None:
        self._agreement = agreement
        # half of what may differ in the end
        self._goal = 1 - (1 - agreement) / 2
        self.asked = f"{self._goal:.2%} of the top-1 answers"

    def start(self, plain: Path, batches: list[Batch]) -> None:
        self._many = list(_first(batches, _JUDGED))
        self._few = [tuple(x[:FELT] for x in batches[0])]
        self._want = _outputs(plain, self._many)
        logits = self._want[0][0]
        if logits.ndim < 2 or logits.shape[1] < 2:
            raise NamPrunerError(
                f"the network gives {list(logits.shape)}, no classes [N, C, …]; INT8 is judged by "
                "top-1 agreement, so export it as float or half"
            )

    def enough(self, path: Path) -> bool:
        gaps = Gaps()
        for want, have in zip(self._want, _outputs(path, self._many), strict=True):
            gaps.add(want, have)
        return (gaps.parity(0).top1_agreement or 0.0) >= self._goal

    def error(self, path: Path) -> float:
        """Return ‖y - float‖ / ‖float‖ of the worst output."""
        (have,) = _outputs(path, self._few)
        pairs = ((y[: len(z)], z) for y, z in zip(self._want[0], have, strict=True))
        errors = [np.linalg.norm(z - y) / (np.linalg.norm(y) or 1.0) for y, z in pairs]
        return float(np.nan_to_num(np.max(errors), nan=np.inf))

    def prove(self, path: Path, parity: Parity) -> None:
        same = parity.top1_agreement or 0.0
        if same < self._agreement or not np.isfinite(parity.max_relative):
            raise ParityError(
                f"INT8 and float agree on the top-1 answer of {same:.2%} of "
                f"{parity.inputs} inputs; {self._agreement:.2%} is asked. {WAY_OUT}"
            )


def _outputs(path: Path, batches: list[Batch]) -> list[list[Array]]:
    run = runner_of(path)
    return [run(batch) for batch in batches]


def _first(batches: list[Batch], count: int) -> Iterator[Batch]:
    for batch in batches:
        if count > 0:
            yield tuple(x[:count] for x in batch)
        count -= len(batch[0])
