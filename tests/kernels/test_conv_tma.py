"""Convolutions that load pixels in boxes: the gather form's results, its traps, and where they fit.

The interpreter runs them on a CPU. A GPU without the copy engine gathers, by the launchers' rule;
the same results are asked of it.
"""

from dataclasses import replace

import pytest
import torch
import triton.language as tl

from fastres.kernels.conv_shape import ConvShape, resnet18_convs, resnet20_convs
from fastres.kernels.gpu import conv_dgrad as dgrad_module
from fastres.kernels.gpu import conv_fprop as fprop_module
from fastres.kernels.gpu.conv_dgrad import conv_dgrad
from fastres.kernels.gpu.conv_fprop import conv_fprop, conv_fprop_folded
from fastres.kernels.gpu.launch import recording
from fastres.kernels.gpu.launch_config import ConvConfig, PixelBox, box_config
from fastres.kernels.reference import block as ref
from tests.helpers.interpreter import DEVICE, needs_gpu, strict_memory  # noqa: F401
from tests.helpers.kernel_cases import (
    channels_last,
    check_stats,
    dgrad,
    fprop,
    geometry,
    make_tensors,
    pre_activation,
)
from tests.helpers.numerics import assert_like_eager, assert_statistics, away_from_ties

pytestmark = pytest.mark.usefixtures("strict_memory")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HAS_ENGINE = DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
TILES = ConvConfig(32, 32, 32, num_warps=4, num_stages=2)
BOX = replace(TILES, loads="box")
PERSISTENT = replace(BOX, programs=2)

# Channels that are no multiples of a tile, and images that do not fill the last box.
SHAPES = {
    "whole rows": ConvShape(2, 8, 8, 24, 40),
    "part of a row": ConvShape(1, 3, 64, 8, 16),
    "whole images": ConvShape(3, 4, 4, 40, 24),
    "one image where a box holds two": ConvShape(1, 4, 4, 16, 8),
    "1x1": ConvShape(2, 4, 8, 72, 24, 1, 1, 1, 0),
    "8x8 without padding": ConvShape(1, 8, 8, 8, 8, padding=0),
    "10x10 without padding": ConvShape(1, 10, 10, 8, 8, padding=0),
    "more padding than taps reach": ConvShape(1, 4, 4, 8, 8, padding=3),
    "1x3": ConvShape(1, 4, 8, 8, 8, 1, 3, 1, 1),
    "one pixel": ConvShape(5, 1, 1, 8, 8),
}


@pytest.fixture
def in_boxes():
    """Demand that every launch of the test loads in boxes, where there is an engine for them."""
    with recording() as launches:
        yield
    assert launches
    assert all(("_box_" in launch.name) == HAS_ENGINE for launch in launches)


FPROP = [
    ("whole rows", BF16, True, BOX),
    ("whole rows", FP16, False, PERSISTENT),
    ("part of a row", FP32, True, BOX),
    ("whole images", BF16, True, PERSISTENT),
    ("one image where a box holds two", FP32, True, BOX),
    ("1x1", BF16, True, PERSISTENT),
    ("10x10 without padding", FP32, True, BOX),
    ("more padding than taps reach", FP32, True, BOX),
    ("1x3", BF16, True, replace(BOX, block_m=16)),
    ("one pixel", FP32, True, BOX),
]


@pytest.mark.parametrize(("name", "dtype", "prologue", "config"), FPROP)
def test_fprop(name, dtype, prologue, config, in_boxes):
    shape = SHAPES[name]
    t = make_tensors(shape, dtype)
    ab = t.scale_shift if prologue else None
    y, stats = conv_fprop(
        t.x, t.w, **geometry(shape), scale_shift=ab, store_stats=True, config=config
    )
    assert_like_eager("y", y, fprop(t, shape, prologue), fprop(t.double(), shape, prologue))
    check_stats(stats, y)


@pytest.mark.parametrize(
    ("name", "dtype", "has_residual", "relu", "config"),
    [("whole rows", BF16, True, True, PERSISTENT), ("1x1", FP32, False, False, BOX)],
)
def test_fprop_folded(name, dtype, has_residual, relu, config, in_boxes):
    shape = SHAPES[name]
    t = make_tensors(shape, dtype)
    wide = t.double()
    fold = t.dy.coefficients[:2].contiguous()
    options = {**geometry(shape), "relu": relu}
    out = conv_fprop_folded(
        t.x, t.w, fold, residual=t.dy.g if has_residual else None, config=config, **options
    )
    eager, truth = (
        ref.conv_folded_ref(
            v.x, v.w, fold.to(f), residual=v.dy.g if has_residual else None, **options
        )
        for v, f in ((t, FP32), (wide, torch.float64))
    )
    assert_like_eager("out", out, eager, truth)


