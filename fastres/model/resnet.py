"""The reference ResNets for 32x32 images: plain PyTorch, no tricks.

This file defines what is right. Every faster route of fastres computes the same function with the
same `state_dict` keys, and is tested against these modules.

A block learns a residual: where a stack of layers should map x to H(x), the block computes
F(x) = H(x) - x and adds x back over an identity shortcut, so that gradients reach early layers
unchanged and deeper nets do not degrade (He et al. 2015, https://arxiv.org/abs/1512.03385). The
layers follow two rules of the VGG nets: layers with the same map size have the same number of
filters, and where the map is halved the number of filters doubles. A shortcut that changes shape is
a 1x1 projection (option B of the paper) or zero padding (option A).

Parameters are named as in torchvision: conv1, bn1, layer1.0.conv1, ..., downsample.0, fc.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.config import NetworkOptions, StemName
from fastres.errors import UsageError

__all__ = [
    "MODELS",
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "ResNet9",
    "ResNet11",
    "create_model",
    "network_of",
]

Shortcut = Literal["A", "B", "none"]


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class ZeroPadShortcut(nn.Module):
    """Option A of the paper: every second pixel, new channels filled with zeros; no parameters.

    The new channels are split between both ends, as in the published CIFAR-10 weights that use
    this option.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.front = (out_channels - in_channels) // 2
        self.back = out_channels - in_channels - self.front

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, out_channels, H / stride, W / stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.front, self.back))


def _make_shortcut(
    kind: Shortcut, in_channels: int, out_channels: int, stride: int
) -> nn.Module | None:
    """Return what reshapes x for the addition, or None where x can be added as it is."""
    if kind == "none" or (stride == 1 and in_channels == out_channels):
        return None
    if kind == "A":
        return ZeroPadShortcut(in_channels, out_channels, stride)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class BasicBlock(nn.Module):
    """out = relu(F(x) + shortcut(x)) with F two 3x3 convolutions, each followed by batch norm."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: Shortcut):
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _make_shortcut(shortcut, in_channels, channels, stride)
        self.residual = shortcut != "none"

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, channels, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.residual:
            out = out + (x if self.downsample is None else self.downsample(x))
        return F.relu(out)


class Bottleneck(nn.Module):
    """out = relu(F(x) + shortcut(x)) with F = 1x1 reduce, 3x3, 1x1 expand by four.

    The stride sits on the 3x3 convolution, as in torchvision, not on the first 1x1 of the paper.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: Shortcut):
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _make_shortcut(shortcut, in_channels, out_channels, stride)
        self.residual = shortcut != "none"

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, 4 * channels, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.residual:
            out = out + (x if self.downsample is None else self.downsample(x))
        return F.relu(out)


