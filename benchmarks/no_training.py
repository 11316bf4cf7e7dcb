"""Accuracy right after the cut: no labels, no fine-tuning.

Fashion-MNIST, ResNet-20 (width 16) and a MobileNetV2-style network, trained once per seed with and
without NAM + proximal penalty, then cut to 1/2 and 1/4 of their MACs by nampruner and, in the same
run, by torch-pruning's importances (each as it is, and with BN recalibration, to be fair).

    python benchmarks/no_training.py            # trains what is not cached, then measures
    python benchmarks/no_training.py --quick    # a minute: does it run? one small network, 1/2 only
"""

import argparse
import copy
import json
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from bisection import largest_within
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import nampruner
from nampruner.config import DataOptions, PenaltyOptions, TrainOptions
from nampruner.data import Data, load_data
from nampruner.models import build
from nampruner.nam import attach_nam
from nampruner.penalty import SparsityPenalty, fitting_strength
from nampruner.pruning import prune
from nampruner.training import FitSettings, evaluate, fit

NETWORKS = {
    "resnet20": "resnet20",
    "mobilenetv2-style": f"{Path(__file__).parent}/networks.py:mobile",
}
TARGETS = {"2x": "50%", "4x": "25%"}
TP = ("BNScale", "GroupMagnitude", "Magnitude", "Taylor", "LAMP", "FPGM", "Random")


@dataclass(frozen=True)
class Scope:
    """How much is measured of one trained network."""

    targets: tuple[str, ...] = tuple(TARGETS)
    theirs: tuple[str, ...] = TP
    calibration: int = 1024


QUICK = Scope(targets=("2x",), theirs=("BNScale", "Magnitude"), calibration=256)


@dataclass(frozen=True)
class Setting:
    """One trained network."""

    network: str
    nam: bool
    seed: int

    @property
    def name(self) -> str:
        return f"{self.network}-{'nam' if self.nam else 'plain'}-{self.seed}"


def trained(setting: Setting, data: Data, epochs: int, cache: Path) -> nn.Module:
    """Train, or load what was trained before."""
    torch.manual_seed(setting.seed)
    spec = NETWORKS[setting.network]
    model = build(spec, num_classes=10, in_channels=1, image_size=28, trust_source=True)
    if setting.nam:
        attach_nam(model, data.example_input(4), parts="channel")
    file = cache / f"{setting.name}.safetensors"
    if file.exists():
        load_model(model, str(file))
        return model.eval()
    options = TrainOptions(epochs=epochs)
    settings = FitSettings.sparse(options, nampruner.config.RuntimeOptions(seed=setting.seed))
    fit(model, data, settings, penalty=_penalty(model, setting, epochs * len(data.train)))
    save_model(model, str(file))
    return model.eval()


def _penalty(model: nn.Module, setting: Setting, steps: int) -> SparsityPenalty | None:
    if not setting.nam:
        return None
    options, training = PenaltyOptions(), TrainOptions()
    warmup = round(options.penalty_warmup * steps)
    mean_lr, momentum = training.lr / 2, training.momentum
    strength = fitting_strength(mean_lr, steps - warmup / 2, momentum=momentum)
    return SparsityPenalty(model, strength, method=options.penalty, warmup_steps=warmup)


OURS = {
    "ours, uniform": {"importance": "reconstruction", "allocation": "uniform"},
    "ours, error": {"importance": "reconstruction", "allocation": "error"},
    "ours, scale factors": {"importance": "auto", "allocation": "uniform"},
}


def ours(model: nn.Module, data: Data, macs: str, calibration: list[Tensor], how: dict[str, Any]):
    """Cut and recover."""
    example = data.example_input(4)
    return prune(model, example, data=calibration, macs=macs, round_to=4, **how)


def theirs(model: nn.Module, data: Data, fraction: float, method: str) -> nn.Module:
    """Cut with torch-pruning, the same fraction everywhere, to at most the same MACs."""
    return largest_within(fraction, lambda ratio: _their_cut(model, data, ratio, method))


def _their_cut(model: nn.Module, data: Data, ratio: float, method: str) -> tuple[nn.Module, float]:
    slim, example = copy.deepcopy(model), data.example_input(1)
    head = [m for m in slim.modules() if isinstance(m, nn.Linear)][-1]
    before, _ = tp.utils.count_ops_and_params(slim, example)
    importance = getattr(tp.importance, f"{method}Importance")()
    pruner = tp.pruner.BasePruner(
        slim, example, importance, pruning_ratio=ratio, ignored_layers=[head], round_to=4
    )
    if method == "Taylor":
        images, labels = next(iter(data.plain))
        nn.functional.cross_entropy(slim(images), labels).backward()
    pruner.step()
    return slim.eval(), tp.utils.count_ops_and_params(slim, example)[0] / before


