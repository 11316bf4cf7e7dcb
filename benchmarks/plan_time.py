"""Time of plan + cut: ResNet-50, nampruner and torch-pruning in turns, and what the proof adds.

    python benchmarks/plan_time.py [--rounds 7] [--threads 1]

Both score by magnitude and remove 30% of the channels in steps of 8. Prints one JSON line per input
size: medians in seconds.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
import torch_pruning as tp
from recovery_time import lively
from torch import Tensor, nn

from nampruner.certificate import certify
from nampruner.config import PruneOptions
from nampruner.graph import trace
from nampruner.importance import score
from nampruner.models import build
from nampruner.selection import select
from nampruner.surgery import cut

RATIO, STEP = 0.3, 8
Times = dict[str, list[float]]


def clock(times: Times) -> Callable[[str], Any]:
    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        times.setdefault(name, []).append(time.perf_counter() - start)

    return timed


def theirs(model: nn.Module, images: Tensor, timed: Callable[[str], Any]) -> None:
    model = copy.deepcopy(model)  # it cuts in place; the copy is not counted
    with timed("torch-pruning: graph"):
        pruner = tp.pruner.MagnitudePruner(
            model, images, tp.importance.MagnitudeImportance(), pruning_ratio=RATIO,
            round_to=STEP, ignored_layers=[model.get_submodule("fc")],
        )  # fmt: skip
    with timed("torch-pruning: score, select, cut"):
        pruner.step()


def ours(model: nn.Module, images: Tensor, timed: Callable[[str], Any]) -> None:
    options = PruneOptions(ratio=RATIO, round_to=STEP, importance="magnitude")
    with timed("nampruner: graph"):
        graph = trace(model, images)
    with timed("nampruner: score, select, cut"):
        plan = select(graph, score(model, graph, "magnitude"), options)
        slim = cut(model, plan)
    with timed("nampruner: certificate"):
        certify(model, slim, plan, images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = lively(build("timm:resnet50", num_classes=1000, in_channels=3, image_size=224))
    for size in (64, 224):
        images, times = torch.randn(1, 3, size, size), Times()
        for number in range(options.rounds + 1):
            if number == 1:  # the first round warms up
                times.clear()
            with clock(times)("forward pass"), torch.no_grad():
                model(images)
            theirs(model, images, clock(times))
            ours(model, images, clock(times))
        found: dict[str, Any] = {name: round(median(runs), 3) for name, runs in times.items()}
        print(json.dumps({"size": size, "threads": options.threads, **found}), flush=True)


if __name__ == "__main__":
    main()
