"""Where the time of a forward pass goes: ONNX Runtime's profiler, run by run, layer by layer."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from torch import Tensor

from nampruner.errors import NamPrunerError
from nampruner.latency.clock import SECONDS_PER_CANDIDATE
from nampruner.latency.sessions import Array, feeds, open_session
from nampruner.progress import Progress, Silent

_WARM_UP = 5
"""Runs of every candidate that are not counted."""
_FEWEST_RUNS, _MOST_RUNS = 5, 100
_KERNEL = "_kernel_time"
"""What ends the name of the event that is a node's own time."""

Run = Mapping[tuple[str, str], float]
"""Node and operation, as ONNX Runtime runs them → milliseconds in one forward pass."""


@dataclass(frozen=True)
class Profile:
    """Medians over runs; a layer's time is that of all its nodes in one run."""

    layers: Mapping[str, float]
    """Layer → milliseconds."""
    unmatched: Mapping[str, float]
    """Operation → milliseconds, of nodes that ONNX Runtime put in and that belong to no layer."""
    runs: int

    @property
    def total(self) -> float:
        """Milliseconds of everything."""
        return sum(self.layers.values()) + sum(self.unmatched.values())


def profile(
    files: Mapping[str, Path],
    inputs: Array | Tensor,
    *,
    threads: int = 1,
    seconds: float = SECONDS_PER_CANDIDATE,
    progress: Progress | None = None,
) -> dict[str, list[Run]]:
    """Run ONNX files in turns under ONNX Runtime's profiler; return every counted run of each.

    Args:
        inputs: one batch [N, …], the same for all.
        seconds: about how long it may take per candidate.

    Raises:
        NamPrunerError: a file cannot be run or does not take `inputs`; or it runs on a GPU, where
            the profiler tells when a kernel was launched and not how long it took.
    """
    batch = inputs.detach().cpu().numpy() if isinstance(inputs, Tensor) else inputs
    with tempfile.TemporaryDirectory(prefix="nampruner-") as folder:
        sessions = {
            name: open_session(path, threads, cuda=True, trace=Path(folder) / str(number))
            for number, (name, path) in enumerate(files.items())
        }
        for name, session in sessions.items():
            _check_device(name, session)
        _run(list(sessions.values()), batch, seconds, progress or Silent())
        traces = {name: Path(session.end_profiling()) for name, session in sessions.items()}
        return {
            name: runs_of(json.loads(path.read_text(encoding="utf-8")))[_WARM_UP:]
            for name, path in traces.items()
        }


def _check_device(name: str, session: Any) -> None:
    provider = session.get_providers()[0]
    if provider != "CPUExecutionProvider":
        raise NamPrunerError(
            f"{name} runs on {provider}, where times per layer cannot be read; hide the GPU "
            "(CUDA_VISIBLE_DEVICES=) to see those of the CPU"
        )


def _run(sessions: Sequence[Any], batch: Array, seconds: float, progress: Progress) -> None:
    named = [feeds(session, batch) for session in sessions]
    deadline = perf_counter() + seconds * len(sessions)
    with progress.bar("layers", _WARM_UP + _MOST_RUNS) as bar:
        for done in range(_WARM_UP + _MOST_RUNS):
            if done >= _WARM_UP + _FEWEST_RUNS and perf_counter() > deadline:
                break
            for session, feed in zip(sessions, named, strict=True):
                session.run(None, feed)
            bar.advance()


def runs_of(events: Iterable[Mapping[str, Any]]) -> list[Run]:
    """Split the events of a trace into runs: the nodes of each come before its `model_run`."""
    runs: list[Run] = []
    nodes: Counter[tuple[str, str]] = Counter()
    for event in events:
        name = event["name"]
        if event["cat"] == "Node" and name.endswith(_KERNEL):
            # a node of a loop runs several times
            nodes[name.removesuffix(_KERNEL), event["args"]["op_name"]] += event["dur"] / 1e3
        elif name == "model_run":
            runs.append(dict(nodes))
            nodes.clear()
    return runs


def by_layer(runs: Sequence[Run], find: Callable[[str], str | None]) -> Profile:
    """Put the nodes of each layer together, and take the medians over the runs.

    Args:
        find: name of a node as ONNX Runtime runs it → layer, or None; see
            `nampruner.export.layers_of`.
    """
    zeros = [0.0] * len(runs)
    layers: dict[str, list[float]] = {}
    unmatched: dict[str, list[float]] = {}
    for number, run in enumerate(runs):
        for (node, op), ms in run.items():
            layer = find(node)
            column, name = (unmatched, op) if layer is None else (layers, layer)
            column.setdefault(name, zeros.copy())[number] += ms
    return Profile(
        {layer: median(each) for layer, each in layers.items()},
        {op: median(each) for op, each in unmatched.items()},
        len(runs),
    )
