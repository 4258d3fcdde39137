"""The ResNets of CIFAR that most people copied, rebuilt from their structure.

kuangliu/pytorch-cifar's and akamaster/pytorch_resnet_cifar10's, each block spelled as its
repository does, with its attribute names: ReLU is a function, the sum is in place, the projection
stands in a Sequential that may be empty. Widths and depths are arguments: stages beyond the given
widths are empty.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "AkamasterBasicBlock",
    "AkamasterResNet",
    "KuangliuBasicBlock",
    "KuangliuResNet",
    "LambdaLayer",
    "conv1x1",
    "conv3x3",
    "make_stages",
    "projection",
]


def conv3x3(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution that keeps the map's size, or divides it by the stride; no bias."""
    return nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)


def conv1x1(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution without a bias."""
    return nn.Conv2d(in_channels, channels, 1, stride, bias=False)


def projection(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """1x1 convolution and batch norm where the shape changes, else nothing."""
    if stride == 1 and in_channels == channels:
        return nn.Sequential()
    return nn.Sequential(conv1x1(in_channels, channels, stride), nn.BatchNorm2d(channels))


def make_stages(
    block: Callable[[int, int, int], Any],
    widths: Sequence[int],
    depths: Sequence[int],
    count: int,
) -> list[nn.Sequential]:
    """`count` stages, the last ones empty; each but the first halves the map in its first block.

    block: makes one of (channels of its input, width, stride); its `expansion` times the width are
    the channels that it returns.
    """
    stages, channels = [], widths[0]
    for number, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        blocks = []
        for i in range(depth):
            blocks.append(block(channels, width, 2 if number > 0 and i == 0 else 1))
            channels = width * blocks[-1].expansion
        stages.append(nn.Sequential(*blocks))
    return stages + [nn.Sequential() for _ in range(count - len(stages))]


class KuangliuBasicBlock(nn.Module):
    """kuangliu/pytorch-cifar: functional ReLU, in-place sum with a Sequential, perhaps empty."""

    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = conv3x3(in_planes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut: nn.Module = projection(in_planes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, planes, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class KuangliuResNet(nn.Module):
    """Up to four stages; the pool leaves one pixel of the last map, which has 4 to 7 of them.

    has_stem_norm: False in a class for blocks that begin with their norm and ReLU.
    """

    has_stem_norm = True

    def __init__(
        self,
        block: Any,
        depths: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512),
        num_classes: int = 10,
    ):
        super().__init__()
        self.conv1 = conv3x3(3, widths[0])
        if self.has_stem_norm:
            self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1, self.layer2, self.layer3, self.layer4 = make_stages(block, widths, depths, 4)
        self.linear = nn.Linear(widths[-1] * block.expansion, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) images to (N, num_classes) logits."""
        out = F.relu(self.bn1(self.conv1(x))) if self.has_stem_norm else self.conv1(x)
        out = self.layer1(out)
        out = self.layer2(out)
        out = self.layer3(out)
        out = self.layer4(out)
        out = F.avg_pool2d(out, 4)
        out = out.view(out.size(0), -1)
        return self.linear(out)


class LambdaLayer(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """The function of x."""
        return self.function(x)


class AkamasterBasicBlock(KuangliuBasicBlock):
    """akamaster/pytorch_resnet_cifar10: option A skips pixels and pads channels with zeros."""

    def __init__(self, in_planes: int, planes: int, stride: int, option: str):
        super().__init__(in_planes, planes, stride)
        if option == "A" and (stride != 1 or in_planes != planes):
            padding = (0, 0, 0, 0, planes // 4, planes // 4)
            self.shortcut = LambdaLayer(lambda x: F.pad(x[:, :, ::2, ::2], padding, "constant", 0))


class AkamasterResNet(nn.Module):
    """Three stages, each of twice the channels of the one before; a pool as large as the map."""

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int] = (16, 32, 64),
        option: str = "A",
        num_classes: int = 10,
    ):
        super().__init__()
        self.conv1 = conv3x3(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        block = partial(AkamasterBasicBlock, option=option)
        self.layer1, self.layer2, self.layer3 = make_stages(block, widths, depths, 3)
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) images to (N, num_classes) logits."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer1(out)
        out = self.layer2(out)
        out = self.layer3(out)
        out = F.avg_pool2d(out, out.size()[3])
        out = out.view(out.size(0), -1)
        return self.linear(out)