# name, dtype, dy is folded, shortcut, mask: none | recomputed | from the output
DGRAD = [
    ("whole rows", BF16, True, True, "recomputed", PERSISTENT),
    ("whole rows", FP16, False, False, "none", BOX),
    ("part of a row", FP32, True, False, "output", BOX),
    ("whole images", BF16, True, True, "recomputed", BOX),
    ("one image where a box holds two", FP32, True, False, "recomputed", BOX),
    ("1x1", BF16, True, True, "output", PERSISTENT),
    ("8x8 without padding", FP32, True, False, "none", BOX),
    ("more padding than taps reach", FP32, True, False, "recomputed", BOX),
    ("1x3", FP32, True, False, "none", BOX),
    ("one pixel", FP32, True, True, "recomputed", BOX),
]


@pytest.mark.parametrize(("name", "dtype", "folded", "shortcut", "mask", "config"), DGRAD)
def test_dgrad(name, dtype, folded, shortcut, mask, config, in_boxes):
    shape = SHAPES[name]
    t = make_tensors(shape, dtype)
    wide = t.double()
    z = pre_activation(wide)
    bn_input = {
        "none": None,
        "recomputed": t.bn_input,
        "output": t.bn_input._replace(scale_shift=None, out=z.relu().to(dtype)),
    }[mask]
    got, sums = conv_dgrad(
        t.dy if folded else t.dy.g,
        t.w,
        (shape.H, shape.W),
        **geometry(shape),
        shortcut=t.shortcut if shortcut else None,
        bn_input=bn_input,
        config=config,
    )
    eager, truth = dgrad(t, shape, folded, shortcut), dgrad(wide, shape, folded, shortcut)
    if mask == "none":
        assert_like_eager("dx", got, eager, truth)
        return
    eager, truth = ref.relu_grad_ref(z.float(), eager), ref.relu_grad_ref(z, truth)
    assert_like_eager("g", got, eager, truth, keep=away_from_ties(z, FP32))
    mean = t.bn_input.mean.double()
    sum_g, sum_gy = ref.bn_backward_sums_ref(got.double(), wide.bn_input.y, mean)
    size_g, size_gy = ref.bn_backward_sums_ref(
        got.double().abs(), (wide.bn_input.y - mean.view(1, -1, 1, 1)).abs(), 0 * mean
    )
    assert_statistics("sum g", sums.g.sum(1), sum_g, size_g)
    assert_statistics("sum g (y - mean)", sums.gy.sum(1), sum_gy, size_gy)


def test_padding_stays_zero_after_scale_and_shift(in_boxes):
    """With x = 0, b = 1 and filters of ones, y counts the taps inside the image."""
    x, w = channels_last(torch.zeros(1, 16, 4, 4)), channels_last(torch.ones(16, 16, 3, 3))
    ab = torch.ones(2, 16, device=DEVICE)
    y, _ = conv_fprop(x, w, padding=1, scale_shift=ab, config=BOX)
    inside = torch.tensor([2.0, 3.0, 3.0, 2.0], device=DEVICE)
    torch.testing.assert_close(y[0, 0], 16 * torch.outer(inside, inside), rtol=0, atol=0)


