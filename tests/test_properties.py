"""Random small networks, cut at random: exact or refused, recovered or left finite.

A `Network` is a list of block descriptions that hypothesis draws and shrinks; `build` turns it
into modules one after another, by running what is there so far.
"""

import copy
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, assume, event, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import lively

from nampruner.certificate import TOLERANCE, cost_of
from nampruner.checkpoint import load, save
from nampruner.errors import CertificateError, GraphError
from nampruner.graph import DependencyGraph, UnitGroup, trace
from nampruner.nam import NAM, SpatialNAM
from nampruner.plan import PruningPlan
from nampruner.pruning import prune
from nampruner.settle import Cut
from nampruner.surgery import cut

CLASSES = 5
ACTIVATIONS = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
}
KEEP_ZERO = ("none", "relu", "silu", "hardswish")
KINDS = (
    *("conv", "grouped", "depthwise", "maxpool", "avgpool", "residual", "dense"),
    *("split", "shuffle", "se", "nam", "twice", "sharednorm"),
)
SHARED = ("twice", "sharednorm")
TAILS = ("pool", "flatten", "map", "two")


def drawn(count: int) -> settings:
    """The same `count` examples every time, without a database and without a clock."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


# -- what a network is drawn from ------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """One step of a network; each kind looks at the options that concern it."""

    kind: str
    width: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    groups: int
    norm: bool
    act: str


@dataclass(frozen=True)
class Network:
    """A stem, blocks and a tail."""

    blocks: tuple[Block, ...]
    tail: str
    size: int
    batch: int
    seed: int

    def build(self) -> nn.Module:
        """The architecture with random weights, in eval mode."""
        torch.manual_seed(self.seed)
        stem = replace(self.blocks[0], kind="conv", stride=1, padding=1, dilation=1)
        parts: list[nn.Module] = []
        x = torch.zeros(1, 3, self.size, self.size)
        for block in (stem, *self.blocks):
            parts.append(MAKERS[block.kind](block, x.shape[1], x.shape[2]).eval())
            with torch.no_grad():
                x = parts[-1](x)
        return nn.Sequential(*parts, tail(self.tail, x.shape[1], x.shape[2])).eval()

    def make(self) -> nn.Module:
        """The same with statistics and factors that make a wrong cut visible."""
        model = lively(self.build())
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, SpatialNAM):
                nn.init.uniform_(module.weight, 0.5, 1.5)
        return model

    def images(self, batch: int | None = None, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1000 * (seed + 1))
        return torch.randn(batch or self.batch, 3, self.size, self.size, generator=generator)


def networks(
    *,
    kinds: tuple[str, ...] = KINDS,
    norm: st.SearchStrategy[bool] | None = None,
    acts: tuple[str, ...] = tuple(ACTIVATIONS),
    paddings: tuple[int, ...] = (0, 1),
) -> st.SearchStrategy[Network]:
    block = st.builds(
        Block,
        kind=st.sampled_from(kinds),
        width=st.sampled_from([4, 6, 8, 12]),
        kernel=st.sampled_from([1, 3]),
        stride=st.sampled_from([1, 2]),
        padding=st.sampled_from(paddings),
        dilation=st.sampled_from([1, 2]),
        groups=st.sampled_from([2, 4]),
        norm=st.booleans() if norm is None else norm,
        act=st.sampled_from(acts),
    )
    return st.builds(
        Network,
        blocks=st.lists(block, min_size=1, max_size=4).map(tuple),
        tail=st.sampled_from(TAILS),
        size=st.integers(8, 12),
        batch=st.integers(2, 4),
        seed=st.integers(0, 999),
    )


# -- from a description to modules -----------------------------------------------------------------


def unit(
    block: Block, a: int, b: int, size: int = 0, *, groups: int = 1, act: bool = True
) -> nn.Sequential:
    """Convolution, BN and activation; without `size` it keeps height and width."""
    reach = block.dilation * (block.kernel - 1)
    fits = size + 2 * block.padding - reach >= 4
    parts: list[nn.Module] = [
        nn.Conv2d(
            a,
            b,
            block.kernel,
            stride=block.stride if fits else 1,
            padding=block.padding if fits else reach // 2,
            dilation=block.dilation,
            groups=groups,
            bias=not block.norm or block.width == 6,
        )
    ]
    if block.norm:
        parts.append(nn.BatchNorm2d(b))
    if act:
        parts.append(ACTIVATIONS[block.act]())
    return nn.Sequential(*parts)


class Residual(nn.Module):
    def __init__(self, block: Block, a: int) -> None:
        super().__init__()
        b = block.width
        plain = replace(block, kernel=1)
        self.body = nn.Sequential(unit(block, a, b), unit(block, b, b, act=False))
        self.shortcut = nn.Identity() if a == b else unit(plain, a, b, act=False)
        self.act = ACTIVATIONS[block.act]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.shortcut(x))


class Dense(nn.Module):
    def __init__(self, block: Block, a: int) -> None:
        super().__init__()
        self.body = unit(block, a, block.width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


class Split(nn.Module):
    def __init__(self, block: Block, a: int) -> None:
        super().__init__()
        half = a // 2
        self.body = unit(block, half, block.width + half % 2)  # so that the width stays even

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return torch.cat([left, self.body(right)], 1)


class Shuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, block: Block, a: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(a, 4, 1), nn.Conv2d(4, a, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu())
        return x * gate.sigmoid()


class Twice(nn.Module):
    def __init__(self, block: Block, a: int) -> None:
        super().__init__()
        self.body = unit(block, a, a)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.body(x))


class SharedNorm(nn.Module):
    """Two convolutions, one BN."""

    def __init__(self, block: Block, a: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(a, a, 1, bias=False) for _ in range(2))
        self.norm, self.act = nn.BatchNorm2d(a), ACTIVATIONS[block.act]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.first(x)) - self.norm(self.second(x)))


class TwoHeads(nn.Module):
    def __init__(self, a: int) -> None:
        super().__init__()
        self.classes, self.map = nn.Linear(a, CLASSES), nn.Conv2d(a, 3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.classes(x.mean((2, 3))), self.map(x)


def grouped(block: Block, a: int, size: int) -> nn.Module:
    groups = gcd(block.groups, gcd(a, block.width))
    return unit(block, a, block.width, size, groups=groups)


def pool(kind: type[nn.Module]) -> Callable[[Block, int, int], nn.Module]:
    return lambda block, a, size: kind(2) if size >= 4 else nn.Identity()


MAKERS: dict[str, Callable[[Block, int, int], nn.Module]] = {
    "conv": lambda block, a, size: unit(block, a, block.width, size),
    "grouped": grouped,
    "depthwise": lambda block, a, size: unit(block, a, a, size, groups=a),
    "maxpool": pool(nn.MaxPool2d),
    "avgpool": pool(nn.AvgPool2d),
    "residual": lambda block, a, size: Residual(block, a),
    "dense": lambda block, a, size: Dense(block, a),
    "split": lambda block, a, size: Split(block, a),
    "shuffle": lambda block, a, size: Shuffle(),
    "se": lambda block, a, size: Gate(block, a),
    "nam": lambda block, a, size: NAM(a, size, size),
    "twice": lambda block, a, size: Twice(block, a),
    "sharednorm": lambda block, a, size: SharedNorm(block, a),
}


def tail(kind: str, a: int, size: int) -> nn.Module:
    if kind == "two":
        return TwoHeads(a)
    if kind == "map":
        return nn.Conv2d(a, 3, 1)
    if kind == "flatten":
        return nn.Sequential(nn.Flatten(), nn.Linear(a * size * size, CLASSES))
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(a, CLASSES))


# -- what is compared ------------------------------------------------------------------------------


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out = model(x)
    return [out] if isinstance(out, Tensor) else list(out)


def distance(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    """Largest difference over the largest value, worst output."""
    pairs = zip(outputs(a, x), outputs(b, x), strict=True)
    return max(float((p - q).abs().max() / p.abs().max()) for p, q in pairs)


def masked(model: nn.Module, plan: PruningPlan) -> nn.Module:
    silent = copy.deepcopy(model)
    for name, dims in plan.masked.items():
        for dim, gone in dims.items():
            silent.get_parameter(name).data.index_fill_(dim, torch.tensor(gone), 0.0)
    return silent


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# -- 1: exact or refused ---------------------------------------------------------------------------


def attempt(model: nn.Module, x: Tensor, ratio: float, **more: Any) -> Cut | None:
    """Cut at random; None where that is refused with a reason."""
    try:
        return prune(model, x, ratio=ratio, round_to=1, importance="random", **more)
    except (GraphError, CertificateError) as error:
        event(f"refused: {error}"[:80])
        return None


def test_every_cut_is_exact_or_refused() -> None:
    seen: Counter[str] = Counter()

    @drawn(300)
    @given(network=networks(), ratio=st.sampled_from([0.3, 0.4, 0.5, 0.6]))
    def check(network: Network, ratio: float) -> None:
        model, seen["drawn"] = network.make(), seen["drawn"] + 1
        found = attempt(model, network.images(), ratio)
        if found is None:
            return
        plan = found.plan
        assert found.certificate.max_relative_error <= TOLERANCE
        # in these networks only inputs of convolutions and linear layers consume
        assert {dim for dims in plan.masked.values() for dim in dims} <= {1}
        exact, fresh = copy.deepcopy(model).double(), network.images(seed=1).double()
        assert distance(masked(exact, plan), cut(exact, plan), fresh) <= 1e-9
        assert parameters(found.model) == plan.after.params
        seen["cut"] += parameters(found.model) < parameters(model)
        seen["felt"] += distance(exact, cut(exact, plan), fresh) > 1e-6

    check()
    assert seen["drawn"] >= 200
    assert min(seen["cut"], seen["felt"]) >= 0.8 * seen["drawn"], seen


# -- 2: recovery -----------------------------------------------------------------------------------


def settled(model: nn.Module, images: Tensor) -> nn.Module:
    """Give every BN the statistics of what reaches it, as training would."""

    def settle(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        var, mean = torch.var_mean(inputs[0], (0, 2, 3))
        module.running_mean, module.running_var = mean, var

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    handles = [norm.register_forward_pre_hook(settle) for norm in norms]
    outputs(model, images)
    for handle in handles:
        handle.remove()
    return model


def test_recovery_stays_finite() -> None:
    @drawn(60)
    @given(network=networks(), ratio=st.sampled_from([0.3, 0.5]))
    def check(network: Network, ratio: float) -> None:
        images = network.images(64)
        found = attempt(network.make(), network.images(), ratio, data=[images])
        if found is not None:
            values = (*found.model.state_dict().values(), *outputs(found.model, images))
            assert all(bool(t.isfinite().all()) for t in values)

    check()


def test_recovery_never_costs() -> None:
    @drawn(60)
    @given(
        network=networks(kinds=tuple(kind for kind in KINDS if kind not in SHARED)),
        trained=st.booleans(),
    )
    def check(network: Network, trained: bool) -> None:
        model, images = network.make(), network.images(64)
        if trained:
            settled(model, images)
        found = attempt(model, network.images(), 0.4, data=[images])
        if found is not None:
            seen = [images[:56]]  # the rest is held out
            before, _ = cost_of(model, cut(model, found.plan), seen)
            after, _ = cost_of(model, found.model, seen)
            assert after <= before * 1.05 + 1e-6

    check()


# -- 3, 4: what can go without a loss --------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A few units of one group, to be made superfluous and cut."""

    graph: DependencyGraph
    group: UnitGroup
    units: list[int]

    def makers(self, unit: int) -> Iterator[tuple[str, int, list[int]]]:
        """What makes the unit: parameter or buffer, dimension, indices."""
        for number, slot in enumerate(self.graph.slots):
            if number not in self.graph.consumers:
                index = np.flatnonzero(self.graph.units(slot) == unit).tolist()
                if index:
                    yield slot.name, slot.dim, index

    def freeze_norms(self, model: nn.Module, value: float) -> None:
        """γ = 0, β = `value` for these units, in every BN that they pass through."""
        for name, _, index in (place for unit in self.units for place in self.makers(unit)):
            path, _, key = name.rpartition(".")
            norm = isinstance(model.get_submodule(path), nn.BatchNorm2d)
            if norm and not path.endswith("channel.bn") and key in ("weight", "bias"):
                model.get_parameter(name).data[index] = 0.0 if key == "weight" else value

    def duplicate(self, model: nn.Module, twin: int) -> None:
        """Make these units copies of `twin`."""
        state = model.state_dict()
        for unit in self.units:
            for (name, dim, to), (_, _, origin) in zip(
                self.makers(unit), self.makers(twin), strict=True
            ):
                copied = state[name].index_select(dim, torch.tensor(origin))
                state[name].index_copy_(dim, torch.tensor(to), copied)

    def prune(self, model: nn.Module, x: Tensor, **more: Any) -> nn.Module:
        """Cut exactly these units; another example where they are refused."""
        total = sum(group.width for group in self.graph.groups)
        wanted = self.graph.indices(self.graph.mask(self.units))
        try:
            found = prune(
                model,
                x,
                importance=lambda _, graph: 1.0 - graph.mask(self.units),
                ratio=len(self.units) * self.group.multiplicity / total,
                round_to=1,
                **more,
            )
        except (GraphError, CertificateError):
            reject()
        if any("not exact" in row.reason for row in found.plan.left_alone):
            reject()
        assert found.plan.removed == wanted
        return found.model


