"""The heart: run the network on channel labels, get the dependency graph.

    graph = trace(model, example_inputs)

`labels` says what a label layer is, `tracer` carries layers through a forward pass, `rules` says
what each ATen op does to them, `graph` is the value that comes out.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from nampruner.errors import GraphError
from nampruner.graph.graph import DependencyGraph, UnitGroup, build
from nampruner.graph.rules import RULES
from nampruner.graph.tracer import Call, Rule, Tracer

__all__ = ["Call", "DependencyGraph", "Rule", "UnitGroup", "call_model", "channelwise", "trace"]

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
Forward = Callable[[nn.Module, Any], Any]
M = TypeVar("M", bound=type[nn.Module])

_CHANNELWISE: dict[type[nn.Module], bool] = {}


def channelwise(cls: M, *, parameters: bool = True) -> M:
    """Declare that a module treats every channel alone (usable as a decorator).

    Its input and output are [N, C, …]; every parameter or buffer dimension of length C belongs to
    the channels, unless `parameters` says that none does. The tracer does not look inside. A wrong
    declaration is caught by the certificate.
    """
    _CHANNELWISE[cls] = parameters
    return cls


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

    Raises:
        GraphError: the model does not run on these inputs.
    """
    tensors = [t for t in tree_flatten(example_inputs)[0] if isinstance(t, Tensor)]
    batch = tensors[0].shape[0] if tensors and tensors[0].dim() else 1
    training = [module for module in model.modules() if module.training]
    fast = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    tracer = Tracer(model, RULES, _CHANNELWISE, batch)
    try:
        for tensor in tensors:
            tracer.activate(tensor)
        with tracer.watching():
            outputs = (forward or call_model)(model, example_inputs)
    except Exception as error:
        raise GraphError(
            f"{type(model).__name__} does not run on the example inputs, in module "
            f"{tracer.stack[-1] if tracer.stack else '(root)'!r}: {error}"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module in training:
            module.training = True
    for tensor in tree_flatten(outputs)[0]:
        if isinstance(tensor, Tensor):
            tracer.ledger.freeze(tracer.labels_of(tensor), "output of the network")
    return build(tracer.ledger, model)
