"""Convolutions that load pixels by TMA: the pointer variant's results, its traps, where tiles fit.

The interpreter runs them on a CPU. A GPU without TMA loads by pointers, by the launchers' rule; the
same results are asked of it.
"""

from dataclasses import replace

import pytest
import torch
import triton.language as tl

from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.conv_types import BatchNorm
from fastres.kernels.gpu import conv_dgrad as dgrad_module
from fastres.kernels.gpu import conv_fprop as fprop_module
from fastres.kernels.gpu.conv_dgrad import conv_dgrad
from fastres.kernels.gpu.conv_fprop import conv_fprop, conv_fprop_folded
from fastres.kernels.gpu.launch import recording
from fastres.kernels.gpu.launch_config import ConvConfig, TmaTile
from fastres.kernels.gpu.launch_rules import tma_config
from fastres.kernels.reference import block as ref
from fastres.kernels.tools.networks import resnet18_convs, resnet20_convs
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
)
from tests.helpers.numerics import assert_like_eager, away_from_ties

pytestmark = pytest.mark.usefixtures("strict_memory")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HAS_TMA = DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
TILES = ConvConfig(32, 32, 32, num_warps=4, num_stages=2)
TMA = replace(TILES, form="tma")
PERSISTENT = replace(TMA, grid_size=2)

# Channels that are no multiples of a tile, and images that do not fill the last TMA tile.
SHAPES = {
    "whole rows": ConvShape(2, 8, 8, 24, 40),
    "part of a row": ConvShape(1, 3, 64, 8, 16),
    "whole images": ConvShape(3, 4, 4, 40, 24),
    "one image where a tile holds two": ConvShape(1, 4, 4, 16, 8),
    "1x1": ConvShape(2, 4, 8, 72, 24, 1, 1, 1, 0),
    "8x8 without padding": ConvShape(1, 8, 8, 8, 8, padding=0),
    "10x10 without padding": ConvShape(1, 10, 10, 8, 8, padding=0),
    "more padding than taps reach": ConvShape(1, 4, 4, 8, 8, padding=3),
    "1x3": ConvShape(1, 4, 8, 8, 8, 1, 3, 1, 1),
    "one pixel": ConvShape(5, 1, 1, 8, 8),
}


@pytest.fixture
def loads_by_tma():
    """Demand that every launch of the test loads by TMA, where the GPU has it."""
    with recording() as launches:
        yield
    assert launches
    assert all(("_tma_" in launch.name) == HAS_TMA for launch in launches)


FPROP = [
    ("whole rows", BF16, True, TMA),
    ("whole rows", FP16, False, PERSISTENT),
    ("part of a row", FP32, True, TMA),
    ("whole images", BF16, True, PERSISTENT),
    ("one image where a tile holds two", FP32, True, TMA),
    ("1x1", BF16, True, PERSISTENT),
    ("10x10 without padding", FP32, True, TMA),
    ("more padding than taps reach", FP32, True, TMA),
    ("1x3", BF16, True, replace(TMA, block_m=16)),
    ("one pixel", FP32, True, TMA),
]


@pytest.mark.parametrize(("name", "dtype", "prologue", "config"), FPROP)
def test_fprop(name, dtype, prologue, config, loads_by_tma):
    shape = SHAPES[name]
    t = make_tensors(shape, dtype)
    ab = t.scale_shift if prologue else None
    y, stats = conv_fprop(
        t.x, t.w, **geometry(shape), scale_shift=ab, batch_norm=t.batch_norm, config=config
    )
    assert_like_eager("y", y, fprop(t, shape, prologue), fprop(t.double(), shape, prologue))
    check_stats(stats, y, t.batch_norm)


@pytest.mark.parametrize("form", ["tma", "im2col"])
@pytest.mark.parametrize("num_filters", [64, 72])
def test_fprop_with_filters_as_rows(num_filters, form):
    """Tiles of 64 filters keep their sums so; 64 filters fill theirs and need no mask, 72 do."""
    shape = ConvShape(2, 8, 8, 8, num_filters)
    config = ConvConfig(64, 64, 32, num_warps=4, num_stages=2, form=form)
    t = make_tensors(shape, BF16)
    y, stats = conv_fprop(t.x, t.w, **geometry(shape), batch_norm=t.batch_norm, config=config)
    assert_like_eager("y", y, fprop(t, shape, False), fprop(t.double(), shape, False))
    check_stats(stats, y, t.batch_norm)