def test_gradient_beyond_the_border_stays_zero_although_c2_is_not(in_boxes):
    """With g = y = 0, c2 = 1 and filters of ones, dx counts the outputs that a pixel meets."""
    t = make_tensors(ConvShape(1, 4, 4, 16, 16), FP32)
    coefficients = torch.zeros(3, 16, device=DEVICE)
    coefficients[2] = 1
    zeros = torch.zeros_like(t.x)
    dy = t.dy._replace(g=zeros, y=zeros, coefficients=coefficients)
    dx, _ = conv_dgrad(dy, torch.ones_like(t.w), (4, 4), padding=1, config=BOX)
    met = torch.tensor([2.0, 3.0, 3.0, 2.0], device=DEVICE)
    torch.testing.assert_close(dx[0, 0], 16 * torch.outer(met, met), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nan_and_inf_come_through_and_stay_in_their_image(poison, in_boxes):
    shape = ConvShape(2, 4, 4, 8, 24)
    t = make_tensors(shape, BF16)
    ab = torch.ones_like(t.scale_shift)
    t.x[1, 4, 3, 2] = t.dy.g[1, 2, 3, 2] = poison
    t = t._replace(scale_shift=ab)
    y, _ = conv_fprop(t.x, t.w, padding=1, scale_shift=ab, config=BOX)
    assert (~y.isfinite() >= ~fprop(t, shape, True).isfinite()).all()
    assert not y[1, :, 3, 2].isfinite().any()
    assert y[0].isfinite().all()
    dx, _ = conv_dgrad(t.dy, t.w, (4, 4), padding=1, config=BOX)
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
    y, stats = conv_fprop(t.x, t.w, **geometry(shape), store_stats=True, config=config)
    size = (shape.H, shape.W)
    dx, sums = conv_dgrad(t.dy, t.w, size, **geometry(shape), bn_input=t.bn_input, config=config)
    return y, stats.partials, dx, *sums[:2]


def test_gaps_persistent_grids_and_64_bit_offsets_give_the_same_bits(monkeypatch, in_boxes):
    shape = SHAPES["whole rows"]
    t = make_tensors(shape, FP32)
    gaps = t._replace(
        x=in_a_wider_tensor(t.x),
        dy=t.dy._replace(g=in_a_wider_tensor(t.dy.g), y=in_a_wider_tensor(t.dy.y)),
    )
    plain = run_both(t, shape, BOX)
    others = [run_both(gaps, shape, BOX), run_both(t, shape, replace(BOX, programs=3))]
    for module in (fprop_module, dgrad_module):
        monkeypatch.setattr(module, "index_dtype", lambda *tensors: tl.int64)
    others.append(run_both(t, shape, PERSISTENT))
    for other in others:
        for a, b in zip(plain, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("block_m", "op", "shape", "box"),
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
def test_a_tile_is_a_box_of_consecutive_pixels_or_is_gathered(block_m, op, shape, box):
    assert replace(BOX, block_m=block_m).pixel_box(op, shape) == (box and PixelBox(*box))
    assert replace(TILES, block_m=block_m).pixel_box(op, shape) is None


@pytest.mark.parametrize(
    "shape",
    [
        ConvShape(1, 7, 9, 16, 16),
        ConvShape(1, 8, 8, 3, 16),
        ConvShape(1, 8, 8, 16, 16, stride=2),
        ConvShape(1, 8, 8, 12, 16),
    ],
)
def test_what_is_no_box_is_gathered_with_the_same_tiles(shape):
    t = make_tensors(shape, BF16)
    with recording() as launches:
        boxed, gathered = (
            conv_fprop(t.x, t.w, **geometry(shape), config=config)[0] for config in (BOX, TILES)
        )
    assert [launch.name for launch in launches] == ["conv_fprop_kernel"] * 2
    torch.testing.assert_close(boxed, gathered, rtol=0, atol=0)


def test_a_tensor_that_is_not_aligned_is_gathered():
    shape = SHAPES["whole rows"]
    t = make_tensors(shape, BF16)
    n, c, h, w = t.x.shape
    whole = torch.zeros(n, c + 8, h, w, dtype=BF16, device=DEVICE)
    x = whole.to(memory_format=torch.channels_last)[:, 1 : c + 1]
    x.copy_(t.x)
    with recording() as launches:
        y, _ = conv_fprop(x, t.w, padding=1, config=BOX)
    assert [launch.name for launch in launches] == ["conv_fprop_kernel"]
    assert_like_eager("y", y, fprop(t, shape, False), fprop(t.double(), shape, False))


@pytest.mark.parametrize("convs", [resnet20_convs, resnet18_convs])
@pytest.mark.parametrize("op", ["fprop", "dgrad"])
def test_every_unstrided_layer_but_the_stem_has_boxes(convs, op):
    for name, shape, _ in convs(512):
        found = box_config(op, shape, BF16)
        assert (found is not None) == (shape.stride == 1 and name != "stem"), name


def test_a_box_launch_declares_what_a_gathering_one_does():
    shape = ConvShape(4, 8, 8, 16, 32)
    t = make_tensors(shape, BF16)
    x, w, g = (v.to("meta") for v in (t.x, t.w, t.dy.g))
    with recording() as launches:
        for config in (BOX, TILES):
            conv_fprop(x, w, padding=1, store_stats=True, config=config)
            conv_dgrad(g, w, (8, 8), padding=1, config=config)
    boxed, gathered = launches[:2], launches[2:]
    assert [launch.name for launch in boxed] == ["conv_fprop_box_kernel", "conv_dgrad_box_kernel"]
    for one, other in zip(boxed, gathered, strict=True):
        assert one.traffic == other.traffic
        names = {name.rpartition("_")[0] for name in one.tensors}
        assert names == {name.rpartition("_")[0] for name in other.tensors}


REAL = {
    f"{net} {conv.name}": conv.shape
    for net, convs in (("resnet20", resnet20_convs(16)), ("resnet18", resnet18_convs(16)))
    for conv in convs
    if box_config("fprop", conv.shape, BF16) is not None
}


@needs_gpu
@pytest.mark.parametrize("programs", [0, 132])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", REAL)
def test_real_layers(name, dtype, programs, in_boxes):
    """Every layer of the two networks that has boxes, in all that training fuses into it."""
    shape = REAL[name]
    t = make_tensors(shape, dtype)
    wide = t.double()
    config = replace(box_config("fprop", shape, dtype), programs=programs)
    y, stats = conv_fprop(
        t.x, t.w, padding=1, scale_shift=t.scale_shift, store_stats=True, config=config
    )
    assert_like_eager("y", y, fprop(t, shape, True), fprop(wide, shape, True))
    check_stats(stats, y)
    config = replace(box_config("dgrad", shape, dtype), programs=programs)
    size = (shape.H, shape.W)
    dx, _ = conv_dgrad(t.dy, t.w, size, padding=1, shortcut=t.shortcut, config=config)
    assert_like_eager("dx", dx, dgrad(t, shape, True, True), dgrad(wide, shape, True, True))
