"""YOLO detectors: mAP dense, right after the cut, after fine-tuning, and the time of the ONNX file.

Fashion-MNIST items on canvases (yolo_data.py): 600 images to train, 200 to validate, 128 px.
Trained by SGD under the proximal penalty, one thread; cut by nampruner with and without recovery,
and v8n by torch-pruning beside it; fine-tuned for a quarter of the training's epochs.

    python benchmarks/yolo.py                               # v8n, 11n, 26n, three seeds; resumable
    python benchmarks/yolo.py --only yolov8n --seeds 1
    python benchmarks/yolo.py --write                       # table into benchmarks/results/
    python benchmarks/yolo.py --quick                       # minutes: does it run?
"""

import argparse
import json
import statistics
from dataclasses import dataclass
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

NETWORKS = ("yolov8n", "yolo11n", "yolo26n")
TARGETS: dict[str, dict[str, Any]] = {"50% MACs": {"macs": "50%"}, "ratio 0.3": {"ratio": 0.3}}
OURS = {
    "scale factors": {"importance": "auto"},
    "reconstruction": {"importance": "reconstruction", "allocation": "error"},
}
THEIRS = ("BNScale", "GroupMagnitude")
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Size:
    """How large the experiment is."""

    epochs: int = 60
    train: int = 600
    val: int = 200
    pixels: int = 128
    calibration: int = 256

    @property
    def shared(self) -> dict[str, Any]:
        """Ultralytics' arguments of every training."""
        return {"imgsz": self.pixels, "batch": 16, "optimizer": "SGD", "device": "cpu"}


QUICK = Size(epochs=4, train=48, val=16, pixels=64, calibration=32)


def trained(name: str, seed: int, size: Size, data: Path, cache: Path) -> nn.Module:
    """Train, or load what was trained before."""
    file = cache / f"{name}-{seed}.pt"
    if not file.exists():
        torch.manual_seed(seed)
        given = {"num_classes": len(CLASSES), "in_channels": 3, "image_size": size.pixels}
        model = nampruner.build(f"yolo:{name}.yaml", **given)
        done = yolo.train(
            model,
            data,
            epochs=size.epochs,
            lr0=0.02,
            warmup_epochs=2.0,
            close_mosaic=size.epochs // 4,
            seed=seed,
            project=str(cache),
            name=f"{name}-{seed}",
            exist_ok=True,
            **size.shared,
        )
        yolo.save(done.model, file)
    return yolo.load(file)


def finetuned(model: nn.Module, seed: int, size: Size, data: Path, cache: Path) -> nn.Module:
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
        project=str(cache),
        name="finetune",
        exist_ok=True,
        **size.shared,
    ).model


