"""Convolutions in pixels of patches against eager torch and the fp64 reference, by code path."""

from dataclasses import replace

import pytest
import torch
import triton.language as tl

from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.gpu import conv_dgrad as dgrad_module
from fastres.kernels.gpu import conv_fprop as fprop_module
from fastres.kernels.gpu import conv_wgrad as wgrad_module
from fastres.kernels.gpu.conv_dgrad import conv_dgrad
from fastres.kernels.gpu.conv_fprop import conv_fprop, conv_fprop_folded
from fastres.kernels.gpu.conv_wgrad import conv_wgrad
from fastres.kernels.gpu.launch import recording
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.prologue import plain_arithmetic
from fastres.kernels.reference import block as ref
from tests.helpers.interpreter import DEVICE, needs_gpu, strict_memory  # noqa: F401
from tests.helpers.kernel_cases import (
    check_producer_grads,
    check_stats,
    dgrad,
    fprop,
    geometry,
    make_tensors,
    pre_activation,
    wgrad,
)
from tests.helpers.numerics import assert_like_eager, assert_rounded_once, away_from_ties

pytestmark = pytest.mark.usefixtures("strict_memory")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

CL = {"memory_format": torch.channels_last}

PATCHES = ConvConfig(16, 16, 16, 4, 1, form="pixel", ahead=2)

SHAPES = {
    "whole": ConvShape(4, 4, 8, 16, 16),
    "images divide tiles": ConvShape(8, 4, 4, 16, 32),
    "partial tile": ConvShape(3, 4, 6, 32, 16),
    "odd": ConvShape(3, 5, 7, 16, 16),
    "odd height": ConvShape(3, 3, 4, 32, 16),
    "one pixel": ConvShape(2, 1, 1, 16, 16),
    "wide": ConvShape(1, 4, 4, 64, 64),
    "many filters": ConvShape(2, 5, 4, 16, 64),
    "more filters": ConvShape(2, 4, 7, 32, 64),
    "strided": ConvShape(4, 8, 8, 16, 32, stride=2),
    "strided, odd": ConvShape(3, 5, 7, 16, 32, stride=2),
    "strided, one pixel": ConvShape(2, 1, 1, 16, 16, stride=2),
    "projection": ConvShape(4, 8, 8, 16, 32, 1, 1, 2, 0),
    "projection, odd": ConvShape(3, 7, 5, 32, 16, 1, 1, 2, 0),
}


def assert_pixel(launches):
    """The form was not given up for another."""
    assert "pixel" in launches[0].name


# shape, dtype, a prologue, a batch norm, window pixels loaded ahead
FPROP = [
    ("whole", BF16, True, True, 0),
    ("images divide tiles", FP16, True, True, 4),
    ("partial tile", BF16, True, True, 1),
    ("partial tile", FP16, False, False, 16),
    ("odd", BF16, True, True, 2),
    ("odd height", FP16, False, True, 2),
    ("one pixel", BF16, True, True, 2),
    ("wide", BF16, False, True, 2),
]


@pytest.mark.parametrize(("name", "dtype", "prologue", "has_batch_norm", "ahead"), FPROP)
def test_fprop(name, dtype, prologue, has_batch_norm, ahead):
    shape = SHAPES[name]
    t = make_tensors(shape, dtype)
    config = ConvConfig(16, 16, 16, 4, 1, form="pixel", ahead=ahead)
    with recording() as launches:
        y, stats = conv_fprop(
            t.x,
            t.w,
            padding=1,
            scale_shift=t.scale_shift if prologue else None,
            batch_norm=t.batch_norm if has_batch_norm else None,
            config=config,
        )
    assert_pixel(launches)
    assert_like_eager("y", y, fprop(t, shape, prologue), fprop(t.double(), shape, prologue))
    assert (stats is not None) == has_batch_norm
    if stats is not None:
        check_stats(stats, y, t.batch_norm)


# shape, dtype, dy is deferred, shortcut, a producer
DGRAD = [
    ("whole", BF16, True, False, True),
    ("images divide tiles", FP16, True, True, False),
    ("partial tile", BF16, True, True, True),
    ("odd", BF16, False, False, True),
    ("odd height", FP16, True, True, True),
    ("one pixel", BF16, True, False, True),
    ("wide", BF16, False, False, False),
    ("strided", BF16, True, True, False),
    ("strided, odd", FP16, True, True, True),
    ("strided, one pixel", BF16, False, False, True),
    ("projection", BF16, True, False, False),
    ("projection", BF16, True, True, True),
    ("projection, odd", FP16, False, True, True),
]


