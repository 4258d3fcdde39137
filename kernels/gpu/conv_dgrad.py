"""Input gradient of a convolution: dx[nhw, c] = sum over rsk of dy'[nhw, rsk] * w[k, r, s, c].

    prologue   dy' = dy, or c0 * g + c1 * y + c2 (batch-norm backward) computed while loading
    epilogue   dx = sum (+ shortcut gradient); or, where a producer made x = relu(a * y_p + b), the
               gradient of its batch norm, g = dx * (x > 0), with sums of g and g * (y_p - mean)
               of which the last program makes dgamma, dbeta and c0, c1, c2 (last_program.py)

Letters: dy (N, P, Q, K), w (K, R, S, C), dx (N, H, W, C); p = (h + padding - r) / stride.

Stride u: a pixel (h, w) meets only the taps r = h + padding, s = w + padding modulo u. Pixels
therefore belong to u * u phases (second grid axis), each a dense convolution with its own few
taps: no arithmetic is wasted on the taps that a stride skips. A phase without taps stores zeros.

Bytes: dy (or g and y) and w read once, dx written once; the epilogue reads the shortcut gradient
and the producer's y, from which it recomputes the mask. The masked gradient g replaces dx: no pass
is spent on the ReLU or on the reductions of the producer's batch norm.

Numerics: dy is rounded to its dtype before the product, as an unfused batch norm would store it;
sums in fp32; the reductions use g as rounded, because that g is what is read back. Deterministic.
Source: own derivation; the algebra of cuDNN's dgrad-drelu-dbn graphs.
"""

import torch
import triton
import triton.language as tl

from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.conv_types import BatchNormGrads, DeferredGrad, LayerState
from fastres.kernels.gpu.checks import (
    check_activation,
    check_deferred_grad,
    check_filter,
    check_state,
    index_dtype,
    nhwc_strides,
)
from fastres.kernels.gpu.conv_pixel import dgrad_pixel_variant
from fastres.kernels.gpu.conv_strip import dgrad_strip_variant
from fastres.kernels.gpu.conv_tma import dgrad_tma_variant
from fastres.kernels.gpu.epilogue import store_gradient_tile
from fastres.kernels.gpu.last_program import finish_batch_norm_backward, finish_grads
from fastres.kernels.gpu.launch import KernelVariant, Traffic, launch, num_bytes
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.launch_table import conv_config
from fastres.kernels.gpu.patches import are_dense
from fastres.kernels.gpu.primitives import dot_fp32, pixel_offsets, wait_for_previous_kernel
from fastres.kernels.gpu.prologue import backward_bn_channels, uses_assembly
from fastres.kernels.layout import empty_channels_last

__all__ = ["conv_dgrad"]


