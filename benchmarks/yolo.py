"""YOLO detectors: mAP dense, right after the cut, after fine-tuning, and the time of the ONNX file.

Fashion-MNIST items on canvases (yolo_data.py): 600 images to train, 200 to validate, 320 px.
Trained by SGD under the proximal penalty; cut by nampruner with and without recovery, and by
torch-pruning beside it; fine-tuned for a quarter of the training's epochs. Every step is kept, so a
network may be trained on one machine and timed on another.

    python benchmarks/yolo.py                               # v8n, 11n, 26n, three seeds; resumable
    python benchmarks/yolo.py --only yolov8n --seeds 1
    python benchmarks/yolo.py --device 0 --workers 2        # trained on a GPU
    python benchmarks/yolo.py --show --write                # what is there into benchmarks/results/
    python benchmarks/yolo.py --quick                       # minutes: does it run?
"""

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yolo_theirs
from no_training import recalibrated
from torch import Tensor, nn
from yolo_data import CLASSES, canvases

import nampruner
from nampruner import latency, yolo
from nampruner.pruning import prune

NETWORKS = ("yolov8n", "yolov8n-nam", "yolo11n", "yolo26n")
HALF = "50% MACs"
TARGETS: dict[str, dict[str, Any]] = {
    HALF: {"macs": "50%"},
    "ratio 0.3": {"ratio": 0.3},
    "ratio 0.5": {"ratio": 0.5},
}
RATIOS_OF = ("yolov8n", "yolo11n")
THEIRS_AT_EVERY_SEED = ("yolov8n",)
"""Of the others once: with attention in them it takes minutes until its memory is used up."""
THEIRS = ("BNScale", "GroupMagnitude")
ROUND_TO = 16
RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How large the experiment is, and where it is trained."""

    epochs: int = 60
    train: int = 600
    val: int = 200
    pixels: int = 320
    calibration: int = 256
    device: str = "cpu"
    workers: int = 0

    @property
    def judging(self) -> dict[str, Any]:
        """Ultralytics' arguments of every validation and training."""
        return {"imgsz": self.pixels, "batch": 16, "device": self.device}

    @property
    def training(self) -> dict[str, Any]:
        """Those of every training: no mixed precision, and no epoch is picked by its validation."""
        given = {"optimizer": "SGD", "amp": False, "val": False, "workers": self.workers}
        return {**self.judging, **given}


QUICK = {"epochs": 4, "train": 48, "val": 16, "pixels": 64, "calibration": 32}


def trained(name: str, seed: int, size: Size, data: Path, folder: Path) -> nn.Module:
    """Train a dense network under the penalty."""
    torch.manual_seed(seed)
    given = {"num_classes": len(CLASSES), "in_channels": 3, "image_size": size.pixels}
    return yolo.train(
        nampruner.build(f"yolo:{name}.yaml", **given),
        data,
        epochs=size.epochs,
        lr0=0.02,
        warmup_epochs=2.0,
        close_mosaic=size.epochs // 4,
        seed=seed,
        project=str(folder),
        name="train",
        exist_ok=True,
        **size.training,
    ).model


