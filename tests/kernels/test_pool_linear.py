"""The kernels of pooling and classifier against torch and the fp64 reference, by code path."""

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl

from fastres.kernels import ops_head
from fastres.kernels.gpu import pool_linear as pool_linear_kernels
from fastres.kernels.gpu.launch import recording
from fastres.kernels.gpu.pool_linear import pool_linear_bwd, pool_linear_fwd
from fastres.kernels.ops_head import pool_linear
from tests.helpers.head_cases import BF16, FP16, FP32, autocast, normal
from tests.helpers.interpreter import strict_memory  # noqa: F401
from tests.helpers.kernel_cases import channels_last
from tests.helpers.numerics import PooledErrorBound, assert_rounded_once

pytestmark = pytest.mark.usefixtures("strict_memory")

# (N, C, H, W) of x and the number of classes.
SIZES = {
    "resnet20": ((3, 64, 8, 8), 10),
    "wide": ((2, 130, 4, 4), 4),
    "hundred classes": ((2, 17, 3, 5), 100),
    "thousand classes": ((2, 5, 1, 2), 1000),
    "odd map": ((5, 7, 9, 7), 3),
    "one image": ((1, 16, 9, 9), 10),
    "one of everything": ((1, 1, 1, 1), 1),
    "several images a program": ((11, 3, 2, 1), 5),
    "images in several rounds": ((20, 2, 1, 1), 250),
}


