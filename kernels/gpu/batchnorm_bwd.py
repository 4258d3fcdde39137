"""Batch norm backward, with the ReLU after it and the shortcut beside it.

    g = dout * (out > 0);  dbeta = sum g;  dgamma = rstd * sum g * (y - mean)
    dy = c0 * g + c1 * y + c2:  c0 = gamma * rstd,  c1 = -c0 * rstd * dgamma / count,
                                c2 = -c0 * dbeta / count - c1 * mean

Letters: y (N, H, W, C) raw convolution output, out = relu(bn(y) + shortcut), count = N * H * W.
g is also the gradient of the shortcut. The batch norm of a projected shortcut needs the same
two sums against its own y_s, and gets them in the same pass.

Tensor passes: the reduction reads dout, out and y (and y_s) and writes g; the apply
reads g and y and writes dy, and is not launched where the convolutions compute dy while loading. A
convolution's dgrad reduces for its producer's batch norm in its epilogue, for one or two reads.

Numerics: all arithmetic in fp32 whatever the storage. Sums are centred, g * (y - mean), so a large
offset costs no digits, and use g as rounded to its dtype, because that g is what later kernels
read. Tiles are added in fixed order (last_program.py). Deterministic. Source: own derivation.
"""

import torch
import triton
import triton.language as tl

from fastres.kernels.conv_types import BatchNormGrads, DeferredGrad, LayerState
from fastres.kernels.gpu.checks import (
    check_activation,
    check_deferred_grad,
    check_state,
    check_vector,
    index_dtype,
    nhwc_strides,
)
from fastres.kernels.gpu.last_program import (
    finish_batch_norm_backward,
    finish_grads,
    store_sums,
)
from fastres.kernels.gpu.launch import Traffic, launch, num_bytes
from fastres.kernels.gpu.launch_config import RowConfig
from fastres.kernels.gpu.launch_rules import row_config
from fastres.kernels.gpu.primitives import (
    affine,
    compute_dy,
    relu_grad,
    round_to,
    row_offsets,
    tile_sum,
    wait_for_previous_kernel,
)
from fastres.kernels.layout import empty_channels_last

__all__ = ["bn_backward_apply", "bn_backward_reduce"]

# Programs of one column at most: 8 a multiprocessor of an H100; with more tiles each takes several.
MOST_PROGRAMS = 1056


@triton.jit
def _bn_backward_reduce_kernel(
    dout_ptr,  # (N, H, W, C) in
    out_ptr,  # (N, H, W, C) in: the mask is out > 0; None: recomputed, or no ReLU
    scale_shift_ptr,  # (2, C) fp32 in: the mask is a * y + b > 0; None: read, or no ReLU
    y_ptr,  # (N, H, W, C) in
    y_shortcut_ptr,  # (N, H, W, C) in: raw projection; None: no projected shortcut
    g_ptr,  # (N, H, W, C) out; None: without a ReLU g is dout itself
    batch_norm,  # `BatchNormBackward` of y
    shortcut_batch_norm,  # that of y_shortcut; None: no projected shortcut
    num_rows,
    num_tiles,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    DOUT_STRIDES: tl.constexpr,
    OUT_STRIDES: tl.constexpr,
    Y_STRIDES: tl.constexpr,
    Y_SHORTCUT_STRIDES: tl.constexpr,
    G_STRIDES: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1)
    offs_c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean = tl.load(batch_norm.stats_ptr + offs_c, mask=mask_c, other=0.0)
    sum_g = tl.zeros((BLOCK_C,), dtype=tl.float32)
    sum_gy = tl.zeros((BLOCK_C,), dtype=tl.float32)
    sum_gy_shortcut = None
    if y_shortcut_ptr is not None:
        mean_s = tl.load(shortcut_batch_norm.stats_ptr + offs_c, mask=mask_c, other=0.0)
        sum_gy_shortcut = tl.zeros((BLOCK_C,), dtype=tl.float32)

    for tile in range(program, num_tiles, num_programs):
        rows = tl.cast(tile, INDEX) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (rows < num_rows)[:, None] & mask_c[None, :]
        offs_dout = row_offsets(rows, H, W, DOUT_STRIDES)[:, None] + offs_c[None, :]
        g = tl.load(dout_ptr + offs_dout, mask=mask, other=0.0).to(tl.float32)
        offs_y = row_offsets(rows, H, W, Y_STRIDES)[:, None] + offs_c[None, :]
        y = tl.load(y_ptr + offs_y, mask=mask, other=0.0).to(tl.float32)
        if out_ptr is not None:
            offs_out = row_offsets(rows, H, W, OUT_STRIDES)[:, None] + offs_c[None, :]
            g = relu_grad(tl.load(out_ptr + offs_out, mask=mask, other=0.0).to(tl.float32), g)
        if scale_shift_ptr is not None:
            g = relu_grad(affine(y, scale_shift_ptr, offs_c, C, mask_c), g)
        if g_ptr is not None:
            offs_g = row_offsets(rows, H, W, G_STRIDES)[:, None] + offs_c[None, :]
            tl.store(g_ptr + offs_g, round_to(g, g_ptr.dtype.element_ty), mask=mask)
        # The mask drops values or keeps them, so g is still as rounded as dout is.
        sum_g += tile_sum(g, mask)
        sum_gy += tile_sum(g * (y - mean[None, :]), mask)
        if y_shortcut_ptr is not None:
            offs_ys = row_offsets(rows, H, W, Y_SHORTCUT_STRIDES)[:, None] + offs_c[None, :]
            y_s = tl.load(y_shortcut_ptr + offs_ys, mask=mask, other=0.0).to(tl.float32)
            sum_gy_shortcut += tile_sum(g * (y_s - mean_s[None, :]), mask)

    store_sums(batch_norm.partials_ptr, program, sum_g, sum_gy, sum_gy_shortcut, offs_c, mask_c, C)
    finish_batch_norm_backward(
        batch_norm, offs_c, column, program, num_programs, num_programs, C, shortcut_batch_norm
    )


