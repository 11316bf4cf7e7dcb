"""What a user may teach the tracer: a module that treats channels alone, or the rule of an op.

A wrong teaching cannot be silent: the certificate of the cut catches it.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from nampruner.errors import NamPrunerError, did_you_mean
from nampruner.graph.rules import RULES
from nampruner.graph.tracer import Rule, name_of

M = TypeVar("M", bound=type[nn.Module])

CHANNELWISE: dict[type[nn.Module], bool] = {}
"""Module class → whether its parameters belong to its channels."""

TAUGHT: dict[str, Rule] = {}
"""Rules of users; they come before our own."""


def channelwise(cls: M, *, parameters: bool = True) -> M:
    """Declare that a module treats every channel alone (usable as a decorator).

    Its input and output are [N, C, …]; every parameter or buffer dimension of length C belongs to
    the channels, unless `parameters` says that none does. The tracer does not look inside.
    """
    CHANNELWISE[cls] = parameters
    return cls


def rule(op: Any, *, like: Any = None) -> Callable[[Rule], Rule]:
    """Teach the tracer what an op does to the channels.

    Either it does what a known op does, with its tensors in the same places,

        nampruner.rule(torch.ops.mine.swish, like=torch.ops.aten.relu)

    or a function says it: it takes the `Call` (`args`, `results`, `labels(tensor)`, `tie`,
    `freeze`, `consume`, `contraction`, `literal`) and returns, per result, its label layers:

        @nampruner.rule(torch.ops.mine.swap_halves)
        def _(call):
            return [[torch.roll(v, v.shape[1] // 2, 1) for v in call.labels(call.args[0])]]

    `op` is `torch.ops.…` (an overload stands for all) or what `torch.library.custom_op` returned.

    Raises:
        NamPrunerError: `op` is no op, or `like` has no rule.
    """
    name = _name(op)

    def teach(function: Rule) -> Rule:
        TAUGHT[name] = function
        return function

    if like is not None:
        teach(_known(_name(like)))
    return teach


def _name(op: Any) -> str:
    overload = getattr(op, "_opoverload", op)
    packet = getattr(overload, "overloadpacket", overload)
    if not hasattr(packet, "overloads"):
        raise NamPrunerError(
            f"{op!r} is no op; give torch.ops.<namespace>.<name>, or what "
            "torch.library.custom_op returned"
        )
    name = name_of(packet)
    return name.rstrip("_") or name


def _known(name: str) -> Rule:
    rules = {**RULES, **TAUGHT}
    if name not in rules:
        raise NamPrunerError(f"no rule is known for {name}{did_you_mean(name, rules)}")
    return rules[name]