@pytest.mark.parametrize(("name", "dtype", "deferred", "shortcut", "has_producer"), DGRAD)
def test_dgrad(name, dtype, deferred, shortcut, has_producer):
    shape = SHAPES[name]
    t = make_tensors(shape, dtype)
    wide = t.double()
    z = pre_activation(wide)
    with recording() as launches:
        got, grads = conv_dgrad(
            t.dy if deferred else t.dy.g,
            t.w,
            (shape.H, shape.W),
            **geometry(shape),
            shortcut=t.shortcut if shortcut else None,
            producer=t.producer if has_producer else None,
            producer_weight=t.producer_weight if has_producer else None,
            config=PATCHES,
        )
    assert_pixel(launches)
    eager = dgrad(t, shape, deferred, shortcut)
    truth = dgrad(wide, shape, deferred, shortcut)
    if not has_producer:
        assert grads is None
        assert_like_eager("dx", got, eager, truth)
        return
    truth = ref.relu_grad_ref(z, truth)
    eager = ref.relu_grad_ref(z.float(), eager)
    assert_like_eager("g", got, eager, truth, keep=away_from_ties(z, FP32))
    check_producer_grads(grads, got, t)


# shape, dtype, a prologue, dy is deferred, rows and columns of a patch, splits
WGRAD = [
    ("whole", BF16, True, True, 2, 2, 2),
    ("whole", FP16, True, True, 1, 8, 1),
    ("images divide tiles", BF16, False, True, 2, 4, 3),
    ("images divide tiles", FP16, True, False, 1, 2, 3),
    ("partial tile", BF16, True, False, 1, 2, 100),
    ("odd", FP16, True, True, 2, 4, 2),
    ("odd", BF16, True, True, 1, 8, 2),
    ("odd height", BF16, True, True, 4, 2, 1),
    ("one pixel", BF16, True, True, 2, 2, 1),
    ("wide", FP16, False, False, 1, 4, 1),
    ("many filters", BF16, True, True, 2, 2, 2),
    ("many filters", FP16, False, False, 1, 8, 1),
    ("more filters", BF16, True, True, 1, 4, 2),
]


@pytest.mark.parametrize(
    ("name", "dtype", "prologue", "deferred", "patch_h", "patch_w", "split_k"), WGRAD
)
def test_wgrad(name, dtype, prologue, deferred, patch_h, patch_w, split_k):
    shape = SHAPES[name]
    t = make_tensors(shape, dtype)
    # All 64 filters are rows of a product that has fewer channels.
    block_n = 64 if shape.C < shape.K == 64 else 16
    config = replace(PATCHES, block_n=block_n, patch_h=patch_h, patch_w=patch_w, split_k=split_k)
    with recording() as launches:
        dw = conv_wgrad(
            t.x,
            t.dy if deferred else t.dy.g,
            (3, 3),
            padding=1,
            scale_shift=t.scale_shift if prologue else None,
            config=config,
        )
    assert_pixel(launches)
    eager = wgrad(t, shape, prologue, deferred)
    assert_like_eager("dw", dw, eager, wgrad(t.double(), shape, prologue, deferred))


@pytest.mark.parametrize(("has_residual", "relu"), [(True, True), (False, False)])
def test_fprop_folded(has_residual, relu):
    shape = SHAPES["odd"]
    t = make_tensors(shape, BF16)
    scale_shift = t.dy.coefficients[:2].contiguous()
    options = {"padding": 1, "relu": relu}
    residual = t.dy.g if has_residual else None
    with recording() as launches:
        out = conv_fprop_folded(t.x, t.w, scale_shift, residual=residual, config=PATCHES, **options)
    assert_pixel(launches)
    eager = ref.conv_folded_ref(t.x, t.w, scale_shift, residual=residual, **options)
    wide = t.double()
    residual = wide.dy.g if has_residual else None
    truth = ref.conv_folded_ref(wide.x, wide.w, scale_shift.double(), residual=residual, **options)
    assert_like_eager("out", out, eager, truth)
    assert_rounded_once("out", out, truth)


