"""Measured latency: the only clock of nampruner, and the only place that opens ONNX Runtime.

Candidates are timed in turns (A B A B …), so a machine that slows down slows all of them, and a
number is the median of many runs beside its spread. Whether one is faster than another is decided
by `compare`, which calls a difference inside the noise by that name.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from nampruner import modes
from nampruner.errors import NamPrunerError
from nampruner.plan import Latency
from nampruner.progress import Progress, Silent

Candidate = Path | str | nn.Module
Array = np.ndarray[Any, Any]

SECONDS_PER_CANDIDATE = 2.0
_FEWEST_ROUNDS = 5
"""Below this many turns a median says more about the neighbours than about the network."""
_MOST_RUNS_PER_TURN = 100
_ORT_TYPES = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16"}


def open_session(path: Path | str, threads: int = 0, *, cuda: bool = False) -> Any:
    """Open an ONNX file in ONNX Runtime.

    Args:
        threads: threads inside one operation; 0 leaves the choice to ONNX Runtime.
        cuda: run on the GPU where this ONNX Runtime can, else on the CPU.

    Raises:
        NamPrunerError: there is no such file, or ONNX Runtime cannot run it.
    """
    if not Path(path).is_file():
        raise NamPrunerError(f"{path}: no such file; give an ONNX file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # A pool that spins on after its run would slow down whoever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    wanted = ["CUDAExecutionProvider"] if cuda else []
    there = onnxruntime.get_available_providers()
    providers = [name for name in wanted if name in there] + ["CPUExecutionProvider"]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime's own classes have no public base but this one
        reason = str(error).splitlines()[0]
        raise NamPrunerError(f"{path}: ONNX Runtime cannot open it ({reason})") from None


def feeds(session: Any, *inputs: Array) -> dict[str, Array]:
    """Name `inputs` as the session does.

    Raises:
        NamPrunerError: their number, an element type or a size is not what the file was made for.
    """
    slots = session.get_inputs()
    if len(slots) != len(inputs):
        raise NamPrunerError(f"the ONNX file takes {len(slots)} inputs, {len(inputs)} were given")
    for slot, array in zip(slots, inputs, strict=True):
        _check_input(slot, array)
    return {slot.name: array for slot, array in zip(slots, inputs, strict=True)}


def _check_input(slot: Any, array: Array) -> None:
    fits = len(slot.shape) == array.ndim and all(
        size == wanted for size, wanted in zip(array.shape, slot.shape, strict=True)
        if isinstance(wanted, int)
    )  # fmt: skip
    dtype = _ORT_TYPES.get(slot.type, str(array.dtype))
    if not fits or dtype != str(array.dtype):
        raise NamPrunerError(
            f"input {slot.name!r} is {dtype} {slot.shape} in the ONNX file, "
            f"given was {array.dtype} {list(array.shape)}; give inputs of that type and size"
        )


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
    return _Runner(
        lambda: session.run(None, named), f"onnxruntime {onnxruntime.__version__} {provider}"
    )


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
    progress: Progress | None = None,
) -> dict[str, Latency]:
    """Time one forward pass of every candidate on `inputs`, in turns.

    ONNX files run in ONNX Runtime (CUDA where present, copies of input and output included, else
    CPU), modules in PyTorch as they are, in eval mode. Takes about two seconds per candidate.
    Between turns everything else stands still; the first run of a turn is not counted, it brings
    the candidate back into the caches.

    Args:
        candidates: name → ONNX file or module.
        inputs: one batch [N, …], the same for all.
        threads: threads of both runtimes; PyTorch's are put back afterwards.
        rounds: turns of each candidate, fewer (not below five) where the time runs out.

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
        samples = _interleave(runners, rounds, progress or Silent())
    return {
        name: summarize(
            samples[name], threads=threads, batch=len(batch), runtime=runners[name].runtime
        )
        for name in candidates
    }


def _interleave(
    runners: Mapping[str, _Runner], rounds: int, progress: Progress
) -> dict[str, list[float]]:
    """Return the seconds of every counted run, taken in turns until rounds or time are used up."""
    deadline = perf_counter() + SECONDS_PER_CANDIDATE * len(runners)
    runs = {name: _runs_per_turn(_warm_up(runner), rounds) for name, runner in runners.items()}
    samples: dict[str, list[float]] = {name: [] for name in runners}
    with progress.bar("latency", rounds) as bar:
        for done in range(rounds):
            if done >= _FEWEST_ROUNDS and perf_counter() > deadline:
                break
            for name, runner in runners.items():
                runner.run()
                samples[name] += [runner.seconds() for _ in range(runs[name])]
            bar.advance()
    return samples


def _warm_up(runner: _Runner) -> float:
    """Run a few times (allocators, kernels, caches) and return the fastest in seconds."""
    first = runner.seconds()
    more = 1 if first > SECONDS_PER_CANDIDATE / 20 else 5
    return min(first, *(runner.seconds() for _ in range(more)))


def _runs_per_turn(seconds: float, rounds: int) -> int:
    """Return how many counted runs fill a turn, with one more that is not counted."""
    fitting = SECONDS_PER_CANDIDATE / rounds / max(seconds, 1e-7) - 1
    return int(min(max(fitting, 1), _MOST_RUNS_PER_TURN))


def summarize(seconds: list[float], *, threads: int, batch: int, runtime: str) -> Latency:
    """Turn the times of single runs, in seconds, into median and spread, in milliseconds."""
    low, median, high = 1e3 * np.percentile(seconds, [10, 50, 90])
    return Latency(
        median_ms=float(median),
        spread_ms=float(high - low) / 2,
        runs=len(seconds),
        threads=threads,
        batch=batch,
        runtime=runtime,
    )


@dataclass(frozen=True)
class Verdict:
    """What two measurements say about each other."""

    speedup: float
    """Time of the first over time of the second."""
    noise: float
    """The part of the first's time that a difference must exceed to count."""

    @property
    def outside_noise(self) -> bool:
        return abs(1 - 1 / self.speedup) > self.noise

    @property
    def faster(self) -> bool:
        """The second is faster, and not by chance."""
        return self.outside_noise and self.speedup > 1

    @property
    def slower(self) -> bool:
        """The second is slower, and not by chance."""
        return self.outside_noise and self.speedup < 1

    def __str__(self) -> str:
        if not self.outside_noise:
            return "no difference outside the noise"
        return f"{self.speedup:.2f}× faster" if self.faster else f"{1 / self.speedup:.2f}× slower"


def compare(first: Latency, second: Latency) -> Verdict:
    """Say whether `second` is faster than `first`.

    Two independent spreads add in quadrature; medians closer than that are not told apart.

    Raises:
        NamPrunerError: they were measured at different batch sizes or thread counts.
    """
    ours, theirs = (first.batch, first.threads), (second.batch, second.threads)
    if ours != theirs:
        raise NamPrunerError(
            f"latencies at (batch, threads) {ours} and {theirs} cannot be compared; "
            "measure both in one run"
        )
    noise = math.hypot(first.spread_ms, second.spread_ms) / first.median_ms
    return Verdict(first.median_ms / second.median_ms, noise)
