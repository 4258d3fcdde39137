"""Filter gradient of 3x3 convolutions of few channels, in strips (strips.py).

    dT[t] = sum over patches and their rows o of x'[o + t]^T @ dy'[o]

    prologue   x' = x, or relu(a * x + b);  dy' = dy, or c0 * g + c1 * y + c2
    epilogue   both output pixels of dT added up to a partial dw; the last program adds the partials

Stride 1, padding 1, any height and width; 16 or 32 channels out, 16, 32 or up to 4 in; bf16, fp16.
A pixel of x is formed 3 times (PATCH_H = 4), one of dy once, where an im2col tile forms x 9 times
and both once more for every 64 of R * S * C; 4/3 of the products are made.

A program keeps three products of 4 * C x 2 * K in registers, of images of up to 4 channels three or
four of 64 x 16, and takes every split_k-th tile. Adding up the pixels costs it 1,000 to 2,000
instructions, so one or two programs a multiprocessor are enough, which also makes few partials:
4 * 9 * C * K bytes each, written and read once.

Numerics: operands rounded to their dtype before the product, sums in fp32, dw rounded once. A tap
that joins a non-finite x with an output beyond the border, whose dy counts as 0, is NaN.
Deterministic. Source: own derivation.
"""

import torch
import triton
import triton.language as tl

from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.gpu.conv_strip import strip_arguments
from fastres.kernels.gpu.epilogue import load_channels, load_outputs
from fastres.kernels.gpu.launch import KernelVariant
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.launch_rules import fits_strips
from fastres.kernels.gpu.patches import are_dense, locate_patches, output_masks
from fastres.kernels.gpu.primitives import wait_for_previous_kernel
from fastres.kernels.gpu.prologue import activate, backward_bn
from fastres.kernels.gpu.strips import (
    add_filter_products,
    finish_filter_sums,
    load_rows,
    row_lanes,
    row_masks,
    zero_filter_sums,
)

__all__ = ["wgrad_strip_variant"]


@triton.jit
def _conv_strip_wgrad_kernel(
    x_ptr,  # (N, H, W, C) in: activation, or raw output of its producer
    in_scale_shift_ptr,  # (2, C) fp32 in: prologue relu(a * x + b); None: x as it is
    g_ptr,  # (N, H, W, K) in: dy, or the gradient g that dy is computed from
    y_ptr,  # (N, H, W, K) in: with g and coefficients; None: dy is read
    coefficients_ptr,  # (3, K) fp32 in: c0, c1, c2; None: dy is read
    dw_ptr,  # (K, 3, 3, C) out
    partials_ptr,  # (num_programs + num_groups, K, 3, 3, C) fp32: None where there is one program
    counters_ptr,  # (1 + num_groups,) int32: zeros
    num_patches,
    num_tiles,
    SHAPE: tl.constexpr,  # `PatchShape` of dy
    C: tl.constexpr,
    K: tl.constexpr,
    INDEX: tl.constexpr,
    ASM: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    PATCH_H: tl.constexpr = SHAPE.PATCH_H
    ACTIVATE: tl.constexpr = in_scale_shift_ptr is not None
    COMPUTE_DY: tl.constexpr = coefficients_ptr is not None
    # The packed prologue needs both numbers of a register in one pixel.
    PACKED: tl.constexpr = ASM and C >= 16

    _, c = row_lanes(C)
    a = load_channels(in_scale_shift_ptr, c % C)
    b = load_channels(in_scale_shift_ptr, C + c % C)
    # A window row has 64 lanes, or so many output rows together have 64 columns.
    JOIN: tl.constexpr = 1 if C >= 16 else 32 // K
    sums = zero_filter_sums(C, K, JOIN)
    column = tl.arange(0, JOIN * 2 * K)
    o = (column // (2 * K))[None, :]
    q = (column // K % 2)[None, :]
    c0 = load_channels(coefficients_ptr, column % K)
    c1 = load_channels(coefficients_ptr, K + column % K)
    c2 = load_channels(coefficients_ptr, 2 * K + column % K)
    # Masks of partial tiles, hoisted out of the loop, would take registers that operands need.
    PARTIAL: tl.constexpr = not SHAPE.WHOLE
    for number in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), disable_licm=PARTIAL):
        tile = locate_patches(number, num_patches, SHAPE, BLOCK_M, INDEX)
        inside_x = row_masks(tile, SHAPE, C)
        inside_dy = output_masks(tile, SHAPE, q, JOIN, o)

        # Prologues: padding and what hangs over an image stay 0, although b and c2 are not.
        xs = load_rows(x_ptr, tile, SHAPE, inside_x, 0, AHEAD, C, not ACTIVATE)
        dys: tl.tuple = ()
        for p in tl.static_range(PATCH_H // JOIN):
            rows = p * JOIN + o
            offs = (tile.pixels * K)[:, None] + rows * (SHAPE.W * K) + (column % (2 * K))[None, :]
            dy = load_outputs(g_ptr, offs, inside_dy[p], SHAPE.WHOLE)
            if COMPUTE_DY:
                y = load_outputs(y_ptr, offs, inside_dy[p], SHAPE.WHOLE)
                dy = backward_bn(dy, y, c0, c1, c2, inside_dy[p], ASM)
            dys += (dy,)
        for r in tl.static_range(PATCH_H + 2):
            xs += load_rows(x_ptr, tile, SHAPE, inside_x, r + AHEAD, 1, C, not ACTIVATE)
            x = xs[r]
            if ACTIVATE:
                x = activate(x, a, b, inside_x[r], PACKED)
            sums = add_filter_products(sums, x, dys, r)

    # Epilogue.
    finish_filter_sums(dw_ptr, partials_ptr, counters_ptr, sums, C, K, False, GROUP)


def wgrad_strip_variant(
    config: ConvConfig,
    shape: ConvShape,
    x: torch.Tensor,
    g: torch.Tensor,
    y: torch.Tensor | None,
) -> KernelVariant | None:
    """The launch in strips; None where configuration or operands want another form."""
    if config.form != "strip" or not fits_strips("wgrad", shape, x.dtype):
        return None
    if not are_dense(x, g, y):
        return None
    num_programs, args = strip_arguments(config, shape)
    num_programs = min(config.split_k, num_programs)
    args.update(x_ptr=x, g_ptr=g, y_ptr=y)
    trips = (args["num_tiles"] / num_programs,)
    return KernelVariant(_conv_strip_wgrad_kernel, (num_programs,), args, num_programs, trips)