@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_padding_stays_zero_although_b_and_c2_are_not(size):
    """With x = g = y = 0, b = c2 = 1 and filters of ones, all results count taps inside."""
    t = make_tensors(ConvShape(1, *size, 16, 16), BF16)
    zeros = torch.zeros_like(t.x)
    ones = torch.ones(16)
    ab = torch.stack([ones, ones]).to(DEVICE)
    coefficients = torch.stack([0 * ones, 0 * ones, ones]).to(DEVICE)
    dy = t.dy._replace(g=zeros, y=zeros, coefficients=coefficients)
    w = torch.ones_like(t.w)
    inside = [torch.tensor([2.0] + [3.0] * (n - 2) + [2.0], device=DEVICE) for n in size]
    expected = 16 * torch.outer(*inside)
    y, _ = conv_fprop(zeros, w, padding=1, scale_shift=ab, config=PATCHES)
    torch.testing.assert_close(y[0, 3].float(), expected, rtol=0, atol=0)
    dx, _ = conv_dgrad(dy, w, size, padding=1, config=PATCHES)
    torch.testing.assert_close(dx[0, 3].float(), expected, rtol=0, atol=0)
    half = [(n + 1) // 2 for n in size]
    dy_of_stride = dy._replace(g=zeros[..., : half[0], : half[1]].contiguous(**CL))
    dy_of_stride = dy_of_stride._replace(y=dy_of_stride.g)
    dx, _ = conv_dgrad(dy_of_stride, w, size, stride=2, padding=1, config=PATCHES)
    # An even pixel meets one row of dy, an odd one the rows around it.
    met = [torch.tensor([1.0 + (i % 2 == 1 and i + 1 < n) for i in range(n)]) for n in size]
    expected = 16 * torch.outer(*met).to(DEVICE)
    torch.testing.assert_close(dx[0, 3].float(), expected, rtol=0, atol=0)
    taps = torch.outer(*(torch.tensor([n - 1.0, n, n - 1.0], device=DEVICE) for n in size))
    for patch_h, patch_w in ((2, 2), (1, 8)):
        config = replace(PATCHES, patch_h=patch_h, patch_w=patch_w)
        dw = conv_wgrad(zeros, dy, (3, 3), padding=1, scale_shift=ab, config=config)
        torch.testing.assert_close(dw[3, 5].float(), taps, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nan_and_inf_come_through(poison):
    """Wherever eager's result is not finite, the fused one is not; other images stay finite."""
    shape = ConvShape(2, 4, 6, 16, 16)
    t = make_tensors(shape, BF16)
    ab = torch.ones_like(t.scale_shift)
    t.x[1, 4, 3, 2] = poison
    t.dy.g[1, 2, 3, 2] = poison
    t = t._replace(scale_shift=ab)
    y, stats = conv_fprop(
        t.x, t.w, padding=1, scale_shift=ab, batch_norm=t.batch_norm, config=PATCHES
    )
    assert (~y.isfinite() >= ~fprop(t, shape, True).isfinite()).all()
    assert y[0].isfinite().all()
    assert not stats[:2].isfinite().any()
    dx, _ = conv_dgrad(t.dy, t.w, (4, 6), padding=1, config=PATCHES)
    assert (~dx.isfinite() >= ~dgrad(t, shape, True, False).isfinite()).all()
    assert dx[0].isfinite().all()
    dw = conv_wgrad(t.x, t.dy, (3, 3), padding=1, scale_shift=ab, config=PATCHES)
    assert (~dw.isfinite() >= ~wgrad(t, shape, True, True).isfinite()).all()


def run_all(t, shape):
    options = {"padding": 1, "config": PATCHES}
    y, stats = conv_fprop(t.x, t.w, scale_shift=t.scale_shift, batch_norm=t.batch_norm, **options)
    producer = {"producer": t.producer, "producer_weight": t.producer_weight}
    dx, grads = conv_dgrad(t.dy, t.w, (shape.H, shape.W), **producer, **options)
    dw = conv_wgrad(t.x, t.dy, (3, 3), scale_shift=t.scale_shift, **options)
    return y, stats, dx, grads.dy.coefficients, *grads[1:], dw


def test_64_bit_offsets_give_the_same_bits(monkeypatch):
    shape = SHAPES["partial tile"]
    t = make_tensors(shape, BF16)
    narrow = run_all(t, shape)
    for module in (fprop_module, dgrad_module, wgrad_module):
        monkeypatch.setattr(module, "index_dtype", lambda *tensors: tl.int64)
    for a, b in zip(narrow, run_all(t, shape), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@needs_gpu
def test_packed_and_plain_arithmetic_give_the_same_bits():
    shape = ConvShape(8, 8, 8, 64, 64)
    t = make_tensors(shape, BF16)
    packed = run_all(t, shape)
    with plain_arithmetic():
        plain = run_all(t, shape)
    for a, b in zip(packed, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (ConvShape(1, 4, 4, 16, 16), FP32),
        (ConvShape(1, 4, 4, 48, 16), BF16),
        (ConvShape(1, 4, 4, 16, 16, stride=3), BF16),
        (ConvShape(1, 4, 4, 16, 16, padding=2), BF16),
        (ConvShape(1, 4, 4, 16, 16, 1, 1, 1, 0), BF16),
    ],
)
def test_what_the_form_cannot_take_is_computed_by_another(shape, dtype):
    t = make_tensors(shape, dtype)
    options = {**geometry(shape), "config": PATCHES}
    with recording() as launches:
        y, _ = conv_fprop(t.x, t.w, **options)
        conv_dgrad(t.dy, t.w, (shape.H, shape.W), **options)
        conv_wgrad(t.x, t.dy, (shape.R, shape.S), **options)
    assert not any("pixel" in launch.name for launch in launches)
    assert_like_eager("y", y, fprop(t, shape, False), fprop(t.double(), shape, False))


def test_tensors_with_gaps_are_computed_by_another():
    shape = SHAPES["whole"]
    t = make_tensors(shape, BF16)
    wide = torch.zeros(4, 20, 4, 8, dtype=BF16, device=DEVICE)
    gaps = wide.to(memory_format=torch.channels_last)[:, 2:18]
    gaps.copy_(t.x)
    with recording() as launches:
        y, _ = conv_fprop(gaps, t.w, padding=1, config=PATCHES)
    assert "pixel" not in launches[0].name
    torch.testing.assert_close(y, conv_fprop(t.x, t.w, padding=1, config=PATCHES)[0])
