"""What a training leaves in its folder: the metrics, and until it ends where it stands.

Both files are written under a temporary name and renamed, so neither is ever half there.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from nampruner.progress import Progress
from nampruner.training.values import EpochMetrics

State = dict[str, Any]


class NoMemory:
    """For a training without a folder."""

    def load(self, progress: Progress) -> State | None:
        """Begin at the beginning."""
        return None

    def save(self, state: State, epochs: tuple[EpochMetrics, ...]) -> None:
        """Keep nothing."""

    def forget(self) -> None:
        """Nothing was kept."""


class Memory(NoMemory):
    """The files of the stage `stage` in `folder`.

    `fingerprint` is plain data, one level deep, that must be equal for a training to go on.
    """

    def __init__(self, folder: Path, stage: str, fingerprint: State) -> None:
        self._metrics = folder / "metrics.jsonl"
        self._unfinished = folder / f"{stage}.unfinished.pt"
        self._stage, self._fingerprint = stage, fingerprint

    def load(self, progress: Progress) -> State | None:
        """Return the state after the last finished epoch; None to begin anew, having said why."""
        if not self._unfinished.exists():
            return None
        try:
            state: State = torch.load(self._unfinished, map_location="cpu", weights_only=True)
            before = state["fingerprint"]
        except (EOFError, KeyError, OSError, RuntimeError, UnpicklingError) as error:
            progress.note(f"{self._unfinished} cannot be read ({error}); beginning anew")
            return None
        changed = [key for key, now in self._fingerprint.items() if before.get(key) != now]
        if changed:
            names = ", ".join(changed)
            progress.note(f"{self._unfinished} was trained with another {names}; beginning anew")
            return None
        return state

    def save(self, state: State, epochs: tuple[EpochMetrics, ...]) -> None:
        """Keep `state`, and the lines of this stage in `metrics.jsonl`."""
        self._metrics.parent.mkdir(parents=True, exist_ok=True)
        lines = self._lines_of_others() + [row.model_dump_json() for row in epochs]
        text = "".join(f"{line}\n" for line in lines)
        _write(self._metrics, lambda path: path.write_text(text, encoding="utf-8"))
        rows = [row.model_dump(mode="json") for row in epochs]
        whole = {**state, "fingerprint": self._fingerprint, "epochs": rows}
        _write(self._unfinished, lambda path: torch.save(whole, path))

    def forget(self) -> None:
        """Remove the state: the training has ended."""
        self._unfinished.unlink(missing_ok=True)

    def _lines_of_others(self) -> list[str]:
        if not self._metrics.exists():
            return []
        lines = self._metrics.read_text(encoding="utf-8").splitlines()
        return [line for line in lines if json.loads(line).get("stage") != self._stage]


def _write(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write(temporary)
    os.replace(temporary, path)
