"""What becomes of a finished tile of sums: the epilogues of the convolutions, as jit helpers.

Convolutions that load pixels by pointers or by TMA (conv_tma.py) end in `store_output_tile` and
`store_gradient_tile`. Those in patches (patches.py) have several tiles of sums, whose columns are
the channels of one pixel or of neighbouring pixels: each ends in `store_output` or
`store_gradient`, and the channels of all together in `channel_stats` or `channel_sum`.
Partial results are stored for last_program.py, whose last program merges them.
A pointer that is None switches its step off. The kernels document every pointer.
"""

import triton
import triton.language as tl

from fastres.kernels.gpu.last_program import (
    finish_batch_norm,
    finish_batch_norm_backward,
    store_stats,
    store_sums,
)
from fastres.kernels.gpu.primitives import (
    affine,
    relu,
    relu_grad,
    round_to,
    row_offsets,
    tile_sum,
)
from fastres.kernels.gpu.prologue import round_pair

__all__ = [
    "channel_stats",
    "channel_sum",
    "finish_stats_of_all",
    "finish_sums_of_all",
    "load_channels",
    "load_norm",
    "load_outputs",
    "load_scale_shift",
    "store_gradient",
    "store_gradient_tile",
    "store_output",
    "store_output_tile",
]


@triton.jit
def store_output_tile(
    acc,  # [BLOCK_M, BLOCK_N] fp32 sums of consecutive output pixels
    tile_m,  # number of the tile among those of its channels
    num_npq,
    offs_k,  # [BLOCK_N] output channels
    y_ptr,
    batch_norm,
    out_scale_shift_ptr,
    residual_ptr,
    K: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    RESIDUAL_STRIDES: tl.constexpr,
    RELU: tl.constexpr,
    INDEX: tl.constexpr,
    WHOLE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Forward: y, or relu(a * y + b + residual); and the batch-norm statistics of it as stored."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    offs_npq = tile_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_k = offs_k < K
    mask = (offs_npq < num_npq)[:, None] & mask_k[None, :]
    if out_scale_shift_ptr is not None:
        acc = affine(acc, out_scale_shift_ptr, offs_k, K, mask_k)
    if residual_ptr is not None:
        offs = row_offsets(offs_npq, P, Q, RESIDUAL_STRIDES)[:, None] + offs_k[None, :]
        acc += load_outputs(residual_ptr, offs, mask, WHOLE).to(tl.float32)
    if RELU:
        acc = relu(acc)
    offs_y = (offs_npq * K)[:, None] + offs_k[None, :]
    y = _store_rounded(y_ptr, offs_y, mask, acc, WHOLE, ASM)
    if batch_norm is not None:
        count = tl.minimum(num_npq - tile_m.to(INDEX) * BLOCK_M, BLOCK_M).to(tl.float32)
        mean, m2 = channel_stats((y,), (mask,), count, BLOCK_N, WHOLE)
        store_stats(batch_norm.partials_ptr, tile_m, count, mean, m2, offs_k, mask_k, K)


@triton.jit
def store_gradient_tile(
    acc,  # [BLOCK_M, BLOCK_N] fp32 sums of input pixels
    offs_nhw,  # [BLOCK_M] which pixels, flattened
    mask_nhw,  # [BLOCK_M] which of them exist
    offs_c,  # [BLOCK_N] input channels
    tile,  # number of the tile among those of its channels
    dx_ptr,
    shortcut_ptr,
    producer_y_ptr,
    producer,
    activation_ptr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    SHORTCUT_STRIDES: tl.constexpr,
    PRODUCER_Y_STRIDES: tl.constexpr,
):
    """Input gradient: dx (+ shortcut); or g, masked by the producer's ReLU, and its two sums.

    With a producer its activation too, if it is wanted: whose filter gradient reads it next.
    """
    mask_c = offs_c < C
    mask = mask_nhw[:, None] & mask_c[None, :]
    if shortcut_ptr is not None:
        offs = row_offsets(offs_nhw, H, W, SHORTCUT_STRIDES)[:, None] + offs_c[None, :]
        acc += tl.load(shortcut_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if producer_y_ptr is not None:
        offs = row_offsets(offs_nhw, H, W, PRODUCER_Y_STRIDES)[:, None] + offs_c[None, :]
        producer_y = tl.load(producer_y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        out = affine(producer_y, producer.stats_ptr + 3 * C, offs_c, C, mask_c)
        acc = relu_grad(out, acc)
    dx = round_to(acc, dx_ptr.dtype.element_ty)
    offs_dx = (offs_nhw * C)[:, None] + offs_c[None, :]
    tl.store(dx_ptr + offs_dx, dx, mask=mask)
    if activation_ptr is not None:
        activation = round_to(relu(out), dx_ptr.dtype.element_ty)
        tl.store(activation_ptr + offs_dx, activation, mask=mask)
    if producer_y_ptr is not None:
        g = dx.to(tl.float32)
        mean = tl.load(producer.stats_ptr + offs_c, mask=mask_c, other=0.0)
        sum_gy = tile_sum(g * (producer_y - mean[None, :]), mask)
        store_sums(producer.partials_ptr, tile, tile_sum(g, mask), sum_gy, None, offs_c, mask_c, C)


@triton.jit
def load_channels(vector_ptr, channels):
    """Numbers of the channels of a tile's columns, [1, columns]; zeros without a pointer."""
    vector = tl.zeros(channels.shape, tl.float32)
    if vector_ptr is not None:
        vector = tl.load(vector_ptr + channels)
    return vector[None, :]


@triton.jit
def load_scale_shift(scale_shift_ptr, channels, C: tl.constexpr):
    """a and b of the channels of a tile's columns, [1, columns] each."""
    return load_channels(scale_shift_ptr, channels), load_channels(scale_shift_ptr, C + channels)


@triton.jit
def load_norm(batch_norm, channels, C: tl.constexpr):
    """Mean, a and b of a `BatchNormBackward` for a tile's columns, [1, columns] each."""
    mean = load_channels(batch_norm.stats_ptr, channels)
    a, b = load_scale_shift(batch_norm.stats_ptr + 3 * C, channels, C)
    return mean, a, b


@triton.jit
def load_outputs(ptr, offs, mask, WHOLE: tl.constexpr):
    """A tile that lies as a tile of outputs does; WHOLE: nothing of it is masked."""
    return tl.load(ptr + offs) if WHOLE else tl.load(ptr + offs, mask=mask, other=0.0)


@triton.jit
def _store_rounded(ptr, offs, mask, value, WHOLE: tl.constexpr, ASM: tl.constexpr):
    """Round a tile, store it, and return what was stored in fp32, 0 outside the mask."""
    rounded, wide = round_pair(value, ptr.dtype.element_ty, ASM)
    if WHOLE:
        tl.store(ptr + offs, rounded)
    else:
        tl.store(ptr + offs, rounded, mask=mask)
        wide = tl.where(mask, wide, 0.0)
    return wide


@triton.jit
def store_output(
    acc,  # [rows, columns] fp32 sums of outputs
    offs,  # [rows, columns] where they lie in y and in the residual
    mask,  # [rows, columns] or [rows, 1]: which of them exist; unused where WHOLE
    y_ptr,
    residual_ptr,
    scale_shift,  # of `load_scale_shift`; None: y as it is
    RELU: tl.constexpr,
    WHOLE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Forward: y, or relu(a * y + b + residual). Returns it as stored, 0 outside mask."""
    if scale_shift is not None:
        acc = acc * scale_shift[0] + scale_shift[1]
    if residual_ptr is not None:
        acc += load_outputs(residual_ptr, offs, mask, WHOLE).to(tl.float32)
    if RELU:
        acc = relu(acc)
    return _store_rounded(y_ptr, offs, mask, acc, WHOLE, ASM)


@triton.jit
def store_gradient(
    acc,  # [rows, columns] fp32 sums of input pixels
    offs,  # [rows, columns] where they lie in dx, shortcut and producer_y
    mask,  # [rows, columns] or [rows, 1]: which of them exist; unused where WHOLE
    dx_ptr,
    shortcut_ptr,
    producer_y,  # [rows, columns] as loaded; None: no mask, no sums
    producer_norm,  # of `load_norm`, with producer_y
    WHOLE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Input gradient: dx (+ shortcut); or g, masked by the producer's ReLU.

    Returns g and g * (producer_y - mean) as stored, 0 outside mask: what is added up to sums.
    """
    if shortcut_ptr is not None:
        acc += load_outputs(shortcut_ptr, offs, mask, WHOLE).to(tl.float32)
    if producer_y is not None:
        mean, a, b = producer_norm
        acc = relu_grad(producer_y.to(tl.float32) * a + b, acc)
    g = _store_rounded(dx_ptr, offs, mask, acc, WHOLE, ASM)
    gy = g
    if producer_y is not None:
        gy = g * (producer_y.to(tl.float32) - mean)
    return g, gy


@triton.jit
def channel_sum(tile, CHANNELS: tl.constexpr):
    """[CHANNELS] sums of a tile, over rows and over the pixels in a row's columns."""
    ROWS: tl.constexpr = tile.shape[0]
    PIXELS: tl.constexpr = tile.shape[1] // CHANNELS
    if PIXELS > 1:
        tile = tl.sum(tile.reshape(ROWS, PIXELS, CHANNELS), axis=1)
    return tl.sum(tile, axis=0)


@triton.jit
def channel_stats(tiles, masks, count, CHANNELS: tl.constexpr, WHOLE: tl.constexpr):
    """Mean and M2 of every channel over a tuple of tiles that are 0 outside their masks.

    Corrected two-pass algorithm: the second pass also finds what rounding left out of the mean.
    """
    ROWS: tl.constexpr = tiles[0].shape[0]
    COLUMNS: tl.constexpr = tiles[0].shape[1]
    PIXELS: tl.constexpr = COLUMNS // CHANNELS
    total = tiles[0]
    for i in tl.static_range(1, len(tiles)):
        total += tiles[i]
    rough = channel_sum(total, CHANNELS) / count
    # Spread as a whole tile: a single row of it would draw all others into a layout of its own.
    means = tl.broadcast_to(rough[None, None, :], (ROWS, PIXELS, CHANNELS)).reshape(ROWS, COLUMNS)
    distances, squares = total, total
    for i in tl.static_range(len(tiles)):
        distance = tiles[i] - means
        if not WHOLE:
            distance = tl.where(masks[i], distance, 0.0)
        distances = distance if i == 0 else distances + distance
        squares = distance * distance if i == 0 else squares + distance * distance
    rest = channel_sum(distances, CHANNELS)
    m2 = channel_sum(squares, CHANNELS) - rest * rest / count
    return rough + rest / count, tl.maximum(m2, 0.0, tl.PropagateNan.ALL)


@triton.jit
def finish_stats_of_all(
    count,  # pixels of the calling program
    mean,  # [K] fp32 of them
    m2,  # [K] fp32
    batch_norm,  # `BatchNormForward`
    K: tl.constexpr,
):
    """End a kernel whose programs have all channels and merge the statistics of their tiles."""
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    offs_k = tl.arange(0, K)
    mask_k = offs_k < K
    store_stats(batch_norm.partials_ptr, program, count, mean, m2, offs_k, mask_k, K)
    finish_batch_norm(batch_norm, offs_k, 0, program, num_programs, num_programs, K)


@triton.jit
def finish_sums_of_all(
    sum_g,  # [C] fp32 over the pixels of the calling program
    sum_gy,  # [C] fp32
    batch_norm,  # `BatchNormBackward`
    C: tl.constexpr,
):
    """End a kernel whose programs have all channels and add up the gradient sums of their tiles."""
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    offs_c = tl.arange(0, C)
    mask_c = offs_c < C
    store_sums(batch_norm.partials_ptr, program, sum_g, sum_gy, None, offs_c, mask_c, C)
    finish_batch_norm_backward(batch_norm, offs_c, 0, program, num_programs, num_programs, C)
