"""The convolution kernels over shapes: what hypothesis draws and, on a GPU, those of real nets."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.gpu.conv_dgrad import conv_dgrad
from fastres.kernels.gpu.conv_fprop import conv_fprop
from fastres.kernels.gpu.conv_wgrad import conv_wgrad
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.tools.networks import resnet18_convs, resnet20_convs
from tests.helpers.interpreter import needs_gpu, strict_memory  # noqa: F401
from tests.helpers.kernel_cases import (
    check_stats,
    dgrad,
    fprop,
    geometry,
    make_tensors,
    wgrad,
)
from tests.helpers.numerics import assert_like_eager

pytestmark = pytest.mark.usefixtures("strict_memory")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# FASTRES_FUZZ=2000 draws as many cases anew; by default a few fixed ones.
FUZZ = int(os.environ.get("FASTRES_FUZZ", "0"))


@st.composite
def conv_shapes(draw):
    size, channels = st.integers(1, 40 if FUZZ else 10), st.integers(1, 130 if FUZZ else 40)
    r, s = draw(st.sampled_from([(3, 3), (1, 1), (3, 3), (1, 1), (2, 5), (5, 2)]))
    padding = draw(st.integers(0, 3))
    least = {"h": max(1, r - 2 * padding), "w": max(1, s - 2 * padding)}
    return ConvShape(
        N=draw(st.integers(1, 9 if FUZZ else 3)),
        H=max(least["h"], draw(size)),
        W=max(least["w"], draw(size)),
        C=draw(channels),
        K=draw(channels),
        R=r,
        S=s,
        stride=draw(st.integers(1, 3)),
        padding=padding,
    )


@settings(
    max_examples=FUZZ or 4,
    derandomize=not FUZZ,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=conv_shapes(),
    dtype=st.sampled_from([FP32, BF16, FP16]),
    deferred=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(shape, dtype, deferred, seed):
    t = make_tensors(shape, dtype, seed)
    wide = t.double()
    # The interpreter pays for programs, not for elements.
    small = shape.N * shape.H * shape.W < 500
    config = ConvConfig(*((64, 64, 64) if small else (512, 128, 128)), 4, 2, split_k=2)
    dy = t.dy if deferred else t.dy.g
    ab = t.scale_shift if deferred else None
    # A single value a channel has no variance, and is refused.
    batch_norm = t.batch_norm if shape.N * shape.P * shape.Q > 1 else None
    y, stats = conv_fprop(
        t.x, t.w, **geometry(shape), scale_shift=ab, batch_norm=batch_norm, config=config
    )
    assert_like_eager("y", y, fprop(t, shape, deferred), fprop(wide, shape, deferred))
    if batch_norm is not None:
        check_stats(stats, y, batch_norm)
    dx, _ = conv_dgrad(dy, t.w, (shape.H, shape.W), **geometry(shape), config=config)
    eager = dgrad(t, shape, deferred, False)
    assert_like_eager("dx", dx, eager, dgrad(wide, shape, deferred, False))
    dw = conv_wgrad(t.x, dy, (shape.R, shape.S), **geometry(shape), scale_shift=ab, config=config)
    eager = wgrad(t, shape, deferred, deferred)
    assert_like_eager("dw", dw, eager, wgrad(wide, shape, deferred, deferred))


REAL = {
    f"{net} {conv.name}": conv.shape
    for net, convs in (("resnet20", resnet20_convs(16)), ("resnet18", resnet18_convs(16)))
    for conv in convs
}


@needs_gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("name", REAL)
def test_real_layers(name, dtype):
    """Every layer shape of the two networks with the configuration that training would use."""
    shape = REAL[name]
    t = make_tensors(shape, dtype)
    wide = t.double()
    y, stats = conv_fprop(
        t.x, t.w, **geometry(shape), scale_shift=t.scale_shift, batch_norm=t.batch_norm
    )
    assert_like_eager("y", y, fprop(t, shape, True), fprop(wide, shape, True))
    check_stats(stats, y, t.batch_norm)
    dx, _ = conv_dgrad(t.dy, t.w, (shape.H, shape.W), **geometry(shape), shortcut=t.shortcut)
    assert_like_eager("dx", dx, dgrad(t, shape, True, True), dgrad(wide, shape, True, True))
    dw = conv_wgrad(t.x, t.dy, (shape.R, shape.S), **geometry(shape), scale_shift=t.scale_shift)
    assert_like_eager("dw", dw, wgrad(t, shape, True, True), wgrad(wide, shape, True, True))
    again = conv_wgrad(t.x, t.dy, (shape.R, shape.S), **geometry(shape), scale_shift=t.scale_shift)
    assert torch.equal(dw, again)
