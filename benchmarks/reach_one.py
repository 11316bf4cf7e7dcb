"""One network, one side, in a process of its own; `reach.py` starts it and ends it when it is late.

    python benchmarks/reach_one.py ours   timm:resnet18 --out runs/reach/part.json
    python benchmarks/reach_one.py theirs timm:resnet18 --out runs/reach/part.json
    python benchmarks/reach_one.py reload FOLDER

What is known is written after every step, so a process that is killed loses one step only.
"""

import argparse
import copy
import logging
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from reach_build import Log, build, difference, kind_of, output_layers, tensors
from reach_networks import Network
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import nampruner

RATIO = 0.3
PARITY = 1e-4
"""ONNX Runtime against PyTorch, relative, or ten times what float32 itself is off."""


def ours(model: nn.Module, images: Tensor, log: Log, *, onnx: bool) -> None:
    """Trace, cut, certify, reload in a fresh process, export."""
    log.note(kind=kind_of(model, images), input_px=images.shape[-1])
    heads = output_layers(model, images)
    trace = nampruner.trace  # the import is not part of the time
    graph = log.attempt("trace", lambda: trace(model, images))
    if graph is None:
        return
    log.attempt("groups", lambda: graph.groups)
    log.note(**freedom(model, graph, graph.left_alone(), heads))
    result = log.attempt("prune", lambda: cut(model, images))
    if result is None:
        return
    plan = result.plan
    log.note(
        error=result.certificate.max_relative_error,
        ratio=plan.achieved.ratio,
        params_left=plan.achieved.params,
        macs_left=plan.achieved.macs,
        repairs=len(plan.repairs),
        **freedom(model, graph, plan.left_alone, heads),
    )
    with tempfile.TemporaryDirectory() as folder:
        log.attempt("reload", lambda: reloaded(result.model, images, Path(folder)))
        if onnx:
            parity = log.attempt("onnx", lambda: exported(result.model, images, Path(folder)))
            log.note(onnx=parity)


def cut(model: nn.Module, images: Tensor) -> Any:
    """The same fraction of every layer that can shrink, so that the proof reaches all of them."""
    return nampruner.prune(
        model, images, ratio=RATIO, importance="magnitude", allocation="uniform", round_to=1
    )


def freedom(model: nn.Module, graph: Any, alone: Any, heads: set[str]) -> dict[str, Any]:
    """How many convolutions have an output channel that can go, and why the others have none.

    Counted are the convolutions that run in eval mode and do not make the network's output.
    """
    modules = dict(model.named_modules())
    ran = dict.fromkeys(product.module for product in graph.products)
    convolutions = {n for n in ran if n not in heads and _is_convolution(modules[n])}
    left = {row.layer: row.reason for row in alone if row.layer in convolutions}
    reasons = Counter(_general(reason, modules) for reason in left.values())
    return {
        "convolutions": len(convolutions),
        "free": len(convolutions) - len(left),
        "reasons": reasons.most_common(2),
    }


def _is_convolution(module: nn.Module) -> bool:
    """Also those of timm that keep their weight in another form (CondConv2d)."""
    own = next(module.parameters(recurse=False), None) is not None
    return isinstance(module, _ConvNd) or (own and "Conv" in type(module).__name__)


def _general(reason: str, modules: dict[str, nn.Module]) -> str:
    """A reason without the names of layers, so that equal ones can be counted."""
    words = [w if w.strip("'\"`,;:().") not in modules else "…" for w in reason.split()]
    return " ".join(words)[:160]


def reloaded(slim: nn.Module, images: Tensor, folder: Path) -> None:
    """Save, load in a fresh process, compare bit by bit.

    Raises:
        RuntimeError: it does not load, or the outputs differ.
    """
    nampruner.save(slim, folder / "checkpoint")
    with torch.no_grad():
        outputs = tensors(slim.eval()(images))
    stored = {str(n): t.clone().contiguous() for n, t in enumerate(outputs)}
    save_file({**stored, "images": images}, folder / "outputs.safetensors")
    threads = str(torch.get_num_threads())
    command = [sys.executable, __file__, "reload", str(folder), "--threads", threads]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(_last(done.stderr) or f"the process ended with {done.returncode}")


def reload(folder: Path) -> None:
    """The fresh process; exits with a message unless every output is bit-equal."""
    wanted = load_file(folder / "outputs.safetensors")
    images = wanted.pop("images")
    # trust_source: the backbones are built by a function of this benchmark
    model = nampruner.load(folder / "checkpoint", trust_source=True)
    with torch.no_grad():
        got = tensors(model(images))
    if len(got) != len(wanted):
        sys.exit(f"{len(got)} outputs instead of {len(wanted)}")
    if not all(torch.equal(wanted[str(n)], t) for n, t in enumerate(got)):
        gap = difference([wanted[str(n)] for n in range(len(got))], got)
        sys.exit(f"outputs differ by {gap:.1e} (relative) after reloading")


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:400] if lines else ""


def exported(slim: nn.Module, images: Tensor, folder: Path) -> float:
    """Relative difference of ONNX Runtime and PyTorch.

    Random weights can amplify rounding, so what float32 is off from float64 in PyTorch is allowed
    ten times where that is more than `PARITY`.
    """
    with torch.no_grad():
        exact = tensors(copy.deepcopy(slim).double()(images.double()))
        noise = difference(exact, [t.double() for t in tensors(slim(images))])
    tolerance = max(PARITY, 10 * noise)
    parity = nampruner.export_onnx(slim, folder / "slim.onnx", images, tolerance=tolerance)
    return float(parity.max_relative)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=("ours", "theirs", "reload"))
    parser.add_argument("what", help="a network, or the folder to reload")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-onnx", action="store_true")
    parser.add_argument("--limit", type=int, default=0, help="seconds, once the network is built")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    if options.side == "reload":
        reload(Path(options.what))
        return
    log, network = Log(options.out), Network(options.what, "", 0)
    measure = partial(ours, onnx=not options.no_onnx)
    if options.side == "theirs":
        from reach_theirs import theirs as measure  # stays out of our own process
    built = log.attempt("build", lambda: build(network))
    if built is not None:
        signal.alarm(options.limit)
        measure(*built, log)
    log.note(done=True)


if __name__ == "__main__":
    main()
