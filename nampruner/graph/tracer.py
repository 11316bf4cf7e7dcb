"""Run the network once on channel labels.

`Tracer` is a dispatch mode: every ATen call of the forward pass goes through it. It runs the call,
asks the rule of that op what happens to the labels, and keeps what the rules say in a `Ledger`.
Nothing is guessed from module types, and any Python control flow that runs can be traced.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakIdKeyDictionary

from nampruner.graph.labels import Layer, Layers, compact, varying
from nampruner.graph.ledger import Contraction, Ledger, Literal
from nampruner.graph.liveness import Liveness


@dataclass(frozen=True)
class Call:
    """One ATen call, as a rule sees it."""

    tracer: "Tracer"
    op: str
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    @property
    def module(self) -> str:
        """Path of the innermost module that is running."""
        return self.tracer.stack[-1] if self.tracer.stack else ""

    @property
    def where(self) -> str:
        return f"{self.op} in {self.module or 'the network'}"

    @cached_property
    def tensors(self) -> list[Tensor]:
        """All tensor arguments, lists opened."""
        return list(_tensors((*self.args, *self.kwargs.values())))

    @cached_property
    def results(self) -> list[Tensor]:
        """All tensors that came out, lists opened."""
        return list(_tensors(self.out))

    def labels(self, tensor: Tensor | None) -> Layers:
        return [] if tensor is None else self.tracer.labels_of(tensor)

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        if len(self.args) > index:
            return self.args[index]
        return self.kwargs.get(name, default)

    def tie(self, a: Layer, b: Layer, why: str | None = None) -> None:
        self.tracer.ledger.tie(a, b, why or f"meets a fixed width: {self.where}")

    def freeze(self, layers: Layers, why: str) -> None:
        self.tracer.ledger.freeze(layers, f"{why}: {self.where}")

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether the tensor depends on parameters only, not on the network's input."""
        return tensor not in self.tracer.active

    def consume(self, labels: Tensor, weight: Tensor) -> None:
        """Removed channels stop mattering here, at the input slices of `weight`."""
        ledger = self.tracer.ledger
        (ledger.consumed if self.is_weight(weight) else ledger.silenced).append(labels)

    def contraction(self, factor: float, outputs: Tensor, inputs: Tensor) -> None:
        if self.tracer.ledger.counting:
            each = factor / self.tracer.batch
            self.tracer.ledger.contractions.append(Contraction(self.module, each, outputs, inputs))

    def literal(self, before: int | tuple[int, ...], *counted: Tensor) -> None:
        if any(bool((labels > 0).any()) for labels in counted):
            self.tracer.ledger.literals.append(Literal(self.module, self.op, before, counted))


