"""TF32 products: operands rounded to nearest as cuDNN rounds them, not cut off.

Every input is a multiple of 2**-16 and every factor of a prologue a power of two, so prologues are
exact in fp32 and the operands of a product are known to the last bit.
"""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.conv_types import DeferredGrad
from fastres.kernels.gpu import backend as gpu_backend
from fastres.kernels.gpu import primitives
from fastres.kernels.gpu.conv_dgrad import conv_dgrad
from fastres.kernels.gpu.conv_fprop import conv_fprop
from fastres.kernels.gpu.conv_wgrad import conv_wgrad
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.launch_rules import heuristic_config, tma_config
from fastres.kernels.gpu.primitives import round_to_tf32
from fastres.kernels.reference import block as ref
from fastres.kernels.tools.networks import PRECISIONS
from fastres.kernels.tools.tune_workloads import ConvVariant, ConvWorkload, ParityCheck
from tests.helpers.interpreter import DEVICE, HAS_GPU, needs_gpu, strict_memory  # noqa: F401
from tests.helpers.kernel_cases import (
    ConvTensors,
    channels_last,
    dgrad,
    fprop,
    geometry,
    make_tensors,
    wgrad,
)
from tests.helpers.numerics import assert_like_eager

pytestmark = pytest.mark.usefixtures("strict_memory")

SHAPE = ConvShape(2, 8, 8, 24, 16)
# Of 64 rows, as a warpgroup of Hopper multiplies at once.
TILES = ConvConfig(64, 32, 32, num_warps=4, num_stages=2, split_k=2)
CONFIGS = {"im2col": TILES, "tma": replace(TILES, form="tma", split_k=1)}

PRODUCTS = [
    ("fprop", "im2col", False),
    ("fprop", "im2col", True),
    ("fprop", "tma", False),
    ("fprop", "tma", True),
    ("dgrad", "im2col", False),
    ("dgrad", "im2col", True),
    ("dgrad", "tma", False),
    ("dgrad", "tma", True),
    ("wgrad", "im2col", False),
    ("wgrad", "im2col", True),
]


def to_tf32(t, quantize=lambda mantissa: torch.floor(mantissa + 0.5)):
    """`t` in fp64 with 11 significant bits: to nearest with ties away from 0, or as told."""
    t = t.double()
    # Below the smallest normal number the spacing stays what it is there.
    exponent = torch.frexp(t).exponent.clamp_min(-125) - 11
    return t.sign() * torch.ldexp(quantize(torch.ldexp(t.abs(), -exponent)), exponent)


OPERANDS = {
    "to nearest": to_tf32,
    "cut off": lambda t: to_tf32(t, torch.floor),
    "in full": torch.Tensor.double,
}


@triton.jit
def _round_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(y_ptr + offs, round_to_tf32(tl.load(x_ptr + offs)))


def rounded_by_the_kernel(x):
    y = torch.empty_like(x)
    _round_kernel[(1,)](x, y, SIZE=x.numel())
    return y


def test_every_number_is_rounded_to_the_nearest_with_11_bits():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=generator)
    bits[0] = 0x7F7FFFFF
    # The odd halves of a step are ties, and the numbers beside them are not.
    ties = (bits & ~0x1FFF) | 0x1000
    x = torch.cat([bits, ties, ties - 1, ties + 1]).to(torch.int32).view(torch.float32)
    x = torch.where(x.isnan(), 0.0, x).to(DEVICE)
    y = rounded_by_the_kernel(x)
    finite = x.isfinite()
    assert torch.equal(y[finite], to_tf32(x[finite]).float())
    assert torch.equal(y[~finite], x[~finite])
    # The largest number of fp32 is nearer to 2**128 than to the largest of TF32.
    assert y[0] == torch.inf


def test_nan_inf_and_signed_zeros_come_through():
    # The NaNs that GPUs and x86 make, either sign; a carry out of the first would wrap to -0.
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, -0x400000], dtype=torch.int32)
    x = torch.cat([nans.view(torch.float32), torch.tensor([torch.inf, -torch.inf, 0.0, -0.0])])
    y = rounded_by_the_kernel(x.to(DEVICE)).cpu()
    assert y[:4].isnan().all()
    assert torch.equal(y[4:].view(torch.int32), x[4:].view(torch.int32))


def exact_tensors():
    """Numbers of 20 bits, two thirds of which TF32 has to round."""
    generator = torch.Generator().manual_seed(1)

    def numbers(*size):
        return (torch.randn(size, generator=generator).clamp(-7.9, 7.9) * 2**16).round() / 2**16

    def powers(*size):
        return torch.ldexp(torch.ones(size), torch.randint(-1, 2, size, generator=generator))

    n, h, w, c, k = SHAPE.N, SHAPE.H, SHAPE.W, SHAPE.C, SHAPE.K
    g, y = (channels_last(numbers(n, k, SHAPE.P, SHAPE.Q)) for _ in range(2))
    return make_tensors(SHAPE, torch.float32)._replace(
        x=channels_last(numbers(n, c, h, w)),
        w=channels_last(numbers(k, c, SHAPE.R, SHAPE.S)),
        scale_shift=torch.stack([powers(c), numbers(c)]).to(DEVICE),
        dy=DeferredGrad(g, y, torch.stack([powers(k), powers(k), numbers(k)]).to(DEVICE)),
    )


