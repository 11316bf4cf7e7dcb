"""The built-in network: the CIFAR-style ResNet of any depth 6n + 2 and width."""

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

BUILT_IN = {"resnet20": 3, "resnet56": 9}
"""Name → residual blocks per stage: depth = 6n + 2."""


class ResNet(nn.Module):
    """The CIFAR-style residual network (He et al. 2016, §4.2), of any width and input size.

    Three stages of `blocks` basic blocks with `width`, 2·`width` and 4·`width` channels; where a
    shape changes the shortcut is a 1×1 convolution and BN (option B). The names inside are
    torchvision's. Input [N, C, H, W], output [N, num_classes].
    """

    def __init__(self, blocks: int, *, num_classes: int, in_channels: int, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.fc(self.avgpool(features).flatten(1))
        return logits


def _stage(before: int, after: int, blocks: int, *, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or before != after:
        convolution = nn.Conv2d(before, after, 1, stride, bias=False)
        shortcut = nn.Sequential(convolution, nn.BatchNorm2d(after))
    first = BasicBlock(before, after, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(after, after) for _ in range(blocks - 1)))