def bn_backward_reduce(
    dout: torch.Tensor,
    state: LayerState,
    weight: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    scale_shift: torch.Tensor | None = None,
    projected: LayerState | None = None,
    projected_weight: torch.Tensor | None = None,
    config: RowConfig | None = None,
) -> tuple[BatchNormGrads, BatchNormGrads | None]:
    """`g = dout * (out > 0)`, and from its sums the gradients of the batch norms that it leaves.

    Args:
        dout: (N, C, H, W) channels_last, gaps allowed; bf16, fp16, fp32.
        state: the layer, its y (N, C, H, W) channels_last, gaps allowed, dtype of dout.
        weight: (C,) fp32, of its batch norm.
        out: (N, C, H, W) channels_last, gaps allowed, dtype of dout: the mask is out > 0.
        scale_shift: (2, C) fp32: the mask is a * y + b > 0. Without out and this, no ReLU.
        projected: as state: the layer of a projected shortcut.
        projected_weight: (C,) fp32, of its batch norm.
        config: tile; by default the rule of launch_rules.py.

    Returns: the gradients of the batch norm, in which dy.g is (N, C, H, W) dense channels_last,
        dtype of dout, and without a ReLU dout itself; those of the projection's, or None.

    Raises: ValueError: when a tensor's shape, dtype, device or layout is not as above, when both
        masks are given, or a projection without its weight.

    Numerics: fp32 sums. A NaN in out passes dout, as in torch. Deterministic.
    """
    check_activation("dout", dout)
    n, c, h, w = size = tuple(dout.shape)
    check_state("state", state, weight, size, dout.dtype)
    check_state("projected", projected, projected_weight, size, dout.dtype)
    _check_mask(out, scale_shift, size, dout.dtype)
    num_rows = n * h * w
    config = config or row_config(num_rows, c, dout.dtype)
    num_tiles = triton.cdiv(num_rows, config.block_rows)
    num_programs, num_columns = min(num_tiles, MOST_PROGRAMS), triton.cdiv(c, config.block_c)
    has_relu = out is not None or scale_shift is not None
    g = empty_channels_last(dout, n, c, h, w) if has_relu else None
    y_shortcut = None if projected is None else projected.y
    shortcut = projected, projected_weight
    layers = {"batch_norm": (state, weight), "shortcut_batch_norm": shortcut}
    finish, (grads, projected_grads) = finish_grads(
        dout if g is None else g, layers, num_programs, num_columns=num_columns
    )
    launch(
        _bn_backward_reduce_kernel,
        (num_programs, num_columns),
        {
            "dout_ptr": dout,
            "out_ptr": out,
            "scale_shift_ptr": scale_shift,
            "y_ptr": state.y,
            "y_shortcut_ptr": y_shortcut,
            "g_ptr": g,
            **finish.args,
            "num_rows": num_rows,
            "num_tiles": num_tiles,
            "H": h,
            "W": w,
            "C": c,
            "DOUT_STRIDES": nhwc_strides(dout),
            "OUT_STRIDES": nhwc_strides(out),
            "Y_STRIDES": nhwc_strides(state.y),
            "Y_SHORTCUT_STRIDES": nhwc_strides(y_shortcut),
            "G_STRIDES": nhwc_strides(g),
            "INDEX": index_dtype(dout, out, state.y, y_shortcut, g),
            "BLOCK_ROWS": config.block_rows,
            "BLOCK_C": config.block_c,
        },
        num_warps=config.num_warps,
        num_stages=1,
        traffic=Traffic(
            reads=num_bytes(dout, out, scale_shift, state.y, y_shortcut) + finish.reads,
            writes=num_bytes(g) + finish.writes,
            flops=(6 + 3 * (projected is not None)) * dout.numel(),
        ),
        trips=num_tiles / num_programs,
        last_programs=finish.last_programs,
    )
    assert grads is not None
    return grads, projected_grads


