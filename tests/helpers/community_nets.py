"""Nets that people have: four CIFAR repositories' rebuilt, those of torchvision and of timm.

Whether a net is recognised depends on how its authors write a block: a projection in a Sequential
that may be empty, F.relu or a module of it made in forward, `+=` or `+`. So the first half of this
file, and benchmarks/peers/community_nets.py, which is measured too, spell every block as its
repository does, from its structure; attribute names are theirs too, and with them the keys of the
state_dict. Widths and depths are arguments: stages beyond the given widths are empty.

NETS are tiny and take 8 pixels, FULL_NETS are of the published size and take 32. `external_nets`
are built by the packages, `reduced_nets` by the same classes with fewer and narrower blocks.

Every net is made from one seed. Its batch norms and the biases of its convolutions are random,
since one that is still the identity, or zero, may be left out unseen. Dropout is there, but drops
nothing: a step can be repeated.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.peers.community_nets import (
    AkamasterResNet,
    KuangliuBasicBlock,
    KuangliuResNet,
    conv1x1,
    conv3x3,
    make_stages,
    projection,
)
from tests.helpers.interpreter import DEVICE

__all__ = [
    "FULL_NETS",
    "NETS",
    "build_net",
    "convs_before_norms",
    "external_nets",
    "reduced_nets",
    "with_random_norms",
]

NetFactory = Callable[[], nn.Module]


def with_random_norms(model: nn.Module) -> nn.Module:
    """A fresh batch norm is the identity and would hide an exchanged gamma and beta."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, std=0.3, generator=generator)
    return model.to(DEVICE)


def _seeded(build: NetFactory) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.uniform_(module.bias, -0.5, 0.5)
            elif isinstance(module, nn.Dropout):
                module.p = 0.0
    return with_random_norms(model)


def _nets(builds: dict[str, NetFactory]) -> dict[str, NetFactory]:
    return {name: partial(_seeded, build) for name, build in builds.items()}


def _is_plain(conv: nn.Conv2d) -> bool:
    """3x3 or 1x1, neither grouped nor dilated."""
    return conv.kernel_size in ((1, 1), (3, 3)) and conv.groups == 1 and conv.dilation == (1, 1)


def convs_before_norms(model: nn.Module, x: torch.Tensor) -> list[str]:
    """Names of the 3x3 and 1x1 convolutions, not grouped or dilated, that a batch norm follows.

    Found by running a copy of the model: a BatchNorm2d was given the very tensor that a convolution
    returned, with nothing written to it since. How a net is written does not matter here.
    """
    model = copy.deepcopy(model).eval()
    # Each output is kept: once it is gone, its id may be another tensor's.
    outputs: dict[int, tuple[str, int, torch.Tensor]] = {}
    found: dict[str, None] = {}

    def record(name, module, inputs, output):
        outputs[id(output)] = name, output._version, output

    def look_up(module, inputs):
        name, version, _ = outputs.get(id(inputs[0]), (None, None, None))
        if name is not None and version == inputs[0]._version:
            found[name] = None

    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(look_up)
        elif isinstance(module, nn.Conv2d) and _is_plain(module):
            module.register_forward_hook(partial(record, name))
    with torch.no_grad():
        model(x)
    return list(found)


class KuangliuBottleneck(nn.Module):
    """The same of three convolutions, the stride in the 3x3 one."""

    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = conv1x1(in_planes, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, 4 * planes)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.shortcut = projection(in_planes, 4 * planes, stride)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        return F.relu(out)


