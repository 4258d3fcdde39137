"""Batch norm forward in training, after a convolution: statistics, then apply (+ shortcut, ReLU).

    mean, var = over the N * H * W pixels of y;  a = gamma * rstd;  b = beta - mean * a
    out = relu(a * y + b + shortcut),  shortcut = none, residual, or a_s * y_s + b_s

Letters: y (N, H, W, C) raw convolution output, z = a * y + b, out the activation.

Tensor passes: apply reads y (and a shortcut) and writes out; the statistics usually
come from the convolution's epilogue for nothing, else `bn_stats` reads y once. They arrive as
(mean, M2) of tiles, and a tiny kernel of one program a channel merges them into a and b.

Numerics: all arithmetic in fp32 whatever the storage. Variance is merged from (count, mean, M2) of
the tiles, never E[y^2] - E[y]^2, so a large offset costs it no digits. Deterministic.
Source: Chan, Golub, LeVeque (1979) for the merge.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastres.kernels.gpu.checks import (
    TileStats,
    check_activation,
    check_vector,
    index_dtype,
    nhwc_strides,
)
from fastres.kernels.gpu.launch import Traffic, launch, num_bytes
from fastres.kernels.gpu.launch_config import RowConfig, row_config
from fastres.kernels.gpu.primitives import (
    affine,
    relu,
    round_to,
    row_offsets,
    store_tile_stats,
    wait_for_previous_kernel,
)
from fastres.kernels.layout import empty_channels_last

__all__ = ["BNForward", "bn_apply", "bn_finalize", "bn_stats"]

# Partials that a finalizing program reads at a time.
BLOCK_TILES = 1024


class BNForward(NamedTuple):
    """What `bn_finalize` returns; all (C,) fp32 but scale_shift, (2, C) fp32 with a above b.

    var is the biased variance, which normalises; unbiased_var is what torch feeds running_var.
    """

    mean: torch.Tensor
    var: torch.Tensor
    unbiased_var: torch.Tensor
    rstd: torch.Tensor
    scale_shift: torch.Tensor


@triton.jit
def _bn_stats_kernel(
    y_ptr,  # (N, H, W, C) in
    stats_ptr,  # (2, C, num_tiles) fp32 out: mean above M2
    num_rows,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    Y_STRIDES: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    tile = tl.program_id(0)
    first_row = tile.to(INDEX) * BLOCK_ROWS
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_rows = rows < num_rows
    mask_c = offs_c < C
    offs_y = row_offsets(rows, H, W, Y_STRIDES)[:, None] + offs_c[None, :]
    y = tl.load(y_ptr + offs_y, mask=mask_rows[:, None] & mask_c[None, :], other=0.0)
    count = tl.minimum(num_rows - first_row, BLOCK_ROWS)
    num_tiles = tl.num_programs(0)
    store_tile_stats(
        stats_ptr, y.to(tl.float32), mask_rows, count, offs_c, mask_c, tile, num_tiles, C
    )


def bn_stats(y: torch.Tensor, *, config: RowConfig | None = None) -> TileStats:
    """Mean and M2 of each channel and tile of y: for a convolution whose epilogue did not do it.

    Args:
        y: (N, C, H, W) channels_last, gaps allowed; bf16, fp16, fp32.
        config: tile; by default the rule of launch_config.py.

    Returns: `TileStats`.

    Raises: ValueError: when y is not as above.

    Numerics: two passes over a tile held in registers, fp32. Deterministic.
    """
    check_activation("y", y)
    n, c, h, w = y.shape
    num_rows = n * h * w
    config = config or row_config(num_rows, c)
    num_tiles = triton.cdiv(num_rows, config.block_rows)
    stats = y.new_empty((2, c, num_tiles), dtype=torch.float32)
    launch(
        _bn_stats_kernel,
        (num_tiles, triton.cdiv(c, config.block_c)),
        {
            "y_ptr": y,
            "stats_ptr": stats,
            "num_rows": num_rows,
            "H": h,
            "W": w,
            "C": c,
            "Y_STRIDES": nhwc_strides(y),
            "INDEX": index_dtype(y, stats),
            "BLOCK_ROWS": config.block_rows,
            "BLOCK_C": config.block_c,
        },
        num_warps=config.num_warps,
        num_stages=1,
        traffic=Traffic(reads=num_bytes(y), writes=num_bytes(stats), flops=4 * y.numel()),
    )
    return TileStats(stats, config.block_rows, num_rows)


@triton.jit
def _bn_finalize_kernel(
    stats_ptr,  # (2, C, num_tiles) fp32 in: mean above M2
    gamma_ptr,  # (C,) fp32 in
    beta_ptr,  # (C,) fp32 in
    mean_ptr,  # (C,) fp32 out, as are the next three
    var_ptr,
    unbiased_var_ptr,
    rstd_ptr,
    scale_shift_ptr,  # (2, C) fp32 out
    num_tiles,
    tile_rows,
    count,
    eps,
    C: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    channel = tl.program_id(0)
    means_ptr = stats_ptr + channel * num_tiles
    m2s_ptr = means_ptr + C * num_tiles

    # Distances from one tile's mean, not from 0: a common offset must cost no digits.
    pivot = tl.load(means_ptr)
    shift = tl.zeros((BLOCK_TILES,), dtype=tl.float32)
    for first in range(0, num_tiles, BLOCK_TILES):
        tiles = first + tl.arange(0, BLOCK_TILES)
        mask = tiles < num_tiles
        rows = tl.minimum(count - tiles.to(tl.int64) * tile_rows, tile_rows).to(tl.float32)
        distance = tl.load(means_ptr + tiles, mask=mask, other=0.0) - pivot
        shift += tl.where(mask, rows * distance, 0.0)
    mean = pivot + tl.sum(shift, axis=0) / count

    m2 = tl.zeros((BLOCK_TILES,), dtype=tl.float32)
    for first in range(0, num_tiles, BLOCK_TILES):
        tiles = first + tl.arange(0, BLOCK_TILES)
        mask = tiles < num_tiles
        rows = tl.minimum(count - tiles.to(tl.int64) * tile_rows, tile_rows).to(tl.float32)
        distance = tl.load(means_ptr + tiles, mask=mask, other=0.0) - mean
        within = tl.load(m2s_ptr + tiles, mask=mask, other=0.0)
        m2 += tl.where(mask, within + rows * distance * distance, 0.0)
    total = tl.sum(m2, axis=0)

    var = total / count
    rstd = 1.0 / tl.sqrt_rn(var + eps)
    a = tl.load(gamma_ptr + channel) * rstd
    tl.store(mean_ptr + channel, mean)
    tl.store(var_ptr + channel, var)
    tl.store(unbiased_var_ptr + channel, total / (count - 1))
    tl.store(rstd_ptr + channel, rstd)
    tl.store(scale_shift_ptr + channel, a)
    tl.store(scale_shift_ptr + C + channel, tl.load(beta_ptr + channel) - mean * a)


def bn_finalize(
    stats: TileStats, weight: torch.Tensor, bias: torch.Tensor, *, eps: float = 1e-5
) -> BNForward:
    """Merge the statistics of all tiles: scale a = weight * rstd, shift b = bias - mean * a.

    Args:
        stats: from `conv_fprop` or `bn_stats`.
        weight: (C,) fp32.
        bias: (C,) fp32.
        eps: added to the biased variance.

    Returns: `BNForward`.

    Raises: ValueError: when a vector is not as above, or each channel has a single value.

    Numerics: fp32; means are merged relative to one tile's mean. Deterministic.
    """
    _, c, num_tiles = stats.partials.shape
    check_vector("stats.partials", stats.partials, (2, c, num_tiles))
    check_vector("weight", weight, (c,))
    check_vector("bias", bias, (c,))
    if stats.num_rows < 2:
        raise ValueError(f"training needs more than 1 value a channel, got {stats.num_rows}")
    mean, var, unbiased_var, rstd = (torch.empty_like(weight) for _ in range(4))
    scale_shift = weight.new_empty((2, c))
    block_tiles = min(BLOCK_TILES, triton.next_power_of_2(num_tiles))
    launch(
        _bn_finalize_kernel,
        (c,),
        {
            "stats_ptr": stats.partials,
            "gamma_ptr": weight,
            "beta_ptr": bias,
            "mean_ptr": mean,
            "var_ptr": var,
            "unbiased_var_ptr": unbiased_var,
            "rstd_ptr": rstd,
            "scale_shift_ptr": scale_shift,
            "num_tiles": num_tiles,
            "tile_rows": stats.tile_rows,
            "count": stats.num_rows,
            "eps": eps,
            "C": c,
            "BLOCK_TILES": block_tiles,
        },
        num_warps=4,
        num_stages=1,
        traffic=Traffic(
            reads=num_bytes(stats.partials, weight, bias),
            writes=num_bytes(mean, var, unbiased_var, rstd, scale_shift),
            flops=8 * c * num_tiles,
        ),
        trips=triton.cdiv(num_tiles, block_tiles),
    )
    return BNForward(mean, var, unbiased_var, rstd, scale_shift)


@triton.jit
def _bn_apply_kernel(
    y_ptr,  # (N, H, W, C) in
    scale_shift_ptr,  # (2, C) fp32 in
    shortcut_ptr,  # (N, H, W, C) in: residual, or its raw projection; None: no shortcut
    shortcut_scale_shift_ptr,  # (2, C) fp32 in: the projection's batch norm; None: residual as is
    out_ptr,  # (N, H, W, C) out
    num_rows,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    Y_STRIDES: tl.constexpr,
    SHORTCUT_STRIDES: tl.constexpr,
    OUT_STRIDES: tl.constexpr,
    RELU: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    rows = tl.program_id(0).to(INDEX) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (rows < num_rows)[:, None] & mask_c[None, :]
    offs_y = row_offsets(rows, H, W, Y_STRIDES)[:, None] + offs_c[None, :]
    z = affine(tl.load(y_ptr + offs_y, mask=mask, other=0.0), scale_shift_ptr, offs_c, C, mask_c)
    if shortcut_ptr is not None:
        offs = row_offsets(rows, H, W, SHORTCUT_STRIDES)[:, None] + offs_c[None, :]
        shortcut = tl.load(shortcut_ptr + offs, mask=mask, other=0.0)
        if shortcut_scale_shift_ptr is not None:
            z += affine(shortcut, shortcut_scale_shift_ptr, offs_c, C, mask_c)
        else:
            z += shortcut.to(tl.float32)
    if RELU:
        z = relu(z)
    offs_out = row_offsets(rows, H, W, OUT_STRIDES)[:, None] + offs_c[None, :]
    tl.store(out_ptr + offs_out, round_to(z, out_ptr.dtype.element_ty), mask=mask)


def bn_apply(
    y: torch.Tensor,
    scale_shift: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    residual_scale_shift: torch.Tensor | None = None,
    relu: bool = True,
    config: RowConfig | None = None,
) -> torch.Tensor:
    """`out = relu(a * y + b + residual)`, or `+ a_s * residual + b_s`: a block's end in one pass.

    Args:
        y: (N, C, H, W) channels_last, gaps allowed; bf16, fp16, fp32.
        scale_shift: (2, C) fp32, a above b.
        residual: (N, C, H, W) channels_last, gaps allowed, dtype of y: the shortcut, or with
            residual_scale_shift the raw output of its projection.
        residual_scale_shift: (2, C) fp32, a_s above b_s: the projection's batch norm.
        relu: whether the ReLU is applied.
        config: tile; by default the rule of launch_config.py.

    Returns: out: (N, C, H, W) dense channels_last, dtype of y.

    Raises: ValueError: when a tensor's shape, dtype, device or layout is not as above.

    Numerics: fp32, one rounding; NaN comes through the ReLU. Deterministic.
    """
    check_activation("y", y)
    n, c, h, w = y.shape
    check_vector("scale_shift", scale_shift, (2, c))
    if residual is not None:
        check_activation("residual", residual, (n, c, h, w), y.dtype)
    elif residual_scale_shift is not None:
        raise ValueError("residual_scale_shift needs a residual")
    if residual_scale_shift is not None:
        check_vector("residual_scale_shift", residual_scale_shift, (2, c))
    num_rows = n * h * w
    config = config or row_config(num_rows, c)
    out = empty_channels_last(y, n, c, h, w)
    flops = 3 + (residual is not None) + 2 * (residual_scale_shift is not None)
    launch(
        _bn_apply_kernel,
        (triton.cdiv(num_rows, config.block_rows), triton.cdiv(c, config.block_c)),
        {
            "y_ptr": y,
            "scale_shift_ptr": scale_shift,
            "shortcut_ptr": residual,
            "shortcut_scale_shift_ptr": residual_scale_shift,
            "out_ptr": out,
            "num_rows": num_rows,
            "H": h,
            "W": w,
            "C": c,
            "Y_STRIDES": nhwc_strides(y),
            "SHORTCUT_STRIDES": nhwc_strides(residual),
            "OUT_STRIDES": nhwc_strides(out),
            "RELU": relu,
            "INDEX": index_dtype(y, residual, out),
            "BLOCK_ROWS": config.block_rows,
            "BLOCK_C": config.block_c,
        },
        num_warps=config.num_warps,
        num_stages=1,
        traffic=Traffic(
            reads=num_bytes(y, scale_shift, residual, residual_scale_shift),
            writes=num_bytes(out),
            flops=flops * y.numel(),
        ),
    )
    return out
