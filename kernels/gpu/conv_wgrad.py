"""Filter gradient of a convolution: dw[k, rsc] = sum over npq of dy'[npq, k] * x'[npq, rsc].

    prologue   x' = x, or relu(a * x + b) recomputed from the raw convolution output x;
               dy' = dy, or c0 * g + c1 * y + c2 (batch-norm backward), both computed while loading
    epilogue   a split-K partial stored in fp32; the last program of a tile adds its partials
               (last_program.py)

Letters: x (N, H, W, C), dy (N, P, Q, K), dw (K, R, S, C).

The product is tiny (16 x 144 to 512 x 4608) and its reduction is huge (every pixel of the batch),
so the pixels are split among split_k programs (split-K): the GPU fills, and no float atomic is
needed. The tile is rsc x k, not k x rsc: Hopper's tensor-core instructions want 64 rows, and
R * S * C has them in every 3x3 layer where K may be 16.

Bytes: x and dy (or g and y) read once, dw written once, and 8 bytes a filter element and partial
when there is more than one partial.

Numerics: both operands are rounded to their dtype before the product; sums in fp32; dw rounded
once. Deterministic: partials are added in the same order for the same configuration.
Source: own derivation; the scheme of cuDNN's conv-bn-wgrad graphs.
"""

import torch
import triton
import triton.language as tl

from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.conv_types import DeferredGrad
from fastres.kernels.gpu.checks import (
    check_activation,
    check_deferred_grad,
    check_vector,
    index_dtype,
    nhwc_strides,
)
from fastres.kernels.gpu.conv_pixel import wgrad_pixel_variant
from fastres.kernels.gpu.conv_strip_wgrad import wgrad_strip_variant
from fastres.kernels.gpu.last_program import add_partials, allocate_partials, store_partial
from fastres.kernels.gpu.launch import KernelVariant, Traffic, launch, num_bytes
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.launch_table import conv_config
from fastres.kernels.gpu.primitives import (
    dot_fp32,
    im2col_offsets,
    load_im2col,
    round_to,
    row_offsets,
    wait_for_previous_kernel,
)
from fastres.kernels.gpu.prologue import activate_channels, backward_bn_channels, uses_assembly

__all__ = ["conv_wgrad"]