@triton.jit
def _conv_dgrad_kernel(
    g_ptr,  # (N, P, Q, K) in: dy, or the gradient g that dy is computed from
    y_ptr,  # (N, P, Q, K) in: with g and coefficients; None: dy is read
    coefficients_ptr,  # (3, K) fp32 in: c0, c1, c2; None: dy is read
    w_ptr,  # (K, R, S, C) in: dense, dtype of dy
    dx_ptr,  # (N, H, W, C) out, dense: dx, or g of the producer's batch norm
    shortcut_ptr,  # (N, H, W, C) in: gradient added to dx; None: nothing added
    producer_y_ptr,  # (N, H, W, C) in: y of the layer that made x; None: no producer
    activation_ptr,  # (N, H, W, C) out: relu(a * producer_y + b), dense; None: not wanted
    producer,  # `BatchNormBackward` of producer_y; None: dx alone
    num_rows,  # pixels of one phase
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
    G_STRIDES: tl.constexpr,
    Y_STRIDES: tl.constexpr,
    SHORTCUT_STRIDES: tl.constexpr,
    PRODUCER_Y_STRIDES: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    COMPUTE_DY: tl.constexpr = coefficients_ptr is not None
    TILES_N: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    PHASE_H: tl.constexpr = (H + STRIDE - 1) // STRIDE
    PHASE_W: tl.constexpr = (W + STRIDE - 1) // STRIDE

    pid = tl.program_id(0)
    phase = tl.program_id(1)
    tile_m = pid // TILES_N
    rows = tile_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = pid % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    n = rows // (PHASE_H * PHASE_W)
    h = rows // PHASE_W % PHASE_H * STRIDE + phase // STRIDE
    w = rows % PHASE_W * STRIDE + phase % STRIDE
    mask_nhw = (rows < num_rows) & (h < H) & (w < W)
    mask_c = offs_c < C

    # The taps of this phase are r0, r0 + STRIDE, ...; its pixels meet tap r0 in output row p0.
    r0 = (phase // STRIDE + PADDING) % STRIDE
    s0 = (phase % STRIDE + PADDING) % STRIDE
    taps_r = (R - r0 + STRIDE - 1) // STRIDE
    taps_s = (S - s0 + STRIDE - 1) // STRIDE
    p0 = (h + PADDING) // STRIDE
    q0 = (w + PADDING) // STRIDE
    rows_g = pixel_offsets(n, p0, q0, G_STRIDES)
    rows_y = pixel_offsets(n, p0, q0, Y_STRIDES)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for rsk in range(0, taps_r * taps_s * K, BLOCK_K):
        offs_rsk = rsk + tl.arange(0, BLOCK_K)
        offs_k = offs_rsk % K
        tap_r = offs_rsk // K // taps_s
        tap_s = offs_rsk // K % taps_s
        mask_rsk = tap_r < taps_r
        p = p0[:, None] - tap_r[None, :]
        q = q0[:, None] - tap_s[None, :]
        mask_dy = mask_nhw[:, None] & mask_rsk[None, :] & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        taps_g = offs_k - tap_r * G_STRIDES[1] - tap_s * G_STRIDES[2]
        dy = tl.load(
            g_ptr + rows_g[:, None] + taps_g[None, :], mask=mask_dy, other=0.0
        )  # [BLOCK_M, BLOCK_K]
        offs_rs = (r0 + tap_r * STRIDE) * S + s0 + tap_s * STRIDE
        filters = tl.load(
            w_ptr + (offs_k * (R * S) + offs_rs)[:, None] * C + offs_c[None, :],
            mask=mask_rsk[:, None] & mask_c[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_N]
        # Prologue: batch-norm backward; taps outside dy stay 0, although c2 is not.
        if COMPUTE_DY:
            taps_y = offs_k - tap_r * Y_STRIDES[1] - tap_s * Y_STRIDES[2]
            y = tl.load(y_ptr + rows_y[:, None] + taps_y[None, :], mask=mask_dy, other=0.0)
            dy = backward_bn_channels(dy, y, coefficients_ptr, offs_k, mask_rsk, mask_dy, K, ASM)
        acc = dot_fp32(dy, filters, acc, PRECISION)

    # Epilogue.
    num_tiles = tl.num_programs(0) // TILES_N * (STRIDE * STRIDE)
    tile = phase * (tl.num_programs(0) // TILES_N) + tile_m
    store_gradient_tile(
        acc,
        (n * H + h) * W + w,
        mask_nhw,
        offs_c,
        tile,
        dx_ptr,
        shortcut_ptr,
        producer_y_ptr,
        producer,
        activation_ptr,
        H,
        W,
        C,
        SHORTCUT_STRIDES,
        PRODUCER_Y_STRIDES,
    )
    if producer is not None:
        column = pid % TILES_N
        finish_batch_norm_backward(producer, offs_c, column, tile, num_tiles, num_tiles, C)


def conv_dgrad(
    dy: torch.Tensor | DeferredGrad,
    w: torch.Tensor,
    input_size: tuple[int, int],
    *,
    stride: int = 1,
    padding: int = 0,
    shortcut: torch.Tensor | None = None,
    producer: LayerState | None = None,
    producer_weight: torch.Tensor | None = None,
    activation: torch.Tensor | None = None,
    allow_tf32: bool = False,
    config: ConvConfig | None = None,
) -> tuple[torch.Tensor, BatchNormGrads | None]:
    """`dx = conv_transpose(dy, w) + shortcut`; with a producer `g = dx * (x > 0)`.

    Args:
        dy: (N, K, P, Q) channels_last gradient, gaps allowed; or a `DeferredGrad`, computed
            while loading.
        w: (K, C, R, S) dense channels_last, dtype of dy.
        input_size: (H, W) of the convolution's input, which a stride leaves open.
        stride: the forward convolution's.
        padding: the forward convolution's.
        shortcut: (N, C, H, W) channels_last, gaps allowed, dtype of dy: added before the mask.
        producer: the layer whose relu(a * y + b) is x, its y (N, C, H, W); given, the result is
            the gradient of its batch norm's output.
        producer_weight: (C,) fp32, of that batch norm.
        activation: (N, C, H, W) dense channels_last, dtype of dy, is given relu(a * y + b) of the
            producer: for a filter gradient that cannot form it while loading.
        allow_tf32: let fp32 products be rounded to TF32.
        config: tiles; by default those of the launch table.

    Returns: dx (or g): (N, C, H, W) dense channels_last, dtype of dy; the gradients of the
        producer's batch norm, in which dy.g is g, or None.

    Raises: ValueError: when a tensor's shape, dtype, device or layout is not as above, or
        a producer comes without its weight.

    Numerics: dy computed in fp32 and rounded once; sums in fp32; dx rounded once. Deterministic.
    """
    g, y, coefficients = check_deferred_grad(dy)
    shape = _dgrad_shape(g, w, input_size, stride, padding)
    size = (shape.N, shape.C, shape.H, shape.W)
    if shortcut is not None:
        check_activation("shortcut", shortcut, size, g.dtype)
    check_state("producer", producer, producer_weight, size, g.dtype)
    if activation is not None:
        check_activation("activation", activation, size, g.dtype)
        if producer is None or not are_dense(activation):
            raise ValueError("activation must be dense channels_last, and beside a producer")
    y_p = None if producer is None else producer.y

    config = config or conv_config("dgrad", shape, g.dtype, g.device, tf32=allow_tf32)
    dx = empty_channels_last(g, *size)
    variant = None
    if activation is None:
        variant = _patch_variant(config, shape, g, y, w, shortcut, y_p)
    if variant is None:
        variant = dgrad_tma_variant(config, shape, g, y, w)
        variant = variant or _pointer_variant(config, shape, g, y, w)
        variant.args.update(
            num_rows=shape.N * triton.cdiv(shape.H, stride) * triton.cdiv(shape.W, stride),
            **shape.constexprs(),
            SHORTCUT_STRIDES=nhwc_strides(shortcut),
            PRODUCER_Y_STRIDES=nhwc_strides(y_p),
            PRECISION="tf32" if allow_tf32 else "ieee",
            **config.constexprs(),
            ASM=uses_assembly(),
            activation_ptr=activation,
        )
    finish, (grads,) = finish_grads(
        dx,
        {"producer": (producer, producer_weight)},
        variant.num_programs,
        num_tiles=variant.num_tiles,
        num_columns=variant.num_columns,
    )
    args = {
        **variant.args,
        "coefficients_ptr": coefficients,
        "dx_ptr": dx,
        "shortcut_ptr": shortcut,
        "producer_y_ptr": y_p,
        **finish.args,
        "INDEX": index_dtype(g, y, dx, shortcut, y_p),
    }
    launch(
        variant.kernel,
        variant.grid,
        args,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        traffic=Traffic(
            reads=num_bytes(g, y, coefficients, w, shortcut, y_p) + finish.reads,
            writes=num_bytes(dx, activation) + finish.writes,
            flops=shape.flops,
        ),
        trips=variant.trips,
        last_programs=finish.last_programs,
    )
    return dx, grads


def _dgrad_shape(
    g: torch.Tensor, w: torch.Tensor, input_size: tuple[int, int], stride: int, padding: int
) -> ConvShape:
    """The shape of the convolution whose output gradient is g, once all three fit."""
    check_filter(w, g.dtype)
    n, k, p, q = g.shape
    w_k, c, r, s = w.shape
    if w_k != k:
        raise ValueError(f"w must have {k} output channels as dy has, got {w_k}")
    shape = ConvShape(n, *input_size, c, k, r, s, stride, padding)
    if (p, q) != (shape.P, shape.Q):
        raise ValueError(
            f"input_size {input_size} gives an output of {(shape.P, shape.Q)}, but dy has {(p, q)}"
        )
    return shape


def _pointer_variant(
    config: ConvConfig, shape: ConvShape, g: torch.Tensor, y: torch.Tensor | None, w: torch.Tensor
) -> KernelVariant:
    """The launch that loads pixels by pointers: one program a tile of each phase."""
    u = shape.stride
    num_rows = shape.N * triton.cdiv(shape.H, u) * triton.cdiv(shape.W, u)
    tiles_m = triton.cdiv(num_rows, config.block_m)
    tiles_n = triton.cdiv(shape.C, config.block_n)
    args = {"g_ptr": g, "y_ptr": y, "w_ptr": w}
    strides = {"G_STRIDES": nhwc_strides(g), "Y_STRIDES": nhwc_strides(y)}
    # Phases have different taps: of the four of a strided 1x1 convolution three have none.
    taps = [
        len(range(r, shape.R, u)) * len(range(s, shape.S, u)) for r in range(u) for s in range(u)
    ]
    trips = sum(triton.cdiv(t * shape.K, config.block_k) for t in taps) / (u * u)
    return KernelVariant(
        _conv_dgrad_kernel,
        (tiles_m * tiles_n, u * u),
        args | strides,
        u * u * tiles_m,
        (trips,),
        tiles_n,
    )


def _patch_variant(
    config: ConvConfig,
    shape: ConvShape,
    g: torch.Tensor,
    y: torch.Tensor | None,
    w: torch.Tensor,
    shortcut: torch.Tensor | None,
    producer_y: torch.Tensor | None,
) -> KernelVariant | None:
    """The launch in patches of outputs; None where configuration or operands want another form."""
    arguments = (config, shape, g, y, w, shortcut, producer_y)
    return dgrad_strip_variant(*arguments) or dgrad_pixel_variant(*arguments)
