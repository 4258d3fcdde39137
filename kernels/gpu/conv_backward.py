"""Both gradients of a 3x3 convolution of few channels in one launch, in strips (strips.py).

    dx[o] = sum over r of dy'[r] @ T[r - o]                     dy' = c0 * g + c1 * y + c2
    dT[t] = sum over patches and o of dy'[o + t]^T @ x'[o]      x' = x, or relu(a * x + b)

for the output rows o of a patch and the rows r of its window: T holds the taps the other way round,
and so does dT. Each window row of dy' is loaded and formed once for both products, and each x once
for the product and the mask of the ReLU behind it.

    epilogue   dx (+ shortcut), or g masked by the producer's ReLU with its sums; every program adds
               up both pixels of dT to a partial dw, and the last one adds the partials

Tensor passes: g, y, x and dx, with a shortcut one more; two launches take three more. A pixel of dy
is formed 3 times (PATCH_H = 4), one of x once. A program keeps the three dT in registers besides
the sums of dx, which leaves room for 16 channels each way and no more.

Numerics: as conv_strip.py and conv_strip_wgrad.py. Deterministic. Source: own derivation.
"""

import torch
import triton
import triton.language as tl

from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.conv_types import ConvGrads, DeferredGrad, LayerState
from fastres.kernels.gpu.checks import (
    check_activation,
    check_deferred_grad,
    check_filter,
    check_state,
    index_dtype,
)
from fastres.kernels.gpu.conv_strip import strip_arguments
from fastres.kernels.gpu.epilogue import (
    channel_sum,
    finish_sums_of_all,
    load_channels,
    load_outputs,
    load_scale_shift,
    store_gradient,
)
from fastres.kernels.gpu.last_program import allocate_partials, finish_grads
from fastres.kernels.gpu.launch import Traffic, launch, num_bytes
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.launch_rules import fits_fused
from fastres.kernels.gpu.patches import are_dense, locate_patches, output_masks
from fastres.kernels.gpu.primitives import wait_for_previous_kernel
from fastres.kernels.gpu.prologue import activate, backward_bn
from fastres.kernels.gpu.strips import (
    add_filter_products,
    add_products,
    finish_filter_sums,
    fold_outputs,
    load_rows,
    load_spread_filters,
    row_lanes,
    row_masks,
    zero_tiles,
)
from fastres.kernels.layout import empty_channels_last

__all__ = ["conv_gradients"]


