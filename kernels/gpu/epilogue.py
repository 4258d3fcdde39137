"""What becomes of a finished tile of sums: the epilogues of the convolutions, as jit helpers.

A convolution has two kernels, which load pixels by pointers or by TMA (conv_tma.py); both end here,
and then in last_program.py, where the last program merges what these leave of every tile.
A pointer that is None switches its step off. The kernels document every pointer.
"""

import triton
import triton.language as tl

from fastres.kernels.gpu.last_program import store_stats, store_sums
from fastres.kernels.gpu.primitives import (
    affine,
    relu,
    relu_grad,
    round_to,
    row_offsets,
    tile_stats,
    tile_sum,
)

__all__ = ["store_gradient_tile", "store_output_tile"]


@triton.jit
def store_output_tile(
    acc,  # [BLOCK_M, BLOCK_N] fp32 sums of consecutive output pixels
    tile_m,  # number of the tile among those of its channels
    num_npq,
    offs_k,  # [BLOCK_N] output channels
    y_ptr,
    stats_ptr,
    out_scale_shift_ptr,
    residual_ptr,
    K: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    Y_STRIDES: tl.constexpr,
    RESIDUAL_STRIDES: tl.constexpr,
    RELU: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Forward: y, or relu(a * y + b + residual); and the batch-norm statistics of it as stored."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    offs_npq = tile_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_npq = offs_npq < num_npq
    mask_k = offs_k < K
    mask = mask_npq[:, None] & mask_k[None, :]
    if out_scale_shift_ptr is not None:
        acc = affine(acc, out_scale_shift_ptr, offs_k, K, mask_k)
    if residual_ptr is not None:
        offs = row_offsets(offs_npq, P, Q, RESIDUAL_STRIDES)[:, None] + offs_k[None, :]
        acc += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        acc = relu(acc)
    y = round_to(acc, y_ptr.dtype.element_ty)
    offs_y = row_offsets(offs_npq, P, Q, Y_STRIDES)[:, None] + offs_k[None, :]
    tl.store(y_ptr + offs_y, y, mask=mask)
    if stats_ptr is not None:
        count = tl.minimum(num_npq - tile_m.to(INDEX) * BLOCK_M, BLOCK_M)
        mean, m2 = tile_stats(y.to(tl.float32), mask_npq, count)
        store_stats(stats_ptr, tile_m, count, mean, m2, offs_k, mask_k, K)


@triton.jit
def store_gradient_tile(
    acc,  # [BLOCK_M, BLOCK_N] fp32 sums of input pixels
    offs_nhw,  # [BLOCK_M] which pixels, flattened
    mask_nhw,  # [BLOCK_M] which of them exist
    offs_c,  # [BLOCK_N] input channels
    tile,  # number of the tile among those of its channels
    dx_ptr,
    shortcut_ptr,
    producer_y_ptr,
    producer_stats_ptr,
    sums_ptr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    DX_STRIDES: tl.constexpr,
    SHORTCUT_STRIDES: tl.constexpr,
    PRODUCER_Y_STRIDES: tl.constexpr,
):
    """Input gradient: dx (+ shortcut); or g, masked by the producer's ReLU, and its two sums."""
    mask_c = offs_c < C
    mask = mask_nhw[:, None] & mask_c[None, :]
    if shortcut_ptr is not None:
        offs = row_offsets(offs_nhw, H, W, SHORTCUT_STRIDES)[:, None] + offs_c[None, :]
        acc += tl.load(shortcut_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if producer_y_ptr is not None:
        offs = row_offsets(offs_nhw, H, W, PRODUCER_Y_STRIDES)[:, None] + offs_c[None, :]
        producer_y = tl.load(producer_y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        out = affine(producer_y, producer_stats_ptr + 3 * C, offs_c, C, mask_c)
        acc = relu_grad(out, acc)
    dx = round_to(acc, dx_ptr.dtype.element_ty)
    offs_dx = row_offsets(offs_nhw, H, W, DX_STRIDES)[:, None] + offs_c[None, :]
    tl.store(dx_ptr + offs_dx, dx, mask=mask)
    if producer_y_ptr is not None:
        g = dx.to(tl.float32)
        mean = tl.load(producer_stats_ptr + offs_c, mask=mask_c, other=0.0)
        sum_gy = tile_sum(g * (producer_y - mean[None, :]), mask)
        store_sums(sums_ptr, tile, tile_sum(g, mask), sum_gy, None, offs_c, mask_c, C)
