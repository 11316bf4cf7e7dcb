"""What NAM costs in time: a training step, and the exported network, with it and without.

    python benchmarks/nam_cost.py [--rounds 9]

Both run in turns on one thread; a number is the median of the ratios turn by turn. Training steps
are counted in CPU time, which neighbours on the machine disturb less. Weights are random: the
time does not depend on them. Prints a table and one JSON line.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nampruner
from nampruner.latency import compare, measure
from nampruner.nam.module import Parts

NETWORKS = (
    ("resnet20", 32, 64),
    ("timm:resnet18", 224, 8),
    ("timm:mobilenetv2_100", 224, 8),
    ("timm:resnet50", 224, 4),
)
"""Source, input size in pixels, training batch."""
PARTS: tuple[Parts, ...] = ("channel", "both")


def pair(source: str, pixels: int, parts: Parts) -> tuple[nn.Module, nn.Module]:
    """Return the network as it is and with NAM in every residual branch."""
    facts = {"num_classes": 10, "in_channels": 3, "image_size": pixels}
    plain, attentive = (nampruner.build(source, **facts) for _ in range(2))
    nampruner.attach_nam(attentive, torch.randn(2, 3, pixels, pixels), parts=parts)
    return plain, attentive


def stepping(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """Return a training step with SGD and momentum."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01, momentum=0.9)
    labels = torch.arange(len(images)) % 10

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def cpu_seconds(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def training(source: str, pixels: int, batch: int, parts: Parts, rounds: int) -> float:
    """Time of a training step with NAM over one without."""
    images = torch.randn(batch, 3, pixels, pixels)
    plain, attentive = (stepping(model, images) for model in pair(source, pixels, parts))
    plain(), attentive()
    # both are timed in each round, in this order
    return median(1 / (cpu_seconds(plain) / cpu_seconds(attentive)) for _ in range(rounds))


def exported(source: str, pixels: int, parts: Parts) -> float:
    """Latency of the ONNX file with NAM over the one without; batch 1."""
    image = torch.randn(1, 3, pixels, pixels)
    with tempfile.TemporaryDirectory() as folder:
        plain, attentive = Path(folder) / "plain.onnx", Path(folder) / "nam.onnx"
        without, with_nam = (model.eval() for model in pair(source, pixels, parts))
        nampruner.export_onnx(without, plain, image)
        nampruner.export_onnx(nampruner.fold_nam(with_nam).model, attentive, image)
        times = measure({"plain": plain, "nam": attentive}, image, threads=1, seconds=5)
    return 1 / compare(times["plain"], times["nam"]).speedup


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="training steps of each")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    found: dict[str, dict[str, dict[str, float]]] = {}
    print("| with NAM, times without | " + " | ".join(PARTS) + " |\n|---|" + "---|" * len(PARTS))
    for source, pixels, batch in NETWORKS:
        torch.manual_seed(0)
        rows = {
            "training": {p: training(source, pixels, batch, p, rounds) for p in PARTS},
            "exported": {p: exported(source, pixels, p) for p in PARTS},
        }
        found[source] = rows
        for what, row in rows.items():
            numbers = " | ".join(f"{row[part]:.2f}" for part in PARTS)
            print(f"| {source}, {pixels} px, {what} | {numbers} |", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
