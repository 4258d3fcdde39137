"""Convolution forward as an implicit GEMM: y[npq, k] = sum over rsc of x'[npq, rsc] * w[k, rsc].

    prologue   x' = x, or relu(a * x + b) of a raw convolution output x, computed while loading
    epilogue   y stored; or y and its batch-norm statistics; or relu(a * y + b + residual) stored

Letters: x (N, H, W, C), w (K, R, S, C), y (N, P, Q, K). The taps and channels r, s, c are one
flattened reduction axis: any C works, and a 3-channel stem is one reduction over 27 elements, not
nine over 3 each padded to 16. The im2col matrix is loaded tile by tile, never stored.

Bytes: x, w read once from memory (the nine taps of a 3x3 filter overlap in the caches), y written
once; statistics add 16 bytes a channel and tile, written and read, and are finished by the last
program (last_program.py). An activation of the prologue is never stored.

Numerics: products in the input's dtype, sums in fp32. Statistics are those of y as rounded to the
output's dtype, because that y is what the batch norm will read back: its output then has mean
beta exactly as the unfused network's has. Padding taps are 0 after the prologue: relu(b) is not 0.
Deterministic. Source: own derivation; the scheme of cuDNN's scale-bias-relu-conv-genstats graphs.
"""

import torch
import triton
import triton.language as tl

from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.conv_types import BatchNorm
from fastres.kernels.gpu.checks import (
    check_activation,
    check_batch_norm,
    check_filter,
    check_vector,
    index_dtype,
    nhwc_strides,
)
from fastres.kernels.gpu.conv_pixel import fprop_pixel_variant
from fastres.kernels.gpu.conv_strip import fprop_strip_variant
from fastres.kernels.gpu.conv_tma import fprop_tma_variant
from fastres.kernels.gpu.epilogue import store_output_tile
from fastres.kernels.gpu.last_program import finish_batch_norm, finish_stats
from fastres.kernels.gpu.launch import KernelVariant, Traffic, launch, num_bytes
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.launch_table import conv_config
from fastres.kernels.gpu.primitives import (
    dot_pixels,
    im2col_offsets,
    load_im2col,
    wait_for_previous_kernel,
    zero_sums,
)
from fastres.kernels.gpu.prologue import activate_channels, uses_assembly
from fastres.kernels.layout import empty_channels_last

__all__ = ["conv_fprop", "conv_fprop_folded"]


