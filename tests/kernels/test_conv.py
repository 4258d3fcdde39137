"""The convolution kernels against eager torch and the fp64 reference, by code path."""

import pytest
import torch
import triton.language as tl

from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.conv_types import LayerState
from fastres.kernels.gpu import conv_dgrad as dgrad_module
from fastres.kernels.gpu import conv_fprop as fprop_module
from fastres.kernels.gpu import conv_wgrad as wgrad_module
from fastres.kernels.gpu.batchnorm_fwd import bn_apply
from fastres.kernels.gpu.conv_dgrad import conv_dgrad
from fastres.kernels.gpu.conv_fprop import conv_fprop, conv_fprop_folded
from fastres.kernels.gpu.conv_wgrad import conv_wgrad
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.reference import block as ref
from tests.helpers.interpreter import DEVICE, strict_memory  # noqa: F401
from tests.helpers.kernel_cases import (
    SHAPES,
    TILES,
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


FPROP = [
    ("1x1", BF16, True, True),
    ("3x3", FP32, True, True),
    ("3x3", BF16, False, True),
    ("3x3, stride 2", BF16, True, True),
    ("3x3, stride 2, even", FP16, True, False),
    ("3x3, stride 3", FP32, False, False),
    ("projection", FP32, True, False),
    ("stem", BF16, False, True),
    ("wide", FP16, True, True),
    ("no padding", FP32, True, False),
    ("more padding than taps reach", FP32, True, True),
    ("5x5", BF16, False, False),
    ("1x3", FP32, True, False),
    ("one pixel", FP32, True, False),
]


@pytest.mark.parametrize(("name", "dtype", "prologue", "has_batch_norm"), FPROP)
def test_fprop(name, dtype, prologue, has_batch_norm):
    shape = SHAPES[name]
    t = make_tensors(shape, dtype)
    y, stats = conv_fprop(
        t.x,
        t.w,
        **geometry(shape),
        scale_shift=t.scale_shift if prologue else None,
        batch_norm=t.batch_norm if has_batch_norm else None,
        config=TILES,
    )
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_like_eager("y", y, fprop(t, shape, prologue), fprop(t.double(), shape, prologue))
    assert (stats is not None) == has_batch_norm
    if stats is not None:
        check_stats(stats, y, t.batch_norm)


@pytest.mark.parametrize(
    ("name", "dtype", "has_residual", "relu"),
    [
        ("3x3", BF16, True, True),
        ("3x3, stride 2", FP32, False, True),
        ("projection", FP16, False, False),
        ("1x1", FP32, True, False),
    ],
)
def test_fprop_folded(name, dtype, has_residual, relu):
    shape = SHAPES[name]
    t = make_tensors(shape, dtype)
    scale_shift = t.dy.coefficients[:2].contiguous()
    options = {**geometry(shape), "relu": relu}
    residual = t.dy.g if has_residual else None
    out = conv_fprop_folded(t.x, t.w, scale_shift, residual=residual, config=TILES, **options)
    eager = ref.conv_folded_ref(t.x, t.w, scale_shift, residual=residual, **options)
    wide = t.double()
    truth = ref.conv_folded_ref(
        wide.x,
        wide.w,
        scale_shift.double(),
        residual=wide.dy.g if has_residual else None,
        **options,
    )
    assert_like_eager("out", out, eager, truth)
    if dtype != FP32:
        assert_rounded_once("out", out, truth)


# name, dtype, dy is deferred, shortcut, a producer
DGRAD = [
    ("1x1", BF16, True, True, True),
    ("3x3", FP32, True, True, True),
    ("3x3", BF16, False, False, False),
    ("3x3, stride 2", FP32, True, False, True),
    ("3x3, stride 2, even", BF16, True, True, True),
    ("3x3, stride 3", FP32, True, True, True),
    ("projection", BF16, False, True, True),
    ("stem", FP16, True, False, False),
    ("wide", FP32, True, True, True),
    ("no padding", FP32, True, False, False),
    ("more padding than taps reach", FP32, True, False, True),
    ("5x5", FP32, True, False, False),
    ("1x3", FP32, True, False, False),
    ("one pixel", FP32, False, True, True),
]


@pytest.mark.parametrize(("name", "dtype", "deferred", "shortcut", "has_producer"), DGRAD)
def test_dgrad(name, dtype, deferred, shortcut, has_producer):
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
        config=TILES,
    )
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