def _initialize(model: nn.Module) -> None:
    """Draw convolutions after He et al. 2015 (fan out); batch norm starts as the identity.

    There is nothing to draw on the meta device, where torch would import its compiler for it.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _stem(kind: StemName, channels: int) -> tuple[nn.Conv2d, nn.Module | None]:
    """Return the first convolution, and the pool behind its ReLU or None."""
    if kind == "cifar":
        return _conv3x3(3, channels), None
    pool = nn.MaxPool2d(3, 2, padding=1)
    if kind == "pool":
        return _conv3x3(3, channels), pool
    return nn.Conv2d(3, channels, 7, 2, padding=3, bias=False), pool


class ResNet(nn.Module):
    """Stem, stages of residual blocks, global average pool, linear classifier.

    Args:
        block: BasicBlock or Bottleneck.
        depths: number of blocks of each stage; every stage after the first halves the map.
        channels: filters of the first stage; each later stage has twice those of the one before.
        num_classes: outputs of the classifier.
        shortcut: "B" projection, "A" zero padding where the shape changes, "none" a plain net.
        stem: "cifar" a 3x3 convolution, "pool" with a 3x3 max pool of stride 2 behind it,
            "imagenet" the same with a 7x7 convolution of stride 2, as in torchvision.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, ...],
        channels: int,
        num_classes: int,
        shortcut: Shortcut,
        stem: StemName = "cifar",
    ):
        super().__init__()
        self.num_classes = num_classes
        self.conv1, self.maxpool = _stem(stem, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.stages: list[str] = []
        in_channels = channels
        for stage, depth in enumerate(depths):
            width = channels << stage
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(in_channels, width, stride, shortcut))
                in_channels = width * block.expansion
            self.stages.append(f"layer{stage + 1}")
            self.add_module(self.stages[-1], nn.Sequential(*blocks))
        self.fc = nn.Linear(in_channels, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        if self.maxpool is not None:
            x = self.maxpool(x)
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.fc(x.mean(dim=(2, 3)))


class ConvPool(nn.Module):
    """out = relu(bn(maxpool(conv(x)))): halves the map with a 3x3 convolution and a 2x2 pool.

    The pool stands before batch norm, which then has a quarter of the pixels to normalise.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = _conv3x3(in_channels, out_channels)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / 2, W / 2)."""
        return F.relu(self.bn(F.max_pool2d(self.conv(x), 2)))


class ResNet9(nn.Module):
    """A shallow net for short runs: after Page 2018, "How to train your ResNet".

    Stem, three halvings of the map by convolution and pool, residual blocks behind the first and
    the last, global max pool, linear classifier whose logits are divided by eight
    (https://github.com/davidcpage/cifar10-fast). The blocks are those of the other nets, with the
    ReLU behind the addition; Page's stands before it.

    Args:
        channels: filters of the stem, 64 in the original; the last layers have eight times as many.
        num_classes: outputs of the classifier.
    """

    logit_scale = 0.125

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = _conv3x3(3, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.layer1 = nn.Sequential(
            ConvPool(channels, 2 * channels), BasicBlock(2 * channels, 2 * channels, 1, "B")
        )
        self.layer2 = ConvPool(2 * channels, 4 * channels)
        self.layer3 = nn.Sequential(
            ConvPool(4 * channels, 8 * channels), BasicBlock(8 * channels, 8 * channels, 1, "B")
        )
        self.fc = nn.Linear(8 * channels, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.amax(dim=(2, 3))) * self.logit_scale


class ResNet11(nn.Module):
    """The net for short runs: a ResNet9 with a residual block behind every halving of the map.

    It is narrower, and ends as the other ResNets do: in a global average pool and logits as they
    are. Own design.

    Args:
        channels: filters of the stem; the last layers have eight times as many.
        num_classes: outputs of the classifier.
    """

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = _conv3x3(3, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(ConvPool(width, 2 * width), BasicBlock(2 * width, 2 * width, 1, "B"))
            for width in (channels, 2 * channels, 4 * channels)
        )
        self.fc = nn.Linear(8 * channels, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean(dim=(2, 3)))


@dataclass(frozen=True)
class ModelSpec:
    """How a named network is built.

    Attributes:
        channels: filters of the stem at width 1.
        build: called with (channels, num_classes, shortcut, stem).
        stems: that it has.
    """

    channels: int
    build: Callable[[int, int, Shortcut, StemName], nn.Module]
    stems: tuple[StemName, ...] = ("cifar",)


def _thin(depth: int, *, plain: bool = False) -> ModelSpec:
    """Describe the CIFAR net of 6n + 2 layers: three stages of n blocks, 16/32/64 filters."""
    depths = ((depth - 2) // 6,) * 3
    return ModelSpec(
        16,
        lambda c, n, shortcut, _: ResNet(BasicBlock, depths, c, n, "none" if plain else shortcut),
    )


def _wide(block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, ...]) -> ModelSpec:
    """Describe an ImageNet net: four stages, 64/128/256/512 filters."""
    return ModelSpec(
        64,
        lambda c, n, shortcut, stem: ResNet(block, depths, c, n, shortcut, stem),
        get_args(StemName),
    )


MODELS: dict[str, ModelSpec] = {
    **{f"resnet{depth}": _thin(depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    "resnet9": ModelSpec(64, lambda c, n, *_: ResNet9(c, n)),
    "resnet9_small": ModelSpec(16, lambda c, n, *_: ResNet9(c, n)),
    "resnet11": ModelSpec(24, lambda c, n, *_: ResNet11(c, n)),
    "resnet10": _wide(BasicBlock, (1, 1, 1, 1)),
    "resnet18": _wide(BasicBlock, (2, 2, 2, 2)),
    "resnet34": _wide(BasicBlock, (3, 4, 6, 3)),
    "resnet50": _wide(Bottleneck, (3, 4, 6, 3)),
    **{f"plain{depth}": _thin(depth, plain=True) for depth in (8, 14, 20, 32, 44, 56, 110)},
}


def create_model(
    name: str,
    num_classes: int = 10,
    *,
    width: float = 1.0,
    shortcut: Literal["A", "B"] = "B",
    stem: StemName = "cifar",
    seed: int | None = None,
) -> nn.Module:
    """Build the plain PyTorch reference network `name`, float32, NCHW, on the CPU.

    Args:
        name: a key of `MODELS`: resnet8/14/20/32/44/56/110 (three stages of 16/32/64 filters) and
            plain8 to plain110 (the same without shortcuts), resnet10/18/34/50 (64/128/256/512, 3x3
            stem), resnet9 and resnet11 (shallow, with pooling) and resnet9_small (a quarter of
            resnet9's filters).
        num_classes: outputs of the classifier, at least 1.
        width: multiplies the filters of every stage; the first stage is rounded, later ones double.
        shortcut: "B" 1x1 projection or "A" zero padding, where a block changes the shape.
        stem: of resnet10/18/34/50: "cifar" a 3x3 convolution, "pool" with a max pool behind it,
            "imagenet" a 7x7 convolution of stride 2 and a max pool.
        seed: initialise from this seed alone and leave torch's generator as it was; None draws
            from torch's generator.

    Returns:
        A module that maps images (N, 3, H, W) to logits (N, num_classes).

    Raises:
        UsageError: for an unknown name, shortcut or stem, a width that leaves no filter, no class.
    """
    if name not in MODELS:
        raise UsageError(f"unknown model {name!r}; the models are {', '.join(MODELS)}")
    if shortcut not in ("A", "B"):
        raise UsageError(f"shortcut must be 'A' or 'B', got {shortcut!r}")
    spec = MODELS[name]
    if stem not in spec.stems:
        choices = " or ".join(repr(known) for known in spec.stems)
        raise UsageError(f"the stem of {name} must be {choices}, got {stem!r}")
    if not 0 < width <= 64 or round(spec.channels * width) < 1:
        raise UsageError(f"width must leave at least one filter and be at most 64, got {width}")
    if num_classes < 1:
        raise UsageError(f"num_classes must be at least 1, got {num_classes}")

    channels = round(spec.channels * width)
    if seed is None:
        return spec.build(channels, num_classes, shortcut, stem)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return spec.build(channels, num_classes, shortcut, stem)


def network_of(options: NetworkOptions, num_classes: int, *, seed: int | None = None) -> nn.Module:
    """Build the network that the options of a run name, as `create_model` does."""
    return create_model(
        options.model,
        num_classes,
        width=options.width,
        shortcut=options.shortcut,
        stem=options.stem,
        seed=seed,
    )
