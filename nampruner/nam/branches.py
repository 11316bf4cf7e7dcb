"""Where residual branches end, seen by running the network once: no class names, no FX graph.

Every tensor value that comes from the inputs is a node. A node knows its *depth*, the number of
convolutions on the longest path to it, and its ancestors. Two nodes of one shape that are added
are a residual sum if one is deeper and the other, the shortcut, is at most a projection away from
an ancestor of both. The module that computed the deeper one ends the branch.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nampruner.modes import evaluating

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""What a model is called with: a tensor, a tuple of arguments or a dict of keyword arguments."""

_ADDITIONS = (torch.ops.aten.add, torch.ops.aten.add_)
_CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.conv2d)

_PROJECTION = 2
"""Convolutions a shortcut may have: one in ResNet, a separable pair in GhostNet."""


@dataclass(frozen=True)
class ForwardRecord:
    """What one forward pass showed."""

    branches: tuple[str, ...]
    """Modules whose output is the branch operand of a residual sum, in the order of the sums."""
    shapes: dict[str, tuple[int, ...]]
    """Module → shape of the tensor it returned, for modules that return one."""
    calls: Counter[str]
    """Module → how often it ran."""


def record_forward(
    model: nn.Module, example_inputs: Inputs, *, opaque: tuple[type[nn.Module], ...] = ()
) -> ForwardRecord:
    """Run `model` once in eval mode, without gradients, and say what ran and what was added.

    Modules of an `opaque` type, and those inside them, are not named: what they return counts as
    the work of the module around them.
    """
    walk = _Walk(tree_leaves(example_inputs))
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(evaluating(model))
        for name, module in _visible(model, opaque):
            before = module.register_forward_pre_hook(walk.enter)
            after = module.register_forward_hook(partial(walk.leave, name))
            stack.callback(before.remove)
            stack.callback(after.remove)
        stack.enter_context(walk)
        call(model, example_inputs)
    # an activation that all blocks share ends none of them: the block around it does
    modules = dict(model.named_modules())
    once = {n for n in walk.calls if walk.calls[n] == 1 and not runs_children(modules[n])}
    ends = (next((n for n in names if n in once), None) for names in walk.branches)
    return ForwardRecord(tuple(dict.fromkeys(n for n in ends if n)), walk.shapes, walk.calls)


def runs_children(module: nn.Module) -> bool:
    """Whether every child of the module runs in turn: one more would too."""
    return type(module).forward is nn.Sequential.forward


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Call `model` on a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def _visible(
    model: nn.Module, opaque: tuple[type[nn.Module], ...]
) -> Iterable[tuple[str, nn.Module]]:
    hidden = {
        inner
        for module in model.modules()
        if isinstance(module, opaque)
        for inner in module.modules()
    }
    return ((name, module) for name, module in model.named_modules() if module not in hidden)


class _Walk(TorchDispatchMode):
    """Number the values of one forward pass; sets of nodes are the bits of an integer."""

    def __init__(self, inputs: Iterable[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.depth: list[int] = []
        self.ancestors: list[int] = []
        self.of_depth: Counter[int] = Counter()
        self.node: dict[int, int] = {}
        self.alive: list[Tensor] = []  # while a tensor lives, its id is not given to another
        self.starts: list[int] = []
        self.producers: dict[int, list[str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.calls: Counter[str] = Counter()
        self.branches: list[list[str]] = []
        for tensor in inputs:
            if isinstance(tensor, Tensor):
                self._number(tensor, [], 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sources = [n for leaf in tree_leaves((args, kwargs)) if (n := self._find(leaf)) is not None]
        operator = func.overloadpacket
        if operator in _ADDITIONS and len(sources) == 2:
            self._sum(args[0].shape, args[1].shape, sources)
        if sources:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._number(leaf, sources, int(operator in _CONVOLUTIONS))
        return result

    def enter(self, module: nn.Module, inputs: Any) -> None:
        """Forward pre-hook: what is numbered from here on is the module's own work."""
        self.starts.append(len(self.depth))

    def leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """Forward hook: note which modules return a value they computed, innermost first."""
        start = self.starts.pop()
        self.calls[name] += 1
        if not isinstance(output, Tensor):
            return
        self.shapes[name] = tuple(output.shape)
        node = self._find(output)
        if node is not None and node >= start:
            self.producers.setdefault(node, []).append(name)

    def _find(self, leaf: Any) -> int | None:
        return self.node.get(id(leaf)) if isinstance(leaf, Tensor) else None

    def _number(self, tensor: Tensor, sources: list[int], convolutions: int) -> None:
        # An in-place operation returns its operand: the same tensor becomes a new node.
        node = len(self.depth)
        depth = max((self.depth[source] for source in sources), default=0) + convolutions
        seen = 1 << node
        for source in sources:
            seen |= self.ancestors[source]
        self.depth.append(depth)
        self.ancestors.append(seen)
        self.of_depth[depth] |= 1 << node
        self.node[id(tensor)] = node
        self.alive.append(tensor)

    def _sum(self, left: torch.Size, right: torch.Size, operands: list[int]) -> None:
        shortcut, branch = sorted(operands, key=self.depth.__getitem__)
        depth = self.depth[shortcut]
        if len(left) != 4 or left != right or depth == self.depth[branch]:
            return
        near = 0
        for step in range(_PROJECTION + 1):
            near |= self.of_depth[depth - step]
        if near & self.ancestors[shortcut] & self.ancestors[branch] and branch in self.producers:
            self.branches.append(self.producers[branch])
