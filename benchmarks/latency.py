"""Fewer MACs, and how much less time? Ours and torch-pruning beside the dense network, in turns.

Six networks at 224 px in ONNX Runtime on the CPU: ours at half of the MACs with `round_to="auto"`
and at half of the time; torch-pruning at half of the MACs, unrounded and in steps of 8 and 16. What
is in the cache is not measured again.

    python benchmarks/latency.py --only 'resnet*' --batch 1 --threads 1
    python benchmarks/latency.py --sweep                 # and: is any ratio slower than dense?
    python benchmarks/latency.py --targets               # and: are targets in time reached?
    python benchmarks/latency.py --write                 # table and plot into benchmarks/results/
    python benchmarks/latency.py --quick                 # a minute or two: does it run?

Weights cannot be had here, so BN statistics are random and importance is what `nampruner prune`
takes by default, scale factors: times depend on widths, not on which channels go.
"""

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from latency_table import CELL, plot, report
from recovery_time import lively
from torch import Tensor, nn

import nampruner
from nampruner.aiming import together
from nampruner.errors import NamPrunerError
from nampruner.latency import compare
from nampruner.latency.fresh import measure_fresh
from nampruner.models import build
from nampruner.plan import Latency

HERE = Path(__file__).parent
NETWORKS = {
    "resnet50": "timm:resnet50",
    "resnet18": "timm:resnet18",
    "mobilenetv2": "timm:mobilenetv2_100",
    "mobilenetv3": "timm:mobilenetv3_large_100",
    "efficientnet_b0": "timm:efficientnet_b0",
    "regnety_400mf": "timm:regnety_004",
}
RATIOS = ("0.05", "0.1", "0.2", "0.3", "0.5", "0.7")
TARGETS = ("80%", "60%", "40%")
HALF = 0.5
_PASSES = 5
"""Fresh processes per measurement."""
_SEARCH = 6
"""Ratios that are tried to bring torch-pruning to the MACs."""


@dataclass
class Case:
    """One network, the record of what was measured of it, and its ONNX files."""

    name: str
    size: int
    folder: Path
    record: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        facts = {"num_classes": 1000, "in_channels": 3, "image_size": self.size}
        return lively(build(NETWORKS[self.name], **facts))

    @cached_property
    def images(self) -> Tensor:
        return torch.randn(1, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))

    @cached_property
    def macs(self) -> int:
        return macs_of(self.model, self.images)

    def file(self, candidate: str) -> Path:
        return self.folder / self.name / f"{candidate.replace('%', '')}.onnx"

    def load(self) -> None:
        path = self.folder / f"{self.name}.json"
        if path.exists():
            self.record.update(json.loads(path.read_text()))
        self.record |= {"network": self.name, "size": self.size}

    def note(self, part: str, key: str, value: Any) -> None:
        """Keep a result, at once."""
        self.record.setdefault(part, {})[key] = value
        (self.folder / f"{self.name}.json").write_text(json.dumps(self.record, indent=1))

    def lacks(self, part: str, key: str) -> bool:
        return key not in self.record.get(part, {})

    def publish(self, candidate: str, slim: nn.Module) -> None:
        """Export a candidate and note its size."""
        self.file(candidate).parent.mkdir(parents=True, exist_ok=True)
        nampruner.export_onnx(slim, self.file(candidate), self.images)
        share = macs_of(slim, self.images) / self.macs
        self.note("candidates", candidate, {"macs": round(share, 4)})

    def timed(self, candidates: list[str], batch: int, threads: int) -> dict[str, Latency]:
        """Measure in several fresh processes; the turns of all of them are put together."""
        shape = (batch, *self.images.shape[1:])
        images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        files = {candidate: self.file(candidate) for candidate in candidates}
        passes = [measure_fresh(files, images, threads=threads) for _ in range(_PASSES)]
        return {name: together([each[name] for each in passes]) for name in files}


def macs_of(model: nn.Module, images: Tensor) -> int:
    graph = nampruner.trace(model, images)
    return graph.size(graph.mask([])).macs


def theirs(case: Case, round_to: int | None) -> nn.Module:
    """Return what torch-pruning makes of the network nearest to half of the MACs, by its ratio."""
    low, high, found = 0.0, 0.9, []
    for _ in range(_SEARCH):
        ratio = (low + high) / 2
        model = copy.deepcopy(case.model)
        pruner = tp.pruner.MagnitudePruner(
            model, case.images, tp.importance.MagnitudeImportance(), pruning_ratio=ratio,
            round_to=round_to, ignored_layers=[model.get_classifier()],
        )  # fmt: skip
        pruner.step()
        share = macs_of(model, case.images) / case.macs
        found.append((abs(share - HALF), ratio, model))
        low, high = (ratio, high) if share > HALF else (low, ratio)
    return min(found, key=lambda each: each[:2])[2]


def _ours(case: Case, **options: Any) -> nn.Module:
    return nampruner.prune(case.model, case.images, **options).model


