"""Convolutions in strips: results of eager and fp64, borders, odd sizes, partial tiles, traps."""

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
from fastres.kernels.gpu.launch_rules import strip_config
from fastres.kernels.gpu.prologue import plain_arithmetic
from fastres.kernels.reference import block as ref
from fastres.kernels.tools.networks import resnet20_convs
from tests.helpers.interpreter import DEVICE, needs_gpu, strict_memory  # noqa: F401
from tests.helpers.kernel_cases import (
    channels_last,
    check_producer_grads,
    check_stats,
    dgrad,
    fprop,
    geometry,
    make_tensors,
    pre_activation,
    wgrad,
)
from tests.helpers.numerics import (
    assert_like_eager,
    assert_rounded_once,
    away_from_ties,
)

pytestmark = pytest.mark.usefixtures("strict_memory")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TALL = ConvConfig(16, 16, 16, num_warps=4, num_stages=1, form="strip", patch_h=4, ahead=6)
FLAT = replace(TALL, patch_h=2, ahead=1)
LATE = replace(TALL, ahead=0)

# Of patches of 4 x 2 and 2 x 2 pixels, 16 to a tile: whole tiles, and what hangs over each border.
SHAPES = {
    "whole": ConvShape(2, 16, 8, 16, 16),
    "tiles of two images": ConvShape(5, 8, 8, 32, 16),
    "odd height": ConvShape(2, 7, 8, 16, 32),
    "odd width": ConvShape(2, 8, 7, 16, 16),
    "odd": ConvShape(3, 5, 9, 32, 32),
    "rows of one pixel": ConvShape(2, 3, 1, 16, 16),
    "one pixel": ConvShape(3, 1, 1, 16, 16),
    "stem": ConvShape(2, 8, 16, 3, 16),
    "odd stem": ConvShape(2, 9, 7, 3, 32),
    "odd stem of 16": ConvShape(3, 9, 7, 3, 16),
    "one channel": ConvShape(1, 8, 6, 1, 16),
    "four channels": ConvShape(1, 6, 8, 4, 16),
}


@pytest.fixture
def in_strips():
    """Demand that every convolution of the test is computed in strips."""
    with recording() as launches:
        yield
    convolutions = [launch.name for launch in launches if launch.name.startswith("conv_")]
    assert convolutions
    assert all(name.startswith("conv_strip_") for name in convolutions), convolutions


# name, dtype, a prologue, a batch norm, configuration
FPROP = [
    ("whole", BF16, True, True, TALL),
    ("whole", FP16, False, False, FLAT),
    ("tiles of two images", BF16, True, True, LATE),
    ("odd height", BF16, True, True, TALL),
    ("odd width", FP16, True, True, FLAT),
    ("odd", BF16, True, True, replace(TALL, grid_size=2)),
    ("rows of one pixel", BF16, False, True, FLAT),
    ("one pixel", BF16, True, True, TALL),
    ("stem", BF16, False, True, TALL),
    ("odd stem", FP16, True, True, FLAT),
    ("one channel", BF16, True, False, TALL),
    ("four channels", BF16, False, True, FLAT),
]


@pytest.mark.parametrize(("name", "dtype", "prologue", "has_batch_norm", "config"), FPROP)
def test_fprop(name, dtype, prologue, has_batch_norm, config, in_strips):
    shape = SHAPES[name]
    t = make_tensors(shape, dtype)
    y, stats = conv_fprop(
        t.x,
        t.w,
        padding=1,
        scale_shift=t.scale_shift if prologue else None,
        batch_norm=t.batch_norm if has_batch_norm else None,
        config=config,
    )
    assert y.is_contiguous(memory_format=torch.channels_last)
    truth = fprop(t.double(), shape, prologue)
    assert_like_eager("y", y, fprop(t, shape, prologue), truth)
    assert (stats is not None) == has_batch_norm
    if stats is not None:
        check_stats(stats, y, t.batch_norm)


@pytest.mark.parametrize("config", [TALL, replace(FLAT, grid_size=2), replace(FLAT, grid_size=1)])
@pytest.mark.parametrize(("name", "dtype"), [("whole", BF16), ("whole", FP16), ("odd", BF16)])
def test_statistics_of_y_as_stored(name, dtype, config, in_strips):
    """Far from 0, where a variance made of squares would lose its digits."""
    t = make_tensors(SHAPES[name], dtype)
    t.x[:, 0] += 100
    y, stats = conv_fprop(t.x, t.w, padding=1, batch_norm=t.batch_norm, config=config)
    check_stats(stats, y, t.batch_norm)