def finetuned(model: nn.Module, seed: int, size: Size, data: Path, folder: Path) -> nn.Module:
    """Train on without penalty for a quarter of the epochs."""
    epochs = max(1, size.epochs // 4)
    return yolo.train(
        model,
        data,
        strength=0,
        epochs=epochs,
        lr0=0.01,
        warmup_epochs=1.0,
        close_mosaic=epochs // 2,
        seed=seed,
        project=str(folder),
        name="finetune",
        exist_ok=True,
        **size.training,
    ).model


@dataclass(frozen=True)
class Bench:
    """One network and seed, and all that is needed to measure it."""

    name: str
    seed: int
    size: Size
    data: Path
    folder: Path

    @cached_property
    def model(self) -> nn.Module:
        return self._network("dense", lambda: trained(self.name, self.seed, *self._where))

    @cached_property
    def images(self) -> list[Tensor]:
        size, count = self.size.pixels, self.size.calibration
        return yolo.images(self.model, self.data, image_size=size, count=count)

    @property
    def _targets(self) -> tuple[str, ...]:
        """What is asked for: half of the MACs, and of some networks the ratios too, once."""
        return tuple(TARGETS) if self.name in RATIOS_OF and self.seed == 0 else (HALF,)

    @property
    def _where(self) -> tuple[Size, Path, Path]:
        return self.size, self.data, self.folder

    def _network(self, what: str, make: Callable[[], nn.Module]) -> nn.Module:
        """Load what was trained before, or train it; a training leaves float16 anyway."""
        file = self.folder / f"{what}.pt"
        if not file.exists():
            yolo.save(copy.deepcopy(make()).half(), file)
        return yolo.load(file)

    def _rows(self, what: str, make: Callable[[], list[Row]]) -> None:
        file = self.folder / f"{what}.json"
        if not file.exists():
            file.write_text(json.dumps(make(), indent=1))

    def measured(self) -> None:
        """Write all rows of this network, each measured once."""
        self._rows("dense", lambda: [self.row("dense", "dense", self.model)])
        for target in self._targets:
            self._rows(target, lambda t=target: self._ours(t))
        self._rows("times", self._times)
        if self.seed == 0 or self.name in THEIRS_AT_EVERY_SEED:
            self._rows("torch-pruning", self._theirs)

    def row(self, target: str, what: str, model: nn.Module, **more: Any) -> Row:
        """Validate `model`."""
        found = yolo.validate(model, self.data, **self.size.judging)
        map50, map95 = (100 * found[f"metrics/mAP50{end}(B)"] for end in ("", "-95"))
        numbers = f"{map50:6.2f} {map95:6.2f}"
        print(f"  {self.name} {self.seed} {target:<10} {what:<40} {numbers}", flush=True)
        return {**self._facts(target, what), "mAP50": map50, "mAP50_95": map95, **more}

    def _facts(self, target: str, what: str) -> Row:
        return {"network": self.name, "seed": self.seed, "target": target, "what": what}

    def _ours(self, target: str) -> list[Row]:
        given: dict[str, Any] = {"forward": yolo.forward, "round_to": ROUND_TO, **TARGETS[target]}
        rows = []
        for what, data in (("not recovered", None), ("recovered", self.images)):
            cut = prune(self.model, self.images[0][:2], data=data, **given)
            left = {"macs": cut.plan.achieved.macs, "params": cut.plan.achieved.params}
            rows.append(self.row(target, what, cut.model, **left))
        slim = self._network(target, lambda: finetuned(cut.model, self.seed, *self._where))
        return [*rows, self.row(target, "fine-tuned", slim)]

    def _theirs(self) -> list[Row]:
        rows = []
        for method in THEIRS:
            what = f"torch-pruning {method}"
            try:
                slim = yolo_theirs.cut(self.model, self.images[0][:1], 0.5, method)
                rows.append(self.row(HALF, what, slim))
                rows.append(self.row(HALF, f"{what} + BN", recalibrated(slim, self.images)))
            except Exception as error:  # that it cannot is a result
                reason = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
                print(f"  {self.name} {what}: {reason}", flush=True)
                rows.append({**self._facts(HALF, what), "refused": reason})
        return rows

    def _times(self) -> list[Row]:
        """Time the exported networks in turns."""
        image, files = self.images[0][:1], {}
        for what in ("dense", *self._targets):
            model = self.model if what == "dense" else yolo.load(self.folder / f"{what}.pt")
            files[what] = self.folder / f"{what}.onnx"
            nampruner.export_onnx(yolo.Exportable(model), files[what], image)
        found = latency.measure(files, image)
        rows = []
        for what in self._targets:
            ms, verdict = found[what].median_ms, latency.compare(found["dense"], found[what])
            row = {"ms": ms, "dense_ms": found["dense"].median_ms, "time": 1 / verdict.speedup}
            rows.append({**self._facts(what, "time of the ONNX file"), **row})
            print(f"  {self.name} {self.seed} {what}: {row}", flush=True)
        return rows


def kept(cache: Path) -> list[Row]:
    """All rows that were measured, network by network."""
    rows: list[Row] = []
    for name in NETWORKS:
        for part in ("dense", *TARGETS, "torch-pruning", "times"):
            for file in sorted(cache.glob(f"{name}-[0-9]/{part}.json")):
                rows += json.loads(file.read_text())
    return rows


def table(rows: list[Row]) -> str:
    """Mean ± standard deviation over the seeds, as Markdown: mAP50 / mAP50-95, time."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    lines = [f"| mAP50 / mAP50-95 | {' | '.join(networks)} |", "|---|" + "---|" * len(networks)]
    for target, what in sorted({(r["target"], r["what"]): None for r in rows}, key=_place):
        cells = []
        for network in networks:
            wanted = (network, target, what)
            same = [r for r in rows if (r["network"], r["target"], r["what"]) == wanted]
            cells.append(_cell(same))
        label = what if what == target else f"{target}: {what}"
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _place(key: tuple[str, str]) -> int:
    return ["dense", *TARGETS].index(key[0])


def _cell(rows: list[Row]) -> str:
    if any("refused" in row for row in rows):
        return "cannot"
    if not rows:
        return "–"
    if "time" in rows[0]:
        dense = statistics.mean(row["dense_ms"] for row in rows)
        return f"{_mean([row['time'] for row in rows], 2)}× of {dense:.1f} ms"
    text = " / ".join(_mean([row[key] for row in rows]) for key in ("mAP50", "mAP50_95"))
    macs = [100 * row["macs"] for row in rows if "macs" in row]
    return f"{text} at {statistics.mean(macs):.0f}%" if macs else text


def _mean(values: list[float], digits: int = 1) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--show", action="store_true", help="measure nothing, show the cache")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results/")
    parser.add_argument("--only", choices=NETWORKS, help="this network")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="of trainings, in Ultralytics' words")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("runs/yolo"))
    return parser.parse_args()


def main() -> None:
    options = _options()
    where = {"device": options.device, "workers": options.workers}
    size, cache = Size(**where), options.cache.resolve()
    networks: tuple[str, ...] = (options.only,) if options.only else NETWORKS
    seeds = options.seeds
    if options.quick:
        size, networks, seeds, cache = Size(**where, **QUICK), networks[:1], [0], cache / "quick"
    torch.set_num_threads(options.threads)
    counts = {"train": size.train, "val": size.val}
    data = canvases(cache / f"set-{size.pixels}", counts, size.pixels)
    for seed in () if options.show else seeds:
        for name in networks:
            folder = cache / f"{name}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            Bench(name, seed, size, data, folder).measured()
    rows = kept(cache)
    print(table(rows))
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "yolo.json").write_text(json.dumps(rows, indent=1) + "\n")
        (RESULTS / "yolo.md").write_text(f"# YOLO: mAP and time\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()
