"""Times in a process of its own, which no training, tracing or cutting has warmed up or filled."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nampruner.errors import NamPrunerError
from nampruner.latency.clock import measure
from nampruner.latency.sessions import Array
from nampruner.plan import Latency


def measure_fresh(
    files: Mapping[str, Path], inputs: Array, *, threads: int = 1
) -> dict[str, Latency]:
    """Time ONNX files in turns, as `measure` does, in a fresh process.

    Raises:
        NamPrunerError: a file cannot be run, or the process was stopped.
    """
    with tempfile.TemporaryDirectory(prefix="nampruner-") as folder:
        batch, answer = Path(folder) / "inputs.npy", Path(folder) / "answer.json"
        np.save(batch, inputs)
        task = {
            "files": {name: str(path) for name, path in files.items()},
            "batch": str(batch),
            "threads": threads,
            "answer": str(answer),
        }
        done = subprocess.run(
            [sys.executable, "-m", __name__, json.dumps(task)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
            raise NamPrunerError(f"the network could not be timed: {reason[0]}")
        found = json.loads(answer.read_text(encoding="utf-8"))
    return {name: Latency.model_validate(value) for name, value in found.items()}


def _answer(task: str) -> None:
    asked = json.loads(task)
    found = measure(asked["files"], np.load(asked["batch"]), threads=asked["threads"])
    told = json.dumps({name: latency.model_dump() for name, latency in found.items()})
    Path(asked["answer"]).write_text(told, encoding="utf-8")


if __name__ == "__main__":
    _answer(sys.argv[1])