@pytest.mark.parametrize(
    ("name", "dtype", "has_residual", "relu", "config"),
    [
        ("whole", BF16, True, True, TALL),
        ("odd", FP16, True, False, FLAT),
        ("odd stem", BF16, False, True, TALL),
    ],
)
def test_fprop_folded(name, dtype, has_residual, relu, config, in_strips):
    shape = SHAPES[name]
    t = make_tensors(shape, dtype)
    wide = t.double()
    ab = t.dy.coefficients[:2].contiguous()
    options = {"padding": 1, "relu": relu}
    residual = t.dy.g if has_residual else None
    out = conv_fprop_folded(t.x, t.w, ab, residual=residual, config=config, **options)
    eager = ref.conv_folded_ref(t.x, t.w, ab, residual=residual, **options)
    residual = wide.dy.g if has_residual else None
    truth = ref.conv_folded_ref(wide.x, wide.w, ab.double(), residual=residual, **options)
    assert_like_eager("out", out, eager, truth)
    assert_rounded_once("out", out, truth)


# name, dtype, dy is deferred, shortcut, a producer, configuration
DGRAD = [
    ("whole", BF16, True, True, True, TALL),
    ("whole", FP16, False, False, False, FLAT),
    ("whole", BF16, False, False, True, replace(FLAT, grid_size=3)),
    ("tiles of two images", BF16, True, False, True, LATE),
    ("odd height", BF16, True, True, False, FLAT),
    ("odd width", BF16, False, True, True, TALL),
    ("odd", FP16, True, True, True, replace(TALL, grid_size=2)),
    ("rows of one pixel", BF16, True, False, True, FLAT),
    ("one pixel", BF16, True, True, True, TALL),
]


@pytest.mark.parametrize(("name", "dtype", "deferred", "shortcut", "has_producer", "config"), DGRAD)
def test_dgrad(name, dtype, deferred, shortcut, has_producer, config, in_strips):
    shape = SHAPES[name]
    t = make_tensors(shape, dtype)
    wide = t.double()
    z = pre_activation(wide)
    got, grads = conv_dgrad(
        t.dy if deferred else t.dy.g,
        t.w,
        (shape.H, shape.W),
        padding=1,
        shortcut=t.shortcut if shortcut else None,
        producer=t.producer if has_producer else None,
        producer_weight=t.producer_weight if has_producer else None,
        config=config,
    )
    eager, truth = dgrad(t, shape, deferred, shortcut), dgrad(wide, shape, deferred, shortcut)
    if not has_producer:
        assert grads is None
        assert_like_eager("dx", got, eager, truth)
        return
    eager, truth = ref.relu_grad_ref(z.float(), eager), ref.relu_grad_ref(z, truth)
    assert_like_eager("g", got, eager, truth, keep=away_from_ties(z, FP32))
    check_producer_grads(grads, got, t)


# name, dtype, a prologue, dy is deferred, configuration
WGRAD = [
    ("whole", BF16, True, True, replace(TALL, split_k=2)),
    ("whole", FP16, False, False, FLAT),
    ("tiles of two images", BF16, True, True, replace(LATE, split_k=3)),
    ("odd height", BF16, True, True, replace(FLAT, split_k=2)),
    ("odd width", BF16, False, True, replace(TALL, split_k=100)),
    ("odd", FP16, True, False, replace(TALL, split_k=2)),
    ("rows of one pixel", BF16, True, True, TALL),
    ("one pixel", BF16, True, True, FLAT),
    ("stem", BF16, False, True, replace(TALL, split_k=2)),
    ("odd stem", FP16, True, True, FLAT),
    ("odd stem of 16", BF16, True, True, replace(TALL, split_k=3)),
    ("odd stem of 16", FP16, False, False, FLAT),
    ("one channel", BF16, False, False, TALL),
    ("four channels", BF16, True, True, TALL),
]


@pytest.mark.parametrize(("name", "dtype", "prologue", "deferred", "config"), WGRAD)
def test_wgrad(name, dtype, prologue, deferred, config, in_strips):
    shape = SHAPES[name]
    t = make_tensors(shape, dtype)
    dw = conv_wgrad(
        t.x,
        t.dy if deferred else t.dy.g,
        (3, 3),
        padding=1,
        scale_shift=t.scale_shift if prologue else None,
        config=config,
    )
    assert dw.is_contiguous(memory_format=torch.channels_last)
    eager = wgrad(t, shape, prologue, deferred)
    assert_like_eager("dw", dw, eager, wgrad(t.double(), shape, prologue, deferred))