@triton.jit
def _conv_wgrad_kernel(
    x_ptr,  # (N, H, W, C) in: activation, or raw output of its producer
    in_scale_shift_ptr,  # (2, C) fp32 in: prologue relu(a * x + b); None: x as it is
    g_ptr,  # (N, P, Q, K) in: dy, or the gradient g that dy is computed from
    y_ptr,  # (N, P, Q, K) in: with g and coefficients; None: dy is read
    coefficients_ptr,  # (3, K) fp32 in: c0, c1, c2; None: dy is read
    dw_ptr,  # (K, R, S, C) out
    partials_ptr,  # (num_splits + num_groups, K, R, S, C) fp32; None: there is one split
    counters_ptr,  # (num_tiles, 1 + num_groups) int32: zeros
    num_npq,
    rows_per_split,  # multiple of BLOCK_K
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    X_STRIDES: tl.constexpr,
    G_STRIDES: tl.constexpr,
    Y_STRIDES: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ASM: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    SCALE_SHIFT_INPUT: tl.constexpr = in_scale_shift_ptr is not None
    COMPUTE_DY: tl.constexpr = coefficients_ptr is not None
    TILES_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N

    pid = tl.program_id(0)
    split = tl.program_id(1).to(INDEX)
    offs_rsc = pid // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_rsc = offs_rsc < R * S * C
    mask_k = offs_k < K
    first_row = split * rows_per_split
    last_row = tl.minimum(first_row + rows_per_split, num_npq)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for row in range(first_row, last_row, BLOCK_K):
        offs_npq = row + tl.arange(0, BLOCK_K)
        mask_npq = offs_npq < num_npq
        offs_x, h0, w0 = im2col_offsets(offs_npq, P, Q, STRIDE, PADDING, X_STRIDES)
        x, mask_x = load_im2col(
            x_ptr, offs_x, h0, w0, mask_npq, offs_rsc, H, W, C, R, S, PADDING, X_STRIDES
        )  # [BLOCK_K, BLOCK_M]
        mask_dy = mask_npq[:, None] & mask_k[None, :]
        offs_g = row_offsets(offs_npq, P, Q, G_STRIDES)[:, None] + offs_k[None, :]
        dy = tl.load(g_ptr + offs_g, mask=mask_dy, other=0.0)  # [BLOCK_K, BLOCK_N]
        # Prologues: padding of x and rows beyond the last pixel stay 0, although b and c2 are not.
        if SCALE_SHIFT_INPUT:
            x = activate_channels(x, in_scale_shift_ptr, offs_rsc % C, mask_rsc, mask_x, C, ASM)
        if COMPUTE_DY:
            offs_y = row_offsets(offs_npq, P, Q, Y_STRIDES)[:, None] + offs_k[None, :]
            y = tl.load(y_ptr + offs_y, mask=mask_dy, other=0.0)
            dy = backward_bn_channels(dy, y, coefficients_ptr, offs_k, mask_k, mask_dy, K, ASM)
        acc = dot_fp32(tl.trans(x), dy, acc, PRECISION)

    # Epilogue.
    offs = offs_k[None, :] * (R * S * C) + offs_rsc[:, None]
    mask = mask_rsc[:, None] & mask_k[None, :]
    if partials_ptr is None:
        tl.store(dw_ptr + offs, round_to(acc, dw_ptr.dtype.element_ty), mask=mask)
    else:
        store_partial(partials_ptr, split, acc, offs, mask, K * R * S * C)
        add_partials(
            partials_ptr,
            counters_ptr,
            dw_ptr,
            pid % TILES_N * BLOCK_N,
            pid // TILES_N * BLOCK_M,
            pid,
            tl.program_id(1),
            tl.num_programs(1),
            K,
            R * S * C,
            BLOCK_N,
            BLOCK_M,
            GROUP,
        )


def conv_wgrad(
    x: torch.Tensor,
    dy: torch.Tensor | DeferredGrad,
    filter_size: tuple[int, int],
    *,
    stride: int = 1,
    padding: int = 0,
    scale_shift: torch.Tensor | None = None,
    allow_tf32: bool = False,
    dw_dtype: torch.dtype | None = None,
    config: ConvConfig | None = None,
) -> torch.Tensor:
    """`dw = sum over pixels of dy * window(x)`, with x and dy recomputed while loading.

    Args:
        x: (N, C, H, W) channels_last, gaps allowed; with scale_shift a raw convolution output.
        dy: (N, K, P, Q) channels_last gradient, gaps allowed; or a `DeferredGrad`, computed
            while loading.
        filter_size: (R, S).
        stride: the forward convolution's.
        padding: the forward convolution's.
        scale_shift: (2, C) fp32, a above b: the forward convolution read relu(a * x + b).
        allow_tf32: let fp32 products be rounded to TF32.
        dw_dtype: of dw; by default that of x.
        config: tiles and split; by default those of the launch table.

    Returns: dw: (K, C, R, S) dense channels_last, dw_dtype.

    Raises: ValueError: when a tensor's shape, dtype, device or layout is not as above.

    Numerics: operands computed in fp32 and rounded once; sums in fp32; dw rounded once.
        Deterministic.
    """
    g, y, coefficients = check_deferred_grad(dy)
    shape = _wgrad_shape(x, g, filter_size, stride, padding)
    if scale_shift is not None:
        check_vector("scale_shift", scale_shift, (2, shape.C))

    config = config or conv_config("wgrad", shape, x.dtype, x.device, tf32=allow_tf32)
    variant = _patch_variant(config, shape, x, g, y)
    variant = variant or _pointer_variant(config, shape, x, g, y, allow_tf32)
    krsc = (shape.K, shape.R, shape.S, shape.C)
    dw = x.new_empty(krsc, dtype=dw_dtype or x.dtype)
    partials = counters = None
    group, last_programs = 1, 0
    if variant.num_programs > 1:
        partials, counters, group, last_programs = allocate_partials(
            x, dw.numel(), variant.num_programs, num_columns=variant.num_columns
        )
    args = {
        **variant.args,
        "in_scale_shift_ptr": scale_shift,
        "coefficients_ptr": coefficients,
        "dw_ptr": dw,
        "partials_ptr": partials,
        "counters_ptr": counters,
        "INDEX": index_dtype(x, g, y),
        "GROUP": group,
    }
    launch(
        variant.kernel,
        variant.grid,
        args,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        traffic=Traffic(
            reads=num_bytes(x, scale_shift, g, y, coefficients, partials),
            writes=num_bytes(dw, partials),
            flops=shape.flops,
        ),
        trips=variant.trips,
        last_programs=last_programs,
    )
    return dw.permute(0, 3, 1, 2)


def _wgrad_shape(
    x: torch.Tensor, g: torch.Tensor, filter_size: tuple[int, int], stride: int, padding: int
) -> ConvShape:
    """The shape of the convolution of x whose output gradient is g, once they fit."""
    check_activation("x", x)
    n, c, h, w = x.shape
    shape = ConvShape(n, h, w, c, g.shape[1], *filter_size, stride, padding)
    check_activation("dy", g, (n, shape.K, shape.P, shape.Q), x.dtype)
    return shape


def _pointer_variant(
    config: ConvConfig,
    shape: ConvShape,
    x: torch.Tensor,
    g: torch.Tensor,
    y: torch.Tensor | None,
    allow_tf32: bool,
) -> KernelVariant:
    """The launch that loads pixels by pointers: one program a tile of each split."""
    num_npq = shape.gemm("wgrad").k
    # Whole blocks a split, and no split without pixels.
    rows_per_split = triton.cdiv(num_npq, config.split_k * config.block_k) * config.block_k
    num_splits = triton.cdiv(num_npq, rows_per_split)
    tiles = triton.cdiv(shape.RSC, config.block_m) * triton.cdiv(shape.K, config.block_n)
    args = {
        "x_ptr": x,
        "g_ptr": g,
        "y_ptr": y,
        "num_npq": num_npq,
        "rows_per_split": rows_per_split,
        **shape.constexprs(),
        "X_STRIDES": nhwc_strides(x),
        "G_STRIDES": nhwc_strides(g),
        "Y_STRIDES": nhwc_strides(y),
        "PRECISION": "tf32" if allow_tf32 else "ieee",
        **config.constexprs(),
        "ASM": uses_assembly(),
    }
    trips = (num_npq / (num_splits * config.block_k),)
    return KernelVariant(_conv_wgrad_kernel, (tiles, num_splits), args, num_splits, trips, tiles)


def _patch_variant(
    config: ConvConfig,
    shape: ConvShape,
    x: torch.Tensor,
    g: torch.Tensor,
    y: torch.Tensor | None,
) -> KernelVariant | None:
    """The launch in patches of outputs; None where configuration or operands want another form."""
    arguments = (config, shape, x, g, y)
    return wgrad_strip_variant(*arguments) or wgrad_pixel_variant(*arguments)
