"""How far nampruner reaches: every BatchNorm family of timm and torchvision, one by one.

Each network gets random BN statistics and is traced, cut by 30%, certified, reloaded in a fresh
process and exported to ONNX; torch-pruning is measured beside it in the same run. A network is a
process with a time limit, and a JSON in the cache: what is there is not measured again.

    python benchmarks/reach.py --list                       # which networks, and stop
    python benchmarks/reach.py --only 'timm:resnet18*'      # a few
    python benchmarks/reach.py --write                      # all, into benchmarks/results/
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from reach_networks import Network, chosen
from reach_table import line, report

HERE = Path(__file__).parent
STARTING = 120
"""Seconds to import and to build the network; they do not count."""


@dataclass(frozen=True)
class Settings:
    """How the networks are measured."""

    cache: Path
    threads: int
    limit: int
    """Seconds for nampruner, all steps together."""
    their_limit: int
    onnx: bool
    torch_pruning: bool
    retry_failed: bool


def measured(network: Network, settings: Settings) -> dict[str, Any]:
    """The record of one network: from the cache what is there, else measured and put there."""
    file = settings.cache / f"{network.file_stem}.json"
    record = json.loads(file.read_text()) if file.exists() else {}
    record |= {"network": network.name, "family": network.family, "params": network.params}
    sides = {"ours": settings.limit, "theirs": settings.their_limit}
    for side, limit in sides.items():
        if _wanted(side, record.get(side), settings):
            record[side] = _in_a_process(side, network, settings, limit)
            file.write_text(json.dumps(record, indent=1))
    return record


def _wanted(side: str, known: dict[str, Any] | None, settings: Settings) -> bool:
    if side == "theirs":
        # its failures are results; what failed in time is not tried again either
        return known is None and settings.torch_pruning
    if known is None or (settings.retry_failed and known["errors"]):
        return True
    return settings.onnx and not known["errors"] and "onnx" not in known


def _in_a_process(side: str, network: Network, settings: Settings, limit: int) -> dict[str, Any]:
    part = settings.cache / f"{network.file_stem}.{side}.part"
    command = [sys.executable, str(HERE / "reach_one.py"), side, network.name]
    command += ["--out", str(part), "--threads", str(settings.threads)]
    command += ["--limit", str(limit)] + ([] if settings.onnx else ["--no-onnx"])
    part.unlink(missing_ok=True)
    threads = {key: str(settings.threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    # a session of its own, so that what it started ends with it
    process = subprocess.Popen(
        command,
        env={**os.environ, **threads},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, stderr = process.communicate(timeout=limit + STARTING)
        end = (stderr.strip().splitlines() or [f"the process ended with {process.returncode}"])[-1]
        late = process.returncode == -signal.SIGALRM
    except subprocess.TimeoutExpired:
        late = True
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if late:
        process.communicate()
        end = f"not done after {limit} s"
    found = json.loads(part.read_text()) if part.exists() else {"seconds": {}, "errors": {}}
    part.unlink(missing_ok=True)
    if not found.pop("done", False):
        found["errors"][found.get("running") or "start"] = end[:400]
    found.pop("running", None)
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="GLOB", help="networks by name")
    parser.add_argument("--list", action="store_true", help="name the networks and stop")
    parser.add_argument(
        "--per",
        choices=("blocks", "module"),
        default="blocks",
        help="a family of timm is a set of blocks, or a whole module of timm",
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch and OpenMP, per process")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time")
    parser.add_argument("--limit", type=int, default=180, help="seconds per network")
    parser.add_argument("--their-limit", type=int, default=60, help="for torch-pruning")
    parser.add_argument("--no-torch-pruning", action="store_true")
    parser.add_argument("--no-onnx", action="store_true")
    parser.add_argument("--retry-failed", action="store_true", help="measure our failures again")
    parser.add_argument("--cache", type=Path, default=Path("runs/reach"))
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/reach.*")
    return parser.parse_args()


def main() -> None:
    options = _options()
    say = partial(print, flush=True, file=sys.stderr)
    networks = chosen(options.cache, options.per, say)
    globs = options.only or ["*"]
    networks = [n for n in networks if any(fnmatchcase(n.name, glob) for glob in globs)]
    if not networks:
        sys.exit(f"--only {' '.join(globs)} matches no network; --list names them")
    if options.list:
        print("\n".join(f"{n.name:<48} {n.params / 1e6:6.1f} M  {n.family}" for n in networks))
        return
    settings = Settings(
        cache=options.cache,
        threads=options.threads,
        limit=options.limit,
        their_limit=options.their_limit,
        onnx=not options.no_onnx,
        torch_pruning=not options.no_torch_pruning,
        retry_failed=options.retry_failed,
    )
    records, small_first = [], sorted(networks, key=lambda network: network.params)
    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda network: measured(network, settings), small_first)
        for number, record in enumerate(results, start=1):
            records.append(record)
            say(f"[{number}/{len(networks)}] {line(record)}")
    records.sort(key=lambda record: record["network"])
    how = {key: getattr(options, key) for key in ("threads", "jobs", "limit", "their_limit")}
    text, facts = report(records, how)
    print(text)
    folder = HERE / "results" if options.write else options.cache
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reach.md").write_text(text + "\n")
    (folder / "reach.json").write_text(json.dumps({**facts, "networks": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
