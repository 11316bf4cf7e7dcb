"""Copies of a network that copy no more than they must."""

import copy
from collections.abc import Callable

from torch import Tensor, nn


def twin(model: nn.Module, convert: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """Return a copy of `model` that holds `convert(name, tensor)` for each parameter and buffer.

    Tensors reach `convert` detached; what it returns as it came is shared with `model`. Shared
    parameters stay shared, `requires_grad` stays, gradients are left behind.
    """
    memo: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters():
        value = convert(name, parameter.detach())
        memo[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
    for name, buffer in model.named_buffers():
        memo[id(buffer)] = convert(name, buffer.detach())
    return copy.deepcopy(model, memo)
