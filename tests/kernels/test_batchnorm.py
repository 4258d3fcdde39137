"""The batch-norm kernels against torch's batch norm and the fp64 reference, by code path."""

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl

from fastres.kernels.conv_types import BatchNorm, DeferredGrad, LayerState
from fastres.kernels.gpu import batchnorm_bwd, batchnorm_fwd
from fastres.kernels.gpu.batchnorm_bwd import bn_backward_apply, bn_backward_reduce
from fastres.kernels.gpu.batchnorm_fwd import bn_apply, bn_stats
from fastres.kernels.gpu.launch import recording
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


def measure(y, weight=None, bias=None, eps=1e-5, config=TILE) -> LayerState:
    """The layer whose convolution left y, as `bn_stats` finds it."""
    c = y.shape[1]
    weight = torch.ones(c, device=DEVICE) if weight is None else weight
    bias = torch.zeros(c, device=DEVICE) if bias is None else bias
    return LayerState(y, bn_stats(y, BatchNorm(weight, bias, eps), config=config))


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
    forward = measure(y, weight, bias)
    truth = ref.bn_stats_ref(y.double())
    size = y.double().abs().mean((0, 2, 3))
    assert_statistics("mean", forward.mean, truth.mean, size)
    # Distances from the mean inherit its error, and y's own rounding, once each.
    slack = truth.var + size * truth.var.sqrt() + statistics_rtol() * size.square()
    count = y.numel() // c
    unbiased = count / (count - 1)
    assert_statistics("var", forward.unbiased_var, truth.var * unbiased, slack * unbiased)
    var = forward.unbiased_var.double() / unbiased
    rstd = (var + 1e-5).rsqrt()
    torch.testing.assert_close(forward.rstd.double(), rstd, rtol=statistics_rtol(), atol=0)
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
    forward = measure(y, weight, bias)
    out = bn_apply(y, forward.scale_shift, config=TILE)
    eager = F.batch_norm(y, None, None, weight, bias, training=True).relu()
    wide = (y.double(), None, None, weight.double(), bias.double())
    assert_like_eager("out", out, eager, F.batch_norm(*wide, training=True).relu())


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

    def autograd(dtype, grad, y, weight):
        leaf, gamma, beta = (t.detach().to(dtype).requires_grad_() for t in (y, weight, bias))
        if dtype != torch.float64:
            gamma, beta = (t.detach().requires_grad_() for t in (weight, bias))
        F.batch_norm(leaf, None, None, gamma, beta, training=True).backward(grad.to(dtype))
        return leaf.grad, gamma.grad, beta.grad

    forward = measure(y, weight, bias)
    out = bn_apply(y, forward.scale_shift, config=TILE)
    z = ref.bn_apply_ref(y.double(), forward.scale_shift.double(), relu=False)
    projection, weight_s = measure(y_s), 1 + normal(33, seed=5)
    grads, projected_grads = bn_backward_reduce(
        dout,
        forward,
        weight,
        out=out if mask == "output" else None,
        scale_shift=forward.scale_shift if mask == "recomputed" else None,
        projected=projection if projected else None,
        projected_weight=weight_s if projected else None,
        config=TILE,
    )
    g = grads.dy.g
    expected_g = dout if mask == "none" else torch.where(z > 0, dout, 0)
    keep = away_from_ties(z, FP32)
    torch.testing.assert_close(g[keep], expected_g[keep], rtol=0, atol=0)
    assert mask != "none" or g is dout

    dy = bn_backward_apply(grads.dy, config=TILE)
    truth_dy, truth_dgamma, truth_dbeta = autograd(torch.float64, g, y, weight)
    assert_like_eager("dy", dy, autograd(dtype, g, y, weight)[0], truth_dy)
    magnitude = g.double().abs().sum((0, 2, 3))
    assert_statistics("dbeta", grads.dbeta, truth_dbeta, magnitude)
    assert_statistics("dgamma", grads.dgamma, truth_dgamma, 4 * magnitude)
    assert (projected_grads is not None) == projected
    if projected_grads is not None:
        assert projected_grads.dy[:2] == (g, y_s)
        dy_s = bn_backward_apply(projected_grads.dy, config=TILE)
        truth_dy, truth_dgamma, _ = autograd(torch.float64, g, y_s, weight_s)
        assert_like_eager("dy_s", dy_s, autograd(dtype, g, y_s, weight_s)[0], truth_dy)
        assert_statistics("dgamma_s", projected_grads.dgamma, truth_dgamma, 4 * magnitude)
        assert projected_grads.dbeta.equal(grads.dbeta)


