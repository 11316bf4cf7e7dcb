"""The cut changes what the plan says and nothing else."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, Case, Net, image, lively

from nampruner.graph import call_model, trace
from nampruner.lineage import lineage
from nampruner.plan import PruningPlan, Repair
from nampruner.pruning import prune
from nampruner.settle import Cut
from nampruner.surgery import cut, find_repairs, literal, owners_of, set_literal


def pruned(model: nn.Module, x: Any = None, **options: Any) -> Cut:
    x = image() if x is None else x
    return prune(model, x, ratio=0.3, round_to=1, importance="random", **options)


def plan_of(model: nn.Module) -> PruningPlan:
    return pruned(model).plan


def test_the_original_is_untouched_bit_for_bit() -> None:
    model = ZOO["nam_attached"].make().train()
    model.deep[1].eval()
    before = copy.deepcopy(model)
    slim = pruned(model).model
    wanted = before.state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in model.state_dict().items())
    modes = [m.training for m in before.modules()]
    assert [m.training for m in model.modules()] == modes
    assert [m.training for m in slim.modules()] == modes
    for name, module in before.named_modules():
        now = {k: v for k, v in vars(model.get_submodule(name)).items() if literal(v) is not None}
        assert now == {k: v for k, v in vars(module).items() if literal(v) is not None}
    assert not lineage(model).plans


def test_exactly_the_listed_indices_go() -> None:
    model = ZOO["depthwise"].make()
    plan = plan_of(model)
    old, new = model.state_dict(), cut(model, plan).state_dict()
    for name, tensor in old.items():
        for dim, gone in plan.removed.get(name, {}).items():
            kept = [i for i in range(tensor.shape[dim]) if i not in gone]
            tensor = tensor.index_select(dim, torch.tensor(kept))
        assert torch.equal(tensor, new[name]), name


def test_an_empty_plan_changes_nothing() -> None:
    model = ZOO["narrow_groups"].make()
    plan = prune(model, image(), ratio=0.0).plan
    slim = cut(model, plan)
    assert not plan.removed
    assert not plan.masked
    assert plan.achieved.ratio == 0
    assert plan.before == plan.after
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in slim.state_dict().items())


def test_frozen_parameters_stay_frozen() -> None:
    model = ZOO["depthwise"].make()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("deep" not in name)
    slim = pruned(model).model
    for name, parameter in slim.named_parameters():
        assert parameter.requires_grad == ("deep" not in name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_stays(dtype: torch.dtype) -> None:
    model = ZOO["depthwise"].make().to(dtype)
    slim = pruned(model, image().to(dtype))
    assert slim.certificate.dtype == "float64"
    before, after = model.state_dict(), slim.model.state_dict()
    assert {k: v.dtype for k, v in after.items()} == {k: v.dtype for k, v in before.items()}
    assert slim.model(image().to(dtype)).dtype == dtype


def test_memory_format_stays() -> None:
    model = ZOO["residual_projection"].make().to(memory_format=torch.channels_last)
    weight = pruned(model).model.inner[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_tied_weights_stay_tied() -> None:
    slim = pruned(ZOO["tied_weights"].make()).model
    assert slim.first.weight is slim.second.weight
    holders = owners_of(slim)
    assert len(holders["first.weight"]) == 2
    assert len(holders["first.bias"]) == 1


def test_buffers_stay_buffers() -> None:
    model = ZOO["blur"].make()
    slim = pruned(model).model
    assert slim.kernel.shape == (slim.stem[0].out_channels, 1, 3, 3)
    assert [n for n, _ in slim.named_buffers()] == [n for n, _ in model.named_buffers()]
    assert list(slim.state_dict()) == list(model.state_dict())


def test_hooks_stay_and_are_the_slim_networks_own() -> None:
    model = ZOO["chain"].make()
    seen: list[nn.Module] = []
    model[2].register_forward_hook(lambda module, args, out: seen.append(module))
    slim = pruned(model).model
    seen.clear()
    slim(image())
    assert seen == [slim[2]]


@pytest.mark.parametrize("name", [n for n in ZOO if n != "weight_norm"])
def test_the_slim_network_learns(name: str) -> None:
    case = ZOO[name]
    model = case.make().train()
    slim = pruned(model, case.inputs()).model
    optimizer = torch.optim.SGD(slim.parameters(), lr=0.1, momentum=0.9)
    before = [p.detach().clone() for p in slim.parameters()]
    learns = {
        name: backward(net, case.inputs()) for name, net in (("dense", model), ("slim", slim))
    }
    assert learns["slim"] == learns["dense"] != set()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, slim.parameters(), strict=True))


def backward(model: nn.Module, inputs: Any) -> set[str]:
    """Names of the parameters that a gradient of the model's own shape reaches."""
    outputs = torch.utils._pytree.tree_leaves(call_model(model, inputs))
    sum(out.square().sum() for out in outputs).backward()
    reached = {name: p for name, p in model.named_parameters() if p.grad is not None}
    assert all(p.grad.shape == p.shape for p in reached.values())
    return set(reached)