@pytest.mark.parametrize("split_k", [1, 3])
def test_wgrad_in_fp32_rounds_to_the_bf16_one(split_k, in_strips):
    t = make_tensors(SHAPES["odd"], BF16)
    options = {"padding": 1, "config": replace(TALL, split_k=split_k)}
    dw = conv_wgrad(t.x, t.dy, (3, 3), dw_dtype=FP32, **options)
    assert dw.dtype == FP32
    assert not torch.equal(dw, dw.to(BF16).float())
    assert torch.equal(dw.to(BF16), conv_wgrad(t.x, t.dy, (3, 3), **options))


@pytest.mark.parametrize("config", [TALL, FLAT])
def test_padding_stays_zero_although_shifts_are_not(config, in_strips):
    """Filters, activations and gradients of ones: results count what lies inside a 5 x 4 image."""
    shape = ConvShape(1, 5, 4, 16, 16)
    zeros, w = channels_last(torch.zeros(1, 16, 5, 4), BF16), torch.ones(16, 16, 3, 3)
    w = channels_last(w, BF16)
    ab = torch.ones(2, 16, device=DEVICE)
    coefficients = torch.stack([torch.zeros(16), torch.zeros(16), torch.ones(16)]).to(DEVICE)
    dy = make_tensors(shape, BF16).dy._replace(g=zeros, y=zeros, coefficients=coefficients)
    rows = torch.tensor([2.0, 3.0, 3.0, 3.0, 2.0], device=DEVICE)
    columns = torch.tensor([2.0, 3.0, 3.0, 2.0], device=DEVICE)
    y, _ = conv_fprop(zeros, w, padding=1, scale_shift=ab, config=config)
    dx, _ = conv_dgrad(dy, w, (5, 4), padding=1, config=config)
    for pixels in (y, dx):
        expected = 16 * torch.outer(rows, columns)
        torch.testing.assert_close(pixels[0, 0].float(), expected, rtol=0, atol=0)
    dw = conv_wgrad(zeros, dy, (3, 3), padding=1, scale_shift=ab, config=config)
    taps = torch.outer(torch.tensor([4.0, 5.0, 4.0]), torch.tensor([3.0, 4.0, 3.0])).to(DEVICE)
    torch.testing.assert_close(dw[0, 0].float(), taps, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["whole", "odd", "stem", "odd stem of 16"])
def test_nan_and_inf_come_through_and_stay_in_their_image(name, poison, in_strips):
    shape = SHAPES[name]
    t = make_tensors(shape, BF16)
    t = t._replace(scale_shift=torch.ones_like(t.scale_shift))
    t.x[1, 0, 3, 2] = t.dy.g[1, 2, 3, 2] = poison
    options = {"padding": 1, "scale_shift": t.scale_shift, "config": TALL}
    y, stats = conv_fprop(t.x, t.w, batch_norm=t.batch_norm, **options)
    assert (~y.isfinite() >= ~fprop(t, shape, True).isfinite()).all()
    assert not y[1, :, 3, 2].isfinite().any()
    assert y[0].isfinite().all()
    assert not stats[:2].isfinite().any()
    dw = conv_wgrad(t.x, t.dy, (3, 3), **options)
    assert (~dw.isfinite() >= ~wgrad(t, shape, True, True).isfinite()).all()
    if shape.C < 16:
        return
    producer = {"producer": t.producer, "producer_weight": t.producer_weight}
    dx, grads = conv_dgrad(t.dy, t.w, (shape.H, shape.W), padding=1, config=TALL, **producer)
    assert (
        ~dx.isfinite()
        >= ~ref.relu_grad_ref(pre_activation(t), dgrad(t, shape, True, False)).isfinite()
    ).all()
    assert not grads.dbeta.isfinite().all()
    assert dx[0].isfinite().all()


def run_all(shape, t, config):
    options = {"padding": 1, "config": config}
    ab = t.scale_shift
    y, stats = conv_fprop(t.x, t.w, scale_shift=ab, batch_norm=t.batch_norm, **options)
    dx, grads = conv_dgrad(
        t.dy,
        t.w,
        (shape.H, shape.W),
        shortcut=t.shortcut,
        producer=t.producer,
        producer_weight=t.producer_weight,
        **options,
    )
    dw = conv_wgrad(t.x, t.dy, (3, 3), scale_shift=ab, **options)
    return y, stats, dx, grads.dy.coefficients, grads.dgamma, grads.dbeta, dw


