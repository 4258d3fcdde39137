"""What becomes of a loaded operand before its product: the prologues, as jit helpers on registers.

    activate     relu(a * x + b)           the activation, from the raw output x of its producer
    backward_bn  c0 * g + (c1 * y + c2)    dy, from the gradient g of the batch norm's output

Both are computed in fp32, rounded once to the dtype of the operand, and 0 outside the image: b and
c2 are not 0, so padding is masked behind the affine. a, b and c0 to c2 are tiles that broadcast
against the operand. `round_pair` is their counterpart in an epilogue: a tile of sums as it is
stored, and that again in fp32, of which statistics and gradient sums are made.

In bf16 the compiler unpacks, compares, converts and packs one number at a time. ASM gives it the
packed form: two numbers to a register, one conversion for both, the ReLU inside that conversion,
the mask as one AND. Both round to nearest even, so the bits are the same; a NaN comes out as the
canonical one. Which neighbours share a register is the compiler's choice, two channels of a pixel
or two pixels of a transposed tile, so each has a mask of its own. Without ASM, in the interpreter
and for other dtypes the plain form is compiled.

Source: own derivation; PTX ISA, sections cvt and fma.
"""

from contextlib import AbstractContextManager

import triton
import triton.language as tl

from fastres.kernels.gpu.primitives import INTERPRETED, relu, round_to
from fastres.kernels.override import Override

__all__ = [
    "ACTIVATE_PTX",
    "BACKWARD_BN_PTX",
    "ROUND_PAIR_PTX",
    "activate",
    "activate_channels",
    "backward_bn",
    "backward_bn_channels",
    "plain_arithmetic",
    "round_pair",
    "uses_assembly",
]

# $0: two results. $1: two of x. $2, $3: a. $4, $5: b. $6: two masks, all ones or zero.
ACTIVATE_PTX = tl.constexpr("""{
    .reg .b32 lo, hi;
    .reg .f32 z0, z1;
    shl.b32 lo, $1, 16;
    and.b32 hi, $1, 0xffff0000;
    mov.b32 z0, lo;
    mov.b32 z1, hi;
    fma.rn.f32 z0, z0, $2, $4;
    fma.rn.f32 z1, z1, $3, $5;
    cvt.rn.relu.bf16x2.f32 lo, z1, z0;
    and.b32 $0, lo, $6;
}""")

# $0: two results. $1, $2: two of g and of y. $3 to $8: c0, c1, c2, two of each. $9: two masks.
BACKWARD_BN_PTX = tl.constexpr("""{
    .reg .b32 lo, hi;
    .reg .f32 d0, d1, g0, g1;
    shl.b32 lo, $2, 16;
    and.b32 hi, $2, 0xffff0000;
    mov.b32 d0, lo;
    mov.b32 d1, hi;
    fma.rn.f32 d0, d0, $5, $7;
    fma.rn.f32 d1, d1, $6, $8;
    shl.b32 lo, $1, 16;
    and.b32 hi, $1, 0xffff0000;
    mov.b32 g0, lo;
    mov.b32 g1, hi;
    fma.rn.f32 d0, g0, $3, d0;
    fma.rn.f32 d1, g1, $4, d1;
    cvt.rn.bf16x2.f32 lo, d1, d0;
    and.b32 $0, lo, $9;
}""")

# $0: two bf16. $1, $2: the same in fp32. $3, $4: two fp32.
ROUND_PAIR_PTX = tl.constexpr("""
    cvt.rn.bf16x2.f32 $0, $4, $3;
    shl.b32 $1, $0, 16;
    and.b32 $2, $0, 0xffff0000;
""")

_plain: Override[bool] = Override()


def plain_arithmetic() -> AbstractContextManager[None]:
    """A context in which kernels are launched without inline assembly: to compare both forms."""
    return _plain.set(True)


def uses_assembly() -> bool:
    """What launchers pass as ASM."""
    return not _plain.value


@triton.jit
def activate(x, a, b, inside, ASM: tl.constexpr):
    """`relu(a * x + b)` in the dtype of x, 0 where `inside` is false."""
    if ASM and not INTERPRETED and x.dtype == tl.bfloat16:
        result = tl.inline_asm_elementwise(
            ACTIVATE_PTX,
            "=r,r,f,f,f,f,r",
            [x, a, b, tl.where(inside, -1, 0).to(tl.int16)],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        z = relu(x.to(tl.float32) * a + b)
        result = round_to(tl.where(inside, z, 0.0), x.dtype)
    return result


@triton.jit
def backward_bn(g, y, c0, c1, c2, inside, ASM: tl.constexpr):
    """`c0 * g + (c1 * y + c2)` in the dtype of g, 0 where `inside` is false."""
    if ASM and not INTERPRETED and g.dtype == tl.bfloat16:
        result = tl.inline_asm_elementwise(
            BACKWARD_BN_PTX,
            "=r,r,r,f,f,f,f,f,f,r",
            [g, y, c0, c1, c2, tl.where(inside, -1, 0).to(tl.int16)],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        dy = c0 * g.to(tl.float32) + (c1 * y.to(tl.float32) + c2)
        result = round_to(tl.where(inside, dy, 0.0), g.dtype)
    return result


@triton.jit
def activate_channels(
    x,  # [rows, columns]
    scale_shift_ptr,  # (2, C) fp32: a above b
    channels,  # [columns]
    mask_c,  # which of them exist
    inside,
    C: tl.constexpr,
    ASM: tl.constexpr,
):
    """`activate` of a tile whose columns are any channels."""
    a = tl.load(scale_shift_ptr + channels, mask=mask_c, other=0.0)
    b = tl.load(scale_shift_ptr + C + channels, mask=mask_c, other=0.0)
    return activate(x, a[None, :], b[None, :], inside, ASM)


@triton.jit
def backward_bn_channels(
    g,  # [rows, columns], as is y
    y,
    coefficients_ptr,  # (3, K) fp32: c0, c1, c2
    channels,  # [columns]
    mask_k,  # which of them exist
    inside,
    K: tl.constexpr,
    ASM: tl.constexpr,
):
    """`backward_bn` of a tile whose columns are any channels."""
    c0 = tl.load(coefficients_ptr + channels, mask=mask_k, other=0.0)
    c1 = tl.load(coefficients_ptr + K + channels, mask=mask_k, other=0.0)
    c2 = tl.load(coefficients_ptr + 2 * K + channels, mask=mask_k, other=0.0)
    return backward_bn(g, y, c0[None, :], c1[None, :], c2[None, :], inside, ASM)


@triton.jit
def round_pair(value, dtype: tl.constexpr, ASM: tl.constexpr):
    """An fp32 tile rounded to `dtype`, and the rounded numbers in fp32."""
    if ASM and not INTERPRETED and dtype == tl.bfloat16:
        rounded, wide = tl.inline_asm_elementwise(
            ROUND_PAIR_PTX,
            "=&r,=r,=r,f,f",
            [value],
            dtype=(tl.bfloat16, tl.float32),
            is_pure=True,
            pack=2,
        )
    else:
        rounded = round_to(value, dtype)
        wide = rounded.to(tl.float32)
    return rounded, wide
