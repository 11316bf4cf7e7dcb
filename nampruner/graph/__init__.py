"""The heart: run the network on channel labels, get the dependency graph.

    graph = trace(model, example_inputs)

labels.py   what a label layer is           tracer.py   carries layers through a forward pass
ledger.py   what the rules find out         rules/      what each ATen op does to the layers
graph.py    the value that comes out        cost.py     MACs and parameters by width
liveness.py what lives in memory until when  memory.py   its peak by width
build.py    from the ledger to the graph
teach.py    what a user may teach it
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils._pytree import tree_flatten

from nampruner.errors import GraphError
from nampruner.graph.build import build
from nampruner.graph.graph import DependencyGraph, UnitGroup
from nampruner.graph.rules import RULES
from nampruner.graph.teach import CHANNELWISE, TAUGHT, channelwise, rule
from nampruner.graph.tracer import Call, Rule, Tracer
from nampruner.modes import evaluating

__all__ = [
    "Call",
    "DependencyGraph",
    "Rule",
    "UnitGroup",
    "call_model",
    "channelwise",
    "rule",
    "trace",
]

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
Forward = Callable[[nn.Module, Any], Any]


def call_model(model: nn.Module, inputs: Inputs) -> Any:
    """Call `model` on a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def trace(
    model: nn.Module, example_inputs: Inputs, forward: Forward | None = None
) -> DependencyGraph:
    """Run `model` once in eval mode on channel labels and return its dependency graph.

    `example_inputs` is a tensor [N, C, H, W], a tuple of arguments or a dict of keyword arguments;
    `forward(model, example_inputs)` replaces the plain call where a model needs another one.

    What runs only in training (an auxiliary head) is followed in a second run in train mode, which
    leaves the buffers as they were.

    Raises:
        GraphError: the model does not run on these inputs, or takes or returns no tensors.
    """
    lazy = [n for n, p in model.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise GraphError(f"{lazy[0]} has no shape yet; run the model once before it is traced")
    tensors = _tensors(example_inputs, "takes")
    tracer = Tracer(
        model, {**RULES, **TAUGHT}, CHANNELWISE, tensors[0].shape[0] if tensors[0].dim() else 1
    )
    run = partial(_run, tracer, model, example_inputs, forward or call_model)
    with evaluating(model), _no_fast_path():
        run(training=False)
        unreached = _unreached(model, tracer)
        if unreached:
            _trace_training(model, tracer, run, unreached)
    return build(tracer.ledger, tracer.liveness.lifetimes, model, tracer.batch)


def _run(
    tracer: Tracer, model: nn.Module, inputs: Inputs, forward: Forward, *, training: bool
) -> None:
    model.train(training)
    for tensor in _tensors(inputs, "takes"):
        tracer.activate(tensor)
        if not training:
            tracer.liveness.take(tensor)
    try:
        with tracer.watching():
            outputs = forward(model, inputs)
    except Exception as error:
        where = tracer.stack[-1] if tracer.stack else "(root)"
        raise GraphError(
            f"{type(model).__name__} does not run on the example inputs, in module {where!r}: "
            f"{error}{_apart(model, inputs)}"
        ) from error
    for tensor in _tensors(outputs, "returns"):
        tracer.ledger.freeze(tracer.labels_of(tensor), "output of the network")
        if not training:
            tracer.liveness.give(tensor)


def _apart(model: nn.Module, inputs: Inputs) -> str:
    """What to do where inputs lie on a device on which nothing of the network does."""
    homes = {str(t.device) for t in (*model.parameters(), *model.buffers())}
    away = {str(t.device) for t in _tensors(inputs, "takes")} - homes
    if not homes or not away:
        return ""
    return f" (inputs on {', '.join(away)}, network on {', '.join(homes)}; bring them together)"


def _tensors(values: Any, verb: str) -> list[Tensor]:
    found = [t for t in tree_flatten(values)[0] if isinstance(t, Tensor)]
    if not found:
        raise GraphError(
            f"the network {verb} a {type(values).__name__} in which no tensor was found; use "
            "tensors, tuples, lists or dicts, or pass `forward` that does"
        )
    return found


def _unreached(model: nn.Module, tracer: Tracer) -> list[str]:
    """Modules with parameters of their own that did not run."""
    return [
        name
        for name, module in model.named_modules()
        if name not in tracer.visited and next(module.parameters(recurse=False), None) is not None
    ]


def _trace_training(
    model: nn.Module, tracer: Tracer, run: Callable[..., None], unreached: list[str]
) -> None:
    buffers = [(b, b.clone()) for b in model.buffers()]
    tracer.ledger.counting = False
    tracer.stack.clear()
    try:
        run(training=True)
    except GraphError as error:
        warnings.warn(
            f"{', '.join(unreached[:3])} did not run in eval mode, and train mode could not be "
            f"traced ({error}); the slim network may fail in train mode",
            stacklevel=3,
        )
    finally:
        with torch.no_grad():
            for buffer, old in buffers:
                buffer.copy_(old)


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Take attention apart instead of running it as one opaque op."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
