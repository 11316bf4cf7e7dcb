"""Baking: a computed weight becomes a parameter, the function stays, and the inputs come free."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from zoo import ZOO, image, lively

from nampruner.baking import bake, bake_again, baked
from nampruner.certificate import TOLERANCE
from nampruner.checkpoint import load, save
from nampruner.errors import NamPrunerError
from nampruner.lineage import lineage
from nampruner.models import build
from nampruner.pruning import plan_pruning, prune
from nampruner.surgery import cut

parametrizations = nn.utils.parametrizations


def two_layers(way: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    head = way(nn.Linear(8, 5))
    inner = way(nn.Conv2d(12, 8, 3, padding=1))
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), inner, nn.ReLU(), *pool, head).eval()


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "way",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
)
def test_a_normalized_weight_becomes_a_parameter(way: Callable[[nn.Module], nn.Module]) -> None:
    model = two_layers(way)
    wanted = model(image())
    assert bake(model) == ("2", "6")
    assert torch.equal(model(image()), wanted)
    assert [type(model[i]) for i in (2, 6)] == [nn.Conv2d, nn.Linear]
    assert set(model.state_dict()) == {f"{i}.{key}" for i in "026" for key in ("weight", "bias")}
    assert bake(model) == ()


@pytest.mark.parametrize("name", ["weight_standardization", "weight_norm"])
def test_the_layer_before_a_baked_one_can_be_cut(name: str) -> None:
    model = ZOO[name].make()
    slim = prune(model, image(), ratio=0.5, round_to=1, importance="random")
    assert slim.certificate.max_relative_error <= TOLERANCE
    assert "stem.0" in {row.layer for row in slim.plan.layers if row.width_after < row.width_before}
    assert slim.plan.baked == lineage(slim.model).baked == ("last",)
    assert type(slim.model.last) is nn.Conv2d
    assert type(model.last) is not nn.Conv2d


def test_a_plan_of_an_unbaked_model_bakes_when_it_is_carried_out() -> None:
    model = ZOO["weight_norm"].make()
    plan = plan_pruning(model, image(), ratio=0.5, round_to=1, importance="random")
    first, second = cut(model, plan), cut(baked(model), plan)
    assert torch.equal(first(image()), second(image()))
    assert first.last.weight.shape[1] == 16 - len(plan.removed["last.weight"][1]) < 16


def test_same_padding_stays() -> None:
    torch.manual_seed(0)
    layer = timm.layers.ScaledStdConv2dSame(3, 8, 3, stride=2)
    model = nn.Sequential(layer, nn.ReLU(), nn.Conv2d(8, 4, 1))
    x = [image(size=9), image(size=12)]
    wanted = [model(v) for v in x]
    assert bake(model) == ("0",)
    assert type(model[0]) is timm.layers.Conv2dSame
    for a, b in zip(wanted, map(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_what_needs_no_baking_is_left() -> None:
    model = ZOO["weight_gain"].make()
    assert bake(model) == ()
    assert baked(model) is model
    depthwise = nn.Sequential(timm.layers.StdConv2d(8, 8, 3, groups=8))
    assert bake(depthwise) == ()


def test_flags_hooks_and_the_original_stay() -> None:
    model = two_layers(parametrizations.weight_norm)
    for parameter in model[2].parameters():
        parameter.requires_grad_(False)
    seen: list[int] = []
    model[2].register_forward_hook(lambda *_: seen.append(1))
    twin = baked(model)
    twin(image())
    assert seen
    assert not any(p.requires_grad for p in twin[2].parameters())
    assert all(p.requires_grad for p in twin[6].parameters())
    assert torch.nn.utils.parametrize.is_parametrized(model[2])
    assert torch.equal(model(image()), twin(image()))


class Doubling(nn.Conv2d):
    """Computes something else than a convolution with its weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.norm()
        return 2 * nn.functional.conv2d(x, weight, self.bias)


def test_a_layer_that_is_no_plain_convolution_is_not_baked() -> None:
    model = nn.Sequential(lively(nn.Conv2d(3, 8, 1)), nn.ReLU(), Doubling(8, 4, 1))
    assert bake(model) == ()
    with pytest.raises(NamPrunerError, match="2 was baked"):
        bake_again(model, ["2"])


def test_a_baked_network_is_loaded_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build("timm:nf_regnet_b0", num_classes=10, in_channels=3, image_size=32)
    slim = prune(model.eval(), image(size=32), ratio=0.3, round_to=1, importance="random")
    assert len(slim.plan.baked) == 54
    assert sum("normalization" in row.reason for row in slim.plan.left_alone) == 0
    again = load(save(slim.model, tmp_path / "slim"))
    assert torch.equal(again(image(size=32)), slim.model(image(size=32)))