def test_shape_attributes_tell_the_truth() -> None:
    slim = pruned(ZOO["depthwise"].make()).model
    for module in slim.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (
                module.out_channels,
                module.in_channels // module.groups,
            )
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.weight) == len(module.running_mean)
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
    up = pruned(ZOO["transposed"].make()).model.up
    assert up.weight.shape[:2] == (up.in_channels, up.out_channels)


def test_a_bn_without_bias() -> None:
    norm = nn.BatchNorm2d(12)
    norm.register_parameter("bias", None)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), norm, nn.Conv2d(12, 5, 3))
    assert pruned(model).plan.achieved.ratio == 0.25


def test_a_head_that_only_runs_in_training_still_runs() -> None:
    class Auxiliary(Net):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Any:
            features = self.stem(x).mean((2, 3))
            return (
                (self.head(features), self.extra(features))
                if self.training
                else self.head(features)
            )

    model = lively(Auxiliary()).train()
    pruned(model).model(image())


# -- literals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, case in ZOO.items() if case.repairs])
def test_a_hard_coded_width_is_repaired_where_it_stands(name: str) -> None:
    case: Case = ZOO[name]
    model = case.make()
    slim = pruned(model)
    for repair in slim.plan.repairs:
        before, after = (m.get_submodule(repair.module) for m in (model, slim.model))
        assert literal(getattr(before, repair.attribute)) == repair.before
        assert literal(getattr(after, repair.attribute)) == repair.after
        assert type(getattr(after, repair.attribute)) is type(getattr(before, repair.attribute))
    attributes = lineage(slim.model).attributes
    for repair in slim.plan.repairs:
        assert attributes[repair.module][repair.attribute] == repair.after


def test_two_wishes_for_one_attribute_repair_nothing() -> None:
    class Torn(Net):
        """One number bounds two tensors of different widths."""

        def __init__(self) -> None:
            super().__init__(20)
            self.part = 10
            self.other = nn.Conv2d(16, 14, 1)

        def middle(self, x: Tensor) -> Tensor:
            return torch.cat([x[:, : self.part], self.other(x)[:, : self.part]], 1)

    model = lively(Torn()).eval()
    graph = trace(model, image())
    slices = [g for g in graph.groups if len(g.units) == 10]
    removed = graph.mask([*slices[0].units[:3], *slices[1].units[:2]])
    assert find_repairs(model, graph, removed, ("slice",)) == ()
    only = graph.mask([*slices[0].units[:3], *slices[1].units[4:7]])
    assert find_repairs(model, graph, only, ("slice",)) == (
        Repair(module="", attribute="part", before=10, after=7),
    )


def test_an_equal_number_that_is_no_width_stays() -> None:
    class Lucky(Net):
        def __init__(self) -> None:
            super().__init__(8)
            self.part = self.drop_block = 8

        def middle(self, x: Tensor) -> Tensor:
            if self.training:
                x = nn.functional.pad(x, (self.drop_block,) * 4)
            left, right = x.split(self.part, 1)
            return left * right

    slim = pruned(lively(Lucky()).eval()).model
    assert slim.part < 8
    assert slim.drop_block == 8


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (3, 3),
        (True, None),
        (1.0, None),
        ([1, 2], (1, 2)),
        ((1,), (1,)),
        ([], None),
        ([1, "a"], None),
        ([True], None),
        (torch.Size([2, 3]), (2, 3)),
        ("8", None),
    ],
)
def test_what_counts_as_a_literal(value: Any, wanted: Any) -> None:
    assert literal(value) == wanted


def test_lists_stay_lists() -> None:
    module = nn.Identity()
    module.parts, module.pair, module.one = [1, 2], (1, 2), 3
    for name, value in (("parts", (4, 5)), ("pair", (4, 5)), ("one", 6)):
        set_literal(module, name, value)
    assert (module.parts, module.pair, module.one) == ([4, 5], (4, 5), 6)


def test_the_lineage_grows_and_the_originals_does_not() -> None:
    model = ZOO["depthwise"].make()
    once = pruned(model)
    twice = pruned(once.model)
    assert lineage(model).plans == ()
    assert lineage(once.model).plans == (once.plan,)
    assert lineage(twice.model).plans == (once.plan, twice.plan)
    width = twice.model.deep[0].groups
    assert lineage(twice.model).attributes["deep.0"]["groups"] == width
