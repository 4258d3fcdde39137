"""Convolutions that load pixels by TMA: what conv_fprop.py and conv_dgrad.py do, at stride 1.

    fprop   y[npq, k]  = sum over rsc of x'[n, p + r - padding, q + s - padding, c] * w[k, rsc]
    dgrad   dx[nhw, c] = sum over rsk of dy'[n, h + padding - r, w + padding - s, k] * w[k, rsc]

A tile of consecutive pixels is a rectangle: a section of an image row, whole rows, or whole images.
A tap (r, s) shifts it, and the Tensor Memory Accelerator (TMA) of Hopper and later GPUs fetches it
through a tensor descriptor at one instruction of one thread: no addresses, no border comparisons,
and zeros for all that lies outside the tensor. Where an operand needs no prologue, the products
read it from shared memory and no thread ever holds it. Prologues and epilogues are those of the
pointer variant; tiles hold the same pixels in the same order.

The grid may be persistent (`ConvConfig.grid_size`): each program computes several tiles, and the
loops over tiles and taps are flattened into one, so a tile's first loads run during the epilogue of
the last.

Limits: stride 1; pixels and filter rows of a multiple of 16 bytes; tiles that are TMA tiles
(`ConvConfig.tma_tile`); a GPU with TMA. All else is loaded by pointers, with the same tiles.

A 3x3 filter still fetches every pixel nine times, from the L2 cache. One TMA tile with a halo
cannot serve the nine taps: Triton has no slice of a tile or of shared memory. Three TMA tiles of
depth 3 * C over overlapping windows (3 * C channels, C apart) are no way out: a window across the
border of an image would meet the neighbouring row instead of zeros, and CUDA documents every stride
of a tensor map as spanning the dimension inside it.

Numerics: those of the pointer variant; only the order of the sum differs. Deterministic.
Source: own derivation; the CUDA driver API's tensor maps for what a descriptor can hold.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres.kernels.conv_shape import ConvOp, ConvShape
from fastres.kernels.gpu.checks import nhwc_strides
from fastres.kernels.gpu.epilogue import store_gradient_tile, store_output_tile
from fastres.kernels.gpu.last_program import finish_batch_norm, finish_batch_norm_backward
from fastres.kernels.gpu.launch import KernelVariant
from fastres.kernels.gpu.launch_config import ConvConfig, TmaTile
from fastres.kernels.gpu.primitives import (
    dot_fp32,
    dot_pixels,
    wait_for_previous_kernel,
    zero_sums,
)
from fastres.kernels.gpu.prologue import activate_channels, backward_bn_channels

__all__ = ["dgrad_tma_variant", "fprop_tma_variant"]

# Bytes to which a descriptor's address and strides are aligned.
ALIGNMENT = 16


@triton.jit
def _are_inside(pixels, SHIFT_H, SHIFT_W, ROWS: tl.constexpr, COLUMNS: tl.constexpr, H, W):
    """Which pixels of ROWS x COLUMNS images lie inside an H x W image once shifted; [rows, 1]."""
    h = pixels // COLUMNS % ROWS + SHIFT_H
    w = pixels % COLUMNS + SHIFT_W
    return ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]


@triton.jit
def _conv_fprop_tma_kernel(
    x_desc,  # (N, H, W, C) in: tiles of BLOCK_M pixels x BLOCK_K channels
    in_scale_shift_ptr,  # (2, C) fp32 in: prologue relu(a * x + b); None: x as it is
    w_desc,  # (K, R * S, C) in: tiles of BLOCK_N x 1 x BLOCK_K
    y_ptr,  # (N, P, Q, K) out: dense, dtype of x
    batch_norm,  # `BatchNormForward` of y; None: not wanted
    out_scale_shift_ptr,  # (2, K) fp32 in: epilogue a * y + b; None: y as it is
    residual_ptr,  # (N, P, Q, K) in: added after the scale and shift; None: nothing added
    num_npq,
    num_tiles,  # a multiple of TILES_N, as is the number of programs
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    STRIDE: tl.constexpr,  # 1
    PADDING: tl.constexpr,
    RESIDUAL_STRIDES: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    PERSISTENT: tl.constexpr,
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
    BLOCKS_C: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K

    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=PERSISTENT):
        tile_m = tile // TILES_N
        first_k = tile % TILES_N * BLOCK_N
        first = tile_m.to(INDEX) * BLOCK_M
        n = (first // (P * Q)).to(tl.int32)
        h0 = (first // Q % P).to(tl.int32) - PADDING
        w0 = (first % Q).to(tl.int32) - PADDING

        acc = zero_sums(BLOCK_M, BLOCK_N, FILTERS_FIRST)
        for step in range(0, R * S * BLOCKS_C):
            tap = step // BLOCKS_C
            c = step % BLOCKS_C * BLOCK_K
            x = x_desc.load([n, h0 + tap // S, w0 + tap % S, c]).reshape(BLOCK_M, BLOCK_K)
            w = w_desc.load([first_k, tap, c]).reshape(BLOCK_N, BLOCK_K)
            # Prologue: the zeros around the image are those of x, and relu(b) is not 0.
            if SCALE_SHIFT_INPUT:
                offs_c = c + tl.arange(0, BLOCK_K)
                pixels = first + tl.arange(0, BLOCK_M)
                inside = _are_inside(pixels, tap // S - PADDING, tap % S - PADDING, P, Q, H, W)
                x = activate_channels(x, in_scale_shift_ptr, offs_c, offs_c < C, inside, C, ASM)
            acc = dot_pixels(x, w.T, acc, PRECISION, FILTERS_FIRST)

        # Epilogue.
        store_output_tile(
            acc.T if FILTERS_FIRST else acc,
            tile_m,
            num_npq,
            first_k + tl.arange(0, BLOCK_N),
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
    # The tiles of a program have the same filters: it is one of those that share their channels.
    if batch_norm is not None:
        column, program = tl.program_id(0) % TILES_N, tl.program_id(0) // TILES_N
        num_programs, num_tiles_m = tl.num_programs(0) // TILES_N, num_tiles // TILES_N
        offs_k = column * BLOCK_N + tl.arange(0, BLOCK_N)
        finish_batch_norm(batch_norm, offs_k, column, program, num_programs, num_tiles_m, K)


@triton.jit
def _conv_dgrad_tma_kernel(
    g_desc,  # (N, P, Q, K) in: tiles of BLOCK_M pixels x BLOCK_K channels of dy or g
    y_desc,  # (N, P, Q, K) in: the same of y; None: dy is read
    coefficients_ptr,  # (3, K) fp32 in: c0, c1, c2; None: dy is read
    w_desc,  # (K, R * S, C) in: tiles of BLOCK_K x 1 x BLOCK_N
    dx_ptr,  # (N, H, W, C) out, dense: dx, or g of the producer's batch norm
    shortcut_ptr,  # (N, H, W, C) in: gradient added to dx; None: nothing added
    producer_y_ptr,  # (N, H, W, C) in: y of the layer that made x; None: no producer
    activation_ptr,  # (N, H, W, C) out: relu(a * producer_y + b), dense; None: not wanted
    producer,  # `BatchNormBackward` of producer_y; None: dx alone
    num_rows,
    num_tiles,  # a multiple of TILES_N, as is the number of programs
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    STRIDE: tl.constexpr,  # 1
    PADDING: tl.constexpr,
    SHORTCUT_STRIDES: tl.constexpr,
    PRODUCER_Y_STRIDES: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    COMPUTE_DY: tl.constexpr = coefficients_ptr is not None
    TILES_N: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    BLOCKS_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K

    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=PERSISTENT):
        tile_m = tile // TILES_N
        first_c = tile % TILES_N * BLOCK_N
        first = tile_m.to(INDEX) * BLOCK_M
        n0 = (first // (H * W)).to(tl.int32)
        p0 = (first // W % H).to(tl.int32) + PADDING
        q0 = (first % W).to(tl.int32) + PADDING
        rows = first + tl.arange(0, BLOCK_M)

        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(0, R * S * BLOCKS_K):
            tap = step // BLOCKS_K
            k = step % BLOCKS_K * BLOCK_K
            place = [n0, p0 - tap // S, q0 - tap % S, k]
            dy = g_desc.load(place).reshape(BLOCK_M, BLOCK_K)
            filters = w_desc.load([k, tap, first_c]).reshape(BLOCK_K, BLOCK_N)
            # Prologue: batch-norm backward; taps outside dy stay 0, although c2 is not.
            if COMPUTE_DY:
                y = y_desc.load(place).reshape(BLOCK_M, BLOCK_K)
                offs_k = k + tl.arange(0, BLOCK_K)
                inside = _are_inside(rows, PADDING - tap // S, PADDING - tap % S, H, W, P, Q)
                dy = backward_bn_channels(
                    dy, y, coefficients_ptr, offs_k, offs_k < K, inside, K, ASM
                )
            acc = dot_fp32(dy, filters, acc, PRECISION)

        # Epilogue.
        store_gradient_tile(
            acc,
            rows,
            rows < num_rows,
            first_c + tl.arange(0, BLOCK_N),
            tile_m,
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
    # The tiles of a program have the same filters: it is one of those that share their channels.
    if producer is not None:
        column, program = tl.program_id(0) % TILES_N, tl.program_id(0) // TILES_N
        num_programs, num_tiles_m = tl.num_programs(0) // TILES_N, num_tiles // TILES_N
        offs_c = column * BLOCK_N + tl.arange(0, BLOCK_N)
        finish_batch_norm_backward(producer, offs_c, column, program, num_programs, num_tiles_m, C)


def fprop_tma_variant(
    config: ConvConfig, shape: ConvShape, x: torch.Tensor, w: torch.Tensor
) -> KernelVariant | None:
    """How conv(x, w) is launched with TMA loads; None where config or operands want pointers."""
    tile = _tma_tile(config, "fprop", shape, x, w)
    if tile is None:
        return None
    args = {
        "x_desc": _describe_pixels(x, tile, config.block_k),
        "w_desc": _describe_filters(w, config.block_n, config.block_k),
    }
    return _schedule(_conv_fprop_tma_kernel, args, config, "fprop", shape)


def dgrad_tma_variant(
    config: ConvConfig, shape: ConvShape, g: torch.Tensor, y: torch.Tensor | None, w: torch.Tensor
) -> KernelVariant | None:
    """How the input gradient is launched with TMA loads; None where it wants pointers."""
    tile = _tma_tile(config, "dgrad", shape, g, w, *([] if y is None else [y]))
    if tile is None:
        return None
    args = {
        "g_desc": _describe_pixels(g, tile, config.block_k),
        "y_desc": None if y is None else _describe_pixels(y, tile, config.block_k),
        "w_desc": _describe_filters(w, config.block_k, config.block_n),
    }
    return _schedule(_conv_dgrad_tma_kernel, args, config, "dgrad", shape)


def _tma_tile(
    config: ConvConfig, op: ConvOp, shape: ConvShape, *operands: torch.Tensor
) -> TmaTile | None:
    """The TMA tile, if the configuration, the operands and the GPU allow one."""
    allowed = all(_can_be_described(t) for t in operands) and _has_tma(operands[0].device)
    return config.tma_tile(op, shape) if allowed else None


def _can_be_described(tensor: torch.Tensor) -> bool:
    """Whether its address and strides are multiples of what a descriptor demands."""
    places = (tensor.data_ptr(), *(s * tensor.element_size() for s in nhwc_strides(tensor)))
    return all(place % ALIGNMENT == 0 for place in places)


def _has_tma(device: torch.device) -> bool:
    """Hopper and later have it; the interpreter and the meta device do as if."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def _schedule(
    kernel: Any, args: dict[str, Any], config: ConvConfig, op: ConvOp, shape: ConvShape
) -> KernelVariant:
    """The launch of `kernel`: its grid, and the arguments that divide the tiles among programs."""
    gemm = shape.gemm(op)
    tiles_m, tiles_n = triton.cdiv(gemm.m, config.block_m), triton.cdiv(gemm.n, config.block_n)
    num_tiles = tiles_m * tiles_n
    grid_size = min(config.grid_size or num_tiles, num_tiles)
    # Whole multiples, so that all tiles of a program have the same filters.
    grid_size = max(grid_size // tiles_n, 1) * tiles_n
    is_persistent = grid_size < num_tiles
    channels = shape.C if op == "fprop" else shape.K
    steps = shape.R * shape.S * triton.cdiv(channels, config.block_k)
    tiles = num_tiles / grid_size
    # Flattened, the loops over tiles and steps are one.
    trips = (tiles * steps,) if is_persistent else (tiles, steps)
    args |= {"num_tiles": num_tiles, "PERSISTENT": is_persistent}
    return KernelVariant(kernel, (grid_size,), args, tiles_m, trips, tiles_n)


def _describe_pixels(tensor: torch.Tensor, tile: TmaTile, block_c: int) -> TensorDescriptor:
    """An (N, C, H, W) channels_last tensor in tiles of pixels x `block_c` channels."""
    n, c, h, w = tensor.shape
    return TensorDescriptor(tensor, [n, h, w, c], [*nhwc_strides(tensor), 1], [*tile, block_c])


def _describe_filters(w: torch.Tensor, block_k: int, block_c: int) -> TensorDescriptor:
    """Filters (K, R * S, C) in tiles of `block_k` filters x one tap x `block_c` channels."""
    k, c, r, s = w.shape
    return TensorDescriptor(w, [k, r * s, c], [r * s * c, c, 1], [block_k, 1, block_c])
