"""Every family of networks the product promises: trace, cut 30%, certify, reload, export."""

from pathlib import Path

import pytest
import torch
from torch import nn
from zoo import image, lively

from nampruner import models
from nampruner.certificate import TOLERANCE
from nampruner.checkpoint import load, save
from nampruner.export import export_onnx
from nampruner.pruning import prune

# Depth is cut where the library lets us, so that the mechanism stays and the export is short.
FAMILIES = {
    "timm:resnet18": 64,
    "timm:resnext50_32x4d?layers=[1,1,1,1]": 64,
    "timm:densenet121?block_config=[3,4,4,3]": 64,
    "timm:mobilenetv1_100": 64,
    "timm:mobilenetv2_100": 64,
    "timm:mobilenetv3_small_050": 64,
    "timm:mobilenetv4_conv_small_035": 64,
    "timm:efficientnet_lite0": 64,
    "timm:regnetx_002": 64,
    "timm:regnety_002": 64,
    "timm:vgg11_bn?mlp_ratio=0.0625": 32,
    "timm:dla34": 64,
    "timm:hrnet_w18_small": 64,
    "torchvision:shufflenet_v2_x0_5": 64,
    "timm:ghostnet_050": 64,
    "timm:repvgg_a0": 64,
    "timm:res2net50_26w_4s?layers=[1,1,1,1]": 64,
}


@pytest.mark.parametrize("spec", FAMILIES)
def test_family(spec: str, tmp_path: Path) -> None:
    size = FAMILIES[spec]
    torch.manual_seed(0)
    dense = models.build(spec, num_classes=10, in_channels=3, image_size=size)
    dense = lively(dense).eval()
    x = image(size=size)

    slim = prune(dense, x, ratio=0.3, round_to=1, importance="random")
    assert slim.certificate.max_relative_error <= TOLERANCE
    assert 0.25 < slim.plan.achieved.ratio <= 0.3
    assert parameters(slim.model) == slim.plan.after.params < parameters(dense)

    again = load(save(slim.model, tmp_path / "slim"))
    with torch.no_grad():
        assert torch.equal(again(x), slim.model(x))

    parity = export_onnx(slim.model, tmp_path / "model.onnx", x)
    assert parity.max_relative <= 1e-4


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
