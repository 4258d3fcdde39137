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
read. Tiles are added in fixed order. Deterministic. Source: own derivation.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastres.kernels.conv_types import DeferredGrad, GradSums
from fastres.kernels.gpu.checks import (
    check_activation,
    check_deferred_grad,
    check_vector,
    index_dtype,
    nhwc_strides,
)
from fastres.kernels.gpu.launch import Traffic, launch, num_bytes
from fastres.kernels.gpu.launch_config import RowConfig, row_config
from fastres.kernels.gpu.primitives import (
    affine,
    compute_dy,
    relu_grad,
    round_to,
    row_offsets,
    store_tile_sum,
    wait_for_previous_kernel,
)
from fastres.kernels.layout import empty_channels_last

__all__ = ["BNGrads", "bn_backward_apply", "bn_backward_finalize", "bn_backward_reduce"]

# Partials that a finalizing program reads at a time.
BLOCK_TILES = 1024


class BNGrads(NamedTuple):
    """What `bn_backward_finalize` returns: dgamma, dbeta (C,) and coefficients (3, C), fp32."""

    dgamma: torch.Tensor
    dbeta: torch.Tensor
    coefficients: torch.Tensor


@triton.jit
def _bn_backward_reduce_kernel(
    dout_ptr,  # (N, H, W, C) in
    out_ptr,  # (N, H, W, C) in: the mask is out > 0; None: recomputed, or no ReLU
    scale_shift_ptr,  # (2, C) fp32 in: the mask is a * y + b > 0; None: read, or no ReLU
    y_ptr,  # (N, H, W, C) in
    mean_ptr,  # (C,) fp32 in
    y_shortcut_ptr,  # (N, H, W, C) in: raw projection; None: no projected shortcut
    mean_shortcut_ptr,  # (C,) fp32 in
    g_ptr,  # (N, H, W, C) out; None: without a ReLU g is dout itself
    sum_g_ptr,  # (C, num_tiles) fp32 out, as are the next two
    sum_gy_ptr,
    sum_gy_shortcut_ptr,
    num_rows,
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
    tile = tl.program_id(0)
    num_tiles = tl.num_programs(0)
    rows = tile.to(INDEX) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
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
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
    store_tile_sum(sum_g_ptr, g, mask, offs_c, mask_c, tile, num_tiles)
    store_tile_sum(sum_gy_ptr, g * (y - mean[None, :]), mask, offs_c, mask_c, tile, num_tiles)
    if y_shortcut_ptr is not None:
        offs_ys = row_offsets(rows, H, W, Y_SHORTCUT_STRIDES)[:, None] + offs_c[None, :]
        y_s = tl.load(y_shortcut_ptr + offs_ys, mask=mask, other=0.0).to(tl.float32)
        mean_s = tl.load(mean_shortcut_ptr + offs_c, mask=mask_c, other=0.0)
        centred = g * (y_s - mean_s[None, :])
        store_tile_sum(sum_gy_shortcut_ptr, centred, mask, offs_c, mask_c, tile, num_tiles)


def bn_backward_reduce(
    dout: torch.Tensor,
    y: torch.Tensor,
    mean: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    scale_shift: torch.Tensor | None = None,
    y_shortcut: torch.Tensor | None = None,
    mean_shortcut: torch.Tensor | None = None,
    config: RowConfig | None = None,
) -> tuple[torch.Tensor, GradSums]:
    """`g = dout * (out > 0)` and, by tiles, the sums of g, g * (y - mean), g * (y_s - mean_s).

    Args:
        dout: (N, C, H, W) channels_last, gaps allowed; bf16, fp16, fp32.
        y: (N, C, H, W) channels_last, gaps allowed, dtype of dout: input of the batch norm.
        mean: (C,) fp32, mean of y.
        out: (N, C, H, W) channels_last, gaps allowed, dtype of dout: the mask is out > 0.
        scale_shift: (2, C) fp32: the mask is a * y + b > 0. Without out and this, no ReLU.
        y_shortcut: (N, C, H, W) as y: raw output of a projected shortcut.
        mean_shortcut: (C,) fp32, mean of y_shortcut.
        config: tile; by default the rule of launch_config.py.

    Returns: g: (N, C, H, W) dense channels_last, dtype of dout, and without a ReLU dout itself;
        `GradSums`.

    Raises: ValueError: when a tensor's shape, dtype, device or layout is not as above, when both
        masks are given, or one of the shortcut's two tensors alone.

    Numerics: fp32 sums of each tile. A NaN in out passes dout, as in torch. Deterministic.
    """
    _check_reduce(dout, y, mean, out, scale_shift, y_shortcut, mean_shortcut)
    n, c, h, w = dout.shape
    num_rows = n * h * w
    config = config or row_config(num_rows, c)
    num_tiles = triton.cdiv(num_rows, config.block_rows)
    has_relu = out is not None or scale_shift is not None
    g = empty_channels_last(dout, n, c, h, w) if has_relu else None
    sum_g, sum_gy = (dout.new_empty((c, num_tiles), dtype=torch.float32) for _ in range(2))
    sum_gy_shortcut = None if y_shortcut is None else torch.empty_like(sum_g)
    launch(
        _bn_backward_reduce_kernel,
        (num_tiles, triton.cdiv(c, config.block_c)),
        {
            "dout_ptr": dout,
            "out_ptr": out,
            "scale_shift_ptr": scale_shift,
            "y_ptr": y,
            "mean_ptr": mean,
            "y_shortcut_ptr": y_shortcut,
            "mean_shortcut_ptr": mean_shortcut,
            "g_ptr": g,
            "sum_g_ptr": sum_g,
            "sum_gy_ptr": sum_gy,
            "sum_gy_shortcut_ptr": sum_gy_shortcut,
            "num_rows": num_rows,
            "H": h,
            "W": w,
            "C": c,
            "DOUT_STRIDES": nhwc_strides(dout),
            "OUT_STRIDES": nhwc_strides(out),
            "Y_STRIDES": nhwc_strides(y),
            "Y_SHORTCUT_STRIDES": nhwc_strides(y_shortcut),
            "G_STRIDES": nhwc_strides(g),
            "INDEX": index_dtype(dout, out, y, y_shortcut, g, sum_g),
            "BLOCK_ROWS": config.block_rows,
            "BLOCK_C": config.block_c,
        },
        num_warps=config.num_warps,
        num_stages=1,
        traffic=Traffic(
            reads=num_bytes(dout, out, scale_shift, y, mean, y_shortcut, mean_shortcut),
            writes=num_bytes(g, sum_g, sum_gy, sum_gy_shortcut),
            flops=(6 + 3 * (y_shortcut is not None)) * y.numel(),
        ),
    )
    return (dout if g is None else g), GradSums(sum_g, sum_gy, sum_gy_shortcut)


def _check_reduce(
    dout: torch.Tensor,
    y: torch.Tensor,
    mean: torch.Tensor,
    out: torch.Tensor | None,
    scale_shift: torch.Tensor | None,
    y_shortcut: torch.Tensor | None,
    mean_shortcut: torch.Tensor | None,
) -> None:
    """Check the arguments of `bn_backward_reduce`."""
    check_activation("dout", dout)
    size, c = tuple(dout.shape), dout.shape[1]
    check_activation("y", y, size, dout.dtype)
    check_vector("mean", mean, (c,))
    if out is not None and scale_shift is not None:
        raise ValueError("give at most one of out and scale_shift")
    if out is not None:
        check_activation("out", out, size, dout.dtype)
    if scale_shift is not None:
        check_vector("scale_shift", scale_shift, (2, c))
    if (y_shortcut is None) != (mean_shortcut is None):
        raise ValueError("give both of y_shortcut and mean_shortcut, or neither")
    if y_shortcut is not None and mean_shortcut is not None:
        check_activation("y_shortcut", y_shortcut, size, dout.dtype)
        check_vector("mean_shortcut", mean_shortcut, (c,))


@triton.jit
def _bn_backward_finalize_kernel(
    sum_g_ptr,  # (C, num_tiles) fp32 in, as is the next
    sum_gy_ptr,
    mean_ptr,  # (C,) fp32 in, as are the next two
    rstd_ptr,
    gamma_ptr,
    dgamma_ptr,  # (C,) fp32 out, as is the next
    dbeta_ptr,
    coefficients_ptr,  # (3, C) fp32 out: c0, c1, c2
    num_tiles,
    count,
    C: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    channel = tl.program_id(0)
    sums_g = tl.zeros((BLOCK_TILES,), dtype=tl.float32)
    sums_gy = tl.zeros((BLOCK_TILES,), dtype=tl.float32)
    for first in range(0, num_tiles, BLOCK_TILES):
        tiles = first + tl.arange(0, BLOCK_TILES)
        mask = tiles < num_tiles
        offs = channel * num_tiles + tiles
        sums_g += tl.load(sum_g_ptr + offs, mask=mask, other=0.0)
        sums_gy += tl.load(sum_gy_ptr + offs, mask=mask, other=0.0)

    rstd = tl.load(rstd_ptr + channel)
    dbeta = tl.sum(sums_g, axis=0)
    dgamma = tl.sum(sums_gy, axis=0) * rstd
    c0 = tl.load(gamma_ptr + channel) * rstd
    c1 = -c0 * rstd * (dgamma / count)
    c2 = -c0 * (dbeta / count) - c1 * tl.load(mean_ptr + channel)
    tl.store(dbeta_ptr + channel, dbeta)
    tl.store(dgamma_ptr + channel, dgamma)
    tl.store(coefficients_ptr + channel, c0)
    tl.store(coefficients_ptr + C + channel, c1)
    tl.store(coefficients_ptr + 2 * C + channel, c2)


def bn_backward_finalize(
    sum_g: torch.Tensor,
    sum_gy: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    count: int,
) -> BNGrads:
    """Add the tiles' sums: dgamma, dbeta, and c0, c1, c2 of dy = c0 * g + c1 * y + c2.

    Args:
        sum_g: (C, num_tiles) fp32, of `GradSums`.
        sum_gy: (C, num_tiles) fp32, of `GradSums`: gy, or gy_shortcut for the projection.
        mean: (C,) fp32, of the batch norm's input.
        rstd: (C,) fp32, of the same.
        weight: (C,) fp32.
        count: pixels in all tiles, N * H * W.

    Returns: `BNGrads`.

    Raises: ValueError: when a tensor is not as above.

    Numerics: fp32, tiles added in fixed order. Deterministic.
    """
    if sum_g.dim() != 2:
        raise ValueError(f"sum_g must have shape (C, num_tiles), got {tuple(sum_g.shape)}")
    c, num_tiles = sum_g.shape
    check_vector("sum_g", sum_g, (c, num_tiles))
    check_vector("sum_gy", sum_gy, (c, num_tiles))
    for name, vector in (("mean", mean), ("rstd", rstd), ("weight", weight)):
        check_vector(name, vector, (c,))
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    dgamma, dbeta = torch.empty_like(mean), torch.empty_like(mean)
    coefficients = mean.new_empty((3, c))
    block_tiles = min(BLOCK_TILES, triton.next_power_of_2(num_tiles))
    launch(
        _bn_backward_finalize_kernel,
        (c,),
        {
            "sum_g_ptr": sum_g,
            "sum_gy_ptr": sum_gy,
            "mean_ptr": mean,
            "rstd_ptr": rstd,
            "gamma_ptr": weight,
            "dgamma_ptr": dgamma,
            "dbeta_ptr": dbeta,
            "coefficients_ptr": coefficients,
            "num_tiles": num_tiles,
            "count": count,
            "C": c,
            "BLOCK_TILES": block_tiles,
        },
        num_warps=4,
        num_stages=1,
        traffic=Traffic(
            reads=num_bytes(sum_g, sum_gy, mean, rstd, weight),
            writes=num_bytes(dgamma, dbeta, coefficients),
            flops=2 * c * num_tiles,
        ),
        trips=triton.cdiv(num_tiles, block_tiles),
    )
    return BNGrads(dgamma, dbeta, coefficients)


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
        config: tile; by default the rule of launch_config.py.

    Returns: dy: (N, C, H, W) dense channels_last, dtype of dy.g.

    Raises: ValueError: when a tensor differs in shape, dtype or layout.

    Numerics: fp32, one rounding. Deterministic.
    """
    check_deferred_grad(dy)
    n, c, h, w = dy.g.shape
    num_rows = n * h * w
    config = config or row_config(num_rows, c)
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
