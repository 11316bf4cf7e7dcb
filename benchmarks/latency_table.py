"""What a person reads of benchmarks/latency.py: a table, the sweep, the targets, a plot."""

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from nampruner.figures.style import (
    AFTER,
    BEFORE,
    INK,
    MUTED,
    PALE,
    blank,
    save,
    styled,
)
from nampruner.staircase.device import processor

CELL = "batch {batch}, {threads} thread(s)"
FIRST = CELL.format(batch=1, threads=1)
WITHIN = 0.03
Record = dict[str, Any]


def report(records: list[Record]) -> str:
    parts = [
        f"{processor()}, onnxruntime {version('onnxruntime')}, torch {version('torch')}, "
        f"torch-pruning {version('torch-pruning')}, timm {version('timm')}; random BN statistics. "
        f"Candidates run in turns, in five fresh processes. The machine has {os.cpu_count()} "
        "cores, shared with other work; *load* is that of the last minute. So *ms* and *speed-up* "
        "are of the quietest turn of each (the smallest median of a turn), *median* is over all "
        "pairs of turns, with its 95 % interval. *Yield* is the speed-up over the MACs reduction: "
        "1 where time falls as MACs do.",
        *_tables(records),
        *_sweep(records),
        *_targets(records),
    ]
    return "\n\n".join(parts)


def _tables(records: list[Record]) -> Iterator[str]:
    cells = dict.fromkeys(cell for record in records for cell in record.get("cells", {}))
    for cell in cells:
        lines = [f"## Half of the MACs, {cell}", ""]
        lines += ["| network | candidate | MACs | ms | speed-up | yield | median (95 %) | load |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for record in records:
            if cell in record.get("cells", {}):
                lines += _rows(record, record["cells"][cell])
        yield "\n".join(lines)


def _rows(record: Record, cell: Record) -> Iterator[str]:
    for candidate, known in record["candidates"].items():
        if candidate in cell["rows"]:
            row, macs = cell["rows"][candidate], known["macs"]
            gain = f"{row['quiet']:.2f}× | {row['quiet'] * macs:.2f} | {_interval(row)}"
            yield (
                f"| {record['network']} | {candidate} | {macs:.1%} | {row['ms']:.2f} | "
                f"{' |  | ' if candidate == 'dense' else gain} | {cell['load']} |"
            )
        elif "error" in known and candidate in _AT_HALF:
            failed = f"failed: {known['error'][:80]}"
            yield f"| {record['network']} | {candidate} | {failed} |  |  |  |  |  |"


def _interval(row: Record) -> str:
    return f"{row['median']:.2f}× ({row['low']:.2f}–{row['high']:.2f})"


def _sweep(records: list[Record]) -> Iterator[str]:
    swept = [record for record in records if record.get("sweep")]
    if swept:
        ratios = sorted({ratio for record in swept for ratio in record["sweep"]}, key=float)
        lines = ['## Every ratio, `round_to="auto"`, batch 1, 1 thread: speed-up at MACs left', ""]
        lines += ["| network | " + " | ".join(ratios) + " |", "|---" * (len(ratios) + 1) + "|"]
        for record in swept:
            cells = [_ratio(record["sweep"].get(ratio)) for ratio in ratios]
            lines.append(f"| {record['network']} | " + " | ".join(cells) + " |")
        yield "\n".join(lines)


def _ratio(row: Record | None) -> str:
    return "" if row is None else f"{row['quiet']:.2f}× ({row['median']:.2f}×) at {row['macs']:.0%}"


def _targets(records: list[Record]) -> Iterator[str]:
    aimed = [record for record in records if record.get("targets")]
    if aimed:
        lines = ["## `--latency`: the time that remains, measured again in a fresh process", ""]
        lines += ["| network | target | while aiming | again: median (95 %) | quietest turn | "]
        lines[-1] += "within 3 % or the noise |"
        lines += ["|---|---|---|---|---|---|"]
        lines += [
            f"| {record['network']} | {target} | {row['aimed']:.1%} | {1 / row['median']:.1%} "
            f"({1 / row['high']:.1%}–{1 / row['low']:.1%}) | {1 / row['quiet']:.1%} | "
            f"{_met(target, row)} |"
            for record in aimed
            for target, row in record["targets"].items()
        ]
        yield "\n".join(lines)


def _met(target: str, row: Record) -> str:
    wanted = float(target.rstrip("%")) / 100
    near = abs(1 / row["median"] / wanted - 1) <= WITHIN
    return "yes" if near else "noise" if 1 / row["high"] <= wanted <= 1 / row["low"] else "no"


_AT_HALF = {
    "nampruner macs 50%": AFTER,
    "nampruner latency 50%": INK,
    "torch-pruning": PALE,
    "torch-pruning round_to 8": MUTED,
    "torch-pruning round_to 16": BEFORE,
}


def plot(records: list[Record], path: Path) -> None:
    """Draw the yield of every candidate at batch 1, 1 thread."""
    shown = [record for record in records if FIRST in record.get("cells", {})]
    if not shown:
        return
    with styled():
        figure = blank(1.5 * len(shown) + 2, 3.4)
        axes = figure.subplots()
        for number, (candidate, color) in enumerate(_AT_HALF.items()):
            places = np.arange(len(shown)) + 0.16 * (number - 2)
            yields = [_yield(record, candidate) for record in shown]
            axes.bar(places, yields, 0.15, color=color, label=candidate)
        axes.axhline(1, color=INK, linewidth=0.8)
        axes.set_xticks(range(len(shown)), [record["network"] for record in shown])
        axes.set_ylabel("speed-up ÷ MACs reduction")
        axes.set_title("Half of the MACs: how much of it is time (batch 1, 1 thread)")
        axes.grid(axis="y")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    save(figure, path)


def _yield(record: Record, candidate: str) -> float:
    row = record["cells"][FIRST]["rows"].get(candidate)
    return float("nan") if row is None else row["quiet"] * record["candidates"][candidate]["macs"]
