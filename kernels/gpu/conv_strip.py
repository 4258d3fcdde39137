"""Forward and input gradient of 3x3 convolutions of few channels, in strips (strips.py).

    fprop  y[o] = sum over r of x'[r] @ T[r - o]     x' = x, or relu(a * x + b)
    dgrad  dx[o] = sum over r of dy'[r] @ T[r - o]   dy' = dy, or c0 * g + c1 * y + c2

for the output rows o of a patch and the rows r of its window; a gradient has the taps of w the
other way round and its channels exchanged. Epilogues are those of the other forms: y and its
statistics, or relu(a * y + b + residual); dx (+ shortcut), or g masked by the producer's ReLU and
its sums.

Stride 1, padding 1, any height and width; 16 or 32 channels each way, into fprop also 1 to 4;
bf16 and fp16. Narrow layers wait for instructions, not for bytes or products: an input is formed 3
times (PATCH_H = 4) where an im2col tile forms it 9 times, 4/3 of the products are made, and loads
and stores take 16 bytes a thread. All that a tile needs of x is loaded before its first product if
AHEAD is PATCH_H + 2: nothing else hides the latency of these loads but other programs.

A program takes every num_programs-th tile and merges their statistics or adds up their sums, so
that it leaves one partial for each channel, however many tiles it has.

Numerics: operands rounded to their dtype before the product, sums in fp32, one rounding; statistics
and sums of what is stored. Padding stays 0 behind the prologue. Deterministic.
Source: own derivation.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.gpu.epilogue import (
    channel_stats,
    channel_sum,
    finish_stats_of_all,
    finish_sums_of_all,
    load_channels,
    load_norm,
    load_outputs,
    load_scale_shift,
    store_gradient,
    store_output,
)
from fastres.kernels.gpu.last_program import merge_stats
from fastres.kernels.gpu.launch import KernelVariant
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.launch_rules import fits_strips
from fastres.kernels.gpu.patches import (
    are_dense,
    count_outputs,
    locate_patches,
    output_masks,
    patch_grid,
)
from fastres.kernels.gpu.primitives import wait_for_previous_kernel
from fastres.kernels.gpu.prologue import activate, backward_bn, uses_assembly
from fastres.kernels.gpu.strips import (
    add_products,
    load_rows,
    load_spread_filters,
    row_lanes,
    row_masks,
    zero_tiles,
)

__all__ = ["dgrad_strip_variant", "fprop_strip_variant", "strip_arguments"]


@triton.jit
def _conv_strip_fprop_kernel(
    x_ptr,  # (N, H, W, C) in: activation, or raw output of its producer
    in_scale_shift_ptr,  # (2, C) fp32 in: prologue relu(a * x + b); None: x as it is
    w_ptr,  # (K, 3, 3, C) in: dtype of x
    y_ptr,  # (N, H, W, K) out: dtype of x
    out_scale_shift_ptr,  # (2, K) fp32 in: epilogue a * y + b; None: y as it is
    residual_ptr,  # (N, H, W, K) in: added after the scale and shift; None: nothing added
    batch_norm,  # `BatchNormForward` of y; None: not wanted
    num_patches,
    num_tiles,
    SHAPE: tl.constexpr,  # `PatchShape` of y
    C: tl.constexpr,
    K: tl.constexpr,
    RELU: tl.constexpr,
    INDEX: tl.constexpr,
    ASM: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    PATCH_H: tl.constexpr = SHAPE.PATCH_H
    WHOLE: tl.constexpr = SHAPE.WHOLE
    ACTIVATE: tl.constexpr = in_scale_shift_ptr is not None
    # The packed prologue needs both numbers of a register in one pixel.
    PACKED: tl.constexpr = ASM and C >= 16

    filters = load_spread_filters(w_ptr, C, K, False)
    _, c = row_lanes(C)
    a = load_channels(in_scale_shift_ptr, c % C)
    b = load_channels(in_scale_shift_ptr, C + c % C)
    column = tl.arange(0, 2 * K)
    scale_shift = None
    if out_scale_shift_ptr is not None:
        scale_shift = load_scale_shift(out_scale_shift_ptr, column % K, K)
    count = 0.0
    mean = tl.zeros((K,), tl.float32)
    m2 = tl.zeros((K,), tl.float32)
    for number in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        tile = locate_patches(number, num_patches, SHAPE, BLOCK_M, INDEX)
        inside_x = row_masks(tile, SHAPE, C)
        inside_y = output_masks(tile, SHAPE, (column // K)[None, :])

        xs = load_rows(x_ptr, tile, SHAPE, inside_x, 0, AHEAD, C, not ACTIVATE)
        sums = zero_tiles(PATCH_H, BLOCK_M, 2 * K)
        for r in tl.static_range(PATCH_H + 2):
            xs += load_rows(x_ptr, tile, SHAPE, inside_x, r + AHEAD, 1, C, not ACTIVATE)
            x = xs[r]
            # Prologue.
            if ACTIVATE:
                x = activate(x, a, b, inside_x[r], PACKED)
            sums = add_products(sums, x, filters, r)

        # Epilogue.
        ys: tl.tuple = ()
        for o in tl.static_range(PATCH_H):
            offs = ((tile.pixels + o * SHAPE.W) * K)[:, None] + column[None, :]
            y = store_output(
                sums[o], offs, inside_y[o], y_ptr, residual_ptr, scale_shift, RELU, WHOLE, ASM
            )
            ys += (y,)
        if batch_norm is not None:
            tile_count = count_outputs(tile, SHAPE)
            tile_mean, tile_m2 = channel_stats(ys, inside_y, tile_count, K, WHOLE)
            count, mean, m2 = merge_stats(count, mean, m2, tile_count, tile_mean, tile_m2)

    if batch_norm is not None:
        finish_stats_of_all(count, mean, m2, batch_norm, K)


@triton.jit
def _conv_strip_dgrad_kernel(
    g_ptr,  # (N, H, W, K) in: dy, or the gradient g that dy is computed from
    y_ptr,  # (N, H, W, K) in: with g and coefficients; None: dy is read
    coefficients_ptr,  # (3, K) fp32 in: c0, c1, c2; None: dy is read
    w_ptr,  # (K, 3, 3, C) in: dtype of dy
    dx_ptr,  # (N, H, W, C) out: dx, or g of the producer's batch norm
    shortcut_ptr,  # (N, H, W, C) in: gradient added to dx; None: nothing added
    producer_y_ptr,  # (N, H, W, C) in: y of the layer that made x; None: no producer
    producer,  # `BatchNormBackward` of producer_y; None: dx alone
    num_patches,
    num_tiles,
    SHAPE: tl.constexpr,  # `PatchShape` of dx
    C: tl.constexpr,
    K: tl.constexpr,
    INDEX: tl.constexpr,
    ASM: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    PATCH_H: tl.constexpr = SHAPE.PATCH_H
    WHOLE: tl.constexpr = SHAPE.WHOLE
    COMPUTE_DY: tl.constexpr = coefficients_ptr is not None
    MASK: tl.constexpr = producer is not None

    filters = load_spread_filters(w_ptr, K, C, True)
    _, k = row_lanes(K)
    c0 = load_channels(coefficients_ptr, k)
    c1 = load_channels(coefficients_ptr, K + k)
    c2 = load_channels(coefficients_ptr, 2 * K + k)
    column = tl.arange(0, 2 * C)
    norm = load_norm(producer, column % C, C) if MASK else None
    sum_g = tl.zeros((C,), tl.float32)
    sum_gy = tl.zeros((C,), tl.float32)
    for number in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        tile = locate_patches(number, num_patches, SHAPE, BLOCK_M, INDEX)
        inside_dy = row_masks(tile, SHAPE, K)
        inside_dx = output_masks(tile, SHAPE, (column // C)[None, :])

        gs = load_rows(g_ptr, tile, SHAPE, inside_dy, 0, AHEAD, K, not COMPUTE_DY)
        ys: tl.tuple = ()
        if COMPUTE_DY:
            ys = load_rows(y_ptr, tile, SHAPE, inside_dy, 0, AHEAD, K, False)
        sums = zero_tiles(PATCH_H, BLOCK_M, 2 * C)
        for r in tl.static_range(PATCH_H + 2):
            gs += load_rows(g_ptr, tile, SHAPE, inside_dy, r + AHEAD, 1, K, not COMPUTE_DY)
            dy = gs[r]
            # Prologue.
            if COMPUTE_DY:
                ys += load_rows(y_ptr, tile, SHAPE, inside_dy, r + AHEAD, 1, K, False)
                dy = backward_bn(dy, ys[r], c0, c1, c2, inside_dy[r], ASM)
            sums = add_products(sums, dy, filters, r)

        # Epilogue.
        dx_rows, dxy_rows = sums[0], sums[0]
        for o in tl.static_range(PATCH_H):
            offs = ((tile.pixels + o * SHAPE.W) * C)[:, None] + column[None, :]
            producer_y = load_outputs(producer_y_ptr, offs, inside_dx[o], WHOLE) if MASK else None
            dx, dxy = store_gradient(
                sums[o], offs, inside_dx[o], dx_ptr, shortcut_ptr, producer_y, norm, WHOLE, ASM
            )
            # Added up row by row, not all rows at the end: they would stay in registers.
            dx_rows = dx if o == 0 else dx_rows + dx
            dxy_rows = dxy if o == 0 else dxy_rows + dxy
        if MASK:
            sum_g += channel_sum(dx_rows, C)
            sum_gy += channel_sum(dxy_rows, C)

    if MASK:
        finish_sums_of_all(sum_g, sum_gy, producer, C)


def fprop_strip_variant(
    config: ConvConfig,
    shape: ConvShape,
    x: torch.Tensor,
    w: torch.Tensor,
    residual: torch.Tensor | None,
) -> KernelVariant | None:
    """The launch in strips; None where configuration or operands want another form."""
    if config.form != "strip" or not fits_strips("fprop", shape, x.dtype):
        return None
    if not are_dense(x, residual):
        return None
    num_programs, args = strip_arguments(config, shape)
    args.update(x_ptr=x, w_ptr=w)
    trips = (args["num_tiles"] / num_programs,)
    return KernelVariant(_conv_strip_fprop_kernel, (num_programs,), args, num_programs, trips)


def dgrad_strip_variant(
    config: ConvConfig,
    shape: ConvShape,
    g: torch.Tensor,
    y: torch.Tensor | None,
    w: torch.Tensor,
    shortcut: torch.Tensor | None,
    producer_y: torch.Tensor | None,
) -> KernelVariant | None:
    """The launch in strips; None where configuration or operands want another form."""
    if config.form != "strip" or not fits_strips("dgrad", shape, g.dtype):
        return None
    if not are_dense(g, y, shortcut, producer_y):
        return None
    num_programs, args = strip_arguments(config, shape)
    args.update(g_ptr=g, y_ptr=y, w_ptr=w)
    trips = (args["num_tiles"] / num_programs,)
    return KernelVariant(_conv_strip_dgrad_kernel, (num_programs,), args, num_programs, trips)


def strip_arguments(config: ConvConfig, shape: ConvShape) -> tuple[int, dict[str, Any]]:
    """How many programs a launch in strips has, and the arguments that all its kernels share."""
    patches = patch_grid(shape, config.patch_h, config.block_m)
    num_programs = min(config.grid_size or patches.num_tiles, patches.num_tiles)
    return num_programs, {
        "num_patches": patches.num_patches,
        "num_tiles": patches.num_tiles,
        "SHAPE": patches.shape,
        "C": shape.C,
        "K": shape.K,
        "ASM": uses_assembly(),
        "AHEAD": min(config.ahead, config.patch_h + 2),
        "BLOCK_M": config.block_m,
    }
