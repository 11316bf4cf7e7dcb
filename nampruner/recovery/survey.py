"""One look at a network before recovery: what follows what, how large it is, what never changes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nampruner.recovery.rows import border, is_consumer, is_linear

Hooks = Sequence[tuple[str, Callable[..., None]]]
_BN = nn.modules.batchnorm._BatchNorm


@dataclass
class Survey:
    """What one forward pass on a few images shows."""

    bytes_per_image: float = 0.0
    """The largest activation."""
    behind: dict[str, str] = field(default_factory=dict)
    """Consumer → the BN that its output goes straight into, and no other's does."""
    positions: dict[str, int] = field(default_factory=dict)
    """Linear layer → positions per channel of the map that was flattened into it."""
    constants: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Consumer → value of each input channel [C], and whether it was the same everywhere [C]."""
    borders: dict[str, float] = field(default_factory=dict)
    """Consumer → share of its output positions whose window touches zero padding."""


def run(net: nn.Module, images: Tensor, *, before: Hooks = (), after: Hooks = ()) -> None:
    """One forward pass in which these hooks see the modules of these names."""
    modules = dict(net.named_modules())
    handles = [modules[name].register_forward_pre_hook(hook) for name, hook in before]
    handles += [modules[name].register_forward_hook(hook) for name, hook in after]
    try:
        net(images)
    finally:
        for handle in handles:
            handle.remove()


def survey(model: nn.Module, images: Tensor) -> Survey:
    """Run `model` on `images` [N, C, …] and see."""
    found = Survey()
    makers: dict[int, tuple[str, Tensor]] = {}
    maps: dict[int, int] = {}
    feeders: dict[str, set[str]] = {}

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, out: Any) -> None:
            if not isinstance(out, Tensor):
                return
            size = out.numel() * out.element_size() / len(images)
            found.bytes_per_image = max(found.bytes_per_image, size)
            if out.dim() > 2:
                maps[out.data_ptr()] = out[0, 0].numel()
            if is_consumer(module):
                makers[id(out)] = (name, out)
                share = border(module, inputs[0], out)
                found.borders[name] = max(share, found.borders.get(name, 0.0))

        return hook

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if isinstance(module, _BN):
                maker, out = makers.get(id(inputs[0]), ("", None))
                feeders.setdefault(name, set()).add(maker if out is inputs[0] else "")
            elif is_consumer(module):
                _see_inputs(found, name, module, inputs[0], maps)

        return hook

    names = [name for name, _ in model.named_modules()]
    with torch.no_grad():
        before = [(name, enter(name)) for name in names]
        run(model, images, before=before, after=[(name, leave(name)) for name in names])
    only = {name: next(iter(who)) for name, who in feeders.items() if len(who) == 1}
    found.behind = {maker: name for name, maker in only.items() if maker}
    return found


def _see_inputs(
    found: Survey, name: str, module: nn.Module, x: Tensor, maps: dict[int, int]
) -> None:
    if is_linear(module):
        found.positions[name] = maps.get(x.data_ptr(), 0)
    rows = (x if is_linear(module) else x.movedim(1, -1)).reshape(
        -1, x.shape[-1 if is_linear(module) else 1]
    )
    low, high = rows.aminmax(dim=0)
    same = low == high
    if name in found.constants:  # runs twice: constant only if it is the same both times
        same = same & found.constants[name][1] & (found.constants[name][0] == low)
    found.constants[name] = (low, same)