def choose(model: nn.Module, x: Tensor, number: int, *, padded: bool = True) -> Choice:
    """Up to half of the units of a group with a BN; unless `padded`, of one that no layer pads."""
    graph = trace(model, x)
    good = []
    for group in graph.groups:
        layers = {
            n: model.get_submodule(graph.slots[n].name.rpartition(".")[0]) for n in group.slots
        }
        users = [layer for n, layer in layers.items() if n in graph.consumers]
        norm = any(isinstance(layer, nn.BatchNorm2d) for layer in layers.values())
        if norm and (padded or all(getattr(u, "padding", (0, 0)) == (0, 0) for u in users)):
            good.append(group)
    assume(good)
    group = good[number % len(good)]
    units = group.units.tolist()
    return Choice(graph, group, units[: 1 + number % (len(units) // 2)])


def test_dead_channels_cost_nothing() -> None:
    seen: Counter[str] = Counter()

    @drawn(60)
    @given(network=networks(norm=st.just(True), acts=KEEP_ZERO), number=st.integers(0, 99))
    def check(network: Network, number: int) -> None:
        model, x = network.make(), network.images()
        chosen = choose(model, x, number)
        chosen.freeze_norms(model, 0.0)
        settled(model, network.images(128, seed=2))
        for slim in (chosen.prune(model, x), chosen.prune(model, x, data=[network.images(64)])):
            assert distance(model, slim, network.images(seed=1)) <= 1e-5
        seen["cut"] += 1

    check()
    assert seen["cut"] >= 40


def test_constant_channels_are_folded() -> None:
    seen: Counter[str] = Counter()
    kinds = ("conv", "grouped", "depthwise", "maxpool", "avgpool", "residual", "dense", "split")

    @drawn(60)
    @given(
        network=networks(kinds=(*kinds, "shuffle"), norm=st.just(True), paddings=(0,)),
        number=st.integers(0, 99),
    )
    def check(network: Network, number: int) -> None:
        model, x = network.make().double(), network.images().double()
        chosen = choose(model, x, number, padded=False)
        chosen.freeze_norms(model, 0.7)
        settled(model, network.images(128, seed=2).double())
        slim = chosen.prune(model, x, data=[network.images(64).double()])
        assert distance(model, slim, network.images(seed=1).double()) <= 1e-5
        seen["cut"] += 1

    check()
    assert seen["cut"] >= 40


def test_duplicates_are_made_up_for() -> None:
    seen: Counter[str] = Counter()
    kinds = tuple(kind for kind in KINDS if kind not in SHARED)

    @drawn(60)
    @given(network=networks(kinds=kinds, norm=st.just(True)), number=st.integers(0, 99))
    def check(network: Network, number: int) -> None:
        model, x = network.make().double(), network.images().double()
        chosen = choose(model, x, number)
        chosen.duplicate(model, int(chosen.group.units[-1]))
        settled(model, network.images(128, seed=2).double())
        slim = chosen.prune(model, x, data=[network.images(128).double()])
        assert distance(model, slim, network.images(seed=1).double()) <= 1e-6
        seen["cut"] += 1

    check()
    assert seen["cut"] >= 40


# -- 5: save and load ------------------------------------------------------------------------------


def test_what_is_saved_is_loaded() -> None:
    seen: Counter[str] = Counter()

    @drawn(20)
    @given(network=networks())
    def check(network: Network) -> None:
        x = network.images()
        found = attempt(network.make(), x, 0.4)
        if found is not None:
            with tempfile.TemporaryDirectory() as folder:
                again = load(save(found.model, Path(folder) / "slim"), model=network.build())
            pairs = zip(outputs(found.model, x), outputs(again, x), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
            seen["cut"] += 1

    check()
    assert seen["cut"] >= 16