@pytest.mark.parametrize("name", ["3x3", "3x3, stride 2"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_dgrad_stores_the_activation_too(name, dtype):
    """The bits of the kernel that stores nothing else; dx and its sums stay as they are."""
    shape = SHAPES[name]
    t = make_tensors(shape, dtype)
    options = {**geometry(shape), "config": TILES}
    options |= {"producer": t.producer, "producer_weight": t.producer_weight}
    size = (shape.H, shape.W)
    activation = torch.full_like(t.x, torch.nan)
    dx, grads = conv_dgrad(t.dy, t.w, size, activation=activation, **options)
    assert torch.equal(activation, bn_apply(t.producer.y, t.producer.scale_shift))
    alone, grads_alone = conv_dgrad(t.dy, t.w, size, **options)
    assert torch.equal(dx, alone)
    assert torch.equal(grads.dgamma, grads_alone.dgamma)
    with pytest.raises(ValueError, match="activation must be dense channels_last, and beside"):
        conv_dgrad(t.dy, t.w, size, activation=activation, **geometry(shape))


# name, dtype, a prologue, dy is deferred, split-K partials
WGRAD = [
    ("1x1", BF16, True, True, 3),
    ("3x3", FP32, True, True, 2),
    ("3x3", BF16, False, False, 1),
    ("3x3, stride 2", BF16, True, True, 1),
    ("3x3, stride 3", FP32, True, False, 2),
    ("projection", FP16, True, True, 1),
    ("stem", FP32, False, True, 100),
    ("wide", FP32, True, True, 1),
    ("more padding than taps reach", FP32, True, True, 2),
    ("1x3", FP32, False, False, 1),
    ("one pixel", FP32, True, True, 2),
]


@pytest.mark.parametrize(("name", "dtype", "prologue", "deferred", "split_k"), WGRAD)
def test_wgrad(name, dtype, prologue, deferred, split_k):
    shape = SHAPES[name]
    t = make_tensors(shape, dtype)
    dw = conv_wgrad(
        t.x,
        t.dy if deferred else t.dy.g,
        (shape.R, shape.S),
        **geometry(shape),
        scale_shift=t.scale_shift if prologue else None,
        config=ConvConfig(32, 32, 32, 4, 2, split_k=split_k),
    )
    assert dw.is_contiguous(memory_format=torch.channels_last)
    eager = wgrad(t, shape, prologue, deferred)
    truth = wgrad(t.double(), shape, prologue, deferred)
    assert_like_eager("dw", dw, eager, truth)


def test_padding_stays_zero_after_scale_and_shift():
    """With x = 0, b = 1 and filters of ones, y counts the taps inside the image."""
    x = channels_last(torch.zeros(1, 16, 4, 4))
    w = channels_last(torch.ones(16, 16, 3, 3))
    ab = torch.stack([torch.ones(16), torch.ones(16)]).to(DEVICE)
    y, _ = conv_fprop(x, w, padding=1, scale_shift=ab, config=TILES)
    inside = torch.tensor([2.0, 3.0, 3.0, 2.0], device=DEVICE)
    expected = 16 * torch.outer(inside, inside)
    torch.testing.assert_close(y[0, 0], expected, rtol=0, atol=0)
    dw = conv_wgrad(x, torch.ones_like(x), (3, 3), padding=1, scale_shift=ab, config=TILES)
    taps = torch.tensor([3.0, 4.0, 3.0], device=DEVICE)
    torch.testing.assert_close(dw[0, 0], torch.outer(taps, taps), rtol=0, atol=0)


def test_gradient_beyond_the_border_stays_zero_although_c2_is_not():
    """With g = y = 0, c2 = 1 and filters of ones, dx counts the outputs that a pixel meets."""
    t = make_tensors(ConvShape(1, 4, 4, 16, 16), FP32)
    zeros = torch.zeros_like(t.x)
    coefficients = torch.stack([torch.zeros(16), torch.zeros(16), torch.ones(16)]).to(DEVICE)
    dy = t.dy._replace(g=zeros, y=zeros, coefficients=coefficients)
    dx, _ = conv_dgrad(dy, torch.ones_like(t.w), (4, 4), padding=1, config=TILES)
    met = torch.tensor([2.0, 3.0, 3.0, 2.0], device=DEVICE)
    torch.testing.assert_close(dx[0, 0], 16 * torch.outer(met, met), rtol=0, atol=0)
    dw = conv_wgrad(torch.ones_like(zeros), dy, (3, 3), padding=1, config=TILES)
    taps = torch.tensor([3.0, 4.0, 3.0], device=DEVICE)
    torch.testing.assert_close(dw[0, 0], torch.outer(taps, taps), rtol=0, atol=0)


def test_mask_drops_the_gradient_where_the_pre_activation_is_exactly_zero():
    t = make_tensors(SHAPES["1x1"], FP32)
    ab = torch.stack([torch.ones(5), torch.zeros(5)]).to(DEVICE)
    producer_y = torch.where(t.producer.y > 0.5, t.producer.y, 0.0)
    producer = LayerState(producer_y, torch.cat([t.producer.stats[:3], ab]))
    weight = t.producer_weight
    g, _ = conv_dgrad(t.dy.g, t.w, (7, 9), producer=producer, producer_weight=weight, config=TILES)
    assert g[producer_y == 0].abs().max() == 0
    assert (g[producer_y > 0] != 0).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_nan_and_inf_come_through(poison, dtype):
    """Wherever eager's result is not finite, the fused one is not."""
    shape = ConvShape(2, 4, 5, 5, 17)
    t = make_tensors(shape, dtype)
    ab = torch.ones_like(t.scale_shift)
    t.x[1, 4, 3, 2] = poison
    t.dy.g[1, 2, 3, 2] = poison
    t = t._replace(scale_shift=ab)
    options = {"padding": 1, "scale_shift": ab, "config": TILES}
    y, stats = conv_fprop(t.x, t.w, batch_norm=t.batch_norm, **options)
    assert (~y.isfinite() >= ~fprop(t, shape, True).isfinite()).all()
    assert not y[1, :, 3, 2].isfinite().any()
    assert y[0].isfinite().all()
    assert not stats[:2].isfinite().any()
    dx, _ = conv_dgrad(t.dy, t.w, (4, 5), padding=1, config=TILES)
    assert (~dx.isfinite() >= ~dgrad(t, shape, True, False).isfinite()).all()
    assert dx[0].isfinite().all()
    dw = conv_wgrad(t.x, t.dy, (3, 3), padding=1, scale_shift=ab, config=TILES)
    assert (~dw.isfinite() >= ~wgrad(t, shape, True, True).isfinite()).all()


def with_gaps(t: torch.Tensor, kind: str) -> torch.Tensor:
    """The same values in a slice of a larger channels_last tensor full of NaN."""
    n, c, h, w = t.shape
    size, index = {
        "channels": ((n, c + 3, h, w), (slice(None), slice(1, c + 1))),
        "pixels": ((n, c, h, w + 2), (..., slice(0, w))),
        "rows and images": (
            (2 * n, c, h + 1, w),
            (slice(0, 2 * n, 2), slice(None), slice(1, h + 1)),
        ),
    }[kind]
    whole = torch.full(size, torch.nan, dtype=t.dtype, device=t.device)
    whole = whole.to(memory_format=torch.channels_last)
    part = whole[index]
    part.copy_(t)
    assert not part.is_contiguous(memory_format=torch.channels_last)
    return part


@pytest.mark.parametrize("kind", ["channels", "pixels", "rows and images"])
def test_inputs_with_gaps(kind):
    shape = ConvShape(2, 4, 5, 5, 17, stride=2)
    t = make_tensors(shape, FP32)
    gaps = t._replace(
        x=with_gaps(t.x, kind),
        dy=t.dy._replace(g=with_gaps(t.dy.g, kind), y=with_gaps(t.dy.y, kind)),
        shortcut=with_gaps(t.shortcut, kind),
        producer=t.producer._replace(y=with_gaps(t.producer.y, kind)),
    )

    def run(t):
        y, _ = conv_fprop(t.x, t.w, **geometry(shape), scale_shift=t.scale_shift, config=TILES)
        out = conv_fprop_folded(
            t.x, t.w, t.dy.coefficients[:2], residual=t.dy.g, **geometry(shape), config=TILES
        )
        dx, _ = conv_dgrad(
            t.dy,
            t.w,
            (shape.H, shape.W),
            **geometry(shape),
            shortcut=t.shortcut,
            producer=t.producer,
            producer_weight=t.producer_weight,
            config=TILES,
        )
        return y, out, dx, conv_wgrad(t.x, t.dy, (3, 3), **geometry(shape), config=TILES)

    for dense, sliced in zip(run(t), run(gaps), strict=True):
        torch.testing.assert_close(sliced, dense, rtol=0, atol=0)


def test_channels_of_one_element_may_have_any_stride():
    x = torch.randn(2, 1, 5, 6, device=DEVICE)
    w = channels_last(torch.randn(5, 1, 3, 3))
    y, _ = conv_fprop(x, w, padding=1, config=TILES)
    assert_like_eager(
        "y", y, ref.conv_ref(x, w, padding=1), ref.conv_ref(x.double(), w.double(), padding=1)
    )


def test_64_bit_offsets_give_the_same_bits(monkeypatch):
    shape = SHAPES["3x3, stride 2, even"]
    t = make_tensors(shape, FP32)

    def run():
        y, stats = conv_fprop(t.x, t.w, **geometry(shape), batch_norm=t.batch_norm, config=TILES)
        producer = {"producer": t.producer, "producer_weight": t.producer_weight}
        dx, grads = conv_dgrad(t.dy, t.w, (8, 8), **geometry(shape), **producer, config=TILES)
        dw = conv_wgrad(t.x, t.dy, (3, 3), **geometry(shape), config=TILES)
        return y, stats, dx, *grads[1:], dw

    narrow = run()
    for module in (fprop_module, dgrad_module, wgrad_module):
        monkeypatch.setattr(module, "index_dtype", lambda *tensors: tl.int64)
    for a, b in zip(narrow, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 17, 7, 9)}, "x must be channels_last"),
        ({"x": torch.zeros(17, 7, 9)}, "x must have 4 dimensions"),
        ({"x": channels_last(torch.zeros(0, 17, 7, 9))}, "x must not be empty"),
        ({"x": channels_last(torch.zeros(2, 17, 7, 9), torch.float64)}, "x must be bfloat16"),
        ({"w": channels_last(torch.zeros(33, 17, 3, 3), BF16)}, "w must have dtype torch.float32"),
        ({"w": channels_last(torch.zeros(33, 16, 3, 3))}, "w must have 17 input channels"),
        ({"w": torch.zeros(33, 17, 3, 3)}, "w must be channels_last"),
        ({"scale_shift": torch.zeros(2, 16)}, r"scale_shift must have shape \(2, 17\)"),
        ({"scale_shift": torch.zeros(2, 17, dtype=BF16)}, "scale_shift must be float32"),
        ({"padding": -1}, "padding must not be negative, got -1"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"w": channels_last(torch.zeros(33, 17, 9, 9)), "padding": 0}, "does not fit"),
    ],
)
def test_fprop_refuses(change, message):
    t = make_tensors(SHAPES["3x3"], FP32)
    arguments = {"x": t.x, "w": t.w, "padding": 1, "scale_shift": t.scale_shift} | change
    with pytest.raises(ValueError, match=message):
        conv_fprop(**arguments)


