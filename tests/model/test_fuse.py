"""`fuse`: the same network by another way: keys, numbers, modes, and what must stay as it is."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastres.fusion.fuse import fuse
from fastres.fusion.fused_module import FusedModule
from fastres.model.conv_bn import ConvBNModules
from fastres.model.residual_block import conv_bn
from fastres.model.resnet import BasicBlock, Bottleneck, ResNet, create_model
from fastres.model.running_stats import batched_running_stats
from tests.helpers.interpreter import DEVICE
from tests.helpers.numerics import assert_like_eager


def tiny(name="resnet8", **options) -> nn.Module:
    model = create_model(name, seed=0, **options).to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, generator=generator)
    return model


def images(n=4, size=8) -> torch.Tensor:
    return torch.randn((n, 3, size, size), generator=torch.Generator().manual_seed(2)).to(DEVICE)


def train_once(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, every gradient and every buffer of one training step."""
    model.zero_grad()
    logits = model.train()(x)
    F.cross_entropy(logits, torch.arange(len(x), device=x.device)).backward()
    grads = {f"grad {name}": p.grad for name, p in model.named_parameters()}
    return {"logits": logits, **grads, **dict(model.named_buffers())}


def assert_same_step(model: nn.Module, x: torch.Tensor) -> None:
    """The fused net is as near to fp64 as the eager one.

    A layer of a tiny net has four channels, too few to compare two RMS errors by: logits and
    gradients are scaled to unit RMS, tensor by tensor, and compared as one vector.
    """
    got = train_once(fuse(model, verbose=False), x)
    truth = train_once(copy.deepcopy(model).double(), x.double())
    eager = train_once(copy.deepcopy(model), x)
    buffers = [name for name, _ in model.named_buffers()]
    learned = [name for name in truth if name not in buffers]
    scales = {name: truth[name].square().mean().sqrt() for name in learned}

    def flat(values):
        return torch.cat([(values[name].double() / scales[name]).flatten() for name in learned])

    assert_like_eager("step", flat(got), flat(eager), flat(truth), torch.float32)
    for name in buffers:
        torch.testing.assert_close(got[name], eager[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet8", {}),
        ("resnet8", {"shortcut": "A"}),
        ("plain20", {"width": 0.25}),
        ("resnet9", {"width": 0.125}),
    ],
    ids=["projections", "zero padding", "no shortcuts", "pools"],
)
def test_a_net_computes_the_same(name, options):
    """In fp64 the two ways differ by rounding alone: logits, gradients, running statistics."""
    model = tiny(name, **options).double()
    x = images().double()
    eager, got = (train_once(net, x) for net in (copy.deepcopy(model), fuse(model, verbose=False)))
    for key, value in eager.items():
        torch.testing.assert_close(got[key], value, rtol=1e-9, atol=1e-9, msg=key)


def test_a_net_on_the_kernels_is_as_right_as_eager():
    assert_same_step(tiny(width=0.25), images(2))


@pytest.mark.usefixtures("plain")
def test_keys_and_original_stay(capsys):
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    faster = fuse(model)
    assert capsys.readouterr().out.startswith("fuse: 9 of 9 convolutions run fused\n")
    assert isinstance(faster, FusedModule)
    assert isinstance(faster, ResNet)
    assert list(faster.state_dict()) == list(before)
    train_once(faster, images())
    assert type(model).__name__ == "ResNet"
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    model.load_state_dict(faster.state_dict())


@pytest.mark.usefixtures("plain")
def test_evaluation_folds():
    model = tiny().double()
    model.train()(images().double())
    faster = fuse(model, verbose=False).eval()
    model.eval()
    x = images(3).double()
    with torch.no_grad():
        torch.testing.assert_close(faster(x), model(x), rtol=1e-9, atol=1e-9)
    with torch.profiler.profile() as profile, torch.no_grad():
        faster(x)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["fastres::conv_bn_folded"] == 9
    assert not [key for key in calls if "batch_norm" in key]
    # With gradients wanted, evaluation is the reference.
    faster(x).sum().backward()
    assert faster.conv1.weight.grad is not None


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("momenta", [[None], [0.3], [None, 0.3, 0.1]])
def test_running_statistics_follow_every_momentum(momenta):
    """Without one they average all batches."""
    model = tiny(width=0.5)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for i, module in enumerate(norms):
        module.momentum = momenta[i % len(momenta)]
    faster = fuse(model, verbose=False)
    for scale in (1.0, 2.0):
        model(images() * scale)
        faster(images() * scale)
    torch.testing.assert_close(dict(faster.named_buffers()), dict(model.named_buffers()))


@pytest.mark.usefixtures("plain")
def test_running_statistics_may_move_together():
    together, alone = (fuse(tiny(width=0.5), verbose=False) for _ in range(2))
    with batched_running_stats():
        together(images())
        assert together.bn1.num_batches_tracked == 0
        together(2 * images())
    for scale in (1, 2):
        alone(scale * images())
    assert together.bn1.num_batches_tracked == 2
    torch.testing.assert_close(
        dict(together.named_buffers()), dict(alone.named_buffers()), rtol=0, atol=0
    )

    def stop():
        with batched_running_stats():
            together(images())
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stop()
    alone(images())
    assert together.bn1.num_batches_tracked == 2
    assert alone.bn1.num_batches_tracked == 3


