"""What half of the MACs, and NAM, are worth on one GPU; in about two minutes.

    python benchmarks/gpu.py [--seconds 140] [--write]

ResNet-50 and MobileNetV2 at 224 px: dense, ours at half of the MACs in steps of 1 to 64 channels,
and torch-pruning where it is installed. Each is a CUDA graph, so launching takes no time, and all
take turns. Then training steps of ResNet-50 with NAM and without. What has not begun after
`--seconds` is left out, and said to be. Prints tables and JSON; `--write` puts both into
benchmarks/results/.

Weights cannot be had here: they are random, and BN statistics are those of noise. Times depend on
widths, not on which channels go.
"""

import argparse
import copy
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bisection import largest_within
from gpu_table import report
from recovery_time import lively
from torch import Tensor, nn
from torch.nn import functional as F

import nampruner
from nampruner.latency import compare, summarize
from nampruner.models import build
from nampruner.plan import Latency

RESULTS = Path(__file__).parent / "results"
NETWORKS = {"ResNet-50": "timm:resnet50", "MobileNetV2": "timm:mobilenetv2_100"}
STEPS = (1, 8, 16, 32, 64)
THEIR_STEPS = (None, 8, 32)
KINDS = {"half": torch.float16, "TF32": torch.float32}
CELLS = (("half", 64), ("half", 1), ("TF32", 64), ("TF32", 1))
NAM_BATCHES = (64, 256)
_TURNS = 15
_TURN_MS = 10.0
Run = Callable[[], object]
Record = dict[str, Any]


def network(source: str) -> nn.Module:
    """Return a network in eval mode on the GPU, whose activations stay within half."""
    torch.manual_seed(0)
    model = lively(build(source, num_classes=1000, in_channels=3, image_size=224)).cuda()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(noise(16))
    return model.eval()


def noise(batch: int) -> Tensor:
    return torch.randn(batch, 3, 224, 224, device="cuda")


def theirs(model: nn.Module, step: int | None) -> nn.Module:
    """Return what torch-pruning makes of at most half of the MACs, by its ratio."""
    import torch_pruning as tp

    images, whole = noise(1), macs_of(model)

    def at(ratio: float) -> tuple[nn.Module, float]:
        slim = copy.deepcopy(model)
        pruner = tp.pruner.MagnitudePruner(
            slim, images, tp.importance.MagnitudeImportance(), pruning_ratio=ratio,
            round_to=step, ignored_layers=[slim.get_classifier()],
        )  # fmt: skip
        pruner.step()
        return slim, macs_of(slim) / whole

    return largest_within(0.5, at)


def macs_of(model: nn.Module) -> int:
    graph = nampruner.trace(model, noise(1))
    return graph.size(graph.mask([])).macs


def ours(model: nn.Module, step: int) -> nn.Module:
    return nampruner.prune(model, noise(1), macs="50%", round_to=step, importance="bn").model


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Return every network that is timed, by name."""
    makers: dict[str, Callable[[], nn.Module]] = {"dense": lambda: model}
    makers |= {f"nampruner, steps of {step}": partial(ours, model, step) for step in STEPS}
    if importlib.util.find_spec("torch_pruning"):
        for step in THEIR_STEPS:
            makers[f"torch-pruning, steps of {step or 1}"] = partial(theirs, model, step)
    return {name: make() for name, make in makers.items()}


def graphed(model: nn.Module, images: Tensor) -> Run:
    """Return the replay of one forward pass."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(stream):
            for _ in range(3):  # cuDNN chooses its kernels here
                model(images)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(images)
    graph.replay()
    if not bool(out.isfinite().all()):
        raise RuntimeError("the outputs are not finite")

    def replay(_kept: tuple[object, ...] = (model, images, out)) -> None:
        graph.replay()

    return replay


