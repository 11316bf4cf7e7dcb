"""One network for every mechanism that ties, splits, mixes or hard-codes channels.

Each is traced, cut by 30 %, certified, saved and loaded again; most of it must be free to be cut.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from zoo import ZOO, image, lively

from nampruner import models
from nampruner.baking import baked
from nampruner.certificate import TOLERANCE
from nampruner.checkpoint import load, save
from nampruner.graph import trace
from nampruner.pruning import prune


@dataclass(frozen=True)
class Family:
    """A network of a library and what is known about it."""

    spec: str
    free: float
    """Share of its convolutions that must be free."""
    repairs: bool = False
    """Whether it holds widths as numbers."""
    size: int = 64


FAMILIES = {
    "split by a list": Family("timm:mixnet_s", 1.0, repairs=True),
    "slice": Family("timm:dpn48b", 0.95, repairs=True),
    "slice written in place": Family("timm:rexnet_100", 1.0, repairs=True),
    "chunk of unequal users": Family("timm:cspresnext50", 0.9),
    "hierarchy of splits": Family("timm:res2net50_26w_4s?layers=[1,1,1,1]", 1.0, repairs=True),
    "partial convolution": Family("timm:fasternet_t0", 0.95, repairs=True),
    "kernel in a buffer": Family("timm:resnetblur18", 1.0, repairs=True),
    "softmax over branches": Family("timm:skresnet18", 1.0),
    "split attention": Family("timm:resnest14d", 1.0),
    "depthwise multiplier": Family("timm:fastvit_t8", 1.0, repairs=True),
    "branches of depthwise kernels": Family("timm:inception_next_atto", 0.95, repairs=True),
    "attention": Family("timm:mobilevit_xxs", 0.85),
    "attention by convolutions": Family("timm:efficientvit_b0", 0.8),
    "channel shuffle": Family("torchvision:shufflenet_v2_x0_5", 0.8),
    "auxiliary head": Family("torchvision:googlenet?init_weights=false", 1.0),
    "weight standardization": Family("timm:nf_regnet_b0", 0.95),
    "parallel branches of one convolution": Family("timm:mobileone_s1", 1.0, repairs=True),
    "convolution across channels": Family("timm:eca_resnext26ts", 0.7),
    "global context": Family("timm:gcresnext26ts", 0.6),
    "squeeze and excitation": Family("timm:mobilenetv3_small_050", 1.0),
    "product of two branches": Family("timm:starnet_s050", 0.95),
    "dense concatenation": Family("timm:densenet121?block_config=[3,4,4,3]", 1.0),
    "parallel resolutions": Family("timm:hrnet_w18_small", 1.0),
    "two maps, outputs in a dict": Family("torchvision:lraspp_mobilenet_v3_large", 0.9),
}

OUR_OWN = (
    *(
        "called_twice",
        "tied_weights",
        "conditional_convolution",
        "weight_norm",
        "group_norm",
        "patches",
        "glu",
    ),
    *("pixel_shuffle", "transposed", "transposed_depthwise", "layer_scale", "prelu"),
    *("one_dimensional", "three_dimensional", "two_inputs", "output_dict", "unequal_split"),
    *("slice_written_in_place", "attention_by_hand"),
)
"""Mechanisms of networks that no library of ours has."""


def share_free(model: nn.Module, x: object) -> float:
    """Convolutions with more than one output, some of which can go."""
    graph = trace(model, x)
    alone = {row.layer for row in graph.left_alone()}
    kinds = (nn.modules.conv._ConvNd,)
    wide = {n for n, m in model.named_modules() if isinstance(m, kinds) and len(m.weight) > 1}
    outputs = {n for n in wide if _reason(graph, n).startswith("output")}
    wide -= outputs
    return 1 - len(wide & alone) / len(wide)


def _reason(graph: object, layer: str) -> str:
    return {row.layer: row.reason for row in graph.left_alone()}.get(layer, "")  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", FAMILIES)
def test_mechanism(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    torch.manual_seed(0)
    built = models.build(family.spec, num_classes=10, in_channels=3, image_size=family.size)
    dense, x = lively(built).eval(), image(size=family.size)
    assert share_free(baked(dense), x) >= family.free

    slim = prune(dense, x, ratio=0.3, round_to=1, importance="random")
    assert slim.certificate.max_relative_error <= TOLERANCE
    assert 0.2 < slim.plan.achieved.ratio <= 0.3
    assert slim.plan.repairs or not family.repairs

    again = load(save(slim.model, tmp_path / "slim"))
    with torch.no_grad():
        torch.testing.assert_close(again(x), slim.model(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", OUR_OWN)
def test_mechanism_of_our_own(name: str, tmp_path: Path) -> None:
    case = ZOO[name]
    dense, x = case.make(), case.inputs()
    slim = prune(dense, x, ratio=0.3, round_to=1, importance="random")
    assert slim.certificate.max_relative_error <= TOLERANCE
    assert 0 < slim.plan.achieved.ratio <= 0.3
    assert slim.plan.repairs or not case.repairs

    again = load(save(slim.model, tmp_path / "slim"), model=case.make())
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), slim.model.state_dict().values(), strict=True)
    )
