"""Batch norm forward in training, after a convolution: statistics, then apply (+ shortcut, ReLU).

    mean, var = over the N * H * W pixels of y;  a = gamma * rstd;  b = beta - mean * a
    out = relu(a * y + b + shortcut),  shortcut = none, residual, or a_s * y_s + b_s

Letters: y (N, H, W, C) raw convolution output, z = a * y + b, out the activation.

Tensor passes: apply reads y (and a shortcut) and writes out; the statistics usually
come from the convolution's epilogue for nothing, else `bn_stats` reads y once.

Numerics: all arithmetic in fp32 whatever the storage. Variance is merged from (count, mean, M2) of
the tiles (last_program.py), never E[y^2] - E[y]^2, so a large offset costs it no digits.
Deterministic. Source: own derivation.
"""

import torch
import triton
import triton.language as tl

from fastres.kernels.conv_types import BatchNorm
from fastres.kernels.gpu.checks import (
    check_activation,
    check_batch_norm,
    check_vector,
    index_dtype,
    nhwc_strides,
)
from fastres.kernels.gpu.last_program import finish_batch_norm, finish_stats, store_stats
from fastres.kernels.gpu.launch import Traffic, launch, num_bytes
from fastres.kernels.gpu.launch_config import RowConfig
from fastres.kernels.gpu.launch_rules import row_config
from fastres.kernels.gpu.primitives import (
    affine,
    relu,
    round_to,
    row_offsets,
    tile_stats,
    wait_for_previous_kernel,
)
from fastres.kernels.layout import empty_channels_last

__all__ = ["bn_apply", "bn_stats"]


@triton.jit
def _bn_stats_kernel(
    y_ptr,  # (N, H, W, C) in
    batch_norm,  # `BatchNormForward` of y
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
    column = tl.program_id(1)
    first_row = tile.to(INDEX) * BLOCK_ROWS
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    offs_c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_rows = rows < num_rows
    mask_c = offs_c < C
    offs_y = row_offsets(rows, H, W, Y_STRIDES)[:, None] + offs_c[None, :]
    y = tl.load(y_ptr + offs_y, mask=mask_rows[:, None] & mask_c[None, :], other=0.0)
    count = tl.minimum(num_rows - first_row, BLOCK_ROWS)
    mean, m2 = tile_stats(y.to(tl.float32), mask_rows, count)
    store_stats(batch_norm.partials_ptr, tile, count, mean, m2, offs_c, mask_c, C)
    num_tiles = tl.num_programs(0)
    finish_batch_norm(batch_norm, offs_c, column, tile, num_tiles, num_tiles, C)


def bn_stats(
    y: torch.Tensor, batch_norm: BatchNorm, *, config: RowConfig | None = None
) -> torch.Tensor:
    """Statistics of y and the batch norm that they make: where the convolution did not find them.

    Args:
        y: (N, C, H, W) channels_last, gaps allowed; bf16, fp16, fp32.
        batch_norm: weight and bias (C,) fp32; eps is added to the biased variance.
        config: tile; by default the rule of launch_rules.py.

    Returns: (5, C) fp32, `LayerState.stats`: mean, unbiased variance, rstd, a, b.

    Raises: ValueError: when a tensor is not as above, or each channel has a single value.

    Numerics: two passes over a tile held in registers, fp32. Deterministic.
    """
    check_activation("y", y)
    n, c, h, w = y.shape
    num_rows = n * h * w
    check_batch_norm(batch_norm, c, num_rows)
    config = config or row_config(num_rows, c, y.dtype)
    num_tiles = triton.cdiv(num_rows, config.block_rows)
    num_columns = triton.cdiv(c, config.block_c)
    finish, stats = finish_stats(y, batch_norm, num_tiles, num_columns=num_columns)
    assert stats is not None
    launch(
        _bn_stats_kernel,
        (num_tiles, num_columns),
        {
            "y_ptr": y,
            **finish.args,
            "num_rows": num_rows,
            "H": h,
            "W": w,
            "C": c,
            "Y_STRIDES": nhwc_strides(y),
            "INDEX": index_dtype(y),
            "BLOCK_ROWS": config.block_rows,
            "BLOCK_C": config.block_c,
        },
        num_warps=config.num_warps,
        num_stages=1,
        traffic=Traffic(
            reads=num_bytes(y) + finish.reads, writes=finish.writes, flops=4 * y.numel()
        ),
        last_programs=finish.last_programs,
    )
    return stats


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
        config: tile; by default the rule of launch_rules.py.

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
    config = config or row_config(num_rows, c, y.dtype)
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