@triton.jit
def _conv_fprop_kernel(
    x_ptr,  # (N, H, W, C) in: activation, or raw output of its producer
    in_scale_shift_ptr,  # (2, C) fp32 in: prologue relu(a * x + b); None: x as it is
    w_ptr,  # (K, R, S, C) in: dense, dtype of x
    y_ptr,  # (N, P, Q, K) out: dense, dtype of x
    batch_norm,  # `BatchNormForward` of y; None: not wanted
    out_scale_shift_ptr,  # (2, K) fp32 in: epilogue a * y + b; None: y as it is
    residual_ptr,  # (N, P, Q, K) in: added after the scale and shift; None: nothing added
    num_npq,
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
    RESIDUAL_STRIDES: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,  # no tile hangs over the pixels or the channels
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    SCALE_SHIFT_INPUT: tl.constexpr = in_scale_shift_ptr is not None
    FILTERS_FIRST: tl.constexpr = BLOCK_N >= 64 and not SCALE_SHIFT_INPUT
    TILES_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N

    # Neighbouring programs share their pixels, the larger operand, and differ in filters.
    pid = tl.program_id(0)
    tile_m = pid // TILES_N
    offs_npq = tile_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_npq = offs_npq < num_npq
    mask_k = offs_k < K
    offs_x, h0, w0 = im2col_offsets(offs_npq, P, Q, STRIDE, PADDING, X_STRIDES)

    acc = zero_sums(BLOCK_M, BLOCK_N, FILTERS_FIRST)
    for rsc in range(0, R * S * C, BLOCK_K):
        offs_rsc = rsc + tl.arange(0, BLOCK_K)
        x, mask_x = load_im2col(
            x_ptr, offs_x, h0, w0, mask_npq, offs_rsc, H, W, C, R, S, PADDING, X_STRIDES
        )  # [BLOCK_M, BLOCK_K]
        w = tl.load(
            w_ptr + offs_k[None, :] * (R * S * C) + offs_rsc[:, None],
            mask=mask_k[None, :] & (offs_rsc < R * S * C)[:, None],
            other=0.0,
        )  # [BLOCK_K, BLOCK_N]
        # Prologue: the affine comes before the padding, so padding is masked once more.
        if SCALE_SHIFT_INPUT:
            mask_rsc = offs_rsc < R * S * C
            x = activate_channels(x, in_scale_shift_ptr, offs_rsc % C, mask_rsc, mask_x, C, ASM)
        acc = dot_pixels(x, w, acc, PRECISION, FILTERS_FIRST)

    # Epilogue.
    store_output_tile(
        acc.T if FILTERS_FIRST else acc,
        tile_m,
        num_npq,
        offs_k,
        y_ptr,
        batch_norm,
        out_scale_shift_ptr,
        residual_ptr,
        K,
        P,
        Q,
        RESIDUAL_STRIDES,
        RELU,
        INDEX,
        WHOLE,
        ASM,
    )
    num_tiles_m = tl.cdiv(num_npq, BLOCK_M)
    if batch_norm is not None:
        finish_batch_norm(batch_norm, offs_k, pid % TILES_N, tile_m, num_tiles_m, num_tiles_m, K)


def conv_fprop(
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    scale_shift: torch.Tensor | None = None,
    batch_norm: BatchNorm | None = None,
    allow_tf32: bool = False,
    config: ConvConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`y = conv(x, w)`, or `conv(relu(a * x + b), w)`: one launch, the activation is never stored.

    Args:
        x: (N, C, H, W) channels_last, gaps between pixels allowed; bf16, fp16, fp32.
        w: (K, C, R, S) dense channels_last, dtype of x.
        stride: the same in both directions.
        padding: the same on all sides; padding taps count as 0 after the scale, shift and ReLU.
        scale_shift: (2, C) fp32, a above b; given, x is a raw convolution output.
        batch_norm: weight and bias (K,) fp32 of the batch norm of y: also find its statistics.
        allow_tf32: let fp32 products be rounded to TF32.
        config: tiles; by default those of the launch table.

    Returns: y: (N, K, P, Q) dense channels_last, dtype of x; with batch_norm
        `LayerState.stats`, (5, K) fp32: mean, unbiased variance, rstd, a, b; else None.

    Raises: ValueError: when a tensor's shape, dtype, device or layout is not as above, or a batch
        norm would see a single value of each channel.

    Numerics: sums in fp32, one rounding to the dtype of y; statistics of y as rounded.
        Deterministic.
    """
    return _launch_fprop(
        x,
        w,
        stride=stride,
        padding=padding,
        in_scale_shift=scale_shift,
        batch_norm=batch_norm,
        allow_tf32=allow_tf32,
        config=config,
    )


def conv_fprop_folded(
    x: torch.Tensor,
    w: torch.Tensor,
    scale_shift: torch.Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    residual: torch.Tensor | None = None,
    relu: bool = True,
    allow_tf32: bool = False,
    config: ConvConfig | None = None,
) -> torch.Tensor:
    """`out = relu(a * conv(x, w) + b + residual)`: a whole layer of inference in one launch.

    Args:
        x: (N, C, H, W) channels_last, gaps between pixels allowed; bf16, fp16, fp32.
        w: (K, C, R, S) dense channels_last, dtype of x.
        scale_shift: (2, K) fp32, the batch norm by its running statistics, a above b.
        stride: the same in both directions.
        padding: the same on all sides.
        residual: (N, K, P, Q) channels_last, gaps allowed, dtype of x; None adds nothing.
        relu: whether the ReLU is applied.
        allow_tf32: let fp32 products be rounded to TF32.
        config: tiles; by default those of the launch table.

    Returns: out: (N, K, P, Q) dense channels_last, dtype of x.

    Raises: ValueError: when a tensor's shape, dtype, device or layout is not as above.

    Numerics: all that follows the products in fp32, one rounding at the end. Deterministic.
    """
    out, _ = _launch_fprop(
        x,
        w,
        stride=stride,
        padding=padding,
        out_scale_shift=scale_shift,
        residual=residual,
        relu=relu,
        allow_tf32=allow_tf32,
        config=config,
    )
    return out


def _fprop_shape(x: torch.Tensor, w: torch.Tensor, stride: int, padding: int) -> ConvShape:
    """The shape of conv(x, w), once x and w are fit for each other."""
    check_activation("x", x)
    check_filter(w, x.dtype)
    n, c, h, width = x.shape
    k, w_c, r, s = w.shape
    if w_c != c:
        raise ValueError(f"w must have {c} input channels as x has, got {w_c}")
    return ConvShape(n, h, width, c, k, r, s, stride, padding)


def _launch_fprop(
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    stride: int,
    padding: int,
    in_scale_shift: torch.Tensor | None = None,
    batch_norm: BatchNorm | None = None,
    out_scale_shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    relu: bool = False,
    allow_tf32: bool = False,
    config: ConvConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Check, allocate and launch, for training and inference."""
    shape = _fprop_shape(x, w, stride, padding)
    if in_scale_shift is not None:
        check_vector("scale_shift", in_scale_shift, (2, shape.C))
    if out_scale_shift is not None:
        check_vector("scale_shift", out_scale_shift, (2, shape.K))
    if residual is not None:
        check_activation("residual", residual, (shape.N, shape.K, shape.P, shape.Q), x.dtype)

    gemm = shape.gemm("fprop")
    if batch_norm is not None:
        check_batch_norm(batch_norm, shape.K, gemm.m)

    config = config or conv_config("fprop", shape, x.dtype, x.device, tf32=allow_tf32)
    y = empty_channels_last(x, shape.N, shape.K, shape.P, shape.Q)
    variant = _patch_variant(config, shape, x, w, residual)
    if variant is None:
        variant = fprop_tma_variant(config, shape, x, w) or _pointer_variant(config, shape, x, w)
        variant.args.update(
            num_npq=gemm.m,
            **shape.constexprs(),
            RESIDUAL_STRIDES=nhwc_strides(residual),
            PRECISION="tf32" if allow_tf32 else "ieee",
            **config.constexprs(),
            WHOLE=config.divides(gemm.m, gemm.n),
            ASM=uses_assembly(),
        )
    finish, stats = finish_stats(
        y,
        batch_norm,
        variant.num_programs,
        num_tiles=variant.num_tiles,
        num_columns=variant.num_columns,
    )
    args = {
        **variant.args,
        "in_scale_shift_ptr": in_scale_shift,
        "y_ptr": y,
        "out_scale_shift_ptr": out_scale_shift,
        "residual_ptr": residual,
        **finish.args,
        "RELU": relu,
        "INDEX": index_dtype(x, y, residual),
    }
    launch(
        variant.kernel,
        variant.grid,
        args,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        traffic=Traffic(
            reads=num_bytes(x, in_scale_shift, w, out_scale_shift, residual) + finish.reads,
            writes=num_bytes(y) + finish.writes,
            flops=shape.flops,
        ),
        trips=variant.trips,
        last_programs=finish.last_programs,
    )
    return y, stats


def _pointer_variant(
    config: ConvConfig, shape: ConvShape, x: torch.Tensor, w: torch.Tensor
) -> KernelVariant:
    """The launch that loads pixels by pointers: one program a tile."""
    gemm = shape.gemm("fprop")
    tiles_m, tiles_n = triton.cdiv(gemm.m, config.block_m), triton.cdiv(gemm.n, config.block_n)
    args = {"x_ptr": x, "w_ptr": w, "X_STRIDES": nhwc_strides(x)}
    trips = (triton.cdiv(shape.RSC, config.block_k),)
    return KernelVariant(_conv_fprop_kernel, (tiles_m * tiles_n,), args, tiles_m, trips, tiles_n)


def _patch_variant(
    config: ConvConfig,
    shape: ConvShape,
    x: torch.Tensor,
    w: torch.Tensor,
    residual: torch.Tensor | None,
) -> KernelVariant | None:
    """The launch in patches of outputs; None where configuration or operands want another form."""
    return fprop_strip_variant(config, shape, x, w, residual) or fprop_pixel_variant(
        config, shape, x, w, residual
    )
