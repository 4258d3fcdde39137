"""The batch-norm kernels against torch's batch norm and the fp64 reference, by code path."""

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl

from fastres.kernels.conv_types import DeferredGrad
from fastres.kernels.gpu import batchnorm_bwd, batchnorm_fwd
from fastres.kernels.gpu.batchnorm_bwd import (
    bn_backward_apply,
    bn_backward_finalize,
    bn_backward_reduce,
)
from fastres.kernels.gpu.batchnorm_fwd import bn_apply, bn_finalize, bn_stats
from fastres.kernels.gpu.checks import TileStats
from fastres.kernels.gpu.launch_config import RowConfig
from fastres.kernels.reference import block as ref
from tests.helpers.interpreter import DEVICE, strict_memory  # noqa: F401
from tests.helpers.kernel_cases import channels_last
from tests.helpers.numerics import (
    assert_like_eager,
    assert_statistics,
    away_from_ties,
    statistics_rtol,
)

pytestmark = pytest.mark.usefixtures("strict_memory")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [FP32, BF16, FP16]

# Several tiles and tails in both directions.
TILE = RowConfig(block_rows=32, block_c=32, num_warps=4)


def normal(*size, seed=0, dtype=FP32):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator)
    return channels_last(values, dtype) if len(size) == 4 else values.to(DEVICE)


def make_y(kind: str, dtype: torch.dtype) -> torch.Tensor:
    y = normal(2, 33, 7, 9, dtype=dtype)
    if kind == "offset":
        return (100 + 0.01 * y.float()).to(dtype)
    if kind == "constant":
        return torch.full_like(y, 3.0)
    if kind == "N = 1":
        return y[:1]
    if kind == "two pixels":
        return normal(1, 5, 1, 2, dtype=dtype)
    return y


