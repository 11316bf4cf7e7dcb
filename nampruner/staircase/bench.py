"""The times of convolutions in ONNX Runtime, taken in turns and kept per device and version."""

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from nampruner.export.single import write_convolution
from nampruner.latency import VERSION, measure
from nampruner.plan import Record
from nampruner.progress import Progress, Silent
from nampruner.staircase.device import cache_folder, fingerprint, processor
from nampruner.staircase.geometry import Geometry

Clock = Callable[[Sequence[Geometry], bool], Sequence[float]]
"""Convolutions of one size, and whether in INT8 → the milliseconds each takes, in turns."""

_SECONDS = 0.25
"""Per convolution: some forty layers of eight widths stay under two minutes."""
_ROUNDS = 10


class Turns(Record):
    """Convolutions that were timed in turns; only times of one such set can be compared."""

    geometries: tuple[Geometry, ...]
    ms: tuple[float, ...]
    int8: bool = False
    """As INT8 networks run them, or in float."""


class _Cache(Record):
    """The file that holds what was measured on one device."""

    processor: str
    runtime: str
    threads: int
    measured: tuple[Turns, ...] = ()


class Bench:
    """Times convolutions, each set once per device, ONNX Runtime version and thread count.

    Args:
        threads: threads of ONNX Runtime.
        clock: measures a set; ONNX Runtime by default.
        folder: where times are kept; the user's cache by default.
    """

    def __init__(
        self, *, threads: int = 1, clock: Clock | None = None, folder: Path | None = None
    ) -> None:
        self.threads = threads
        self._clock = clock or self._onnxruntime
        name = fingerprint(VERSION, str(threads))
        self._path = (folder or cache_folder()) / f"staircase-{name}.json"

    def times(
        self,
        sets: Iterable[tuple[Geometry, ...]],
        progress: Progress | None = None,
        *,
        int8: bool = False,
    ) -> tuple[Turns, ...]:
        """Return the times of every set, measured now where they are not known."""
        wanted = [(each, int8) for each in dict.fromkeys(sets)]
        known = {(turns.geometries, turns.int8): turns for turns in self._read().measured}
        missing = [each for each in wanted if each not in known]
        if missing:
            with (progress or Silent()).bar("staircase", len(missing)) as bar:
                for each, _ in missing:
                    ms = tuple(self._clock(each, int8))
                    known[each, int8] = Turns(geometries=each, ms=ms, int8=int8)
                    bar.advance()
            self._write(tuple(known.values()))
        return tuple(known[each] for each in wanted)

    def _onnxruntime(self, geometries: Sequence[Geometry], int8: bool) -> list[float]:
        size = geometries[0].size
        with tempfile.TemporaryDirectory(prefix="nampruner-") as folder:
            files = {}
            for number, each in enumerate(geometries):
                files[str(number)] = Path(folder) / f"{number}.onnx"
                write_convolution(
                    files[str(number)],
                    (each.outputs, each.inputs // each.groups, *each.kernel),
                    each.size,
                    strides=each.stride,
                    dilations=each.dilation,
                    groups=each.groups,
                    int8=int8,
                )
            image = np.random.default_rng(0).uniform(0.5, 1.5, (1, 1, *size)).astype(np.float32)
            found = measure(files, image, threads=self.threads, rounds=_ROUNDS, seconds=_SECONDS)
        # what else the machine does only ever adds time, and one turn that is late makes a cliff
        return [min(found[str(number)].turns_ms) for number in range(len(geometries))]

    def _read(self) -> _Cache:
        """Return what is known; a file that is missing or damaged is measured again."""
        try:
            return _Cache.model_validate_json(self._path.read_text(encoding="utf-8"))
        except (OSError, ValidationError, UnicodeDecodeError):
            return _Cache(processor=processor(), runtime=VERSION, threads=self.threads)

    def _write(self, measured: tuple[Turns, ...]) -> None:
        """Keep what is known, where the user's cache can be written."""
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        told = self._read().model_copy(update={"measured": measured})
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(told.model_dump_json(), encoding="utf-8")
            os.replace(draft, self._path)
        except OSError:
            return