def recalibrated(model: nn.Module, calibration: list[Tensor]) -> nn.Module:
    """BN statistics of the calibration images."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in calibration:
            model(batch)
    return model.eval()


def measure(
    setting: Setting, data: Data, epochs: int, cache: Path, scope: Scope
) -> list[dict[str, Any]]:
    """All rows of one trained network."""
    model = trained(setting, data, epochs, cache)
    rows: list[dict[str, Any]] = []
    calibration = list(data.calibration(scope.calibration))

    def add(target: str, method: str, accuracy: float, **more: Any) -> None:
        rows.append({**setting.__dict__, "target": target, "method": method,
                     "accuracy": 100 * accuracy, **more})  # fmt: skip
        print(f"  {setting.name:<28} {target:<5} {method:<34} {100 * accuracy:6.2f}", flush=True)

    add("dense", "dense", evaluate(model, data.test).accuracy)
    for target in scope.targets:
        macs = TARGETS[target]
        for name, how in OURS.items():
            start = time.perf_counter()
            cut = ours(model, data, macs, calibration, how)
            seconds = time.perf_counter() - start
            accuracy = evaluate(cut.model, data.test).accuracy
            add(target, name, accuracy, macs=cut.plan.achieved.macs, seconds=seconds)
        for method in scope.theirs:
            try:
                slim = theirs(model, data, float(macs[:-1]) / 100, method)
                add(target, f"torch-pruning {method}", evaluate(slim, data.test).accuracy)
                slim = recalibrated(slim, calibration)
                add(target, f"torch-pruning {method} + BN", evaluate(slim, data.test).accuracy)
            except Exception as error:
                print(f"  {setting.name} torch-pruning {method}: {type(error).__name__}: {error}")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation over the seeds, as Markdown."""
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        network = f"{row['network']}, {'NAM + penalty' if row['nam'] else 'plain'}"
        cells[f"{row['target']} {row['method']}", network].append(row["accuracy"])
    networks = sorted({network for _, network in cells})
    methods = list(dict.fromkeys(method for method, _ in cells))
    lines = [f"| | {' | '.join(networks)} |", "|---|" + "---|" * len(networks)]
    for method in methods:
        values = [cells.get((method, network), []) for network in networks]
        lines.append(f"| {method} | " + " | ".join(map(_cell, values)) + " |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def images(count: int, tested: int | None = None, batch_size: int | None = None) -> Data:
    """Fashion-MNIST with the first `count` training images of a fixed permutation.

    Of the test images, the first `tested`, or all. Few images need small batches, or the running
    statistics of the BN layers lag behind.
    """
    data = load_data(DataOptions(data="fashion-mnist"), seed=0)
    order = torch.randperm(len(data.train.dataset), generator=torch.Generator().manual_seed(0))
    few = Subset(data.train.dataset, order[:count].tolist())
    train = DataLoader(
        few,
        batch_size=batch_size or data.train.batch_size,
        shuffle=True,
        collate_fn=data.train.collate_fn,
        generator=data.train.generator,
        drop_last=True,
    )
    if tested is None:
        return replace(data, train=train)
    some = Subset(data.test.dataset, range(tested))
    test = DataLoader(some, batch_size=data.test.batch_size, collate_fn=data.test.collate_fn)
    return replace(data, train=train, test=test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--network", choices=list(NETWORKS), help="only this one")
    parser.add_argument("--nam", action="store_true", help="only with NAM and penalty")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--cache", type=Path, default=Path("runs/no_training"))
    parser.add_argument("--out", type=Path, help="default: runs/no_training/results.json")
    options = parser.parse_args()
    scope, tested, batch_size, out = Scope(), None, None, Path("runs/no_training/results.json")
    if options.quick:
        scope, tested, batch_size = QUICK, 1000, 32
        options.seeds, options.epochs, options.images = 1, 2, 2000
        options.network, options.nam = options.network or "resnet20", True
        options.cache = options.cache / "quick"
        out = options.cache / "results.json"
    options.cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    data = images(options.images, tested, batch_size)
    seeds = range(options.seeds)
    networks = [options.network] if options.network else list(NETWORKS)
    ways = (True,) if options.nam else (True, False)
    settings = [Setting(n, nam, s) for nam in ways for s in seeds for n in networks]
    rows: list[dict[str, Any]] = []
    for setting in settings:
        if options.train_only:
            start = time.perf_counter()
            trained(setting, data, options.epochs, options.cache)
            print(f"{setting.name} trained, {time.perf_counter() - start:.0f} s", flush=True)
            continue
        done = options.cache / f"{setting.name}.json"
        if not done.exists():
            found = measure(setting, data, options.epochs, options.cache, scope)
            done.write_text(json.dumps(found, indent=1))
        rows += json.loads(done.read_text())
    (options.out or out).write_text(json.dumps(rows, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