KINDS = ["ordinary", "offset", "constant", "N = 1", "two pixels"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_statistics(kind, dtype):
    y = make_y(kind, dtype)
    c = y.shape[1]
    weight, bias = 1 + normal(c, seed=1), normal(c, seed=2)
    forward = bn_finalize(bn_stats(y, config=TILE), weight, bias, eps=1e-5)
    truth = ref.bn_stats_ref(y.double())
    size = y.double().abs().mean((0, 2, 3))
    assert_statistics("mean", forward.mean, truth.mean, size)
    # Distances from the mean inherit its error, and y's own rounding, once each.
    slack = truth.var + size * truth.var.sqrt() + statistics_rtol() * size.square()
    assert_statistics("var", forward.var, truth.var, slack)
    count = y.numel() // c
    unbiased = forward.var.double() * count / (count - 1)
    torch.testing.assert_close(forward.unbiased_var.double(), unbiased, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        forward.rstd, (forward.var + 1e-5).rsqrt(), rtol=statistics_rtol(), atol=0
    )
    scale_shift = ref.bn_fold_ref(forward.mean, forward.rstd, weight, bias)
    torch.testing.assert_close(
        forward.scale_shift,
        scale_shift,
        rtol=statistics_rtol(),
        atol=statistics_rtol() * scale_shift.abs().max(),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["ordinary", "offset", "N = 1"])
def test_normalised_output_is_as_good_as_torchs(kind, dtype):
    """Statistics, scale and shift, apply together: out = relu(batch_norm(y))."""
    y = make_y(kind, dtype)
    c = y.shape[1]
    weight, bias = 1 + 0.1 * normal(c, seed=1), normal(c, seed=2)
    weight[0] = 0
    forward = bn_finalize(bn_stats(y, config=TILE), weight, bias)
    out = bn_apply(y, forward.scale_shift, config=TILE)
    eager = F.batch_norm(y, None, None, weight, bias, training=True).relu()
    wide = (y.double(), None, None, weight.double(), bias.double())
    assert_like_eager("out", out, eager, F.batch_norm(*wide, training=True).relu())


def test_many_tiles_are_merged_in_several_rounds():
    """More tiles than a finalizing program reads at once, the last one short."""
    y = 100 + normal(1, 3, 1, 2500).double()
    tiles = y[0, :, 0].split(2, dim=1)
    mean = torch.stack([t.mean(1) for t in tiles], dim=1)
    m2 = torch.stack([(t - t.mean(1, keepdim=True)).square().sum(1) for t in tiles], dim=1)
    assert mean.shape[1] > batchnorm_fwd.BLOCK_TILES
    stats = TileStats(torch.stack([mean, m2]).float(), 2, 2500)
    forward = bn_finalize(stats, torch.ones(3, device=DEVICE), torch.zeros(3, device=DEVICE))
    truth = ref.bn_stats_ref(y)
    assert_statistics("mean", forward.mean, truth.mean, truth.mean.abs())
    assert_statistics("var", forward.var, truth.var, truth.var + truth.mean.abs())
    sums = mean.float()
    grads = bn_backward_finalize(
        sums, m2.float(), forward.mean, forward.rstd, torch.ones(3, device=DEVICE), 2500
    )
    total = sums.double()
    assert_statistics("dbeta", grads.dbeta, total.sum(1), total.abs().sum(1))


@pytest.mark.parametrize(
    ("shortcut", "relu", "dtype"),
    [
        ("none", True, FP32),
        ("none", False, BF16),
        ("residual", True, BF16),
        ("residual", False, FP16),
        ("projected", True, FP16),
        ("projected", True, BF16),
        ("projected", False, FP32),
    ],
)
def test_apply(shortcut, relu, dtype):
    y, residual = normal(2, 33, 7, 9, dtype=dtype), normal(2, 33, 7, 9, seed=1, dtype=dtype)
    ab, ab_s = normal(2, 33, seed=2), normal(2, 33, seed=3)
    out = bn_apply(
        y,
        ab,
        residual=None if shortcut == "none" else residual,
        residual_scale_shift=ab_s if shortcut == "projected" else None,
        relu=relu,
        config=TILE,
    )

    def eager(y, residual, ab, ab_s):
        z = ref.bn_apply_ref(y, ab, relu=False)
        if shortcut == "residual":
            z = z + residual
        if shortcut == "projected":
            z = z + ref.bn_apply_ref(residual, ab_s, relu=False)
        return z.relu() if relu else z

    truth = eager(y.double(), residual.double(), ab.double(), ab_s.double())
    assert_like_eager("out", out, eager(y, residual, ab, ab_s), truth)


@pytest.mark.parametrize(
    ("mask", "projected", "dtype"),
    [
        ("output", False, FP32),
        ("output", True, BF16),
        ("recomputed", False, BF16),
        ("recomputed", True, FP16),
        ("none", False, FP16),
        ("none", True, FP32),
    ],
)
def test_backward(mask, projected, dtype):
    """Reduce, finalize and apply against the gradient that autograd finds for batch norm."""
    y, dout = normal(2, 33, 7, 9, dtype=dtype), normal(2, 33, 7, 9, seed=1, dtype=dtype)
    y_s = normal(2, 33, 7, 9, seed=2, dtype=dtype) + 1
    weight, bias = 1 + normal(33, seed=3), normal(33, seed=4)
    weight[0] = 0

    def autograd(dtype, grad):
        leaf, gamma, beta = (t.detach().to(dtype).requires_grad_() for t in (y, weight, bias))
        if dtype != torch.float64:
            gamma, beta = (t.detach().requires_grad_() for t in (weight, bias))
        F.batch_norm(leaf, None, None, gamma, beta, training=True).backward(grad.to(dtype))
        return leaf.grad, gamma.grad, beta.grad

    forward = bn_finalize(bn_stats(y), weight, bias)
    out = bn_apply(y, forward.scale_shift, config=TILE)
    z = ref.bn_apply_ref(y.double(), forward.scale_shift.double(), relu=False)
    mean_s = y_s.double().mean((0, 2, 3))
    g, sums = bn_backward_reduce(
        dout,
        y,
        forward.mean,
        out=out if mask == "output" else None,
        scale_shift=forward.scale_shift if mask == "recomputed" else None,
        y_shortcut=y_s if projected else None,
        mean_shortcut=mean_s.float() if projected else None,
        config=TILE,
    )
    expected_g = dout if mask == "none" else torch.where(z > 0, dout, 0)
    keep = away_from_ties(z, FP32)
    torch.testing.assert_close(g[keep], expected_g[keep], rtol=0, atol=0)
    assert mask != "none" or g is dout

    grads = bn_backward_finalize(
        sums.g, sums.gy, forward.mean, forward.rstd, weight, y.numel() // 33
    )
    dy = bn_backward_apply(DeferredGrad(g, y, grads.coefficients), config=TILE)
    truth_dy, truth_dgamma, truth_dbeta = autograd(torch.float64, g)
    assert_like_eager("dy", dy, autograd(dtype, g)[0], truth_dy)
    magnitude = g.double().abs().sum((0, 2, 3))
    assert_statistics("dbeta", grads.dbeta, truth_dbeta, magnitude)
    assert_statistics("dgamma", grads.dgamma, truth_dgamma, 4 * magnitude)
    assert (sums.gy_shortcut is not None) == projected
    if sums.gy_shortcut is not None:
        _, truth = ref.bn_backward_sums_ref(g.double(), y_s.double(), mean_s)
        assert_statistics("sum g y_s", sums.gy_shortcut.sum(1), truth, 4 * magnitude)


def test_backward_keeps_digits_beside_a_large_offset():
    """At mean 100 and deviation 0.01 only the rounding of the fp32 mean itself may show."""
    y, g = make_y("offset", FP32), normal(2, 33, 7, 9, seed=1)
    weight = torch.ones(33, device=DEVICE)
    forward = bn_finalize(bn_stats(y), weight, torch.zeros(33, device=DEVICE))
    _, sums = bn_backward_reduce(g, y, forward.mean, config=TILE)
    grads = bn_backward_finalize(sums.g, sums.gy, forward.mean, forward.rstd, weight, 126)
    _, truth = ref.bn_backward_sums_ref(g.double(), y.double(), y.double().mean((0, 2, 3)))
    rstd = (y.double().var((0, 2, 3), unbiased=False) + 1e-5).rsqrt()
    error_of_mean = 2.0**-17
    dbeta = g.double().sum((0, 2, 3)).abs()
    size = g.double().abs().sum((0, 2, 3))
    allowed = error_of_mean * rstd * dbeta + 4 * statistics_rtol() * size
    assert ((grads.dgamma.double() - truth * rstd).abs() <= allowed).all()
    raw = (g * y).sum((0, 2, 3)) - forward.mean * g.sum((0, 2, 3))
    assert ((raw.double() - truth) * rstd > allowed).any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_comes_through_and_ties_do_not():
    y = normal(1, 16, 2, 2)
    y[0, 3, 1, 1], y[0, 4, 0, 0] = torch.nan, torch.inf
    ab = torch.stack([torch.ones(16), torch.zeros(16)]).to(DEVICE)
    y[0, 5, 0, 1] = 0
    out = bn_apply(y, ab)
    torch.testing.assert_close(out, y.relu(), equal_nan=True, rtol=0, atol=0)
    dout = torch.ones_like(y)
    leaf = y.clone().requires_grad_()
    leaf.relu().backward(dout)
    mean = torch.zeros(16, device=DEVICE)
    for mask in ({"out": out}, {"scale_shift": ab}):
        g, sums = bn_backward_reduce(dout, y, mean, **mask)
        torch.testing.assert_close(g, leaf.grad, rtol=0, atol=0)
        assert sums.gy.sum(1)[3].isnan()
        assert sums.gy.sum(1)[4].isinf()
    stats = bn_finalize(bn_stats(y), ab[0], ab[1])
    assert stats.mean[3].isnan()
    assert not stats.mean[4].isfinite()
    assert stats.mean[6].isfinite()


def test_inputs_with_gaps_and_64_bit_offsets(monkeypatch):
    def run(y, residual, dout):
        forward = bn_finalize(bn_stats(y, config=TILE), ab[0], ab[1])
        out = bn_apply(y, forward.scale_shift, residual=residual, config=TILE)
        g, sums = bn_backward_reduce(dout, y, forward.mean, out=out, config=TILE)
        dy = bn_backward_apply(DeferredGrad(dout, y, coefficients), config=TILE)
        return out, g, *sums[:2], dy

    def gaps(t):
        whole = channels_last(torch.full((2, 20, 8, 9), torch.nan))
        part = whole[:, 2:19, 1:]
        part.copy_(t)
        return part

    ab, coefficients = normal(2, 17), normal(3, 17, seed=1)
    tensors = [normal(2, 17, 7, 9, seed=seed) for seed in (2, 3, 4)]
    expected = run(*tensors)
    monkeypatch.setattr(batchnorm_fwd, "index_dtype", lambda *tensors: tl.int64)
    monkeypatch.setattr(batchnorm_bwd, "index_dtype", lambda *tensors: tl.int64)
    for a, b in zip(expected, run(*map(gaps, tensors)), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0)


def test_refusals():
    y, ab = normal(2, 17, 3, 3), normal(2, 17)
    with pytest.raises(ValueError, match="y must be channels_last"):
        bn_stats(y.contiguous())
    with pytest.raises(ValueError, match="more than 1 value a channel, got 1"):
        bn_finalize(bn_stats(normal(1, 17, 1, 1)), ab[0], ab[1])
    with pytest.raises(ValueError, match=r"weight must have shape \(17,\), got \(16,\)"):
        bn_finalize(bn_stats(y), ab[0, :16], ab[1])
    with pytest.raises(ValueError, match="residual_scale_shift needs a residual"):
        bn_apply(y, ab, residual_scale_shift=ab)
    with pytest.raises(ValueError, match=r"residual must have dtype torch\.float32"):
        bn_apply(y, ab, residual=y.to(BF16))
    with pytest.raises(ValueError, match="at most one of out and scale_shift"):
        bn_backward_reduce(y, y, ab[0], out=y, scale_shift=ab)
    with pytest.raises(ValueError, match="both of y_shortcut and mean_shortcut"):
        bn_backward_reduce(y, y, ab[0], y_shortcut=y)
    with pytest.raises(ValueError, match="count must be at least 1"):
        bn_backward_finalize(ab, ab, ab[0, :2], ab[0, :2], ab[0, :2], 0)