@pytest.mark.usefixtures("plain")
def test_autocast_computes_in_bfloat16_and_keeps_statistics_in_float32():
    model = tiny(width=0.5)
    faster = fuse(model, verbose=False)
    x = torch.randn((4, 8, 8, 8), generator=torch.Generator().manual_seed(3)).to(DEVICE).bfloat16()
    truth = copy.deepcopy(model.layer1).double()(x.double())
    with torch.autocast(DEVICE.type, torch.bfloat16):
        got, eager = faster.layer1(x), model.layer1(x)
    assert got.dtype == torch.bfloat16
    assert_like_eager("layer1", got, eager, truth)
    assert all(b.dtype in (torch.float32, torch.int64) for b in faster.buffers())


@pytest.mark.usefixtures("plain")
def test_bottleneck_and_sequential():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Bottleneck(8, 8, 2, "B"),
        nn.Conv2d(32, 5, 1, bias=False),
        nn.BatchNorm2d(5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    model = model.double().to(DEVICE)
    faster = fuse(model, verbose=False)
    assert [type(m).__name__ for m in faster.modules() if isinstance(m, FusedModule)] == [
        "FusedSequential",
        "FusedBottleneck",
    ]
    assert isinstance(faster[3], Bottleneck)
    x = images().double()
    eager, got = train_once(model, x), train_once(faster, x)
    for key, value in eager.items():
        torch.testing.assert_close(got[key], value, rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.usefixtures("plain")
def test_conv_bn_with_a_residual():
    torch.manual_seed(0)
    pair = ConvBNModules(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16))
    for module in pair:
        module.double().to(DEVICE)
    x, residual = images().double(), torch.randn(4, 16, 4, 4).double().to(DEVICE)
    wanted = F.relu(copy.deepcopy(pair.bn)(pair.conv(x)) + residual)
    torch.testing.assert_close(conv_bn(x, pair, residual=residual), wanted, rtol=1e-9, atol=1e-9)


def odd_pairs():
    def pair(conv, bn=None):
        return nn.Sequential(conv, bn or nn.BatchNorm2d(8), nn.ReLU())

    hooked = pair(nn.Conv2d(4, 8, 3, bias=False))
    hooked[1].register_forward_hook(lambda *_: None)
    return {
        "groups": pair(nn.Conv2d(4, 8, 3, groups=2, bias=False)),
        "dilation": pair(nn.Conv2d(4, 8, 3, dilation=2, bias=False)),
        "norm": pair(nn.Conv2d(4, 8, 3, bias=False), nn.GroupNorm(2, 8)),
        "statistics": pair(
            nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8, track_running_stats=False)
        ),
        "hook": hooked,
        "padding": pair(nn.Conv2d(4, 8, 3, padding="same", bias=False)),
        "stride": pair(nn.Conv2d(4, 8, 3, stride=(1, 2), bias=False)),
    }


@pytest.mark.parametrize("name", odd_pairs())
def test_unsupported_parts_stay(name, capsys):
    model = odd_pairs()[name]
    assert type(fuse(model)) is nn.Sequential
    assert "left alone  0:" in capsys.readouterr().out


def test_a_hooked_convolution_stays():
    model = tiny()
    model.layer1[0].conv2.register_forward_hook(lambda *_: None)
    blocks = [m for m in fuse(model, verbose=False).modules() if isinstance(m, BasicBlock)]
    assert ["conv2" in block.fused_program.absorbed for block in blocks] == [False, True, True]


@pytest.mark.usefixtures("plain")
def test_torchvision_net():
    resnet = pytest.importorskip("torchvision.models.resnet")
    torch.manual_seed(0)
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=4).to(DEVICE).double()
    faster = fuse(model, verbose=False)
    assert isinstance(faster, resnet.ResNet)
    assert list(faster.state_dict()) == list(model.state_dict())
    x = images(size=32).double()
    eager, got = train_once(model, x), train_once(faster, x)
    for key, value in eager.items():
        torch.testing.assert_close(got[key], value, rtol=1e-7, atol=1e-9, msg=key)


@pytest.mark.usefixtures("plain")
def test_compiled_in_one_graph():
    """Forward and backward, traced whole: nothing in a fused net breaks the graph."""
    faster = fuse(tiny(width=0.5), verbose=False).double()
    wanted = train_once(copy.deepcopy(faster), images().double())
    compiled = torch.compile(faster, backend="aot_eager", fullgraph=True)
    logits = compiled(images().double())
    F.cross_entropy(logits, torch.arange(4, device=DEVICE)).backward()
    torch.testing.assert_close(logits, wanted["logits"], rtol=1e-9, atol=1e-9)
    for name, p in faster.named_parameters():
        torch.testing.assert_close(p.grad, wanted[f"grad {name}"], rtol=1e-9, atol=1e-9, msg=name)
    for name, buffer in faster.named_buffers():
        torch.testing.assert_close(buffer, wanted[name], rtol=1e-9, atol=1e-9, msg=name)