@pytest.fixture(params=["plain", "triton"])
def backend(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(ops_head, "_find_kernels", lambda name, x: None)


def with_gaps(x):
    """The same values with NaN between the pixels, the rows and the images."""
    n, c, h, w = x.shape
    whole = channels_last(torch.full((n, c + 3, h + 1, w + 2), torch.nan), x.dtype)
    part = whole[:, 2 : c + 2, 1:, :w]
    return part.copy_(x)


class Head:
    """Inputs of one head: x and dlogits in some dtype, fp32 parameters; and the ways through it."""

    def __init__(self, size, classes, dtype, seed):
        self.x = normal(*size, seed=seed, dtype=dtype)
        self.weight = normal(classes, size[1], seed=seed + 1) / size[1] ** 0.5
        self.bias = normal(classes, seed=seed + 2)
        self.dlogits = normal(size[0], classes, seed=seed + 3, dtype=dtype)

    def step(self, way, wide=None):
        """Logits and every gradient."""
        inputs = [
            t.to(wide or t.dtype).detach().clone().requires_grad_()
            for t in (self.x, self.weight, self.bias)
        ]
        logits = way(*inputs)
        grads = torch.autograd.grad(logits, inputs, self.dlogits.to(wide or logits.dtype))
        return dict(zip(("logits", "dx", "dw", "dbias"), (logits, *grads), strict=True))


def eager_head(x, weight, bias):
    """What the reference model computes, under autocast where x is in half precision."""
    with autocast(x.dtype):
        return F.linear(x.mean(dim=(2, 3)), weight, bias)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("name", SIZES)
def test_head_and_every_gradient(name, dtype, monkeypatch):
    """On a GPU of two multiprocessors, so that a few images already share programs."""
    monkeypatch.setattr(pool_linear_kernels, "NUM_SMS", 2)
    size, classes = SIZES[name]
    bound = PooledErrorBound(dtype)
    # Small tensors hold too few errors for a norm of one draw to say much.
    for draw in range(1 if classes * size[1] > 1000 else 4):
        case = Head(size, classes, dtype, seed=10 * draw)
        got, eager = case.step(pool_linear), case.step(eager_head)
        truth = case.step(eager_head, torch.float64)
        for key, value in got.items():
            assert value.dtype == eager[key].dtype, key
            bound.add(key, value, [eager[key]], truth[key])
            if value.dtype != FP32:
                assert_rounded_once(key, value, truth[key])
    assert not bound.refused()
    assert got["dx"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_gaps_between_pixels_and_64_bit_offsets_change_nothing(dtype, monkeypatch):
    case = Head((3, 17, 4, 3), 5, dtype, seed=0)
    logits, pooled = pool_linear_fwd(case.x, case.weight, case.bias)
    grads = pool_linear_bwd(case.dlogits, pooled, case.weight, (4, 3))
    monkeypatch.setattr(pool_linear_kernels, "index_dtype", lambda *tensors: tl.int64)
    again = pool_linear_fwd(with_gaps(case.x), case.weight, case.bias)
    assert torch.equal(again[0], logits)
    assert torch.equal(again[1], pooled)
    for a, b in zip(grads, pool_linear_bwd(case.dlogits, pooled, case.weight, (4, 3)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("backend")
def test_other_layouts_no_bias_and_half_parameters():
    case = Head((2, 5, 3, 4), 7, BF16, seed=0)
    weight = case.weight.to(BF16).requires_grad_()
    x = case.x.contiguous().requires_grad_()
    logits = pool_linear(x, weight)
    dx, dw = torch.autograd.grad(logits.sum(), (x, weight))
    pooled = case.x.double().mean((2, 3))
    close = {"rtol": 2.0**-8, "atol": 2.0**-9}
    torch.testing.assert_close(logits.double(), pooled @ weight.double().T, **close)
    torch.testing.assert_close(dw.double(), pooled.sum(0).expand(7, 5), **close)
    wanted = weight.double().sum(0)[:, None, None].expand_as(x) / 12
    torch.testing.assert_close(dx.double(), wanted, **close)
    assert dw.dtype == BF16


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_stay_in_their_image(bad):
    x = normal(3, 5, 2, 2)
    x[1, 2, 0, 1] = bad
    weight = normal(4, 5, seed=1)
    logits, pooled = pool_linear_fwd(x, weight, None)
    assert not logits[1].isfinite().any()
    assert logits[[0, 2]].isfinite().all()
    dlogits = torch.ones_like(logits)
    grads = pool_linear_bwd(dlogits, pooled, weight, (2, 2))
    assert not grads.dw[:, 2].isfinite().any()
    assert grads.dw[:, [0, 1, 3, 4]].isfinite().all()
    assert grads.dx.isfinite().all()


def test_the_head_makes_two_launches_and_two_passes():
    """Forward reads x once; backward writes dx once and reads nothing of that size."""
    x = torch.empty((512, 64, 8, 8), dtype=BF16, device="meta").to(
        memory_format=torch.channels_last
    )
    weight = torch.empty((10, 64), device="meta")
    with recording() as launches:
        logits, pooled = pool_linear_fwd(x, weight, None)
        pool_linear_bwd(logits, pooled, weight, (8, 8))
    sizes = [x.numel() * 2, logits.numel() * 2, pooled.numel() * 4, weight.numel() * 4, 10 * 4]
    activation, small, means, parameters, bias = sizes
    forward, backward = (launch.traffic for launch in launches)
    assert forward.reads == activation + parameters
    assert forward.writes == means + small
    assert backward.reads == small + means + parameters
    assert backward.writes == activation + parameters + bias


def test_refusals():
    x, weight, bias = normal(2, 5, 3, 3), normal(4, 5), normal(4)
    logits, pooled = pool_linear_fwd(x, weight, bias)
    with pytest.raises(ValueError, match="x must be channels_last"):
        pool_linear_fwd(x.contiguous(), weight, bias)
    with pytest.raises(ValueError, match=r"weight must have shape \(classes, 5\), got \[5, 4\]"):
        pool_linear(x, weight.T, bias)
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\) and dtype torch.float32"):
        pool_linear(x, weight, bias[:3])
    with pytest.raises(ValueError, match="weight must be bfloat16, float16 or float32"):
        pool_linear(x, weight.double())
    with pytest.raises(ValueError, match="weight must be contiguous"):
        pool_linear_fwd(x, normal(5, 4).T, bias)
    with pytest.raises(ValueError, match=r"x must have shape \(N, C, H, W\)"):
        pool_linear(pooled, weight)
    with pytest.raises(ValueError, match="dlogits must be contiguous"):
        pool_linear_bwd(logits[:1], pooled, weight, (3, 3))