CANDIDATES: dict[str, Callable[[Case], nn.Module]] = {
    "dense": lambda case: case.model,
    "nampruner macs 50%": lambda case: _ours(case, macs="50%", round_to="auto"),
    "nampruner latency 50%": lambda case: _ours(case, latency="50%"),
    "torch-pruning": lambda case: theirs(case, None),
    "torch-pruning round_to 8": lambda case: theirs(case, 8),
    "torch-pruning round_to 16": lambda case: theirs(case, 16),
}


def exported(case: Case, candidate: str, make: Callable[[Case], nn.Module]) -> bool:
    """Make and export a candidate where that was not done; tell whether it is there."""
    known = case.record.get("candidates", {}).get(candidate)
    if known is None or ("error" not in known and not case.file(candidate).exists()):
        try:
            case.publish(candidate, make(case))
        except Exception as error:  # what a tool cannot do is a result too
            case.note("candidates", candidate, {"error": f"{type(error).__name__}: {error}"[:300]})
    return "error" not in case.record["candidates"][candidate]


def compared(case: Case, candidates: list[str], batch: int, threads: int) -> dict[str, Any]:
    """Time candidates beside the dense network, and say how busy the machine was."""
    found = case.timed(["dense", *candidates], batch, threads)
    rows = {}
    for candidate, latency in found.items():
        verdict, quiet = compare(found["dense"], latency), min(latency.turns_ms)
        rows[candidate] = {
            "ms": round(quiet, 3),
            "turns": len(latency.turns_ms),
            "quiet": round(min(found["dense"].turns_ms) / quiet, 3),
            "median": round(verdict.speedup, 3),
            "low": round(verdict.low, 3),
            "high": round(verdict.high, 3),
        }
    return {"load": round(os.getloadavg()[0], 1), "rows": rows}


def main_table(case: Case, cells: list[tuple[int, int]]) -> None:
    there = [name for name, make in CANDIDATES.items() if exported(case, name, make)]
    for batch, threads in cells:
        key = CELL.format(batch=batch, threads=threads)
        if case.lacks("cells", key):
            case.note("cells", key, compared(case, there[1:], batch, threads))


def sweep(case: Case) -> None:
    """Cut at every ratio, rounded to the steps of the device, and time it at batch 1."""
    exported(case, "dense", CANDIDATES["dense"])
    for ratio in RATIOS:
        name = f"ratio {ratio}"
        if case.lacks("sweep", ratio):
            value = float(ratio)
            if exported(case, name, lambda c, r=value: _ours(c, ratio=r, round_to="auto")):
                found = compared(case, [name], 1, 1)
                macs = case.record["candidates"][name]["macs"]
                row = {"macs": macs, "load": found["load"], **found["rows"][name]}
                case.note("sweep", ratio, row)


def targets(case: Case) -> None:
    """Aim at targets in time, and measure what came out once more, in a fresh process."""
    exported(case, "dense", CANDIDATES["dense"])
    for target in TARGETS:
        if case.lacks("targets", target):
            name = f"latency {target}"
            found = nampruner.prune(case.model, case.images, latency=target)
            case.publish(name, found.model)
            again = compared(case, [name], 1, 1)
            row = {"aimed": round(found.plan.achieved.latency or 0, 4), "load": again["load"]}
            case.note("targets", target, row | again["rows"][name])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="GLOB", help="networks by name")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--no-table", action="store_true", help="not the candidates at 50%%")
    parser.add_argument("--sweep", action="store_true", help="ratios 0.05 … 0.7")
    parser.add_argument("--targets", action="store_true", help="80, 60 and 40%% of the time")
    parser.add_argument("--show", action="store_true", help="measure nothing, show the cache")
    parser.add_argument("--quick", action="store_true", help="one network at 96 px")
    parser.add_argument("--cache", type=Path, default=Path("runs/latency"))
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/latency.*")
    return parser.parse_args()


def measured(case: Case, options: argparse.Namespace) -> None:
    cells = [(b, t) for b in options.batch for t in options.threads]
    if not options.no_table:
        main_table(case, cells[:1] if options.quick else cells)
    if options.sweep:
        sweep(case)
    if options.targets:
        targets(case)


def main() -> None:
    options = _options()
    globs = ["mobilenetv2"] if options.quick else options.only or ["*"]
    names = [name for name in NETWORKS if any(fnmatchcase(name, glob) for glob in globs)]
    if not names:
        sys.exit(f"--only {' '.join(globs)} matches none of {', '.join(NETWORKS)}")
    folder = options.cache / "quick" if options.quick else options.cache
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    cases = [Case(name, 96 if options.quick else 224, folder) for name in names]
    for case in cases:
        case.load()
        if not options.show:
            try:
                measured(case, options)
            except NamPrunerError as error:
                print(f"{case.name}: {error}", file=sys.stderr, flush=True)
    records = [case.record for case in cases]
    text = report(records)
    print(text)
    out = HERE / "results" if options.write else folder
    (out / "latency.md").write_text(text + "\n")
    (out / "latency.json").write_text(json.dumps({"networks": records}, indent=1) + "\n")
    plot(records, out / "latency.png")


if __name__ == "__main__":
    main()
