"""The label graph: what is free, what is frozen and why, what goes together, what it costs."""

import gc
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from zoo import ZOO, Blur, Case, FusedAttention, Net, image, lively, unit

from nampruner.baking import baked
from nampruner.errors import GraphError, NamPrunerError
from nampruner.graph import DependencyGraph, call_model, trace
from nampruner.pruning import prune

Member = tuple[str, int, int]
"""Parameter or buffer, dimension, index."""


def free_layers(graph: DependencyGraph) -> set[str]:
    free = {int(u) for group in graph.groups for u in group.units}
    return {p.module for p in graph.products if free & set(p.outputs.tolist())}


@pytest.mark.parametrize("case", ZOO.values(), ids=ZOO)
def test_free_and_left_alone(case: Case) -> None:
    graph = trace(case.make(), case.inputs())
    free = free_layers(graph)
    reasons = {row.layer: row.reason for row in graph.left_alone()}
    assert set(case.free) <= free
    for layer, word in case.alone.items():
        assert word in reasons[layer]
    layers = {p.module for p in graph.products} - {""}
    assert layers == (free | set(reasons)) - {""}
    assert not layers & free & set(reasons)


def test_a_unit_of_a_residual_net_by_hand() -> None:
    graph = trace(ZOO["residual_projection"].make(), image())
    group = next(g for g in graph.groups if g.name == "inner.0")
    members = graph.indices(graph.mask([group.units[7]]))
    assert members == {
        "inner.0.weight": {0: [7]},
        "inner.1.weight": {0: [7]},
        "inner.1.bias": {0: [7]},
        "inner.1.running_mean": {0: [7]},
        "inner.1.running_var": {0: [7]},
        "last.weight": {1: [7]},
    }
    assert graph.indices(graph.mask([group.units[7]]), consumed=True) == {"last.weight": {1: [7]}}


def test_units_of_a_concatenation_by_hand() -> None:
    graph = trace(ZOO["dense_concat"].make(), image())
    group = next(g for g in graph.groups if g.name == "grow.0.0")
    consumed = graph.indices(graph.mask([group.units[2]]), consumed=True)
    assert consumed == {"grow.1.0.weight": {1: [18]}, "head.weight": {1: [18]}}


def test_narrow_groups_go_whole_and_wide_ones_lose_equal_positions() -> None:
    def removed(name: str) -> dict[str, dict[int, list[int]]]:
        graph = trace(ZOO[name].make(), image())
        group = next(g for g in graph.groups if g.name == "stem.0")
        return graph.indices(graph.mask([group.units[1]]))

    narrow, wide = removed("narrow_groups"), removed("wide_groups")
    assert narrow["stem.0.weight"] == {0: [2, 3]}
    assert narrow["inner.0.weight"] == {0: [4, 5, 6, 7]}
    assert narrow["head.weight"] == {1: [4, 5, 6, 7]}
    assert wide["stem.0.weight"] == {0: [1, 9]}
    assert wide["inner.0.weight"] == {1: [1]}


# -- the second opinion ----------------------------------------------------------------------------


def vgg() -> nn.Module:
    """torchvision's VGG-11-BN with a head for 32 pixels."""
    model = torchvision.models.vgg.vgg11_bn(num_classes=10, init_weights=False).features
    return nn.Sequential(model, nn.Flatten(), nn.Linear(512, 10))


