"""Jit helpers that the kernels share: rounding, products, im2col loads, per-tile statistics.

Triton inlines them, so they cost nothing; they make prologue, main loop and epilogue of a kernel
readable at one look.

`round_to` and `dot_fp32` exist because the interpreter differs from the hardware for bfloat16: it
truncates where the hardware rounds to nearest even, and multiplies the raw bits in `tl.dot`. Both
give hardware arithmetic in both places.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = [
    "INTERPRETED",
    "add_outer",
    "affine",
    "compute_dy",
    "dot_fp32",
    "dot_pixels",
    "im2col_offsets",
    "load_im2col",
    "pixel_offsets",
    "relu",
    "relu_grad",
    "round_to",
    "round_to_tf32",
    "row_offsets",
    "tile_stats",
    "tile_sum",
    "wait_for_previous_kernel",
    "zero_outer",
    "zero_sums",
]

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """Programmatic dependent launch (PDL): the first statement of every kernel.

    Launched with PDL, the programs of a kernel may start while the kernel before it in the stream
    still runs, as soon as all of its programs said `gdc_launch_dependents` or ended: the launch and
    its latency overlap. `gdc_wait` blocks until that kernel has ended and its writes are seen. It
    stands before the first read, of what an earlier kernel may have written, and before the first
    write, to memory which an earlier kernel may still read and the allocator handed on meanwhile.

    Every kernel waits, even one that needs nothing of the last: only the kernel directly before is
    waited for, and its end is the end of all others before it because it waited too. Dependents
    are let in at once; they can do nothing before this kernel ends but be there.

    Kernels of others in between are launched as ever: they wait for the end of what precedes them,
    and the next kernel with PDL for theirs.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def relu(z):
    """`max(z, 0)` that lets NaN through, as torch.relu does."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu_grad(out, dout):
    """`dout` where out > 0, else 0; a NaN in out passes dout, as in torch."""
    return tl.where(out <= 0.0, 0.0, dout)


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """Round an fp32 tile to `dtype`, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        is_nan = value != value
        bits = tl.where(is_nan, 0.0, value).to(tl.uint32, bitcast=True)
        bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        value = tl.where(is_nan, value, bits.to(tl.float32, bitcast=True))
    return value.to(dtype)


@triton.jit
def round_to_tf32(value):
    """Round an fp32 tile to the 11 significant bits of TF32: to nearest, ties away from 0.

    Written in integers, so that the interpreter computes it too. It is no slower: ptxas assembles
    `cvt.rna.tf32.f32` into the same comparison, addition and mask on sm_80, sm_90 and sm_100.
    """
    bits = value.to(tl.uint32, bitcast=True)
    # A carry runs on into the exponent, as it should; out of a NaN it would make a number.
    bits = tl.where(value == value, bits + 0x1000, bits) & 0xFFFFE000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def dot_fp32(lhs, rhs, acc, PRECISION: tl.constexpr):
    """`acc + lhs @ rhs` in fp32; PRECISION ("ieee" or "tf32") matters for fp32 operands only.

    Tensor cores ignore the 13 bits that TF32 lacks, and `tl.dot` rounds nothing for them. Cutting
    them off makes every operand smaller, by 2**-11 on average, so the error of a sum would grow
    with its length; rounding as cuDNN does has no bias.
    """
    if PRECISION == "tf32" and lhs.dtype == tl.float32:
        lhs = round_to_tf32(lhs)
        rhs = round_to_tf32(rhs)
    if INTERPRETED:
        lhs = lhs.to(tl.float32)
        rhs = rhs.to(tl.float32)
    return tl.dot(lhs, rhs, acc, input_precision=PRECISION)


@triton.jit
def zero_outer(A: tl.constexpr, B: tl.constexpr):
    """Where `add_outer` begins."""
    return tl.zeros((A, B) if min(B, 64) <= A else (B, A), dtype=tl.float32)


@triton.jit
def add_outer(acc, a, b):
    """`acc + a^T @ b` of a [pixels, A] and b [pixels, B], or the same transposed, `acc + b^T @ a`.

    A product of a warpgroup has 64 rows. Where A has fewer, the longer side makes them.
    """
    if a.shape[1] >= min(b.shape[1], 64):
        acc = dot_fp32(tl.trans(a), b, acc, "ieee")
    else:
        acc = dot_fp32(tl.trans(b), a, acc, "ieee")
    return acc


@triton.jit
def zero_sums(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FILTERS_FIRST: tl.constexpr):
    """Where `dot_pixels` begins."""
    if FILTERS_FIRST:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    return acc