def _tensors(value: Any) -> Iterator[Tensor]:
    """ATen calls know no other containers; pytree would take longer than many an op."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _replay(function: Any, args: Any, kwargs: Any, index: int, base: Tensor) -> Tensor:
    """Look at `base` as a recorded view op looked at its own."""
    window: Tensor = tree_flatten(function(base, *args, **kwargs))[0][index]
    return window


def name_of(op: Any) -> str:
    """`relu` for torch.ops.aten.relu, `mine.act` for torch.ops.mine.act."""
    space, _, name = str(op).rpartition(".")
    return name if space in ("aten", "prims") else f"{space}.{name}"


Rule = Callable[[Call], list[Layers]]


class Tracer(TorchDispatchMode):
    """The dispatch mode that carries labels beside tensors."""

    def __init__(
        self,
        model: nn.Module,
        rules: Mapping[str, Rule],
        channelwise: Mapping[type[nn.Module], bool],
        batch: int,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = Ledger()
        self.liveness = Liveness()
        self.batch = batch
        self.stack: list[str] = []
        self.visited: set[str] = set()
        """Paths of the modules that ran."""
        self.active: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._rules = rules
        self._channelwise = channelwise
        self._inside = 0  # > 0 while a channel-wise module runs: its ops are not looked at
        self._entered = 0  # lifetimes that were known when it began
        self._labels: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._views: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._paths = {id(module): path for path, module in model.named_modules()}
        for named in (model.named_parameters(), model.named_buffers()):
            for name, tensor in named:
                self._labels[tensor] = self.ledger.fresh(name, tensor)

    def labels_of(self, tensor: Tensor) -> Layers:
        layers: Layers = self._labels.get(tensor, [])
        return layers

    def put(self, tensor: Tensor, layers: Layers) -> None:
        """Give `tensor` its layers; a label that no longer has a position is frozen."""
        kept: Layers = []
        for layer in map(compact, layers):
            if not varying(layer):
                self.ledger.freeze(
                    [layer[layer > 0]], f"tied to a fixed position in {self._here()}"
                )
            elif bool((layer > 0).any()):
                kept.append(layer)
        self._labels[tensor] = kept

    def activate(self, tensor: Tensor) -> None:
        """Note that `tensor` depends on the network's input."""
        self.active[tensor] = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        call = Call(self, name_of(func.overloadpacket), func, args, kwargs, out)
        inputs, results = call.tensors, call.results
        if any(t in self.active for t in inputs):
            for tensor in results:
                self.activate(tensor)
        if not self._inside and any(self.labels_of(t) for t in inputs):
            self._follow(call, results)
        if self.ledger.counting:
            self.liveness.follow(inputs, results, self.active, self.labels_of)
        return out

    def _follow(self, call: Call, results: list[Tensor]) -> None:
        rule = self._rules.get(call.op.rstrip("_") or call.op, self._rules["?"])
        self._note_views(call, results)
        for tensor, layers in zip(results, rule(call), strict=False):
            self.put(tensor, layers)
            if call.op.endswith("_") and tensor is call.args[0]:
                self._write_through(tensor)

    def _note_views(self, call: Call, results: list[Tensor]) -> None:
        if call.function.is_view and isinstance(call.args[0], Tensor):
            for index, tensor in enumerate(results):
                if tensor is not call.args[0]:
                    replay = partial(_replay, call.function, call.args[1:], call.kwargs, index)
                    self._views[tensor] = (weakref.ref(call.args[0]), replay)

    def _write_through(self, view: Tensor) -> None:
        """An in-place op on a view also labels the tensor that the view looks at."""
        if view not in self._views:
            return
        reference, replay = self._views[view]
        base = reference()
        if base is None:
            return
        layers = [layer.expand(base.shape).clone() for layer in self.labels_of(base)]
        for new in self.labels_of(view):
            target = next((x for x in layers if varying(compact(x)) == varying(new)), None)
            if target is None:
                target = torch.zeros(base.shape, dtype=torch.int64)
                layers.append(target)
            replay(target).copy_(new.expand(view.shape))
        self.put(base, layers)
        self._write_through(base)

    def _here(self) -> str:
        return (self.stack[-1] if self.stack else "") or "the network"

    def _enter(self, module: nn.Module, args: Any) -> None:
        if id(module) in self._paths:
            self.stack.append(self._paths[id(module)])
            self.visited.add(self.stack[-1])
        if type(module) in self._channelwise:
            if not self._inside:
                self._entered = len(self.liveness.lifetimes)
            self._inside += 1

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        if type(module) in self._channelwise:
            self._inside -= 1
            if not self._inside:
                self._cross(module, args[0], out)
        if id(module) in self._paths:
            self.stack.pop()

    def _cross(self, module: nn.Module, x: Tensor, out: Tensor) -> None:
        """A channel-wise module: its tensors that are as long as the channels are tied to them."""
        channels = x.shape[1]
        layers = self.labels_of(x)
        ours = next((v for v in layers if varying(v) == (1,)), None)
        owned = self._channelwise[type(module)]
        for tensor in (*module.parameters(), *module.buffers()) if owned else ():
            for layer in self.labels_of(tensor):
                size = layer.numel()
                mine = torch.zeros(size, dtype=torch.int64) if ours is None else ours.reshape(-1)
                why = f"{type(module).__name__} at {self._here()} has a fixed width"
                self.ledger.tie(layer.reshape(-1), mine if size == channels else mine[:1] * 0, why)
        self.put(out, layers)
        if ours is not None:
            self.liveness.label(self._entered, ours.reshape(-1))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Know which module runs, and dispatch through this mode."""
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave),
        ]
        try:
            with torch.no_grad(), self:
                yield
        finally:
            for handle in handles:
                handle.remove()
