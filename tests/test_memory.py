"""Memory: what lives together, by hand, in reality and after a cut; and as a target."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo import ZOO, image, unit

from nampruner.baking import baked
from nampruner.budget import remaining
from nampruner.config import PruneOptions
from nampruner.errors import NamPrunerError
from nampruner.graph import DependencyGraph, trace
from nampruner.plan import PruningPlan
from nampruner.pruning import plan_pruning, prune
from nampruner.selection import select
from nampruner.surgery import cut

FLOAT = 4


def peak(model: nn.Module, inputs: Any = None) -> int:
    graph = trace(model.eval(), image() if inputs is None else inputs)
    return graph.size(graph.mask([])).memory


def weights(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


# -- by hand ---------------------------------------------------------------------------------------


def chain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 5),
    )


def test_a_chain_by_hand() -> None:
    model = chain()
    given, wide, half = (c * size * size for c, size in ((3, 8), (8, 8), (16, 4)))
    parameters = 8 * 3 * 9 + 8 + 16 * 8 * 9 + 16 + 5 * half + 5
    # the input is the caller's and stays; the peak is at the first ReLU, which is not in place
    assert peak(model) == FLOAT * (parameters + given + wide + wide)
    model[1] = nn.ReLU(inplace=True)
    # then where the second convolution reads one tensor and makes the other
    assert peak(model) == FLOAT * (parameters + given + wide + half)


def test_a_chain_by_hand_as_it_narrows() -> None:
    graph = trace(chain(), image())
    assert [group.name for group in graph.groups] == ["0", "2"]
    given, wide, half = 3 * 64, 64, 16
    for one in (8, 5, 1):
        for two in (16, 7, 2):
            parameters = one * 27 + one + two * one * 9 + two + 5 * two * 16 + 5
            living = max(2 * wide * one, wide * one + half * two)
            found = graph.memory.peak(np.array([one, two], dtype=np.float64))
            assert found == FLOAT * (parameters + given + living)


def test_a_shortcut_lives_until_it_is_added() -> None:
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.branch = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return x + self.branch(x).relu_()

    model = Shortcut()
    # the input, the shortcut, the branch, their sum
    assert peak(model) == weights(model) + FLOAT * 64 * (3 + 4 + 4 + 4)


class Cat(nn.Module):
    """Writes halves into one tensor, in place, by views of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 2, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = x.new_empty(len(x), 8, 8, 8)
        both[:, :6] = self.a(x)
        both[:, 6:] = self.b(x)
        return self.c(both.relu_())


def test_views_and_writes_in_place_take_nothing() -> None:
    model = Cat()
    # both parts live at no time together; the output is a half of what it is made of
    assert peak(model) == weights(model) + FLOAT * 64 * (3 + 8 + 6)


def test_what_nobody_reads_is_not_counted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1))
    # the indices of the pooling (8 bytes each) are no part of it
    assert peak(model) == weights(model) + FLOAT * (3 * 64 + 4 * 64 + 4 * 16)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_it_is_counted_at_batch_1(batch: int) -> None:
    assert peak(chain(), image(batch=batch)) == peak(chain(), image())


def test_half_precision_takes_half() -> None:
    assert 2 * peak(chain().half(), image().half()) == peak(chain())


class Odd(nn.Module):
    """Tensors without strides, or without a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.b(self.a(x)).mean((2, 3))
        sparse = torch.sparse.mm(torch.eye(len(y)).to_sparse(), y).to_sparse().to_dense()
        nested = torch.nested.nested_tensor(list(y.unbind())).to_padded_tensor(0.0)
        return sparse, nested


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_odd_tensors_are_no_obstacle() -> None:
    assert peak(Odd()) >= weights(Odd()) + FLOAT * 64 * (3 + 8 + 4)


# -- in reality ------------------------------------------------------------------------------------


class Living(TorchDispatchMode):
    """Counts the bytes that really live while a network runs, storage by storage."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: dict[int, weakref.ref[Any]] = {}

    def meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            size, place = storage.nbytes(), storage._cdata
            self.now += size
            self.known[place] = weakref.ref(storage, lambda _: self.leave(place, size))

    def leave(self, place: int, size: int) -> None:
        self.now -= size
        del self.known[place]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.meet(tensor)
        self.most = max(self.most, self.now)
        return out


def lived(model: nn.Module, x: Tensor) -> int:
    living = Living()
    for parameter in model.parameters():
        living.meet(parameter)
    for buffer in model.buffers():  # not counted, so met before
        living.known[buffer.untyped_storage()._cdata] = weakref.ref(buffer.untyped_storage())
    living.meet(x)
    with torch.no_grad(), living:
        model(x)
    return living.most


def bottleneck() -> nn.Module:
    class Bottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = unit(3, 16)
            self.branch = nn.Sequential(unit(16, 24), nn.Conv2d(24, 16, 1), nn.SiLU())
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return self.head(y + self.branch(y))

    return Bottleneck()


@pytest.mark.parametrize("build", [chain, bottleneck])
@pytest.mark.parametrize("ratio", [None, 0.4])
def test_it_is_what_pytorch_really_holds(
    build: Callable[[], nn.Module], ratio: float | None
) -> None:
    model = build().eval()
    if ratio:
        model = prune(model, image(), ratio=ratio, round_to=1, importance="magnitude").model
    one = image(batch=1)
    assert peak(model, one) == lived(model, one)


# -- after a cut -----------------------------------------------------------------------------------

UNCUT = {
    "rolled": "nothing of it can be cut",
    "fused_attention": "another width of its heads runs another kernel, op by op",
}


