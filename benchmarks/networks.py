"""Networks of the benchmarks that no library has."""

from torch import Tensor, nn


def _conv(
    before: int, after: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(after)]


class InvertedResidual(nn.Module):
    """Sandler et al. 2018, expansion 4."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        wide = 4 * before
        self.block = nn.Sequential(
            *_conv(before, wide),
            nn.ReLU6(),
            *_conv(wide, wide, 3, stride, groups=wide),
            nn.ReLU6(),
            *_conv(wide, after),
        )
        self.residual = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.residual else self.block(x)


def mobile(num_classes: int, in_channels: int) -> nn.Module:
    """A MobileNetV2-style network for small images: 16, 16, 24, 40 channels, head of 128."""
    layers: list[nn.Module] = [*_conv(in_channels, 16, 3), nn.ReLU6()]
    width = 16
    for after, stride in ((16, 1), (16, 1), (24, 2), (24, 1), (40, 2), (40, 1)):
        layers.append(InvertedResidual(width, after, stride))
        width = after
    head = [*_conv(width, 128), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *head, nn.Linear(128, num_classes))