def product_of_kernel(t: ConvTensors, op, prologue, config):
    options = {"padding": 1, "allow_tf32": True, "config": config}
    scale_shift = t.scale_shift if prologue else None
    dy = t.dy if prologue else t.dy.g
    if op == "fprop":
        return conv_fprop(t.x, t.w, scale_shift=scale_shift, **options)[0]
    if op == "dgrad":
        return conv_dgrad(dy, t.w, t.x.shape[2:], **options)[0]
    return conv_wgrad(t.x, dy, (3, 3), scale_shift=scale_shift, **options)


def product_of_operands(t: ConvTensors, op, prologue, change):
    """The product of operands that `change` maps, and the sum of the magnitudes of its terms."""
    wide = t.double()
    x = ref.bn_apply_ref(wide.x, wide.scale_shift) if prologue else wide.x
    dy = ref.bn_backward_apply_ref(*wide.dy) if prologue else wide.dy.g
    size = {"fprop": (x, wide.w), "dgrad": (dy, wide.w), "wgrad": (x, dy)}[op]

    def multiply(first, second):
        if op == "fprop":
            return ref.conv_ref(first, second, **geometry(SHAPE))
        if op == "dgrad":
            return ref.conv_dgrad_ref(first, second, (SHAPE.H, SHAPE.W), **geometry(SHAPE))
        return ref.conv_wgrad_ref(first, second, (3, 3), **geometry(SHAPE))

    first, second = (change(t) for t in size)
    return multiply(first, second), multiply(first.abs(), second.abs())


@pytest.mark.parametrize(("op", "form", "prologue"), PRODUCTS)
def test_a_product_is_that_of_operands_rounded_to_nearest(op, form, prologue):
    """Within the error of a sum in fp32, and far from the products of operands changed otherwise.

    A sum of n terms in any order, rounded or cut off to 24 bits after each addition, is off by
    n * 2**-23 of the sum of their magnitudes at most.
    """
    t = exact_tensors()
    computed = product_of_kernel(t, op, prologue, CONFIGS[form]).double()
    allowed = SHAPE.gemm(op).k * 2.0**-23
    errors = {}
    for name, change in OPERANDS.items():
        truth, magnitude = product_of_operands(t, op, prologue, change)
        errors[name] = ((computed - truth).abs() / magnitude.clamp_min(1e-30)).max().item()
    assert errors["to nearest"] <= allowed, errors
    assert errors["cut off"] > 4 * allowed, errors
    assert errors["in full"] > 4 * allowed, errors


def test_without_tf32_no_operand_is_rounded():
    t = exact_tensors()
    y, _ = conv_fprop(t.x, t.w, padding=1, config=TILES)
    truth, magnitude = product_of_operands(t, "fprop", False, torch.Tensor.double)
    assert ((y.double() - truth).abs() <= SHAPE.RSC * 2.0**-23 * magnitude).all()


@triton.jit
def _cut_off(value):
    bits = value.to(tl.uint32, bitcast=True) & 0xFFFFE000
    return bits.to(tl.float32, bitcast=True)


@pytest.mark.skipif(HAS_GPU, reason="the fault is planted in interpreted kernels")
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_the_tuner_takes_rounded_products_and_refuses_those_cut_off(name, monkeypatch):
    """Cutting off makes both operands smaller by 2**-11 on average, more than a check allows."""
    workload = ConvWorkload(
        replace(SHAPE, N=1), PRECISIONS["tf32"], {ConvVariant(False, False, True): 1}, bytes=1
    )
    check = ParityCheck(workload, DEVICE)
    assert check(name, gpu_backend) is None
    monkeypatch.setattr(primitives, "round_to_tf32", _cut_off)
    assert "is off by" in check(name, gpu_backend)


@needs_gpu
@pytest.mark.parametrize(("op", "form", "prologue"), PRODUCTS)
def test_tf32_is_as_good_as_eager_tf32(op, form, prologue, monkeypatch):
    shape = ConvShape(16, 16, 16, 64, 64)
    choose = tma_config if form == "tma" else heuristic_config
    t = make_tensors(shape, torch.float32)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    config = choose(op, shape, torch.float32, tf32=True)
    computed = product_of_kernel(t, op, prologue, config)
    run = {
        "fprop": lambda t: fprop(t, shape, prologue),
        "dgrad": lambda t: dgrad(t, shape, prologue, False),
        "wgrad": lambda t: wgrad(t, shape, prologue, prologue),
    }[op]
    # TF32 rounds its operands to 11 bits, as fp16 does.
    assert_like_eager(op, computed, run(t), run(t.double()), torch.float16)