def torch_pruning_units(model: nn.Module, x: Tensor, layer: nn.Module) -> list[set[Member]]:
    """The members of torch_pruning's group for every output channel of `layer`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch_pruning as tp

        graph = tp.DependencyGraph().build_dependency(model, x)
        group = graph.get_pruning_group(
            layer, tp.prune_conv_out_channels, idxs=list(range(layer.weight.shape[0]))
        )
    names = {module: name for name, module in model.named_modules()}
    units: list[set[Member]] = [set() for _ in range(layer.weight.shape[0])]
    for item in group.items:
        module = item.dep.target.module
        if module not in names:
            continue
        reads = "in_channels" in item.dep.handler.__name__
        inputs = reads and not isinstance(module, nn.BatchNorm2d)
        keys = ["weight"] if inputs else [k for k, _ in tensors_of(module)]
        for root, index in zip(item.root_idxs, item.idxs, strict=True):
            units[root] |= {(f"{names[module]}.{key}", int(inputs), index) for key in keys}
    return units


def tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    both = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return [(name, tensor) for name, tensor in both if tensor.dim()]


@pytest.mark.parametrize(
    ("build", "layer"),
    [
        (lambda: torchvision.models.resnet18(num_classes=10), "conv1"),
        (lambda: torchvision.models.resnet18(num_classes=10), "layer2.1.conv1"),
        (vgg, "0.0"),
        (vgg, "0.25"),
        (lambda: torchvision.models.densenet121(num_classes=10), "features.conv0"),
        (
            lambda: torchvision.models.densenet121(num_classes=10),
            "features.denseblock2.denselayer3.conv2",
        ),
    ],
    ids=[
        "resnet-stream",
        "resnet-inner",
        "vgg-first",
        "vgg-last",
        "densenet-stem",
        "densenet-grow",
    ],
)
def test_units_equal_torch_prunings_groups(build: Any, layer: str) -> None:
    torch.manual_seed(0)
    model, x = build().eval(), image(size=32)
    theirs = torch_pruning_units(model, x, model.get_submodule(layer))
    graph = trace(model, x)
    slot = next(s for s in graph.slots if s.name == f"{layer}.weight" and s.dim == 0)
    for channel, number in enumerate(graph.units(slot)):
        members = graph.indices(graph.mask([number]))
        ours = {(n, d, i) for n, dims in members.items() for d, ids in dims.items() for i in ids}
        assert ours == theirs[channel]


# -- sizes -----------------------------------------------------------------------------------------


@contextmanager
def counting(model: nn.Module) -> Iterator[Counter[str]]:
    """Count MACs of the convolution and linear modules by what passes through them."""
    total: Counter[str] = Counter()

    def count(module: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        positions = args[0][0].numel() if transposed else out[0].numel()
        total["macs"] += positions * module.weight[0].numel()

    layers = (nn.modules.conv._ConvNd, nn.Linear)
    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, layers)]
    yield total
    for handle in handles:
        handle.remove()


def size_of(model: nn.Module, x: Any) -> tuple[int, int]:
    with counting(model.eval()) as total, torch.no_grad():
        call_model(model, x)
    return total["macs"], sum(p.numel() for p in model.parameters())


FUNCTIONAL = {"blur", "conditional_convolution", "attention_by_hand", "fused_attention"}
"""Contractions outside of modules, which a count by modules does not see."""


@pytest.mark.parametrize("name", sorted(set(ZOO) - FUNCTIONAL))
def test_sizes_are_what_really_runs(name: str) -> None:
    model, x = baked(ZOO[name].make()), ZOO[name].inputs()
    graph = trace(model, x)
    size = graph.size(graph.mask([]))
    assert (size.macs, size.params) == size_of(model, x)
    try:
        slim = prune(model, x, ratio=0.3, round_to=1, importance="random")
    except NamPrunerError:
        return
    assert slim.plan.before == size
    assert (slim.plan.after.macs, slim.plan.after.params) == size_of(slim.model, x)


def test_functional_contractions_are_counted() -> None:
    model = Blur().eval()
    graph = trace(model, image())
    by_modules, params = size_of(model, image())
    assert graph.size(graph.mask([])).params == params
    assert graph.size(graph.mask([])).macs == by_modules + 16 * 9 * 3 * 3


def test_fused_attention_is_counted() -> None:
    model = FusedAttention().eval()
    graph = trace(model, image())
    assert graph.size(graph.mask([])).macs == size_of(model, image())[0] + 2 * 64 * 64 * 16


def test_sizes_do_not_depend_on_the_batch() -> None:
    model = ZOO["depthwise"].make()
    sizes = {trace(model, image(batch=n)).size(np.zeros(1000, dtype=bool)) for n in (1, 3)}
    assert len(sizes) == 1


# -- the call --------------------------------------------------------------------------------------


def test_tracing_changes_nothing() -> None:
    model = ZOO["nam_attached"].make()
    model.train()
    model.stem.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    trace(model, image())
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_failed_trace_leaves_the_model_as_it_was() -> None:
    model = ZOO["chain"].make().train()
    with pytest.raises(GraphError, match=r"Sequential does not run .* in module '0'"):
        trace(model, image(channels=4))
    assert all(m.training for m in model.modules())
    assert not torch.nn.modules.module._global_forward_hooks


def test_a_lazy_model_is_a_clear_error() -> None:
    with pytest.raises(GraphError):
        trace(nn.Sequential(nn.LazyConv2d(8, 3)), image())


def test_forward_replaces_the_call() -> None:
    model = ZOO["two_outputs"].make()
    graph = trace(model, image(), forward=lambda net, x: net(x)[0])
    assert "last" in free_layers(graph)
    assert "last" not in free_layers(trace(model, image()))


def test_an_output_in_an_unknown_object_is_frozen_or_refused() -> None:
    class Box:
        def __init__(self, features: Tensor) -> None:
            self.features = features

    class Boxed(Net):
        def forward(self, x: Tensor) -> Any:
            return Box(self.stem(x))

    model = lively(Boxed()).eval()
    try:
        slim = prune(model, image(), ratio=0.3, round_to=1).model
    except NamPrunerError:
        return
    assert slim(image()).features.shape[1] == 16


def test_the_model_is_not_kept_alive() -> None:
    model = ZOO["depthwise"].make()
    graph = trace(model, image())
    slim = prune(model, image(), ratio=0.3, round_to=1)
    gone = weakref.ref(model), weakref.ref(slim.model)
    plan = slim.plan
    del model, slim
    gc.collect()
    assert [r() for r in gone] == [None, None]
    assert graph.groups
    assert plan.removed


def test_freeze_keeps_the_first_reason() -> None:
    graph = trace(ZOO["chain"].make(), image())
    group = graph.groups[0]
    once = graph.freeze(group.units, "one")
    assert {once.freeze(group.units, "two").frozen[int(u)] for u in group.units} == {"one"}
    assert group.name not in {g.name for g in once.groups}
    assert group.name in {g.name for g in graph.groups}


@pytest.mark.parametrize("op", ["cumsum", "mean", "sum", "sort", "topk", "amax", "softmax"])
def test_ops_along_channels_freeze(op: str) -> None:
    class Mixed(Net):
        def middle(self, x: Tensor) -> Tensor:
            more = {"topk": (3, 1)}.get(op, (1,))
            out = getattr(x, op)(*more)
            out = out[0] if isinstance(out, tuple) else out
            return x + out.sum(1 if out.dim() == 4 else 0, keepdim=True).sum() * 0.1

    assert "stem.0" not in free_layers(trace(lively(Mixed()).eval(), image()))


def test_an_unknown_op_freezes() -> None:
    class Strange(Net):
        def __init__(self) -> None:
            super().__init__()
            self.free = unit(16, 16)

        def middle(self, x: Tensor) -> Tensor:
            return self.free(torch.fft.fft2(x).abs())

    graph = trace(lively(Strange()).eval(), image())
    assert "free.0" in free_layers(graph)
    reasons = {row.layer: row.reason for row in graph.left_alone()}
    assert reasons["stem.0"].startswith("no rule for this op: _fft")


def test_memory_layout_changes_nothing() -> None:
    """Pooling to 1x1 sets strides anew where the input is in channels_last."""
    model, images = torchvision.models.resnet18(num_classes=4), torch.randn(2, 3, 64, 64)
    last = images.to(memory_format=torch.channels_last)
    one, other = trace(model, images), trace(model, last)
    assert [(g.name, g.width) for g in one.groups] == [(g.name, g.width) for g in other.groups]
    assert one.left_alone() == other.left_alone()


class Transposed(Net):
    """Strides that do move elements."""

    def middle(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.as_strided((n, c, w, h), (c * h * w, h * w, 1, w))


def test_strides_that_move_elements_freeze() -> None:
    reasons = {row.layer: row.reason for row in trace(Transposed(), image()).left_alone()}
    assert "as_strided" in reasons["stem.0"]


def test_inputs_on_another_device_are_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with pytest.raises(GraphError, match=r"inputs on meta, network on cpu; bring them together"):
        trace(model, torch.empty(2, 3, 8, 8, device="meta"))
