"""What a person reads of benchmarks/gpu.py."""

from collections.abc import Iterator
from typing import Any

Record = dict[str, Any]


def report(record: Record) -> str:
    """Return the tables as markdown."""
    software = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    about = (
        f"One {record['gpu']}; {software}; PyTorch eager in CUDA graphs, channels_last, BN and "
        "activations unfused, cuDNN's choice of kernels by trial. Candidates run in turns; a time "
        "is a median over turns by CUDA events, a speed-up the median over pairs of turns, with "
        "its 95 % interval. *Yield* is the speed-up over the MACs reduction: 1 where time falls as "
        "MACs do."
    )
    parts = [about, *_inference(record), *_nam(record)]
    if record["left_out"]:
        parts.append(f"Left out, for time: {'; '.join(record['left_out'])}.")
    return "\n\n".join(parts)


def _inference(record: Record) -> Iterator[str]:
    for cell, found in record["inference"].items():
        shares = record["macs"][cell.split(",")[0]]
        lines = ["| candidate | MACs | ms | speed-up (95 %) | yield |", "|---|---|---|---|---|"]
        for name, row in found.items():
            share = shares[name]
            gain = "" if name == "dense" else f"{row['speedup'] * share:.2f}"
            lines.append(f"| {name} | {share:.1%} | {row['ms']:.3f} | {_speedup(row)} | {gain} |")
        yield f"## {cell}"
        yield "\n".join(lines)


def _nam(record: Record) -> Iterator[str]:
    if not record["nam"]:
        return
    yield "## NAM in ResNet-50: training steps (bf16 autocast, no graph), and inference"
    lines = [
        "| | network | ms | time, times plain | memory of a step, GB |",
        "|---|---|---|---|---|",
    ]
    for where, found in record["nam"].items():
        for name, row in found.items():
            peak = row.get("peak_gb", "")
            lines.append(
                f"| {where} | {name} | {row['ms']:.2f} | {1 / row['speedup']:.2f} | {peak} |"
            )
    yield "\n".join(lines)


def _speedup(row: Record) -> str:
    return f"{row['speedup']:.2f}× ({row['low']:.2f}–{row['high']:.2f})"