def _check_mask(
    out: torch.Tensor | None,
    scale_shift: torch.Tensor | None,
    size: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    """Check the two ways to tell where a ReLU let the gradient through."""
    if out is not None and scale_shift is not None:
        raise ValueError("give at most one of out and scale_shift")
    if out is not None:
        check_activation("out", out, size, dtype)
    if scale_shift is not None:
        check_vector("scale_shift", scale_shift, (2, size[1]))


@triton.jit
def _bn_backward_apply_kernel(
    g_ptr,  # (N, H, W, C) in
    y_ptr,  # (N, H, W, C) in
    coefficients_ptr,  # (3, C) fp32 in: c0, c1, c2
    dy_ptr,  # (N, H, W, C) out
    num_rows,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    G_STRIDES: tl.constexpr,
    Y_STRIDES: tl.constexpr,
    DY_STRIDES: tl.constexpr,
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
    offs_g = row_offsets(rows, H, W, G_STRIDES)[:, None] + offs_c[None, :]
    offs_y = row_offsets(rows, H, W, Y_STRIDES)[:, None] + offs_c[None, :]
    g = tl.load(g_ptr + offs_g, mask=mask, other=0.0)
    y = tl.load(y_ptr + offs_y, mask=mask, other=0.0)
    dy = compute_dy(g, y, coefficients_ptr, offs_c, C, mask, mask_c)
    offs_dy = row_offsets(rows, H, W, DY_STRIDES)[:, None] + offs_c[None, :]
    tl.store(dy_ptr + offs_dy, round_to(dy, dy_ptr.dtype.element_ty), mask=mask)


def bn_backward_apply(dy: DeferredGrad, *, config: RowConfig | None = None) -> torch.Tensor:
    """`dy = c0 * g + c1 * y + c2`, stored: for a convolution that cannot compute it while loading.

    Args:
        dy: the deferred gradient.
        config: tile; by default the rule of launch_rules.py.

    Returns: dy: (N, C, H, W) dense channels_last, dtype of dy.g.

    Raises: ValueError: when a tensor differs in shape, dtype or layout.

    Numerics: fp32, one rounding. Deterministic.
    """
    check_deferred_grad(dy)
    n, c, h, w = dy.g.shape
    num_rows = n * h * w
    config = config or row_config(num_rows, c, dy.g.dtype)
    stored = empty_channels_last(dy.g, n, c, h, w)
    launch(
        _bn_backward_apply_kernel,
        (triton.cdiv(num_rows, config.block_rows), triton.cdiv(c, config.block_c)),
        {
            "g_ptr": dy.g,
            "y_ptr": dy.y,
            "coefficients_ptr": dy.coefficients,
            "dy_ptr": stored,
            "num_rows": num_rows,
            "H": h,
            "W": w,
            "C": c,
            "G_STRIDES": nhwc_strides(dy.g),
            "Y_STRIDES": nhwc_strides(dy.y),
            "DY_STRIDES": nhwc_strides(stored),
            "INDEX": index_dtype(dy.g, dy.y, stored),
            "BLOCK_ROWS": config.block_rows,
            "BLOCK_C": config.block_c,
        },
        num_warps=config.num_warps,
        num_stages=1,
        traffic=Traffic(
            reads=num_bytes(dy.g, dy.y, dy.coefficients),
            writes=num_bytes(stored),
            flops=4 * dy.g.numel(),
        ),
    )
    return stored