@dataclass(frozen=True)
class Bench:
    """One trained network, and all that is needed to measure it."""

    name: str
    seed: int
    size: Size
    data: Path
    cache: Path

    def row(self, target: str, what: str, model: nn.Module, **more: Any) -> dict[str, Any]:
        """Validate `model`."""
        found = yolo.validate(model, self.data, imgsz=self.size.pixels, batch=16, device="cpu")
        map50, map95 = (100 * found[f"metrics/mAP50{end}(B)"] for end in ("", "-95"))
        numbers = f"{map50:6.2f} {map95:6.2f}"
        print(f"  {self.name} {self.seed} {target:<10} {what:<40} {numbers}", flush=True)
        facts = {"network": self.name, "seed": self.seed, "target": target, "what": what}
        return {**facts, "mAP50": map50, "mAP50_95": map95, **more}

    def measured(self) -> list[dict[str, Any]]:
        """All rows of this network."""
        model = trained(self.name, self.seed, self.size, self.data, self.cache)
        images = yolo.images(
            model, self.data, image_size=self.size.pixels, count=self.size.calibration
        )
        rows = [self.row("dense", "dense", model)]
        for target, options in TARGETS.items():
            rows += self._ours(model, images, target, options)
        rows += self._theirs(model, images)
        return rows

    def _ours(
        self, model: nn.Module, images: list[Tensor], target: str, options: dict[str, Any]
    ) -> list[dict[str, Any]]:
        rows, best = [], (-1.0, model)
        for way, how in OURS.items():
            given: dict[str, Any] = {"forward": yolo.forward, "batches": images, **options, **how}
            bare = prune(model, images[0][:2], **given)
            cut = prune(model, images[0][:2], data=images, **given)
            left = {"macs": cut.plan.achieved.macs, "params": cut.plan.achieved.params}
            rows.append(self.row(target, f"{way}, not recovered", bare.model, **left))
            rows.append(self.row(target, f"{way}, recovered", cut.model, **left))
            best = max(best, (rows[-1]["mAP50"], cut.model), key=lambda pair: pair[0])
        slim = finetuned(best[1], self.seed, self.size, self.data, self.cache)
        times = self._times(model, slim, images[0][:1])
        return [*rows, self.row(target, "fine-tuned", slim, **times)]

    def _times(self, dense: nn.Module, slim: nn.Module, image: Tensor) -> dict[str, float]:
        files = {}
        for name, model in (("dense", dense), ("slim", slim)):
            files[name] = self.cache / f"{self.name}-{self.seed}-{name}.onnx"
            nampruner.export_onnx(yolo.Exportable(model), files[name], image)
        found = latency.measure(files, image)
        times = {f"{name}_ms": found[name].median_ms for name in files}
        return {**times, "time": found["slim"].median_ms / found["dense"].median_ms}

    def _theirs(self, model: nn.Module, images: list[Tensor]) -> list[dict[str, Any]]:
        rows = []
        for method in THEIRS:
            what = f"torch-pruning {method}"
            try:
                slim = yolo_theirs.cut(model, images[0][:1], 0.5, method)
                rows.append(self.row("50% MACs", what, slim))
                rows.append(self.row("50% MACs", f"{what} + BN", recalibrated(slim, images)))
            except Exception as error:  # that it cannot is a result
                reason = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
                print(f"  {self.name} {what}: {reason}", flush=True)
                rows.append({"network": self.name, "seed": self.seed, "target": "50% MACs",
                             "what": what, "refused": reason})  # fmt: skip
        return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation over the seeds, as Markdown: mAP50 / mAP50-95, time."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    lines = [f"| mAP50 / mAP50-95 | {' | '.join(networks)} |", "|---|" + "---|" * len(networks)]
    for target, what in dict.fromkeys((row["target"], row["what"]) for row in rows):
        cells = []
        for network in networks:
            wanted = (network, target, what)
            same = [r for r in rows if (r["network"], r["target"], r["what"]) == wanted]
            cells.append(_cell(same))
        label = what if what == target else f"{target}: {what}"
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rows: list[dict[str, Any]]) -> str:
    if any("refused" in row for row in rows):
        return "cannot"
    if not rows:
        return "–"
    text = " / ".join(_mean([row[key] for row in rows]) for key in ("mAP50", "mAP50_95"))
    times = [row["time"] for row in rows if "time" in row]
    return f"{text}, {statistics.mean(times):.2f}× the time" if times else text


def _mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results/")
    parser.add_argument("--only", choices=NETWORKS, help="this network")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("runs/yolo"))
    options = parser.parse_args()
    size, networks, seeds = Size(), NETWORKS, options.seeds
    if options.quick:
        size, networks, seeds = QUICK, ("yolov8n",), 1
        options.cache /= "quick"
    cache = options.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    counts = {"train": size.train, "val": size.val}
    data = canvases(cache / f"set-{size.pixels}", counts, size.pixels)
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        for name in (options.only,) if options.only else networks:
            done = cache / f"{name}-{seed}.json"
            if not done.exists():
                found = Bench(name, seed, size, data, cache).measured()
                done.write_text(json.dumps(found, indent=1))
            rows += json.loads(done.read_text())
    print(table(rows))
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "yolo.json").write_text(json.dumps(rows, indent=1) + "\n")
        (RESULTS / "yolo.md").write_text(f"# YOLO: mAP and time\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()