def test_dgrad_and_wgrad_refuse():
    t = make_tensors(SHAPES["3x3"], FP32)
    with pytest.raises(ValueError, match=r"input_size \(9, 9\) gives an output of"):
        conv_dgrad(t.dy, t.w, (9, 9), padding=1)
    wrong = t.producer._replace(stats=t.producer.stats[:, :16])
    with pytest.raises(ValueError, match=r"producer\.stats must have shape \(5, 17\)"):
        conv_dgrad(t.dy, t.w, (7, 9), padding=1, producer=wrong, producer_weight=t.producer_weight)
    with pytest.raises(ValueError, match="give both of producer and producer_weight"):
        conv_dgrad(t.dy, t.w, (7, 9), padding=1, producer=t.producer)
    with pytest.raises(ValueError, match=r"dy\.y must have shape"):
        conv_dgrad(t.dy._replace(y=t.x), t.w, (7, 9), padding=1)
    with pytest.raises(ValueError, match="w must have 33 output channels"):
        conv_dgrad(t.dy, t.w[:32], (7, 9), padding=1)
    with pytest.raises(ValueError, match="dy must have shape"):
        conv_wgrad(t.x, t.dy, (3, 3))
    with pytest.raises(ValueError, match="dy must have dtype"):
        conv_wgrad(t.x.to(BF16), t.dy, (3, 3), padding=1)