@pytest.mark.parametrize(
    ("name", "dtype", "has_residual", "relu", "config"),
    [("whole rows", BF16, True, True, PERSISTENT), ("1x1", FP32, False, False, TMA)],
)
def test_fprop_folded(name, dtype, has_residual, relu, config, loads_by_tma):
    shape = SHAPES[name]
    t = make_tensors(shape, dtype)
    wide = t.double()
    scale_shift = t.dy.coefficients[:2].contiguous()
    options = {**geometry(shape), "relu": relu}
    out = conv_fprop_folded(
        t.x, t.w, scale_shift, residual=t.dy.g if has_residual else None, config=config, **options
    )
    eager, truth = (
        ref.conv_folded_ref(
            v.x, v.w, scale_shift.to(f), residual=v.dy.g if has_residual else None, **options
        )
        for v, f in ((t, FP32), (wide, torch.float64))
    )
    assert_like_eager("out", out, eager, truth)


# name, dtype, dy is deferred, shortcut, a producer
DGRAD = [
    ("whole rows", BF16, True, True, True, PERSISTENT),
    ("whole rows", FP16, False, False, False, TMA),
    ("part of a row", FP32, True, False, True, TMA),
    ("whole images", BF16, True, True, True, TMA),
    ("one image where a tile holds two", FP32, True, False, True, TMA),
    ("1x1", BF16, True, True, True, PERSISTENT),
    ("8x8 without padding", FP32, True, False, False, TMA),
    ("more padding than taps reach", FP32, True, False, True, TMA),
    ("1x3", FP32, True, False, False, TMA),
    ("one pixel", FP32, True, True, True, TMA),
]


@pytest.mark.parametrize(("name", "dtype", "deferred", "shortcut", "has_producer", "config"), DGRAD)
def test_dgrad(name, dtype, deferred, shortcut, has_producer, config, loads_by_tma):
    shape = SHAPES[name]
    t = make_tensors(shape, dtype)
    wide = t.double()
    z = pre_activation(wide)
    got, grads = conv_dgrad(
        t.dy if deferred else t.dy.g,
        t.w,
        (shape.H, shape.W),
        **geometry(shape),
        shortcut=t.shortcut if shortcut else None,
        producer=t.producer if has_producer else None,
        producer_weight=t.producer_weight if has_producer else None,
        config=config,
    )
    eager, truth = dgrad(t, shape, deferred, shortcut), dgrad(wide, shape, deferred, shortcut)
    if not has_producer:
        assert_like_eager("dx", got, eager, truth)
        return
    eager, truth = ref.relu_grad_ref(z.float(), eager), ref.relu_grad_ref(z, truth)
    assert_like_eager("g", got, eager, truth, keep=away_from_ties(z, FP32))
    check_producer_grads(grads, got, t)


def test_padding_stays_zero_after_scale_and_shift(loads_by_tma):
    """With x = 0, b = 1 and filters of ones, y counts the taps inside the image."""
    x, w = channels_last(torch.zeros(1, 16, 4, 4)), channels_last(torch.ones(16, 16, 3, 3))
    ab = torch.ones(2, 16, device=DEVICE)
    y, _ = conv_fprop(x, w, padding=1, scale_shift=ab, config=TMA)
    inside = torch.tensor([2.0, 3.0, 3.0, 2.0], device=DEVICE)
    torch.testing.assert_close(y[0, 0], 16 * torch.outer(inside, inside), rtol=0, atol=0)