def test_64_bit_offsets_and_the_order_of_loads_give_the_same_bits(monkeypatch, in_strips):
    shape = SHAPES["odd"]
    t = make_tensors(shape, BF16)
    config = replace(TALL, split_k=2, grid_size=2)
    expected = run_all(shape, t, config)
    others = [run_all(shape, t, replace(config, ahead=ahead)) for ahead in (0, 2)]
    for module in (fprop_module, dgrad_module, wgrad_module):
        monkeypatch.setattr(module, "index_dtype", lambda *tensors: tl.int64)
    for other in (*others, run_all(shape, t, config)):
        for a, b in zip(expected, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


REFUSED = {
    "wide": (ConvShape(1, 4, 4, 64, 16), BF16),
    "channels of no power of two": (ConvShape(1, 4, 4, 16, 24), BF16),
    "stride": (ConvShape(1, 4, 4, 16, 16, stride=2), BF16),
    "without padding": (ConvShape(1, 4, 4, 16, 16, padding=0), BF16),
    "1x1": (ConvShape(1, 4, 4, 16, 16, 1, 1, 1, 0), BF16),
    "fp32": (ConvShape(1, 4, 4, 16, 16), FP32),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_strips_cannot_take_is_computed_in_im2col_tiles(name):
    shape, dtype = REFUSED[name]
    assert all(strip_config(op, shape, dtype) is None for op in ("fprop", "dgrad", "wgrad"))
    t = make_tensors(shape, dtype)
    with recording() as launches:
        y, _ = conv_fprop(t.x, t.w, **geometry(shape), config=replace(TALL, block_k=16))
        conv_dgrad(t.dy, t.w, (shape.H, shape.W), **geometry(shape), config=TALL)
        conv_wgrad(t.x, t.dy, (shape.R, shape.S), **geometry(shape), config=TALL)
    names = [launch.name for launch in launches]
    assert names == ["conv_fprop_kernel", "conv_dgrad_kernel", "conv_wgrad_kernel"]
    assert_like_eager("y", y, fprop(t, shape, False), fprop(t.double(), shape, False))


def test_tensors_with_gaps_are_computed_in_im2col_tiles():
    shape = SHAPES["whole"]
    t = make_tensors(shape, BF16)
    wide = torch.cat([t.x, torch.full_like(t.x, torch.nan)], dim=1)
    x = wide.to(memory_format=torch.channels_last)[:, :16]
    with recording() as launches:
        y, _ = conv_fprop(x, t.w, padding=1, config=TALL)
    assert [launch.name for launch in launches] == ["conv_fprop_kernel"]
    assert_like_eager("y", y, fprop(t, shape, False), fprop(t.double(), shape, False))


def test_a_launch_in_strips_declares_what_one_in_im2col_tiles_does():
    shape = SHAPES["whole"]
    t = make_tensors(shape, BF16)
    x, w, g = (v.to("meta") for v in (t.x, t.w, t.dy.g))
    with recording() as launches:
        for config in (TALL, replace(TALL, form="im2col")):
            conv_fprop(x, w, padding=1, config=config)
            conv_dgrad(g, w, (16, 8), padding=1, config=config)
            conv_wgrad(x, g, (3, 3), padding=1, config=config)
    for one, other in zip(launches[:3], launches[3:], strict=True):
        assert one.traffic == other.traffic
        assert one.tensors.keys() == other.tensors.keys()


REAL = {
    conv.name: conv.shape
    for conv in resnet20_convs(16)
    if strip_config("fprop", conv.shape, BF16) is not None
}


@needs_gpu
@pytest.mark.parametrize("name", REAL)
def test_packed_and_plain_arithmetic_agree_bit_for_bit(name):
    """On a GPU; and both are right."""
    shape = REAL[name]
    t = make_tensors(shape, BF16)

    def run():
        options = {"padding": 1, "scale_shift": t.scale_shift}
        config = strip_config("fprop", shape, BF16)
        y, stats = conv_fprop(t.x, t.w, batch_norm=t.batch_norm, config=config, **options)
        dw = conv_wgrad(t.x, t.dy, (3, 3), config=strip_config("wgrad", shape, BF16), **options)
        if shape.C < 16:
            return y, dw, stats
        producer = {"producer": t.producer, "producer_weight": t.producer_weight}
        config, size = strip_config("dgrad", shape, BF16), (shape.H, shape.W)
        dx, grads = conv_dgrad(t.dy, t.w, size, padding=1, config=config, **producer)
        return y, dw, stats, dx, grads.dy.coefficients, grads.dgamma, grads.dbeta

    packed = run()
    with plain_arithmetic():
        plain = run()
    for a, b in zip(packed, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    wide = t.double()
    assert_like_eager("y", packed[0], fprop(t, shape, True), fprop(wide, shape, True))
    dw, truth = wgrad(t, shape, True, True), wgrad(wide, shape, True, True)
    assert_like_eager("dw", packed[1], dw, truth)