@pytest.mark.parametrize("name", [name for name in ZOO if name not in UNCUT])
def test_a_plan_foretells_the_memory_of_the_slim_network(name: str) -> None:
    model, inputs = ZOO[name].make(), ZOO[name].inputs()
    plan = plan_pruning(model, inputs, ratio=0.4, round_to=1, importance="random")

    model = baked(model)
    slim = cut(model, plan)

    assert peak(slim, inputs) == plan.after.memory < plan.before.memory
    assert plan.before.memory == peak(model, inputs)
    assert plan.achieved.memory == plan.after.memory / plan.before.memory


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["dense_concat", "wide_groups", "se_gate", "nam_attached"]), st.data())
def test_fewer_channels_never_take_more(name: str, data: st.DataObject) -> None:
    graph = trace(ZOO[name].make(), ZOO[name].inputs())
    more = np.array([data.draw(st.integers(1, int(size))) for size in graph.sizes], dtype=float)
    less = np.array([data.draw(st.integers(1, int(width))) for width in more], dtype=float)
    assert (graph.memory.steps(less) <= graph.memory.steps(more) + 1e-6).all()
    assert graph.memory.peak(less) <= graph.memory.peak(more) + 1e-6


# -- as a target -----------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """Wide where images are large; the last layers hold the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(unit(3, 32), unit(32, 32), nn.AvgPool2d(4))
        self.late = nn.Sequential(unit(32, 32), unit(32, 32))
        self.head = nn.Conv2d(32, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(self.early(x)))


def planned(**options: Any) -> PruningPlan:
    torch.manual_seed(0)
    return plan_pruning(Pyramid().eval(), image(size=32), **{"round_to": 4, **options})


@pytest.mark.parametrize("allocation", ["global", "uniform", "error"])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.35])
def test_the_target_holds_and_no_step_too_many_is_taken(share: float, allocation: str) -> None:
    torch.manual_seed(0)
    graph = trace(Pyramid().eval(), image(size=32))
    scores = np.random.default_rng(1).random(graph.count)
    options = PruneOptions(memory=f"{share:.0%}", round_to=4, allocation=allocation)

    plan = select(graph, scores, options)

    assert plan.after.memory <= share * plan.before.memory
    assert plan.requested.model_dump(exclude_none=True) == {"memory": f"{share:.0%}"}
    kept = np.array([row.width_after for row in plan.layers], dtype=float)
    wider = [kept + 4 * (np.arange(len(kept)) == n) for n in range(len(kept))]
    undone = [graph.memory.peak(each) for each in wider if (each <= graph.sizes).all()]
    assert max(undone) > share * plan.before.memory


def test_what_takes_most_memory_goes_first_by_error() -> None:
    graph = trace(Pyramid().eval(), image(size=32))
    options = PruneOptions(memory="60%", round_to=4, allocation="error")
    plan = select(graph, np.ones(graph.count), options)
    after = {row.layer: row.width_after for row in plan.layers}
    # the two early layers are equally large: both must shrink, one alone does not lower the peak
    assert max(after["early.0.0"], after["early.1.0"]) < 32
    assert after["late.0.0"] == 32


def test_an_absolute_target() -> None:
    whole = planned(ratio=0.0).before.memory
    plan = planned(memory=f"{0.7 * whole / 1e3:.1f}kB")
    assert plan.after.memory <= round(0.7 * whole, -2)
    assert plan.achieved.memory == pytest.approx(0.7, abs=0.1)
    assert "memory" in str(plan).splitlines()[-1]


def test_beside_another_target_both_hold() -> None:
    alone = planned(ratio=0.25)
    strict = planned(ratio=0.25, memory="40%")
    loose = planned(ratio=0.25, memory="99%")

    assert alone.achieved.memory > 0.4 >= strict.achieved.memory
    assert strict.achieved.ratio > 0.25 >= alone.achieved.ratio
    assert loose.layers == alone.layers
    # a limit that holds already is none to complain about
    assert planned(ratio=0.25, memory="1GB").layers == alone.layers
    # what went for the first target is gone for both
    for narrow, wide in zip(strict.layers, alone.layers, strict=True):
        assert narrow.width_after <= wide.width_after


def test_the_slim_network_has_what_was_asked_for() -> None:
    torch.manual_seed(0)
    model, x = Pyramid().eval(), image(size=32, batch=1)
    found = prune(model, x, memory="50%", round_to=4)
    assert lived(found.model, x) <= 0.5 * lived(model, x)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("50%", 5e6), ("0.5", 5e6), ("4MB", 4e6), ("4mb", 4e6), ("300 kB", 3e5), ("2000b", 2e3)],
)
def test_amounts(given: str, wanted: float) -> None:
    assert remaining("memory", given, 1e7) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"memory": "4 elephants"}, r"is no amount; give 50%, 0.5 or 20MB"),
        ({"memory": "0MB"}, r"must lie in \(0, "),
        ({"memory": "1GB"}, r"must lie in \(0, "),
        ({"memory": "120%", "ratio": 0.3}, r"must lie in \(0, "),
        ({"memory": "1kB"}, r"asks for 1000 bytes, and .* remain .* floor = 0.1 and round_to = 4"),
        ({"memory": "20%", "floor": 0.9}, r"remain .* where every layer is as narrow as floor"),
        ({"memory": "50%", "ratio": 0.3, "macs": "50%"}, "ratio and macs were given together"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(NamPrunerError, match=said):
        planned(**options)


def test_a_graph_knows_its_memory_when_more_is_frozen() -> None:
    graph = trace(chain(), image())
    frozen = graph.freeze(graph.groups[0].units, "test")
    assert isinstance(frozen, DependencyGraph)
    assert frozen.memory.peak(frozen.sizes) == graph.memory.peak(graph.sizes)