@triton.jit
def dot_pixels(x, w, acc, PRECISION: tl.constexpr, FILTERS_FIRST: tl.constexpr):
    """`acc + x @ w`, pixels by filters, or with FILTERS_FIRST the same transposed.

    Filters as rows save an epilogue instructions: a thread then holds many pixels of few filters,
    not few of many, and adds them up for the statistics without asking its neighbours. But only the
    left operand is multiplied from registers, where a prologue leaves pixels; and a product of a
    warpgroup has 64 rows.
    """
    return dot_fp32(w.T, x.T, acc, PRECISION) if FILTERS_FIRST else dot_fp32(x, w, acc, PRECISION)


@triton.jit
def pixel_offsets(n, h, w, STRIDES: tl.constexpr):
    """Element offsets of pixels (n, h, w) in an NHWC tensor whose (n, h, w) strides are given."""
    return n * STRIDES[0] + h * STRIDES[1] + w * STRIDES[2]


@triton.jit
def row_offsets(offs_nhw, H: tl.constexpr, W: tl.constexpr, STRIDES: tl.constexpr):
    """Element offsets of flattened pixels; one multiplication if the pixels are evenly spaced."""
    if STRIDES[1] == W * STRIDES[2] and STRIDES[0] == H * STRIDES[1]:
        offsets = offs_nhw * STRIDES[2]
    else:
        offsets = pixel_offsets(offs_nhw // (H * W), offs_nhw // W % H, offs_nhw % W, STRIDES)
    return offsets


@triton.jit
def im2col_offsets(
    offs_npq,
    P: tl.constexpr,
    Q: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    X_STRIDES: tl.constexpr,
):
    """Offset, row and column in x of the upper left tap of each output pixel; may be negative."""
    h0 = offs_npq // Q % P * STRIDE - PADDING
    w0 = offs_npq % Q * STRIDE - PADDING
    return pixel_offsets(offs_npq // (P * Q), h0, w0, X_STRIDES), h0, w0


@triton.jit
def load_im2col(
    x_ptr,
    offs_x,  # [rows] from im2col_offsets, as are h0 and w0
    h0,
    w0,
    mask_rows,
    offs_rsc,  # [columns] taps x channels, flattened
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    PADDING: tl.constexpr,
    X_STRIDES: tl.constexpr,
):
    """The im2col tile [rows, columns] of x, and where it lies inside the image; 0 elsewhere."""
    c = offs_rsc % C
    s = offs_rsc // C % S
    r = offs_rsc // (S * C)
    mask = mask_rows[:, None] & (offs_rsc < R * S * C)[None, :]
    if PADDING > 0:
        h = h0[:, None] + r[None, :]
        w = w0[:, None] + s[None, :]
        mask = mask & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    taps = r * X_STRIDES[1] + s * X_STRIDES[2] + c
    return tl.load(x_ptr + offs_x[:, None] + taps[None, :], mask=mask, other=0.0), mask


@triton.jit
def affine(x, scale_shift_ptr, channels, C: tl.constexpr, mask_c):
    """`a * x + b` in fp32 for a tile [rows, channels]; scale_shift is (2, C): a above b."""
    a = tl.load(scale_shift_ptr + channels, mask=mask_c, other=0.0)
    b = tl.load(scale_shift_ptr + C + channels, mask=mask_c, other=0.0)
    return x.to(tl.float32) * a[None, :] + b[None, :]


@triton.jit
def compute_dy(g, y, coefficients_ptr, channels, K: tl.constexpr, mask, mask_k):
    """`dy = c0 * g + c1 * y + c2` in fp32, 0 outside `mask`; coefficients (3, K): c0, c1, c2."""
    c0 = tl.load(coefficients_ptr + channels, mask=mask_k, other=0.0)
    c1 = tl.load(coefficients_ptr + K + channels, mask=mask_k, other=0.0)
    c2 = tl.load(coefficients_ptr + 2 * K + channels, mask=mask_k, other=0.0)
    dy = c0[None, :] * g.to(tl.float32) + (c1[None, :] * y.to(tl.float32) + c2[None, :])
    return tl.where(mask, dy, 0.0)


@triton.jit
def tile_stats(values, mask_rows, count):
    """Mean and M2, the sum of squared distances from it, of each channel of a tile.

    values: [rows, channels] fp32, anything outside mask_rows, which has `count` rows. Corrected
    two-pass algorithm: the second pass also finds what rounding left out of the mean.
    """
    rows = count.to(tl.float32)
    rough = tl.sum(tl.where(mask_rows[:, None], values, 0.0), axis=0) / rows
    distance = tl.where(mask_rows[:, None], values - rough[None, :], 0.0)
    rest = tl.sum(distance, axis=0)
    m2 = tl.sum(distance * distance, axis=0) - rest * rest / rows
    return rough + rest / rows, tl.maximum(m2, 0.0, tl.PropagateNan.ALL)


@triton.jit
def tile_sum(values, mask):
    """Sum of each channel of a tile [rows, channels], over what lies inside the mask."""
    return tl.sum(tl.where(mask, values, 0.0), axis=0)
