"""What `reach.py` prints: a line per network while it runs, then the summary and the table."""

import os
import platform
import statistics
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

Record = dict[str, Any]
PACKAGES = ("nampruner", "torch", "torchvision", "timm", "torch-pruning", "onnx", "onnxruntime")
FREE_CNN = 0.8
FREE_HYBRID = 0.3
SPEEDS = {
    "graph": "Building the graph",
    "groups": "Graph and everything that goes together",
}


# -- judgements of one network


def exact(record: Record) -> bool:
    return "error" in record["ours"]


def reloaded(record: Record) -> bool:
    return _done(record["ours"], "reload")


def exported(record: Record) -> bool:
    return _done(record["ours"], "onnx")


def right(record: Record) -> bool:
    """torch-pruning built, pruned, ran, and computes what the masked network does."""
    return "theirs" in record and _done(record["theirs"], "exact")


def verdict(record: Record) -> str:
    """What became of torch-pruning."""
    if "theirs" not in record:
        return "–"
    errors = record["theirs"]["errors"]
    step, message = next(iter(errors.items()), ("", ""))
    if not errors:
        return "right"
    if step == "exact" and message.startswith("NotChecked"):
        return "not checked"
    if step == "exact" and "error" in record["theirs"]:
        return "**silently wrong**"
    if step == "exact":
        return "removes nothing"
    return f"late: {step}" if "not done after" in message else f"fails: {step}"


def free_share(record: Record) -> float:
    """Convolutions free of those that could be; 1 where there is none to free."""
    ours = record["ours"]
    if "free" not in ours:
        return 0.0
    return ours["free"] / ours["convolutions"] if ours["convolutions"] else 1.0


def _done(side: Record, step: str) -> bool:
    return step in side["seconds"] and step not in side["errors"]


def graph_seconds(record: Record) -> tuple[float | None, float | None]:
    """Seconds of building the graph: ours, theirs."""
    ours, theirs = record["ours"], record.get("theirs", {})
    trace = ours["seconds"]["trace"] if _done(ours, "trace") else None
    return trace, theirs.get("graph_seconds")


def group_seconds(record: Record) -> tuple[float | None, float | None]:
    """Seconds until it is known what goes together everywhere: ours, theirs (its constructor)."""
    ours, theirs = record["ours"], record.get("theirs", {"seconds": {}})
    known = _done(ours, "trace") and _done(ours, "groups")
    mine = ours["seconds"]["trace"] + ours["seconds"]["groups"] if known else None
    return mine, theirs["seconds"]["graph"] if _done(theirs, "graph") else None


def _ratio(pairs: Iterable[tuple[float | None, float | None]]) -> dict[str, Any]:
    """Their seconds over ours, where both have any."""
    ratios = [theirs / ours for ours, theirs in pairs if ours and theirs]
    return {
        "networks": len(ratios),
        "median": statistics.median(ratios) if ratios else None,
        "quartiles": statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else None,
    }


# -- the whole


def report(records: list[Record], how: dict[str, int]) -> tuple[str, dict[str, Any]]:
    """The Markdown text, and the same numbers as JSON."""
    summary = {
        kind: _counts([r for r in records if r["ours"].get("kind") == kind])
        for kind in ("CNN", "hybrid")
    }
    unknown = [r["network"] for r in records if "kind" not in r["ours"]]
    speed = {
        "graph": _ratio(map(graph_seconds, records)),
        "groups": _ratio(map(group_seconds, records)),
    }
    run = {
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "cpu": _cpu(),
        **how,
    }
    facts = {"run": run, "summary": summary, "time_ratio": speed, "not_built": unknown}
    parts = ["# Reach", _sentence(facts), _conditions(run), table(records), _failures(records)]
    return "\n\n".join(part for part in parts if part), facts


def _counts(records: list[Record]) -> dict[str, int]:
    tests: dict[str, Callable[[Record], bool]] = {
        "exact": exact,
        "reloaded": reloaded,
        "exported": exported,
        "exact_and_free_80": lambda r: exact(r) and free_share(r) >= FREE_CNN,
        "exact_and_free_30": lambda r: exact(r) and free_share(r) >= FREE_HYBRID,
        "with_repairs": lambda r: r["ours"].get("repairs", 0) > 0,
        "beside": lambda r: "theirs" in r,
        "theirs_right": right,
        "theirs_silently_wrong": lambda r: "silently" in verdict(r),
        "theirs_late": lambda r: verdict(r).startswith("late"),
        "theirs_not_checked": lambda r: verdict(r) == "not checked",
    }
    return {"networks": len(records)} | {k: sum(map(t, records)) for k, t in tests.items()}