def test_gradient_beyond_the_border_stays_zero_although_c2_is_not(loads_by_tma):
    """With g = y = 0, c2 = 1 and filters of ones, dx counts the outputs that a pixel meets."""
    t = make_tensors(ConvShape(1, 4, 4, 16, 16), FP32)
    coefficients = torch.zeros(3, 16, device=DEVICE)
    coefficients[2] = 1
    zeros = torch.zeros_like(t.x)
    dy = t.dy._replace(g=zeros, y=zeros, coefficients=coefficients)
    dx, _ = conv_dgrad(dy, torch.ones_like(t.w), (4, 4), padding=1, config=TMA)
    met = torch.tensor([2.0, 3.0, 3.0, 2.0], device=DEVICE)
    torch.testing.assert_close(dx[0, 0], 16 * torch.outer(met, met), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nan_and_inf_come_through_and_stay_in_their_image(poison, loads_by_tma):
    shape = ConvShape(2, 4, 4, 8, 24)
    t = make_tensors(shape, BF16)
    ab = torch.ones_like(t.scale_shift)
    t.x[1, 4, 3, 2] = t.dy.g[1, 2, 3, 2] = poison
    t = t._replace(scale_shift=ab)
    y, _ = conv_fprop(t.x, t.w, padding=1, scale_shift=ab, config=TMA)
    assert (~y.isfinite() >= ~fprop(t, shape, True).isfinite()).all()
    assert not y[1, :, 3, 2].isfinite().any()
    assert y[0].isfinite().all()
    dx, _ = conv_dgrad(t.dy, t.w, (4, 4), padding=1, config=TMA)
    assert (~dx.isfinite() >= ~dgrad(t, shape, True, False).isfinite()).all()
    assert dx[0].isfinite().all()


def in_a_wider_tensor(t):
    """The same values in eight channels among sixteen of which the others are NaN."""
    n, c, h, w = t.shape
    whole = torch.full((n, c + 8, h, w), torch.nan, dtype=t.dtype, device=t.device)
    part = whole.to(memory_format=torch.channels_last)[:, 8:]
    part.copy_(t)
    return part


def run_both(t, shape, config):
    y, stats = conv_fprop(t.x, t.w, **geometry(shape), batch_norm=t.batch_norm, config=config)
    producer = {"producer": t.producer, "producer_weight": t.producer_weight}
    size = (shape.H, shape.W)
    dx, grads = conv_dgrad(t.dy, t.w, size, **geometry(shape), **producer, config=config)
    check_stats(stats, y, t.batch_norm)
    check_producer_grads(grads, dx, t)
    return y, dx, stats, *grads[1:]


def test_gaps_persistent_grids_and_64_bit_offsets_give_the_same_bits(monkeypatch, loads_by_tma):
    shape = SHAPES["whole rows"]
    t = make_tensors(shape, FP32)
    gaps = t._replace(
        x=in_a_wider_tensor(t.x),
        dy=t.dy._replace(g=in_a_wider_tensor(t.dy.g), y=in_a_wider_tensor(t.dy.y)),
    )
    expected = run_both(t, shape, TMA)
    for a, b in zip(expected, run_both(gaps, shape, TMA), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    persistent = [run_both(t, shape, replace(TMA, grid_size=3))]
    for module in (fprop_module, dgrad_module):
        monkeypatch.setattr(module, "index_dtype", lambda *tensors: tl.int64)
    persistent.append(run_both(t, shape, PERSISTENT))
    # Statistics and sums are merged in an order that the number of programs decides.
    for other in persistent:
        for a, b in zip(expected[:2], other[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("block_m", "op", "shape", "tile"),
    [
        (128, "fprop", ConvShape(2, 32, 32, 16, 16), (1, 4, 32)),
        (128, "dgrad", ConvShape(2, 32, 32, 16, 16), (1, 4, 32)),
        (128, "fprop", ConvShape(2, 8, 8, 16, 16), (2, 8, 8)),
        (16, "fprop", ConvShape(2, 3, 64, 16, 16), (1, 1, 16)),
        (64, "fprop", ConvShape(2, 1, 8, 16, 16), (8, 1, 8)),
        (64, "dgrad", ConvShape(1, 8, 8, 16, 16, padding=0), (1, 8, 8)),
        (64, "fprop", ConvShape(1, 8, 8, 16, 16, padding=0), None),
        (64, "fprop", ConvShape(1, 7, 8, 16, 16), None),
        (64, "fprop", ConvShape(1, 8, 24, 16, 16), None),
        (32, "fprop", ConvShape(1, 8, 48, 16, 16), None),
        (64, "fprop", ConvShape(1, 8, 8, 16, 16, stride=2), None),
        (512, "fprop", ConvShape(1, 32, 32, 16, 16), (1, 16, 32)),
        (512, "fprop", ConvShape(1, 1, 512, 16, 16), None),
        (64, "wgrad", ConvShape(2, 8, 8, 16, 16), None),
    ],
)
def test_a_tma_tile_is_a_rectangle_of_consecutive_pixels(block_m, op, shape, tile):
    assert replace(TMA, block_m=block_m).tma_tile(op, shape) == (tile and TmaTile(*tile))
    assert replace(TILES, block_m=block_m).tma_tile(op, shape) is None


@pytest.mark.parametrize(
    "shape",
    [
        ConvShape(1, 7, 9, 16, 16),
        ConvShape(1, 8, 8, 3, 16),
        ConvShape(1, 8, 8, 16, 16, stride=2),
        ConvShape(1, 8, 8, 12, 16),
    ],
)
def test_what_is_no_tma_tile_is_loaded_by_pointers_with_the_same_tiles(shape):
    t = make_tensors(shape, BF16)
    with recording() as launches:
        by_tma, by_pointer = (
            conv_fprop(t.x, t.w, **geometry(shape), config=config)[0] for config in (TMA, TILES)
        )
    assert [launch.name for launch in launches] == ["conv_fprop_kernel"] * 2
    torch.testing.assert_close(by_tma, by_pointer, rtol=0, atol=0)


def test_a_tensor_that_is_not_aligned_is_loaded_by_pointers():
    shape = SHAPES["whole rows"]
    t = make_tensors(shape, BF16)
    n, c, h, w = t.x.shape
    whole = torch.zeros(n, c + 8, h, w, dtype=BF16, device=DEVICE)
    x = whole.to(memory_format=torch.channels_last)[:, 1 : c + 1]
    x.copy_(t.x)
    with recording() as launches:
        y, _ = conv_fprop(x, t.w, padding=1, config=TMA)
    assert [launch.name for launch in launches] == ["conv_fprop_kernel"]
    assert_like_eager("y", y, fprop(t, shape, False), fprop(t.double(), shape, False))


@pytest.mark.parametrize("convs", [resnet20_convs, resnet18_convs])
@pytest.mark.parametrize("op", ["fprop", "dgrad"])
def test_every_unstrided_layer_but_the_stem_has_tma_tiles(convs, op):
    for name, shape, _ in convs(512):
        found = tma_config(op, shape, BF16)
        assert (found is not None) == (shape.stride == 1 and name != "stem"), name


def test_a_tma_launch_declares_what_one_by_pointers_does():
    shape = ConvShape(4, 8, 8, 16, 32)
    t = make_tensors(shape, BF16)
    x, w, g = (v.to("meta") for v in (t.x, t.w, t.dy.g))
    batch_norm = BatchNorm(*(v.to("meta") for v in t.batch_norm[:2]))
    with recording() as launches:
        for config in (TMA, TILES):
            conv_fprop(x, w, padding=1, batch_norm=batch_norm, config=config)
            conv_dgrad(g, w, (8, 8), padding=1, config=config)
    by_tma, by_pointer = launches[:2], launches[2:]
    assert [launch.name for launch in by_tma] == ["conv_fprop_tma_kernel", "conv_dgrad_tma_kernel"]
    for one, other in zip(by_tma, by_pointer, strict=True):
        assert one.traffic == other.traffic
        names = {name.rpartition("_")[0] for name in one.tensors}
        assert names == {name.rpartition("_")[0] for name in other.tensors}


REAL = {
    f"{net} {conv.name}": conv.shape
    for net, convs in (("resnet20", resnet20_convs(16)), ("resnet18", resnet18_convs(16)))
    for conv in convs
    if tma_config("fprop", conv.shape, BF16) is not None
}


@needs_gpu
@pytest.mark.parametrize("grid_size", [0, 132])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", REAL)
def test_real_layers(name, dtype, grid_size, loads_by_tma):
    """Every layer of the two networks that has TMA tiles, in all that training fuses into it."""
    shape = REAL[name]
    t = make_tensors(shape, dtype)
    wide = t.double()
    config = replace(tma_config("fprop", shape, dtype), grid_size=grid_size)
    y, stats = conv_fprop(
        t.x, t.w, padding=1, scale_shift=t.scale_shift, batch_norm=t.batch_norm, config=config
    )
    assert_like_eager("y", y, fprop(t, shape, True), fprop(wide, shape, True))
    check_stats(stats, y, t.batch_norm)
    config = replace(tma_config("dgrad", shape, dtype), grid_size=grid_size)
    size = (shape.H, shape.W)
    dx, _ = conv_dgrad(t.dy, t.w, size, padding=1, shortcut=t.shortcut, config=config)
    assert_like_eager("dx", dx, dgrad(t, shape, True, True), dgrad(wide, shape, True, True))