@triton.jit
def _conv_backward_kernel(
    g_ptr,  # (N, H, W, K) in: gradient that dy is computed from
    y_ptr,  # (N, H, W, K) in
    coefficients_ptr,  # (3, K) fp32 in: c0, c1, c2
    x_ptr,  # (N, H, W, C) in: activation; with a producer its raw output
    w_ptr,  # (K, 3, 3, C) in: dtype of x
    dx_ptr,  # (N, H, W, C) out: dx, or g of the producer's batch norm
    shortcut_ptr,  # (N, H, W, C) in: gradient added to dx; None: nothing added
    producer,  # `BatchNormBackward` of x; None: no producer
    dw_ptr,  # (K, 3, 3, C) out
    partials_ptr,  # (num_programs + num_groups, K, 3, 3, C) fp32: None where there is one program
    counters_ptr,  # (1 + num_groups,) int32: zeros
    num_patches,
    num_tiles,
    SHAPE: tl.constexpr,  # `PatchShape` of dx
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
    WHOLE: tl.constexpr = SHAPE.WHOLE
    MASK: tl.constexpr = producer is not None

    filters = load_spread_filters(w_ptr, K, C, True)
    _, k = row_lanes(K)
    column = tl.arange(0, 2 * C)
    sum_g = tl.zeros((BLOCK_M // 16, 8, C), tl.float32)
    sum_gy = sum_g
    filter_sums = zero_tiles(3, 4 * K, 2 * C)
    # Hoisted out of the loop, offsets and masks of the lanes would take registers that sums need.
    for number in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), disable_licm=True):
        tile = locate_patches(number, num_patches, SHAPE, BLOCK_M, INDEX)
        # One tile of offsets for all rows: there are no registers for more.
        offs_x = (tile.pixels * C)[:, None] + column[None, :]
        inside_dy = row_masks(tile, SHAPE, K)
        inside_x = output_masks(tile, SHAPE, (column // C)[None, :])

        # Prologues: padding and what hangs over an image stay 0, although b and c2 are not.
        c0 = load_channels(coefficients_ptr, k)
        c1 = load_channels(coefficients_ptr, K + k)
        c2 = load_channels(coefficients_ptr, 2 * K + k)
        if MASK:
            a, b = load_scale_shift(producer.stats_ptr + 3 * C, column % C, C)
        raw: tl.tuple = ()
        xs: tl.tuple = ()
        for o in tl.static_range(PATCH_H):
            offs = offs_x + o * (SHAPE.W * C)
            x = load_outputs(x_ptr, offs, inside_x[o], WHOLE)
            raw += (x,)
            xs += (activate(x, a, b, inside_x[o], ASM) if MASK else x,)
        gs = load_rows(g_ptr, tile, SHAPE, inside_dy, 0, AHEAD, K, False)
        ys = load_rows(y_ptr, tile, SHAPE, inside_dy, 0, AHEAD, K, False)
        sums = zero_tiles(PATCH_H, BLOCK_M, 2 * C)
        for r in tl.static_range(PATCH_H + 2):
            gs += load_rows(g_ptr, tile, SHAPE, inside_dy, r + AHEAD, 1, K, False)
            ys += load_rows(y_ptr, tile, SHAPE, inside_dy, r + AHEAD, 1, K, False)
            dy = backward_bn(gs[r], ys[r], c0, c1, c2, inside_dy[r], ASM)
            sums = add_products(sums, dy, filters, r)
            filter_sums = add_filter_products(filter_sums, dy, xs, r)

        # Epilogue.
        norm = (load_channels(producer.stats_ptr, column % C), a, b) if MASK else None
        for o in tl.static_range(PATCH_H):
            offs = offs_x + o * (SHAPE.W * C)
            producer_y = raw[o] if MASK else None
            dx, dxy = store_gradient(
                sums[o], offs, inside_x[o], dx_ptr, shortcut_ptr, producer_y, norm, WHOLE, ASM
            )
            if MASK:
                sum_g += fold_outputs(dx, C)
                sum_gy += fold_outputs(dxy, C)

    if MASK:
        finish_sums_of_all(
            channel_sum(sum_g.reshape(BLOCK_M // 2, C), C),
            channel_sum(sum_gy.reshape(BLOCK_M // 2, C), C),
            producer,
            C,
        )
    finish_filter_sums(dw_ptr, partials_ptr, counters_ptr, filter_sums, K, C, True, GROUP)


def conv_gradients(
    dy: DeferredGrad,
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    shortcut: torch.Tensor | None = None,
    producer: LayerState | None = None,
    producer_weight: torch.Tensor | None = None,
    dw_dtype: torch.dtype | None = None,
    config: ConvConfig,
) -> ConvGrads | None:
    """What `conv_dgrad` and `conv_wgrad` compute, in one launch; None where it takes two.

    Args:
        dy: (N, K, P, Q) channels_last gradient of the output, computed while loading.
        x: (N, C, H, W) channels_last input; with a producer its y.
        w: (K, C, R, S) dense channels_last, dtype of x.
        stride: the forward convolution's.
        padding: the forward convolution's.
        shortcut: (N, C, H, W) channels_last, dtype of x: added to dx.
        producer: the layer whose relu(a * y + b) the convolution read; given, dx is the gradient of
            its batch norm's output.
        producer_weight: (C,) fp32, of that batch norm.
        dw_dtype: of dw; by default that of x.
        config: tiles; of the form "fused", or the answer is None.

    Returns: dx (or g): (N, C, H, W) dense channels_last; dw: (K, C, 3, 3) dense channels_last; the
        gradients of the producer's batch norm, or None. None alone where configuration or operands
        want two launches: other filters than 3x3 of stride and padding 1, other channels than 16,
        fp32, tensors with gaps, a shortcut in front of a producer.

    Raises: ValueError: when a tensor's shape, dtype, device or layout is not as above.

    Numerics: operands computed in fp32 and rounded once; sums in fp32; results rounded once.
        Deterministic.
    """
    g, y, coefficients = check_deferred_grad(dy)
    check_activation("x", x)
    check_filter(w, x.dtype)
    n, c, h, width = x.shape
    shape = ConvShape(n, h, width, c, w.shape[0], w.shape[2], w.shape[3], stride, padding)
    check_activation("dy", g, (n, shape.K, shape.P, shape.Q), x.dtype)
    if w.shape[1] != c:
        raise ValueError(f"w must have {c} input channels as x has, got {w.shape[1]}")
    if shortcut is not None:
        check_activation("shortcut", shortcut, (n, c, h, width), x.dtype)
    check_state("producer", producer, producer_weight, (n, c, h, width), x.dtype)
    if config.form != "fused" or not fits_fused(shape, x.dtype):
        return None
    if not are_dense(g, y, x, shortcut) or (shortcut is not None and producer is not None):
        return None
    num_programs, args = strip_arguments(config, shape)
    dx = empty_channels_last(x, n, c, h, width)
    dw = x.new_empty((shape.K, 3, 3, c), dtype=dw_dtype or x.dtype)
    finish, (grads,) = finish_grads(dx, {"producer": (producer, producer_weight)}, num_programs)
    partials = counters = None
    group, last_programs = 1, 0
    if num_programs > 1:
        partials, counters, group, last_programs = allocate_partials(x, dw.numel(), num_programs)
    launch(
        _conv_backward_kernel,
        (num_programs,),
        {
            **args,
            "g_ptr": g,
            "y_ptr": y,
            "coefficients_ptr": coefficients,
            "x_ptr": x,
            "w_ptr": w,
            "dx_ptr": dx,
            "shortcut_ptr": shortcut,
            **finish.args,
            "dw_ptr": dw,
            "partials_ptr": partials,
            "counters_ptr": counters,
            "INDEX": index_dtype(g, y, x, dx, shortcut),
            "GROUP": group,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        traffic=Traffic(
            reads=num_bytes(g, y, coefficients, x, w, shortcut, partials) + finish.reads,
            writes=num_bytes(dx, dw, partials) + finish.writes,
            flops=2 * shape.flops,
        ),
        trips=args["num_tiles"] / num_programs,
        last_programs=max(last_programs, finish.last_programs),
    )
    return ConvGrads(dx, dw.permute(0, 3, 1, 2), grads)
