"""A fused net where users stumble: frozen parts, pickles, slices, autocast, odd batches."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastres.fusion.fuse import fuse
from fastres.kernels import block as block_ops
from fastres.kernels.conv_types import ConvBN
from fastres.kernels.gpu import backend as gpu_backend
from fastres.kernels.reference import backend as reference_backend
from fastres.model import conv_bn, residual_block
from fastres.model.conv_bn import ConvBNModules, constant_parameters
from fastres.model.resnet import create_model
from tests.helpers.interpreter import DEVICE


def tiny(**options) -> nn.Module:
    return create_model("resnet8", width=0.25, seed=0, **options).to(DEVICE)


def images(n=2, size=8, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((n, 3, size, size), generator=generator, **options).to(DEVICE)


def layer(k=8, c=4, dtype=torch.float32) -> ConvBN:
    w = torch.randn(k, c, 3, 3, generator=torch.Generator().manual_seed(0))
    w = w.contiguous(memory_format=torch.channels_last)
    vectors = (torch.ones(k), torch.zeros(k))
    return ConvBN(*(t.to(DEVICE, dtype) for t in (w, *vectors)), 1, 1)


def test_a_frozen_layer_in_evaluation_passes_the_residuals_gradient_on():
    pair = ConvBNModules(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
    for module in pair:
        module.to(DEVICE).eval().requires_grad_(False)
    x = torch.randn(2, 4, 5, 5, device=DEVICE)
    residual = torch.randn(2, 8, 5, 5, device=DEVICE, requires_grad=True)
    out = residual_block.conv_bn(x, pair, residual=residual)
    (grad,) = torch.autograd.grad(out.sum(), residual)
    assert torch.equal(grad, (out > 0).float())


def test_a_learning_shortcut_around_a_frozen_block_gets_its_gradient():
    block = create_model("resnet8", width=0.25).layer2[0].to(DEVICE)
    block.downsample = nn.Sequential(nn.Conv2d(4, 8, 1, 2), nn.BatchNorm2d(8)).to(DEVICE)
    block.eval().requires_grad_(False).downsample.requires_grad_(True)
    x = torch.randn(2, 4, 6, 6, device=DEVICE)
    grads = {}
    for name, module in {"eager": block, "fused": fuse(block, verbose=False)}.items():
        module(x).square().sum().backward()
        grads[name] = module.downsample[0].weight.grad
    torch.testing.assert_close(grads["fused"], grads["eager"], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("frozen", ["conv", "bn", "stem"])
def test_frozen_parameters_get_no_gradient_and_others_theirs(frozen):
    model = tiny()
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        is_stem = parts[0] in ("conv1", "bn1")
        hit = is_stem if frozen == "stem" else any(part.startswith(frozen) for part in parts)
        parameter.requires_grad_(not hit)
    grads = []
    for net in (model.train(), fuse(model, verbose=False)):
        F.cross_entropy(net(images()), torch.arange(2, device=DEVICE)).backward()
        grads.append({name: p.grad for name, p in net.named_parameters()})
    eager, got = grads
    for name, grad in eager.items():
        assert (grad is None) == (got[name] is None), name
        if grad is not None:
            scale = grad.abs().max().item()
            torch.testing.assert_close(got[name], grad, rtol=0, atol=1e-3 * scale, msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_no_images_are_no_error(training):
    model = tiny().train(training)
    faster = fuse(model, verbose=False)
    with torch.set_grad_enabled(training):
        assert faster(images(0)).shape == model(images(0)).shape == (0, 10)


def test_one_value_a_channel_is_refused_as_in_torch():
    for net in (tiny().train(), fuse(tiny(), verbose=False).train()):
        with pytest.raises(ValueError, match="more than 1 value"):
            net(images(1, 1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts_and_modes_agree(layout):
    """NCHW images, inference mode and no_grad with parameters that learn."""
    model = tiny().eval()
    faster = fuse(model, verbose=False)
    x = images().contiguous(memory_format=layout)
    with torch.no_grad():
        wanted = model(x)
        torch.testing.assert_close(faster(x), wanted, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(faster(x), wanted, rtol=1e-4, atol=1e-5)


def torchvision_net() -> nn.Module:
    resnet = pytest.importorskip("torchvision.models.resnet")
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=4, width_per_group=64)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("make", [tiny, torchvision_net], ids=["fastres", "torchvision"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_stay_fused(make, duplicate):
    faster = fuse(make().to(DEVICE), verbose=False).eval()
    other = duplicate(faster)
    assert [type(m) for m in other.modules()] == [type(m) for m in faster.modules()]
    with torch.no_grad():
        assert torch.equal(other(images(size=32)), faster(images(size=32)))


def test_a_slice_of_a_fused_sequential_runs():
    torch.manual_seed(0)
    pair = (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    model = nn.Sequential(*pair, nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)).to(DEVICE)
    faster = fuse(model.eval(), verbose=False)
    with torch.no_grad():
        torch.testing.assert_close(faster[3:](faster[:3](images())), model(images()))


@pytest.mark.usefixtures("plain")
def test_a_block_used_twice_moves_its_statistics_twice():
    block = tiny().layer1[0]
    twice = nn.Sequential(block, block).train()
    faster = fuse(twice, verbose=False)
    x = torch.randn(2, 4, 6, 6, device=DEVICE)
    torch.testing.assert_close(faster(x), twice(x), rtol=1e-4, atol=1e-5)
    assert faster[0] is faster[1]
    assert faster[0].bn1.num_batches_tracked == twice[0].bn1.num_batches_tracked == 2
    torch.testing.assert_close(faster[0].bn2.running_var, twice[0].bn2.running_var)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_computes_a_whole_net_in_its_dtype(dtype):
    faster = fuse(tiny(), verbose=False).train()
    seen = []
    faster.layer3.register_forward_hook(lambda _module, _args, out: seen.append(out.dtype))
    with torch.autocast(DEVICE.type, dtype):
        loss = F.cross_entropy(faster(images()), torch.arange(2, device=DEVICE))
    loss.backward()
    assert seen == [dtype]
    grads = [p.grad for p in faster.parameters()]
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("steps", [reference_backend, gpu_backend], ids=["plain", "triton"])
def test_a_shortcut_of_another_shape_or_dtype_is_refused(steps):
    """Plain torch would broadcast it and promote, and its gradient would have the wrong shape."""
    x = torch.randn(2, 4, 5, 5, device=DEVICE).contiguous(memory_format=torch.channels_last)
    given = block_ops.Block([layer()], shortcut="given")
    for residual in (torch.randn(2, 8, 1, 1), torch.randn(2, 8, 5, 5).half()):
        with pytest.raises(ValueError, match=r"shortcut|residual"):
            block_ops.forward(given, x, residual.to(DEVICE), steps)
    narrow = x[:, :1].contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"shortcut|residual"):
        block_ops.forward(block_ops.Block([layer(c=1)], shortcut="input"), narrow, None, steps)


@pytest.mark.usefixtures("plain")
def test_an_op_keeps_its_dtype_under_autocast():
    """Torch's convolution inside the op must not be cast: the fake promises the dtype of x."""
    x = torch.randn(2, 4, 5, 5, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = torch.ops.fastres.conv_bn_relu_fwd(
            x, None, list(layer()[:3]), [1, 1], [1e-5], "none", True
        )
        assert out[0].dtype == out[1][0].dtype == torch.float32
        folded = torch.ops.fastres.conv_bn_folded(
            x, layer().w, torch.ones(2, 8, device=DEVICE), None, 1, 1, True
        )
    assert folded.dtype == torch.float32


@torch.no_grad()
def test_parameters_are_folded_once_where_they_are_constant_and_anew_elsewhere(plain, monkeypatch):
    net, x = fuse(tiny(), verbose=False).eval(), images()
    folds = []
    fold = conv_bn.bn_fold_ref
    monkeypatch.setattr(conv_bn, "bn_fold_ref", lambda *args: folds.append(args) or fold(*args))
    before = net(x)
    each = len(folds)
    assert each == sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    with constant_parameters():
        assert torch.equal(net(x), before)
        assert torch.equal(net(x), before)
        # Another dtype is another filter.
        with torch.autocast(DEVICE.type, torch.bfloat16):
            assert not torch.equal(net(x).float(), before)
        assert torch.equal(net(x), before)
    assert len(folds) == 3 * each
    net.bn1.running_mean += 1
    assert not torch.equal(net(x), before)
    with constant_parameters():
        assert not torch.equal(net(x), before)
