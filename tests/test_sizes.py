"""Deep, dense and large networks: what grows, grows with the network; nothing is kept or copied."""

import gc
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import image, lively, unit

from nampruner.config import PruneOptions
from nampruner.graph import DependencyGraph, trace
from nampruner.importance import score
from nampruner.lineage import lineage
from nampruner.plan import PruningPlan
from nampruner.pruning import plan_pruning, prune
from nampruner.selection import select
from nampruner.surgery import cut


class Residual(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = unit(3, 4)
        self.blocks = nn.ModuleList(unit(4, 4, 1) for _ in range(depth))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            # every other block is a chain inside the branch of the next
            x = block(x) if number % 2 else x + block(x)
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """Every layer sees all layers before it, and adds four channels."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.grow = nn.ModuleList(nn.Conv2d(4 * n, 4, 1) for n in range(1, depth + 1))
        self.head = nn.Linear(4 * (depth + 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.grow:
            features.append(layer(torch.cat(features, 1)).relu())
        return self.head(torch.cat(features, 1).mean((2, 3)))


def plain(depth: int) -> nn.Module:
    layers = [nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()) for _ in range(depth)]
    return nn.Sequential(nn.Conv2d(3, 4, 1), *layers, nn.Conv2d(4, 2, 2), nn.Flatten())


class Counting(TorchDispatchMode):
    """Counts ATen calls: those of the network and those on its labels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def small() -> Tensor:
    return image(size=2, batch=1)


def traced(model: nn.Module) -> tuple[DependencyGraph, int]:
    with Counting() as mode:
        graph = trace(model.eval(), small())
    return graph, sum(mode.calls.values())


def weight_of(graph: DependencyGraph) -> dict[str, int]:
    """Sizes of everything that a graph holds."""
    cost = graph.cost
    return {
        "slots": len(graph.slots),
        "labels": len(graph.unit_of),
        "units": graph.count,
        "products": sum(len(p.outputs) + len(p.inputs) for p in graph.products),
        "widths": sum(len(c) for w in graph.widths for c in w.counted),
        "groups": sum(len(g.units) + len(g.slots) for g in graph.groups),
        "cost": sum(w.counts.nnz for w in (cost.outputs, cost.inputs, cost.dims)),
        "memory": graph.memory.dims.counts.nnz + graph.memory.live.nnz,
    }


@pytest.mark.parametrize("build", [plain, Residual])
def test_twice_as_deep_is_twice_the_work(build: Callable[[int], nn.Module]) -> None:
    (small_graph, few), (large_graph, many) = (traced(build(n)) for n in (60, 120))
    assert 1.8 < many / few < 2.1
    before, after = weight_of(small_graph), weight_of(large_graph)
    assert before["cost"] > 100
    for name, size in before.items():
        assert after[name] <= 2.1 * size, name


def test_a_dense_concatenation_grows_with_its_weights() -> None:
    """The inputs of its layers grow with the square of the depth, and so do its parameters."""
    (small_graph, few), (large_graph, many) = (traced(Dense(n)) for n in (40, 80))
    before, after = weight_of(small_graph), weight_of(large_graph)
    bigger = params(Dense(80)) / params(Dense(40))
    assert 3.5 < bigger < 4.1
    assert many / few < bigger
    for name, size in before.items():
        assert after[name] <= 1.05 * bigger * size, name
    for name in ("slots", "units"):
        assert after[name] <= 2.1 * before[name]


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def planned(model: nn.Module, **target: Any) -> tuple[nn.Module, PruningPlan]:
    graph = trace(model, small())
    options = PruneOptions(importance="magnitude", round_to=1, **target)
    plan = select(graph, score(model, graph, "magnitude"), options)
    return cut(model, plan), plan


@pytest.mark.parametrize("target", [{"ratio": 0.5}, {"macs": "50%"}], ids=["ratio", "macs"])
@pytest.mark.parametrize("build", [plain, Residual])
def test_a_thousand_layers(build: Callable[[int], nn.Module], target: dict[str, Any]) -> None:
    limit = sys.getrecursionlimit()
    slim, plan = planned(build(1000).eval(), **target)
    assert params(slim) == plan.after.params < 0.8 * plan.before.params
    assert slim(small()).shape[:2] == (1, 2)
    assert sys.getrecursionlimit() == limit


def test_two_hundred_concatenations() -> None:
    slim, plan = planned(Dense(200).eval(), params="50%")
    assert params(slim) == plan.after.params
    assert plan.achieved.params == pytest.approx(0.5, abs=0.02)
    assert slim(small()).shape == (1, 2)


def test_the_whole_way_through_a_deep_network() -> None:
    result = prune(lively(Residual(200)).eval(), small(), ratio=0.3, round_to=1)
    assert result.plan.achieved.ratio > 0.2


# -- memory ----------------------------------------------------------------------------------------


def graph_of(model: nn.Module) -> Any:
    return trace(model, image())


def plan_of(model: nn.Module) -> Any:
    return plan_pruning(model, image(), ratio=0.3, round_to=1)


def slim_of(model: nn.Module) -> Any:
    return prune(model, image(), ratio=0.3, round_to=1, data=[image(batch=16)])


def failure_of(model: nn.Module) -> Any:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        prune(model, image(), ratio=0.3, ignore=("nowhere",))
    return str(caught.value)


@pytest.mark.parametrize("act", [graph_of, plan_of, slim_of, failure_of])
def test_the_model_is_not_kept(act: Callable[[nn.Module], Any]) -> None:
    model = Residual(4).eval()
    weights = [weakref.ref(p) for p in model.parameters()]
    modules = [weakref.ref(m) for m in model.modules()]
    result = act(model)
    del model
    gc.collect()
    assert not [ref for ref in (*weights, *modules) if ref() is not None]
    assert result


def test_a_cut_keeps_only_words_about_its_origin() -> None:
    model = Residual(4).eval()
    slim = slim_of(model).model
    assert len(lineage(slim).plans) == 1
    assert not {id(p) for p in model.parameters()} & {id(p) for p in slim.parameters()}


LARGE = """
import resource, sys
import torch
from torch import nn
from nampruner.graph import trace

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 1024, 1)
        self.plain = nn.Sequential(*(nn.Conv2d(1024, 1024, 3, padding=1) for _ in range(2)))
        self.flat = nn.Linear(1024 * 4, 2048)
        self.tied = nn.Parameter(torch.zeros(1024, 1024, 1, 1))
        self.head = nn.Linear(2048, 2)

    def forward(self, x):
        x = self.plain(self.stem(x))
        # weights that are computed: a sum, a view, a permutation
        x = nn.functional.conv2d(x, self.tied * 2)
        x = nn.functional.conv2d(x, self.tied.view(1024, -1).t().reshape(1024, 1024, 1, 1))
        return self.head(self.flat(x.flatten(1)).relu())

def peak():
    # kilobytes on Linux, bytes on a Mac
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

torch.set_num_threads(1)
model, x = Net().eval(), torch.randn(1, 3, 2, 2)
weights = sum(p.nbytes for p in model.parameters())
with torch.no_grad():
    model(x)
# what the first trace of a process imports
trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval(), x)
before = peak()
graph = trace(model, x)
assert len(graph.groups) >= 4
print((peak() - before) / weights)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no getrusage")
def test_tracing_takes_at_most_the_model_once_more() -> None:
    """110 MB of weights; what the forward pass itself takes is not counted."""
    run = [sys.executable, "-c", LARGE]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.0
