"""A fused net that is changed after it was fused computes what its modules now say."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fastres.fusion.fuse import fuse
from fastres.fusion.fused_module import FusedModule
from fastres.model.conv_bn import ConvBNModules
from fastres.model.residual_block import conv_bn
from fastres.model.resnet import create_model
from tests.helpers.interpreter import DEVICE

# What is tested is the module around the ops.
pytestmark = pytest.mark.usefixtures("plain")


def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def resnet8() -> nn.Module:
    return create_model("resnet8", width=0.25, seed=0)


def torchvision_net() -> nn.Module:
    resnet = pytest.importorskip("torchvision.models.resnet")
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)


def sequential() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())


def hook_a_convolution(net):
    net.layer1[0].conv2.register_forward_hook(lambda _module, _args, out: 2 * out)


def hook_a_shortcut(net):
    net.layer2[0].downsample.register_forward_hook(lambda _module, _args, out: 2 * out)


def prune_a_convolution(net):
    prune.l1_unstructured(net.layer1[0].conv1, "weight", amount=0.5)
    with torch.no_grad():
        net.layer1[0].conv1.weight_orig.mul_(2)


def add_a_bias(net):
    net.layer1[0].conv1.bias = nn.Parameter(torch.ones(net.layer1[0].conv1.out_channels))


def freeze_the_running_statistics(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False


def exchange_a_norm(net):
    net.layer1[0].bn1 = nn.GroupNorm(2, net.layer1[0].conv1.out_channels)


def exchange_a_convolution(net, **options):
    old = net.layer1[0].conv1
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, bias=False, **options)
    new.load_state_dict(old.state_dict())
    net.layer1[0].conv1 = new


def reflect_the_border(net):
    exchange_a_convolution(net, padding=1, padding_mode="reflect")


def dilate_a_convolution(net):
    exchange_a_convolution(net, padding=2, dilation=2)


def stretch_a_filter(net):
    net.conv1 = nn.Conv2d(3, net.conv1.out_channels, (3, 5), padding=(1, 2), bias=False)
    nn.init.constant_(net.conv1.weight, 0.1)


def stride_along_one_axis(net):
    weight = net.conv1.weight
    net.conv1 = nn.Conv2d(3, net.conv1.out_channels, 3, (1, 2), padding=1, bias=False)
    net.conv1.weight = weight


def exchange_the_activation(net):
    for module in (net, net.layer1[0]):
        module.relu = nn.GELU()


def exchange_the_last(net):
    net[2] = nn.GELU()


def drop_the_norm(net):
    del net[1]


CHANGES = [
    (resnet8, hook_a_convolution),
    (resnet8, hook_a_shortcut),
    (resnet8, prune_a_convolution),
    (resnet8, add_a_bias),
    (resnet8, freeze_the_running_statistics),
    (resnet8, exchange_a_norm),
    (resnet8, reflect_the_border),
    (resnet8, dilate_a_convolution),
    (resnet8, stretch_a_filter),
    (resnet8, stride_along_one_axis),
    (torchvision_net, exchange_the_activation),
    (sequential, exchange_the_last),
    (sequential, drop_the_norm),
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("make", "change"), CHANGES, ids=[c.__name__ for _, c in CHANGES])
def test_a_change_is_seen(make, change, training):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().to(DEVICE).double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.5, 0.0)
    faster = fuse(model, verbose=False)
    untouched = copy.deepcopy(faster)
    results = []
    for net in (model, faster, untouched):
        if net is not untouched:
            change(net.float())
            net.to(DEVICE).double()
        with torch.no_grad():
            out = net.train(training)(images().double())
        results.append([out, *(b for b in net.buffers() if b.is_floating_point())])
    wanted, got, before = results
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    if training or change is not freeze_the_running_statistics:
        pairs = zip(got, before, strict=False)
        assert any(a.shape != b.shape or not torch.allclose(a, b) for a, b in pairs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kept", [("running_mean", "running_var"), ()], ids=["kept", "none"])
def test_statistics_may_be_missing(kept, momentum, training):
    model = resnet8().to(DEVICE).double()
    faster = fuse(model, verbose=False)
    results = []
    for net in (model, faster):
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
                for name in {"running_mean", "running_var", "num_batches_tracked"} - {*kept}:
                    setattr(module, name, None)
        with torch.no_grad():
            out = net.train(training)(images().double())
        results.append([out, *net.buffers()])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8])
def test_images_of_another_dtype_are_refused_as_by_torch(dtype, training):
    faster = fuse(sequential().to(DEVICE), verbose=False).train(training)
    assert isinstance(faster, FusedModule)
    with torch.no_grad(), pytest.raises(RuntimeError):
        faster(images().to(dtype))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_residual_without_a_relu(training):
    pair = ConvBNModules(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
    for module in pair:
        module.to(DEVICE).double().train(training)
    residual = torch.full((4, 4, 8, 8), -2.0, dtype=torch.float64, device=DEVICE)
    wanted = copy.deepcopy(pair.bn)(pair.conv(images().double())) + residual
    with torch.no_grad():
        got = conv_bn(images().double(), pair, relu=False, residual=residual)
    assert (wanted < 0).any()
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