class KuangliuPreActBlock(nn.Module):
    """Norm and ReLU first; `shortcut` is an attribute only of a block that projects."""

    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = conv3x3(in_planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(conv1x1(in_planes, planes, stride))

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class KuangliuPreActBottleneck(nn.Module):
    """The same of three convolutions."""

    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = conv1x1(in_planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, 4 * planes)
        if stride != 1 or in_planes != 4 * planes:
            self.shortcut = nn.Sequential(conv1x1(in_planes, 4 * planes, stride))

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out = self.conv3(F.relu(self.bn3(out)))
        out += shortcut
        return out


class KuangliuPreActResNet(KuangliuResNet):
    """Its stem is a convolution alone, and no norm follows the last block."""

    has_stem_norm = False


class WeiaicunzaiBasicBlock(nn.Module):
    """weiaicunzai/pytorch-cifar100: two Sequentials, and a ReLU module that forward makes."""

    expansion = 1

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.residual_function = nn.Sequential(
            conv3x3(in_channels, out_channels, stride),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            conv3x3(out_channels, out_channels),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut = projection(in_channels, out_channels, stride)

    def forward(self, x):
        return nn.ReLU(inplace=True)(self.residual_function(x) + self.shortcut(x))


class WeiaicunzaiBottleneck(nn.Module):
    """The same of three convolutions."""

    expansion = 4

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.residual_function = nn.Sequential(
            conv1x1(in_channels, out_channels),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            conv3x3(out_channels, out_channels, stride),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            conv1x1(out_channels, 4 * out_channels),
            nn.BatchNorm2d(4 * out_channels),
        )
        self.shortcut = projection(in_channels, 4 * out_channels, stride)

    def forward(self, x):
        return nn.ReLU(inplace=True)(self.residual_function(x) + self.shortcut(x))


class WeiaicunzaiResNet(nn.Module):
    """Stem in a Sequential, global pool as a module."""

    def __init__(self, block, depths, widths=(64, 128, 256, 512), num_classes=100):
        super().__init__()
        self.conv1 = nn.Sequential(
            conv3x3(3, widths[0]), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        self.conv2_x, self.conv3_x, self.conv4_x, self.conv5_x = make_stages(
            block, widths, depths, 4
        )
        self.avg_pool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(widths[-1] * block.expansion, num_classes)

    def forward(self, x):
        output = self.conv1(x)
        output = self.conv2_x(output)
        output = self.conv3_x(output)
        output = self.conv4_x(output)
        output = self.conv5_x(output)
        output = self.avg_pool(output)
        output = output.view(output.size(0), -1)
        return self.fc(output)


class ChenyaofoBasicBlock(nn.Module):
    """chenyaofo/pytorch-cifar-models: torchvision's block, of a class of its own."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        projects = stride != 1 or inplanes != planes
        self.downsample = projection(inplanes, planes, stride) if projects else None
        self.stride = stride

    def forward(self, x):
        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        return self.relu(out)


class ChenyaofoResNet(nn.Module):
    """Three stages between one ReLU module and a global pool."""

    def __init__(self, depths, widths=(16, 32, 64), num_classes=10):
        super().__init__()
        self.conv1 = conv3x3(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        stages = make_stages(ChenyaofoBasicBlock, widths, depths, 3)
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x):
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)

        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)

        x = self.avgpool(x)
        x = x.view(x.size(0), -1)
        return self.fc(x)


# Filters of each convolution; "M" halves the map.
VGG11 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")


class ChenyaofoVGG(nn.Module):
    """Convolutions with a bias before their norm, one Sequential; the last map is one pixel."""

    def __init__(self, layers: Sequence[int | str] = VGG11, num_classes: int = 10):
        super().__init__()
        features: list[nn.Module] = []
        channels = 3
        for layer in layers:
            if layer == "M":
                features.append(nn.MaxPool2d(2, 2))
            else:
                conv = nn.Conv2d(channels, layer, 3, padding=1)
                features += [conv, nn.BatchNorm2d(layer), nn.ReLU(inplace=True)]
                channels = layer
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(
            nn.Linear(channels, channels),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(channels, channels),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(channels, num_classes),
        )

    def forward(self, x):
        x = self.features(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


# The first bottleneck projects in any case; it takes a second one to see an identity.
_BASIC, _DEEP = {"depths": (1, 1), "widths": (8, 16)}, {"depths": (2, 1), "widths": (8, 16)}

NETS = _nets(
    {
        "kuangliu/basic": partial(KuangliuResNet, KuangliuBasicBlock, **_BASIC),
        "kuangliu/bottleneck": partial(KuangliuResNet, KuangliuBottleneck, **_DEEP),
        "kuangliu/preact": partial(KuangliuPreActResNet, KuangliuPreActBlock, **_BASIC),
        "kuangliu/preact_bottleneck": partial(
            KuangliuPreActResNet, KuangliuPreActBottleneck, **_DEEP
        ),
        "akamaster/A": partial(AkamasterResNet, **_BASIC, option="A"),
        "akamaster/B": partial(AkamasterResNet, **_BASIC, option="B"),
        "weiaicunzai/basic": partial(
            WeiaicunzaiResNet, WeiaicunzaiBasicBlock, **_BASIC, num_classes=10
        ),
        "weiaicunzai/bottleneck": partial(
            WeiaicunzaiResNet, WeiaicunzaiBottleneck, **_DEEP, num_classes=10
        ),
        "chenyaofo/basic": partial(ChenyaofoResNet, **_BASIC),
        "chenyaofo/vgg": partial(ChenyaofoVGG, (8, "M", 16, "M", 16, 16, "M")),
    }
)

_DEPTHS_18, _DEPTHS_50 = (2, 2, 2, 2), (3, 4, 6, 3)

FULL_NETS = _nets(
    {
        "kuangliu/resnet18": partial(KuangliuResNet, KuangliuBasicBlock, _DEPTHS_18),
        "kuangliu/resnet50": partial(KuangliuResNet, KuangliuBottleneck, _DEPTHS_50),
        "kuangliu/preact_resnet18": partial(KuangliuPreActResNet, KuangliuPreActBlock, _DEPTHS_18),
        "kuangliu/preact_resnet50": partial(
            KuangliuPreActResNet, KuangliuPreActBottleneck, _DEPTHS_50
        ),
        "akamaster/resnet20": partial(AkamasterResNet, (3, 3, 3)),
        "akamaster/resnet56": partial(AkamasterResNet, (9, 9, 9)),
        "akamaster/resnet20_b": partial(AkamasterResNet, (3, 3, 3), option="B"),
        "weiaicunzai/resnet18": partial(WeiaicunzaiResNet, WeiaicunzaiBasicBlock, _DEPTHS_18),
        "weiaicunzai/resnet50": partial(WeiaicunzaiResNet, WeiaicunzaiBottleneck, _DEPTHS_50),
        "chenyaofo/resnet20": partial(ChenyaofoResNet, (3, 3, 3)),
        "chenyaofo/resnet56": partial(ChenyaofoResNet, (9, 9, 9)),
        "chenyaofo/vgg11_bn": ChenyaofoVGG,
    }
)

_TORCHVISION = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "wide_resnet50_2",
    "resnext50_32x4d",
    "vgg11_bn",
    "mobilenet_v2",
    "densenet121",
    "regnet_x_400mf",
)
_TIMM = (
    "resnet18",
    "resnet50",
    "resnet18d",
    "resnet50d",
    "resnetrs50",
    "seresnet50",
    "wide_resnet50_2",
    "resnext50_32x4d",
    "resnetv2_50",
    "resnetblur50",
    "ecaresnet50t",
    "vgg11_bn",
)


def _torchvision(name: str) -> nn.Module:
    from torchvision.models import get_model

    return get_model(name, weights=None, num_classes=10)


def _timm(name: str, **arguments) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=10, **arguments)


def external_nets() -> dict[str, tuple[NetFactory, int]]:
    """{"package/net": (factory, pixels)}: nets of torchvision and timm, with 10 classes.

    It is the factory that imports the package. pixels: images of that side are large enough.
    """
    return _from_packages(_torchvision, _timm)


def reduced_nets() -> dict[str, tuple[NetFactory, int]]:
    """The same keys and classes, of few blocks with an eighth of the channels or so."""
    return _from_packages(_reduced_torchvision, _reduced_timm)


def build_net(nets: dict[str, tuple[NetFactory, int]], name: str) -> tuple[nn.Module, int]:
    """A net and its pixels; skips the test where its package is missing."""
    package = name.partition("/")[0]
    if package in ("torchvision", "timm"):
        pytest.importorskip(package)
    build, pixels = nets[name]
    return build(), pixels


def _from_packages(
    torchvision_net: Callable[[str], nn.Module], timm_net: Callable[[str], nn.Module]
) -> dict[str, tuple[NetFactory, int]]:
    builds = {f"torchvision/{name}": partial(torchvision_net, name) for name in _TORCHVISION}
    builds |= {f"timm/{name}": partial(timm_net, name) for name in _TIMM}
    return {name: (factory, 32) for name, factory in _nets(builds).items()}


def _narrowed(module: nn.Module) -> nn.Module:
    """A net of torchvision with an eighth of all channels and groups, but of images and classes."""

    def fewer(channels: int) -> int:
        return channels if channels in (3, 10) else max(channels // 8, 1)

    match module:
        case nn.Conv2d():
            options = module.kernel_size, module.stride, module.padding, module.dilation
            groups, has_bias = fewer(module.groups), module.bias is not None
            channels = fewer(module.in_channels), fewer(module.out_channels)
            return nn.Conv2d(*channels, *options, groups, has_bias)
        case nn.BatchNorm2d():
            return nn.BatchNorm2d(fewer(module.num_features), module.eps, module.momentum)
        case nn.Linear():
            return nn.Linear(fewer(module.in_features), fewer(module.out_features))
    for name, child in list(module.named_children()):
        setattr(module, name, _narrowed(child))
    return module


def _reduced_torchvision(name: str) -> nn.Module:
    from torchvision.models import densenet, mobilenetv2, regnet, resnet

    # Nets that differ in depth alone have their second block in different stages.
    resnets = {
        "resnet18": (resnet.BasicBlock, [1, 1, 1, 1], {}),
        "resnet34": (resnet.BasicBlock, [1, 2, 1, 1], {}),
        "resnet50": (resnet.Bottleneck, [2, 1, 1, 1], {}),
        "resnet101": (resnet.Bottleneck, [1, 1, 2, 1], {}),
        "wide_resnet50_2": (resnet.Bottleneck, [1, 1, 1, 1], {"width_per_group": 128}),
        "resnext50_32x4d": (resnet.Bottleneck, [1, 1, 1, 1], {"groups": 32, "width_per_group": 4}),
    }
    if name == "mobilenet_v2":
        # Expansion, channels, blocks and stride of each stage.
        stages = [[1, 8, 1, 1], [6, 8, 2, 2], [6, 16, 1, 2]]
        return mobilenetv2.MobileNetV2(10, 0.25, stages)
    if name == "densenet121":
        return densenet.DenseNet(8, (2, 2), 16, num_classes=10)
    if name == "regnet_x_400mf":
        stages = regnet.BlockParams([2, 1], [16, 32], [8, 8], [1.0, 1.0], [2, 2])
        return regnet.RegNet(stages, num_classes=10, stem_width=16)
    # Neither class takes its widths. Without storage the wide form costs nothing.
    with torch.device("meta"):
        if name in resnets:
            block, depths, options = resnets[name]
            wide = resnet.ResNet(block, depths, num_classes=10, **options)
        else:
            wide = _torchvision(name)
    return _narrowed(wide)


def _reduced_timm(name: str) -> nn.Module:
    from timm.models.vgg import VGG

    if name == "vgg11_bn":
        layers = [8, "M", 16, "M", 16, 16, "M"]
        return VGG(layers, num_classes=10, mlp_ratio=1 / 64, norm_layer=nn.BatchNorm2d)
    if name == "resnetv2_50":
        return _timm(name, layers=(2, 1), channels=(32, 64), stem_chs=16)
    # The plain ones have an identity's shortcut, too; the others what their names say.
    options = {"layers": (2, 1, 1, 1) if name in ("resnet18", "resnet50") else (1, 1, 1, 1)}
    if name == "resnext50_32x4d":
        options |= {"cardinality": 4, "base_width": 32}
    if name in ("resnet18d", "resnet50d", "resnetrs50", "ecaresnet50t"):
        options |= {"stem_width": 8}
    return _timm(name, channels=(8, 16, 32, 64), **options)