def _sentence(facts: dict[str, Any]) -> str:
    cnn, hybrid = facts["summary"]["CNN"], facts["summary"]["hybrid"]
    both = {key: cnn[key] + hybrid[key] for key in cnn}
    share = cnn["exact_and_free_80"] / max(cnn["networks"], 1)
    words = [
        f"{cnn['networks']} CNNs: {cnn['exact']} exact, {cnn['reloaded']} reloaded bit-equal in a "
        f"fresh process, {cnn['exported']} exported to ONNX; {share:.0%} of them exact with "
        f"at least {FREE_CNN:.0%} of their convolutions free.",
        f"{hybrid['networks']} hybrids: {hybrid['exact']} exact, {hybrid['exact_and_free_30']} "
        f"exact with at least {FREE_HYBRID:.0%} free, {hybrid['reloaded']} reloaded, "
        f"{hybrid['exported']} exported.",
    ]
    if both["beside"]:
        words.append(
            f"torch-pruning in the same run: {cnn['theirs_right']} of {cnn['beside']} CNNs right, "
            f"{hybrid['theirs_right']} of {hybrid['beside']} hybrids; "
            f"{both['theirs_silently_wrong']} silently wrong, "
            f"{both['theirs_late']} not done in time, {both['theirs_not_checked']} not checked."
        )
    words += [_compared(what, facts["time_ratio"][key]) for key, what in SPEEDS.items()]
    if facts["not_built"]:
        words.append(f"Not built: {', '.join(facts['not_built'])}.")
    return " ".join(filter(None, words))


def _compared(what: str, ratio: dict[str, Any]) -> str:
    if ratio["median"] is None:
        return ""
    spread = (
        ", quartiles {:.2g} and {:.2g}".format(*ratio["quartiles"]) if ratio["quartiles"] else ""
    )
    return (
        f"{what}: torch-pruning takes {ratio['median']:.2g}× our time "
        f"(median of {ratio['networks']} networks that both can do{spread})."
    )


def _conditions(run: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    return (
        f"`python benchmarks/reach.py`: {run['cpu']}, {run['threads']} thread(s) per process, "
        f"{run['jobs']} process(es) at a time, {run['limit']} s for each network and "
        f"{run['their_limit']} s for torch-pruning; Python {run['python']}, {versions}. "
        "Random weights and BN statistics, float32, batch 2, the smallest of 64, 96, 128, 224 "
        "pixels (or the network's own size) that it takes; 30% of the channels, smallest "
        "weights first, the same fraction in every layer.\n\n"
        "*exact*: masked against pruned, relative, float64 (nampruner refuses above 1e-9; "
        "torch-pruning is given 1e-6). *free*: convolutions with an output channel that can go, "
        "of those that do not make the network's output. *ONNX*: relative difference to PyTorch, "
        "at most 1e-4 or ten times what float32 itself is off. *hybrid*: a LayerNorm, or "
        "attention. torch-pruning is given the network, an input and the output layers, nothing "
        "that is particular to a network. Its graph: `build_dependency`; with groups: the "
        "constructor of its pruner, which builds the graph and walks every group; ours: `trace`, "
        "and with `.groups`."
    )


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    rows = info.read_text().splitlines() if info.exists() else []
    names = [row.partition(":")[2].strip() for row in rows if row.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


# -- rows

COLUMNS = (
    "network", "kind", "px", "exact", "free", "MACs", "params", "repairs", "reload", "ONNX",
    "graph s", "cut s", "torch-pruning", "its graph s", "with groups s", "left alone because",
)  # fmt: skip


def table(records: Iterable[Record]) -> str:
    """One row per network."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(_cells(record))} |" for record in records]
    return "\n".join(lines)


def _cells(record: Record) -> list[str]:
    ours, seconds = record["ours"], record["ours"]["seconds"]
    share = f"{ours['free']}/{ours['convolutions']}" if "free" in ours else "–"
    reasons = "; ".join(f"{why} ({n}×)" for why, n in ours.get("reasons", []))
    return [
        record["network"],
        ours.get("kind", "–"),
        str(ours.get("input_px", "–")),
        _number(ours.get("error"), ".0e") if exact(record) else "**no**",
        share,
        _number(ours.get("macs_left"), ".0%"),
        _number(ours.get("params_left"), ".0%"),
        str(ours.get("repairs", "–")),
        _word(ours, "reload"),
        _number(ours["onnx"], ".0e") if ours.get("onnx") is not None else _word(ours, "onnx"),
        _number(seconds.get("trace"), ".2f"),
        _number(seconds.get("prune"), ".1f"),
        verdict(record),
        _number(graph_seconds(record)[1], ".2f"),
        _number(group_seconds(record)[1], ".2f"),
        reasons.replace("|", "\\|"),
    ]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _word(side: Record, step: str) -> str:
    if step in side["errors"]:
        return "**no**"
    return "yes" if step in side["seconds"] else "–"


def _failures(records: Iterable[Record]) -> str:
    """What failed, in the words of the program."""
    rows = [
        f"- {record['network']}, {who}, {step}: {message}"
        for record in records
        for who, side in (("nampruner", "ours"), ("torch-pruning", "theirs"))
        for step, message in record.get(side, {}).get("errors", {}).items()
    ]
    return "\n".join(["## What failed", "", *rows]) if rows else ""


def line(record: Record) -> str:
    """One network in one line, while it runs."""
    ours = record["ours"]
    error, onnx = _number(ours.get("error"), ".0e"), _number(ours.get("onnx"), ".0e")
    share = f"{ours['free']}/{ours['convolutions']} free" if "free" in ours else "not traced"
    failed = "".join(f" | {step}: {why[:90]}" for step, why in ours["errors"].items())
    seconds = sum(ours["seconds"].values())
    return (
        f"{record['network']:<44} {ours.get('kind', '?'):<6} exact {error:<6} {share:<14} "
        f"reload {_word(ours, 'reload'):<7} onnx {onnx:<6} torch-pruning {verdict(record)} "
        f"| {seconds:.0f} s{failed}"
    )
