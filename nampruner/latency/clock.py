"""The clock: candidates run in turns (A B A B …), a number is a median beside its spread."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn

from nampruner import modes
from nampruner.errors import NamPrunerError
from nampruner.latency.sessions import VERSION, Array, feeds, open_session
from nampruner.plan import Latency
from nampruner.progress import Progress, Silent

Candidate = Path | str | nn.Module

SECONDS_PER_CANDIDATE = 2.0
_FEWEST_ROUNDS = 5
"""Below this many turns a median says more about the neighbours than about the network."""
_MOST_RUNS_PER_TURN = 100


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules in eval mode without gradients, and every part back as it was."""
    with modes.evaluating(*modules), torch.no_grad():
        yield


def device_of(module: nn.Module) -> torch.device:
    """Return where the first parameter or buffer of `module` lies; the CPU if it has none."""
    tensors = (*module.parameters(), *module.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


@dataclass(frozen=True)
class _Runner:
    """One candidate, ready to be timed."""

    run: Callable[[], object]
    runtime: str

    def seconds(self) -> float:
        start = perf_counter()
        self.run()
        return perf_counter() - start


def _onnx_runner(path: Path | str, inputs: Array, threads: int) -> _Runner:
    session = open_session(path, threads, cuda=True)
    named = feeds(session, inputs)
    provider = session.get_providers()[0]
    return _Runner(lambda: session.run(None, named), f"{VERSION} {provider}")


def _torch_runner(module: nn.Module, inputs: Array) -> _Runner:
    device = device_of(module)
    tensor = torch.from_numpy(inputs).to(device)

    def run() -> None:
        module(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return _Runner(run, f"torch {torch.__version__} eager {device.type}")


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(
    candidates: Mapping[str, Candidate],
    inputs: Array | Tensor,
    *,
    threads: int = 1,
    rounds: int = 20,
    seconds: float = SECONDS_PER_CANDIDATE,
    progress: Progress | None = None,
) -> dict[str, Latency]:
    """Time one forward pass of every candidate on `inputs`, in turns.

    ONNX files run in ONNX Runtime (CUDA where present, copies of input and output included, else
    CPU), modules in PyTorch as they are, in eval mode.
    Between turns everything else stands still; the first run of a turn is not counted, it brings
    the candidate back into the caches.

    Args:
        candidates: name → ONNX file or module.
        inputs: one batch [N, …], the same for all.
        threads: threads of both runtimes; PyTorch's are put back afterwards.
        rounds: turns of each candidate, fewer (not below five) where the time runs out.
        seconds: about how long it may take per candidate.

    Raises:
        NamPrunerError: a file cannot be run, does not take `inputs`, or an option is below 1.
    """
    if threads < 1 or rounds < 1:
        raise NamPrunerError(f"threads = {threads}, rounds = {rounds}: both must be at least 1")
    batch = inputs.detach().cpu().numpy() if isinstance(inputs, Tensor) else inputs
    modules = [each for each in candidates.values() if isinstance(each, nn.Module)]
    with _torch_threads(threads), evaluating(*modules), torch.inference_mode():
        runners = {
            name: _torch_runner(each, batch)
            if isinstance(each, nn.Module)
            else _onnx_runner(each, batch, threads)
            for name, each in candidates.items()
        }
        turns = _interleave(runners, rounds, seconds, progress or Silent())
    return {
        name: summarize(
            turns[name], threads=threads, batch=len(batch), runtime=runners[name].runtime
        )
        for name in candidates
    }


def _interleave(
    runners: Mapping[str, _Runner], rounds: int, seconds: float, progress: Progress
) -> dict[str, list[list[float]]]:
    """Return the seconds of every counted run, turn by turn, until rounds or time are used up."""
    deadline = perf_counter() + seconds * len(runners)
    runs = {
        name: _runs_per_turn(_warm_up(runner, seconds), seconds / rounds)
        for name, runner in runners.items()
    }
    turns: dict[str, list[list[float]]] = {name: [] for name in runners}
    with progress.bar("latency", rounds) as bar:
        for done in range(rounds):
            if done >= _FEWEST_ROUNDS and perf_counter() > deadline:
                break
            for name, runner in runners.items():
                runner.run()
                turns[name].append([runner.seconds() for _ in range(runs[name])])
            bar.advance()
    return turns


def _warm_up(runner: _Runner, seconds: float) -> float:
    """Run a few times (allocators, kernels, caches) and return the fastest in seconds."""
    first = runner.seconds()
    more = 1 if first > seconds / 20 else 5
    return min(first, *(runner.seconds() for _ in range(more)))


def _runs_per_turn(seconds: float, turn: float) -> int:
    """Return how many counted runs fill a turn, with one more that is not counted."""
    return int(min(max(turn / max(seconds, 1e-7) - 1, 1), _MOST_RUNS_PER_TURN))


def summarize(
    turns: Sequence[Sequence[float]], *, threads: int, batch: int, runtime: str
) -> Latency:
    """Turn the times of single runs, in seconds, turn by turn, into milliseconds."""
    runs = np.concatenate([np.asarray(turn) for turn in turns])
    low, median, high = 1e3 * np.percentile(runs, [10, 50, 90])
    return Latency(
        median_ms=float(median),
        spread_ms=float(high - low) / 2,
        turns_ms=tuple(1e3 * float(np.median(turn)) for turn in turns),
        runs=len(runs),
        threads=threads,
        batch=batch,
        runtime=runtime,
    )