def test_programs_that_take_several_tiles(monkeypatch):
    """With more tiles than programs a program adds those of its own first."""
    y, dout = normal(2, 33, 7, 9), normal(2, 33, 7, 9, seed=1)
    state, weight = measure(y), 1 + normal(33, seed=3)
    expected, _ = bn_backward_reduce(dout, state, weight, out=y, config=TILE)
    monkeypatch.setattr(batchnorm_bwd, "MOST_PROGRAMS", 3)
    with recording() as launches:
        grads, _ = bn_backward_reduce(dout, state, weight, out=y, config=TILE)
    assert launches[0].grid == (3, 2)
    assert grads.dy.g.equal(expected.dy.g)
    size = grads.dy.g.double().abs().sum((0, 2, 3))
    assert_statistics("dbeta", grads.dbeta, expected.dbeta.double(), size)
    assert_statistics("dgamma", grads.dgamma, expected.dgamma.double(), 4 * size)


def test_backward_keeps_digits_beside_a_large_offset():
    """At mean 100 and deviation 0.01 only the rounding of the fp32 mean itself may show."""
    y, g = make_y("offset", FP32), normal(2, 33, 7, 9, seed=1)
    weight = torch.ones(33, device=DEVICE)
    forward = measure(y, weight)
    grads, _ = bn_backward_reduce(g, forward, weight, config=TILE)
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
    ones = torch.ones(16, device=DEVICE)
    zeros = torch.zeros(16, device=DEVICE)
    state = LayerState(y, torch.stack([zeros, ones, ones, *ab]))
    for mask in ({"out": out}, {"scale_shift": ab}):
        grads, _ = bn_backward_reduce(dout, state, ones, **mask)
        torch.testing.assert_close(grads.dy.g, leaf.grad, rtol=0, atol=0)
        assert grads.dgamma[3].isnan()
        assert grads.dgamma[4].isinf()
    stats = measure(y)
    assert stats.mean[3].isnan()
    assert not stats.mean[4].isfinite()
    assert stats.mean[6].isfinite()


def test_inputs_with_gaps_and_64_bit_offsets(monkeypatch):
    def run(y, residual, dout):
        forward = measure(y, ab[0], ab[1])
        out = bn_apply(y, forward.scale_shift, residual=residual, config=TILE)
        grads, _ = bn_backward_reduce(dout, forward, ab[0], out=out, config=TILE)
        dy = bn_backward_apply(DeferredGrad(dout, y, coefficients), config=TILE)
        return out, grads.dy.g, *grads[1:], dy

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
    y, ab, stats = normal(2, 17, 3, 3), normal(2, 17), normal(5, 17)
    norm, state = BatchNorm(ab[0], ab[1]), LayerState(y, stats)
    with pytest.raises(ValueError, match="y must be channels_last"):
        bn_stats(y.contiguous(), norm)
    with pytest.raises(ValueError, match="more than 1 value a channel, got 1"):
        bn_stats(normal(1, 17, 1, 1), norm)
    with pytest.raises(ValueError, match=r"weight must have shape \(17,\), got \(16,\)"):
        bn_stats(y, BatchNorm(ab[0, :16], ab[1]))
    with pytest.raises(ValueError, match="residual_scale_shift needs a residual"):
        bn_apply(y, ab, residual_scale_shift=ab)
    with pytest.raises(ValueError, match=r"residual must have dtype torch\.float32"):
        bn_apply(y, ab, residual=y.to(BF16))
    with pytest.raises(ValueError, match="at most one of out and scale_shift"):
        bn_backward_reduce(y, state, ab[0], out=y, scale_shift=ab)
    with pytest.raises(ValueError, match="both of projected and projected_weight"):
        bn_backward_reduce(y, state, ab[0], projected=state)
    with pytest.raises(ValueError, match=r"state\.stats must have shape \(5, 17\)"):
        bn_backward_reduce(y, LayerState(y, ab), ab[0])