def milliseconds(run: Run, times: int) -> float:
    """Time `times` runs by CUDA events; one more before them is not counted."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / times


def in_turns(runs: dict[str, Run], batch: int) -> dict[str, Latency]:
    """Time everything in turns of about equal length."""
    often = {name: max(1, int(_TURN_MS / milliseconds(run, 3))) for name, run in runs.items()}
    turns: dict[str, list[list[float]]] = {name: [] for name in runs}
    for _ in range(_TURNS):
        for name, run in runs.items():
            turns[name].append([milliseconds(run, often[name]) / 1e3])
    about = {"threads": 1, "batch": batch, "runtime": f"torch {torch.__version__} cuda"}
    return {name: summarize(found, **about) for name, found in turns.items()}


def rows(found: dict[str, Latency]) -> dict[str, Record]:
    """Each beside the first: milliseconds, speed-up and its 95 % interval."""
    first = next(iter(found.values()))
    return {name: _row(first, latency) for name, latency in found.items()}


def _row(first: Latency, other: Latency) -> Record:
    found = compare(first, other)
    numbers = {"speedup": found.speedup, "low": found.low, "high": found.high}
    return {name: round(value, 4) for name, value in {"ms": other.median_ms, **numbers}.items()}


def inference(slims: dict[str, nn.Module], kind: str, batch: int) -> dict[str, Record]:
    """Time the networks in one number format, at one batch size."""
    layout = {"dtype": KINDS[kind], "memory_format": torch.channels_last}
    images = noise(batch).to(**layout)
    runs = {n: graphed(copy.deepcopy(m).to(**layout), images) for n, m in slims.items()}
    return rows(in_turns(runs, batch))


def stepping(model: nn.Module, images: Tensor) -> Run:
    """Return a training step: bf16 autocast, channels_last, SGD with momentum."""
    model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    labels = torch.arange(len(images), device="cuda") % 1000

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def attentive(parts: Any) -> nn.Module:
    model = network(NETWORKS["ResNet-50"])
    if parts:
        nampruner.attach_nam(model, noise(2), parts=parts)
    return model


def peak_gb(run: Run) -> float:
    """Memory of one more run beside what is there, at its peak."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def nam_cost(batch: int) -> dict[str, Record]:
    """Time training steps of ResNet-50 without NAM, with its channel part, and with both."""
    images = noise(batch).to(memory_format=torch.channels_last)
    parts = {"plain": None, "channel NAM": "channel", "both parts": "both"}
    steps = {name: stepping(attentive(part), images) for name, part in parts.items()}
    for step in steps.values():
        step(), step()
    peaks = {name: peak_gb(step) for name, step in steps.items()}
    found = rows(in_turns(steps, batch))
    return {name: {**row, "peak_gb": round(peaks[name], 2)} for name, row in found.items()}


def folded_cost(batch: int) -> dict[str, Record]:
    """Time inference in half without NAM, and with it, the gates folded."""
    layout = {"dtype": torch.float16, "memory_format": torch.channels_last}
    parts = {"plain": None, "channel NAM": "channel", "both parts": "both"}
    images = noise(batch).to(**layout)
    models = {name: nampruner.fold_nam(attentive(part)).model for name, part in parts.items()}
    return rows(in_turns({n: graphed(m.to(**layout), images) for n, m in models.items()}, batch))


def tasks(record: Record) -> Iterator[tuple[str, Callable[[], None]]]:
    """What there is to measure, in the order of its worth; each adds itself to `record`."""
    made: dict[str, dict[str, nn.Module]] = {}

    def make(name: str, source: str) -> None:
        made[name] = candidates(network(source))
        whole = macs_of(made[name]["dense"])
        record["macs"][name] = {n: round(macs_of(m) / whole, 4) for n, m in made[name].items()}

    def infer(name: str, kind: str, batch: int) -> None:
        record["inference"][f"{name}, {kind}, batch {batch}"] = inference(made[name], kind, batch)

    def into(part: str, key: str, measure: Callable[[], Record]) -> None:
        record[part][key] = measure()

    for name, source in NETWORKS.items():
        yield f"cutting {name}", partial(make, name, source)
    for kind, batch in CELLS[:2]:
        for name in NETWORKS:
            yield f"{name}, {kind}, batch {batch}", partial(infer, name, kind, batch)
    for batch in NAM_BATCHES:
        yield (
            f"NAM, batch {batch}",
            partial(into, "nam", f"batch {batch}", partial(nam_cost, batch)),
        )
    folded = partial(into, "nam", "inference in half, batch 64", partial(folded_cost, 64))
    yield "NAM folded", folded
    for kind, batch in CELLS[2:]:
        for name in NETWORKS:
            yield f"{name}, {kind}, batch {batch}", partial(infer, name, kind, batch)


def measured(seconds: float) -> Record:
    """Measure what can be begun within the time."""
    start = time.perf_counter()
    record: Record = {"gpu": torch.cuda.get_device_name(), "macs": {}, "inference": {}, "nam": {}}
    record |= {"versions": versions(), "left_out": []}
    for name, task in tasks(record):
        spent = time.perf_counter() - start
        if spent > seconds:
            record["left_out"].append(name)
            continue
        print(f"{spent:5.0f} s  {name}", file=sys.stderr, flush=True)
        task()
        torch.cuda.empty_cache()
    return record


def versions() -> dict[str, str]:
    cudnn: Any = torch.backends.cudnn
    found = {"torch": str(torch.__version__), "CUDA": str(torch.version.cuda)}
    return {**found, "cuDNN": str(cudnn.version())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=140)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/gpu.*")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA GPU, and PyTorch sees none here")
    torch.backends.cudnn.benchmark = True
    record = measured(options.seconds)
    text = report(record)
    print(text)
    print(json.dumps(record))
    if options.write:
        (RESULTS / "gpu.md").write_text(text + "\n", encoding="utf-8")
        (RESULTS / "gpu.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
