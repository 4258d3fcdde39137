"""Convolutions of 16 to 64 channels by pixels of patches: 3x3, stride 1, padding 1.

    fprop   y[o, q, k]     = sum over r, s of x'[o + r, q + s, :] @ w[k, r, s, :]
    dgrad   dx[o, q, c]    = sum over r, s of dy'[o + 2 - r, q + 2 - s, :] @ w[:, r, s, c]
    wgrad   dw[k, r, s, c] = sum over patches, o, q of dy'[o, q, k] * x'[o + r, q + s, c]

A row of the products of fprop and dgrad is a patch of 2x2 outputs (patches.py); its window is 4x4
pixels. A window pixel of all patches of a tile, [BLOCK_M, channels], is loaded and formed once,
then multiplied into the sums it touches: one for each of the four outputs of a patch, of which it
meets one at the corners of the window, two at its edges, four in its middle. An element is formed
4 times, where an im2col tile forms it 9 times, and nothing is multiplied by zero. Prologues are
those of prologue.py, epilogues those of epilogue.py.

dgrad also takes stride 2, 3x3 with padding 1 or 1x1 without. The window of a patch of dx is 2x2
pixels of dy, or one: the four outputs of a patch are the four phases of a stride, each with its own
taps (conv_dgrad.py), and share what is formed of dy. Outputs that no tap meets are the shortcut's
gradient, or zeros.

wgrad multiplies a window pixel, transposed, with the outputs that a tap joins with it; dw of all
pixels that a program owns stays in its registers, the tiles of patches are divided among split_k
programs. Nine taps of 64x64 channels are too many for one program: it owns BLOCK_N filters, and
with patches of PATCH_H = 1 row one filter row only, whose window is one row too. Channels are the
rows of a product, or filters where those are fewer: a warpgroup's has 64.

AHEAD window pixels are loaded before the first product, and the next whenever one is used: products
outside of a pipelined loop wait for their operands, so loads must be under way.

Bytes: every operand once from memory, the windows overlap in the caches; the result written once,
for wgrad 8 bytes a filter element and split.

Limits: channels in {16, 32, 64}, bf16 and fp16, tensors without gaps; all else is im2col's.

Numerics: those of conv_fprop.py, conv_dgrad.py and conv_wgrad.py; only the order of the sum
differs. Nothing else is non-finite than should be, but dw of a tap that joins a non-finite window
pixel with an output beyond the border, which counts as 0. Deterministic. Source: own derivation.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from fastres.kernels.conv_shape import ConvOp, ConvShape
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
from fastres.kernels.gpu.last_program import add_partials, store_partial
from fastres.kernels.gpu.launch import KernelVariant
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.launch_rules import fits_pixels
from fastres.kernels.gpu.patches import (
    PatchGrid,
    are_dense,
    count_outputs,
    locate_patches,
    output_mask,
    patch_grid,
)
from fastres.kernels.gpu.primitives import (
    add_outer,
    dot_fp32,
    round_to,
    wait_for_previous_kernel,
    zero_outer,
)
from fastres.kernels.gpu.prologue import activate, backward_bn, uses_assembly

__all__ = ["dgrad_pixel_variant", "fprop_pixel_variant", "wgrad_pixel_variant"]

PATCH_H = 2


@triton.jit
def _are_inside(
    tile,  # `PatchTile`
    SHAPE: tl.constexpr,  # `PatchShape`
    channels,
    first_r,  # filter row that window row 0 is for output row 0, where ROWS is 1; else 0
    i: tl.constexpr,  # number of the window pixel
    ROWS: tl.constexpr,  # filter rows that the window serves
):
    """Whether window pixel i of every patch lies in its image, [BLOCK_M, channels].

    Comparisons that no patch can fail are left out. The full tile, not one column of it, is what
    the compiler can form again in the layout of a product, where it would pass on a column.
    """
    H: tl.constexpr = SHAPE.H
    W: tl.constexpr = SHAPE.W
    PATCH_H: tl.constexpr = SHAPE.PATCH_H
    PATCH_W: tl.constexpr = SHAPE.PATCH_W
    r: tl.constexpr = i // (PATCH_W + 2)
    s: tl.constexpr = i % (PATCH_W + 2)
    LOWEST: tl.constexpr = r + 2 - ROWS
    inside = tile.w0 >= 0 if SHAPE.WHOLE else tile.exists
    if r == 0:
        inside = inside & (tile.h0 + first_r > 0)
    if LOWEST >= PATCH_H or (LOWEST > 0 and H % PATCH_H != 0):
        inside = inside & (tile.h0 + first_r < H + 1 - r)
    if s == 0:
        inside = inside & (tile.w0 > 0)
    elif s > PATCH_W or (s > 1 and W % PATCH_W != 0):
        inside = inside & (tile.w0 < W + 1 - s)
    return inside[:, None] & (channels >= 0)[None, :]


@triton.jit
def _offsets(pixels, channels, h, w, W: tl.constexpr, CHANNELS: tl.constexpr):
    """Elements of the pixels h rows below and w columns beside given ones, [pixels, channels]."""
    return ((pixels + (h * W + w)) * CHANNELS)[:, None] + channels[None, :]


@triton.jit
def _load_masked(ptr, offs, mask, ZEROS: tl.constexpr):
    """A tile of pixels: where the mask is false 0 if ZEROS, else anything."""
    return tl.load(ptr + offs, mask=mask, other=0.0) if ZEROS else tl.load(ptr + offs, mask=mask)


@triton.jit
def _load_operand(
    ptr,  # (N, P, Q, IN)
    pixels,  # [BLOCK_M] number of the operand's pixel at window place (1, 1) of each patch
    inside,  # [BLOCK_M, IN]
    i: tl.constexpr,
    Q: tl.constexpr,
    STRIDE: tl.constexpr,
    ZEROS: tl.constexpr,
):
    """The pixel at window place i of every patch, [BLOCK_M, IN]; outside 0 if ZEROS."""
    h: tl.constexpr = (i // 4 - 1) // STRIDE
    w: tl.constexpr = (i % 4 - 1) // STRIDE
    offs = _offsets(pixels, tl.arange(0, inside.shape[1]), h, w, Q, inside.shape[1])
    return _load_masked(ptr, offs, inside, ZEROS)


@triton.jit
def _add_tap(
    acc,
    pixel,
    w_ptrs,
    i: tl.constexpr,
    o: tl.constexpr,
    R: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """Add to output o of every patch the product of the pixel at place i, if a tap joins them."""
    C: tl.constexpr = acc.shape[1] if GRADIENT else pixel.shape[1]
    # The padding is R // 2, and window row 1 is aligned with output row 0.
    r: tl.constexpr = o // 2 - i // 4 + R // 2 + 1 if GRADIENT else i // 4 - o // 2
    s: tl.constexpr = o % 2 - i % 4 + R // 2 + 1 if GRADIENT else i % 4 - o % 2
    if r >= 0 and r < R and s >= 0 and s < R:
        acc = dot_fp32(pixel, tl.load(w_ptrs + (r * R + s) * C), acc, "ieee")
    return acc


@triton.jit
def _convolve(
    accs,  # [BLOCK_M, OUT] fp32 of the four outputs of all patches, row by row
    pixels_ptr,  # (N, P, Q, IN) in: the operand, or what its prologue reads first
    y_ptr,  # (N, P, Q, IN) in: what the prologue of dgrad reads beside it; None otherwise
    vectors,  # [1, IN] fp32 each: a, b of fprop's prologue, or c0, c1, c2 of dgrad's; or None
    w_ptrs,  # [IN, OUT] pointers to the first tap
    pixels,  # [BLOCK_M] number of the operand's pixel at window place (1, 1) of each patch
    tile,  # `PatchTile`
    SHAPE: tl.constexpr,  # `PatchShape`
    Q: tl.constexpr,
    R: tl.constexpr,
    STRIDE: tl.constexpr,
    PLACES: tl.constexpr,
    GRADIENT: tl.constexpr,
    AHEAD: tl.constexpr,
    ASM: tl.constexpr,
):
    """Add to the outputs of all patches the products of their windows."""
    PROLOGUE: tl.constexpr = vectors is not None
    NUM: tl.constexpr = len(PLACES)
    channels = tl.arange(0, w_ptrs.shape[0])
    loaded: tl.tuple = ()
    loaded_y: tl.tuple = ()
    for j in tl.static_range(NUM + AHEAD):
        if j < NUM:
            inside = _are_inside(tile, SHAPE, channels, 0, PLACES[j], 3)
            loaded += (
                _load_operand(pixels_ptr, pixels, inside, PLACES[j], Q, STRIDE, not PROLOGUE),
            )
            if y_ptr is not None:
                loaded_y += (_load_operand(y_ptr, pixels, inside, PLACES[j], Q, STRIDE, False),)
        if j >= AHEAD:
            pixel = loaded[j - AHEAD]
            if PROLOGUE:
                inside = _are_inside(tile, SHAPE, channels, 0, PLACES[j - AHEAD], 3)
                if y_ptr is None:
                    a, b = vectors
                    pixel = activate(pixel, a, b, inside, ASM)
                else:
                    c0, c1, c2 = vectors
                    pixel = backward_bn(pixel, loaded_y[j - AHEAD], c0, c1, c2, inside, ASM)
            added: tl.tuple = ()
            for o in tl.static_range(4):
                added += (_add_tap(accs[o], pixel, w_ptrs, PLACES[j - AHEAD], o, R, GRADIENT),)
            accs = added
    return accs


@triton.jit
def _conv_fprop_pixel_kernel(
    x_ptr,  # (N, H, W, C) in: activation, or raw output of its producer
    in_scale_shift_ptr,  # (2, C) fp32 in: prologue relu(a * x + b); None: x as it is
    w_ptr,  # (K, 3, 3, C) in: dense, dtype of x
    y_ptr,  # (N, H, W, K) out: dtype of x
    out_scale_shift_ptr,  # (2, K) fp32 in: epilogue a * y + b; None: y as it is
    residual_ptr,  # (N, H, W, K) in: added after the scale and shift; None: nothing added
    batch_norm,  # `BatchNormForward` of y; None: not wanted
    num_patches,
    SHAPE: tl.constexpr,  # `PatchShape` of y
    C: tl.constexpr,
    K: tl.constexpr,
    RELU: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PLACES: tl.constexpr,
    AHEAD: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    WHOLE: tl.constexpr = SHAPE.WHOLE
    tile = locate_patches(tl.program_id(0), num_patches, SHAPE, BLOCK_M, INDEX)
    offs_c = tl.arange(0, C)
    offs_k = tl.arange(0, K)

    vectors = None
    if in_scale_shift_ptr is not None:
        vectors = load_scale_shift(in_scale_shift_ptr, offs_c, C)
    accs = _convolve(
        (tl.zeros((BLOCK_M, K), dtype=tl.float32),) * 4,
        x_ptr,
        None,
        vectors,
        w_ptr + offs_c[:, None] + offs_k[None, :] * (9 * C),
        tile.pixels,
        tile,
        SHAPE,
        Q=SHAPE.W,
        R=3,
        STRIDE=1,
        PLACES=PLACES,
        GRADIENT=False,
        AHEAD=AHEAD,
        ASM=ASM,
    )

    # Epilogue.
    scale_shift = None
    if out_scale_shift_ptr is not None:
        scale_shift = load_scale_shift(out_scale_shift_ptr, offs_k, K)
    stored: tl.tuple = ()
    masks: tl.tuple = ()
    for o in tl.static_range(4):
        offs = _offsets(tile.pixels, offs_k, o // 2, o % 2, SHAPE.W, K)
        mask = output_mask(tile, SHAPE, o // 2, o % 2)
        y = store_output(accs[o], offs, mask, y_ptr, residual_ptr, scale_shift, RELU, WHOLE, ASM)
        masks += (mask,)
        stored += (y,)
    if batch_norm is not None:
        count = count_outputs(tile, SHAPE)
        mean, m2 = channel_stats(stored, masks, count, K, WHOLE)
        finish_stats_of_all(count, mean, m2, batch_norm, K)


@triton.jit
def _conv_dgrad_pixel_kernel(
    g_ptr,  # (N, P, Q, K) in: dy, or the gradient g that dy is computed from
    y_ptr,  # (N, P, Q, K) in: with g and coefficients; None: dy is read
    coefficients_ptr,  # (3, K) fp32 in: c0, c1, c2; None: dy is read
    w_ptr,  # (K, R, R, C) in: dense, dtype of dy
    dx_ptr,  # (N, H, W, C) out: dx, or g of the producer's batch norm
    shortcut_ptr,  # (N, H, W, C) in: gradient added to dx; None: nothing added
    producer_y_ptr,  # (N, H, W, C) in: y of the layer that made x; None: no producer
    producer,  # `BatchNormBackward` of producer_y; None: dx alone
    num_patches,
    SHAPE: tl.constexpr,  # `PatchShape` of dx
    C: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    STRIDE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PLACES: tl.constexpr,
    AHEAD: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    WHOLE: tl.constexpr = SHAPE.WHOLE
    tile = locate_patches(tl.program_id(0), num_patches, SHAPE, BLOCK_M, INDEX)
    offs_c = tl.arange(0, C)
    offs_k = tl.arange(0, K)

    vectors = None
    if coefficients_ptr is not None:
        c0 = load_channels(coefficients_ptr, offs_k)
        c1 = load_channels(coefficients_ptr, K + offs_k)
        c2 = load_channels(coefficients_ptr, 2 * K + offs_k)
        vectors = (c0, c1, c2)
    # The sums begin with the shortcut: at their end, beside producer_y, it would not fit.
    accs: tl.tuple = ()
    for o in tl.static_range(4):
        acc = tl.zeros((BLOCK_M, C), dtype=tl.float32)
        if shortcut_ptr is not None:
            offs = _offsets(tile.pixels, offs_c, o // 2, o % 2, SHAPE.W, C)
            mask = output_mask(tile, SHAPE, o // 2, o % 2)
            acc = load_outputs(shortcut_ptr, offs, mask, WHOLE).to(tl.float32)
        accs += (acc,)
    accs = _convolve(
        accs,
        g_ptr,
        y_ptr,
        vectors,
        w_ptr + offs_k[:, None] * (R * R * C) + offs_c[None, :],
        tile.pixels if STRIDE == 1 else (tile.n.to(INDEX) * P + tile.h0 // 2) * Q + tile.w0 // 2,
        tile,
        SHAPE,
        Q=Q,
        R=R,
        STRIDE=STRIDE,
        PLACES=PLACES,
        GRADIENT=True,
        AHEAD=AHEAD,
        ASM=ASM,
    )

    # Epilogue.
    sum_g = tl.zeros((BLOCK_M, C), dtype=tl.float32)
    sum_gy = sum_g
    for o in tl.static_range(4):
        offs = _offsets(tile.pixels, offs_c, o // 2, o % 2, SHAPE.W, C)
        mask = output_mask(tile, SHAPE, o // 2, o % 2)
        producer_y, norm = None, None
        if producer is not None:
            producer_y = load_outputs(producer_y_ptr, offs, mask, WHOLE)
            # Loaded for each output: beside all sums these vectors would not fit the registers.
            norm = load_norm(producer, offs_c, C)
        g, gy = store_gradient(accs[o], offs, mask, dx_ptr, None, producer_y, norm, WHOLE, ASM)
        sum_g += g
        sum_gy += gy
    if producer is not None:
        finish_sums_of_all(channel_sum(sum_g, C), channel_sum(sum_gy, C), producer, C)


@triton.jit
def _outputs_exist(tile, SHAPE: tl.constexpr, channels, o: tl.constexpr):
    """Whether output o of every patch is a pixel, [BLOCK_M, channels]."""
    PATCH_W: tl.constexpr = SHAPE.PATCH_W
    inside = tile.w0 >= 0
    if not SHAPE.WHOLE:
        inside = tile.exists
        if SHAPE.H % SHAPE.PATCH_H != 0:
            inside = inside & (tile.h0 < SHAPE.H - o // PATCH_W)
        if SHAPE.W % PATCH_W != 0:
            inside = inside & (tile.w0 < SHAPE.W - o % PATCH_W)
    return inside[:, None] & (channels >= 0)[None, :]


@triton.jit
def _load_window(
    x_ptr,
    tile,  # `PatchTile`
    SHAPE: tl.constexpr,  # `PatchShape`
    offs_c,
    first_r,
    i: tl.constexpr,
    ROWS: tl.constexpr,
    ZEROS: tl.constexpr,  # whether pixels outside are 0; anything where a prologue masks them
):
    """Window pixel i of every patch, [BLOCK_M, C]."""
    COLUMNS: tl.constexpr = SHAPE.PATCH_W + 2
    inside = _are_inside(tile, SHAPE, offs_c, first_r, i, ROWS)
    row = i // COLUMNS - 1 + first_r
    offs = _offsets(tile.pixels, offs_c, row, i % COLUMNS - 1, SHAPE.W, offs_c.shape[0])
    return _load_masked(x_ptr, offs, inside, ZEROS)


@triton.jit
def _add_outputs(
    acc,  # [C, BLOCK_N] fp32 of one tap, or transposed: see `add_outer`
    x,  # [BLOCK_M, C] window pixel i
    dys,  # tuple of the outputs' [BLOCK_M, BLOCK_N]
    i: tl.constexpr,
    tap: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
):
    """Add the product of window pixel i and the output that the tap joins with it, if there is."""
    o: tl.constexpr = i // (PATCH_W + 2) - tap // 3
    q: tl.constexpr = i % (PATCH_W + 2) - tap % 3
    if o >= 0 and o < PATCH_H and q >= 0 and q < PATCH_W:
        acc = add_outer(acc, x, dys[o * PATCH_W + q])
    return acc


@triton.jit
def _conv_wgrad_pixel_kernel(
    x_ptr,  # (N, H, W, C) in: activation, or raw output of its producer
    in_scale_shift_ptr,  # (2, C) fp32 in: prologue relu(a * x + b); None: x as it is
    g_ptr,  # (N, H, W, K) in: dy, or the gradient g that dy is computed from
    y_ptr,  # (N, H, W, K) in: with g and coefficients; None: dy is read
    coefficients_ptr,  # (3, K) fp32 in: c0, c1, c2; None: dy is read
    dw_ptr,  # (K, 3, 3, C) out
    partials_ptr,  # (num_splits + num_groups, K, 3, 3, C) fp32: None where there is one split
    counters_ptr,  # (num_blocks, 1 + num_groups) int32: zeros
    num_patches,
    num_tiles,
    SHAPE: tl.constexpr,  # `PatchShape` of dy
    C: tl.constexpr,
    K: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr,
    ASM: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    SCALE_SHIFT_INPUT: tl.constexpr = in_scale_shift_ptr is not None
    COMPUTE_DY: tl.constexpr = coefficients_ptr is not None
    PATCH_H: tl.constexpr = SHAPE.PATCH_H
    PATCH_W: tl.constexpr = SHAPE.PATCH_W
    ROWS: tl.constexpr = 1 if PATCH_H == 1 else 3
    WINDOW: tl.constexpr = (PATCH_H + ROWS - 1) * (PATCH_W + 2)
    OUTPUTS: tl.constexpr = PATCH_H * PATCH_W

    first_r = tl.program_id(0) % (3 // ROWS)
    split = tl.program_id(1)
    offs_c = tl.arange(0, C)
    offs_k = tl.program_id(0) // (3 // ROWS) * BLOCK_N + tl.arange(0, BLOCK_N)
    a = load_channels(in_scale_shift_ptr, offs_c)
    b = load_channels(in_scale_shift_ptr, C + offs_c)
    c0 = load_channels(coefficients_ptr, offs_k)
    c1 = load_channels(coefficients_ptr, K + offs_k)
    c2 = load_channels(coefficients_ptr, 2 * K + offs_k)

    accs = (zero_outer(C, BLOCK_N),) * (3 * ROWS)
    # Masks of partial tiles, hoisted out of the loop, would take registers that operands need.
    PARTIAL: tl.constexpr = not SHAPE.WHOLE
    for number in tl.range(split, num_tiles, tl.num_programs(1), disable_licm=PARTIAL):
        tile = locate_patches(number, num_patches, SHAPE, BLOCK_M, INDEX)
        loaded: tl.tuple = ()
        for i in tl.static_range(min(AHEAD, WINDOW)):
            x = _load_window(x_ptr, tile, SHAPE, offs_c, first_r, i, ROWS, not SCALE_SHIFT_INPUT)
            loaded += (x,)
        gs: tl.tuple = ()
        ys: tl.tuple = ()
        dys: tl.tuple = ()
        for o in tl.static_range(OUTPUTS + AHEAD):
            if o < OUTPUTS:
                mask = _outputs_exist(tile, SHAPE, offs_k, o)
                offs = _offsets(tile.pixels, offs_k, o // PATCH_W, o % PATCH_W, SHAPE.W, K)
                gs += (load_outputs(g_ptr, offs, mask, SHAPE.WHOLE),)
                if COMPUTE_DY:
                    ys += (load_outputs(y_ptr, offs, mask, SHAPE.WHOLE),)
            if o >= AHEAD:
                dy = gs[o - AHEAD]
                if COMPUTE_DY:
                    mask = _outputs_exist(tile, SHAPE, offs_k, o - AHEAD)
                    dy = backward_bn(dy, ys[o - AHEAD], c0, c1, c2, mask, ASM)
                dys += (dy,)
        for i in tl.static_range(WINDOW):
            if i + AHEAD < WINDOW:
                x = _load_window(
                    x_ptr, tile, SHAPE, offs_c, first_r, i + AHEAD, ROWS, not SCALE_SHIFT_INPUT
                )
                loaded += (x,)
            x = loaded[i]
            if SCALE_SHIFT_INPUT:
                inside = _are_inside(tile, SHAPE, offs_c, first_r, i, ROWS)
                x = activate(x, a, b, inside, ASM)
            new: tl.tuple = ()
            for tap in tl.static_range(3 * ROWS):
                new += (_add_outputs(accs[tap], x, dys, i, tap, PATCH_H, PATCH_W),)
            accs = new

    # Epilogue.
    offs = offs_k[None, :] * (9 * C) + offs_c[:, None]
    # Where filters are the rows of the sums.
    if accs[0].shape[0] != C:
        offs = tl.trans(offs)
    for tap in tl.static_range(3 * ROWS):
        offs_tap = offs + (first_r * 3 + tap) * C
        if partials_ptr is None:
            tl.store(dw_ptr + offs_tap, round_to(accs[tap], dw_ptr.dtype.element_ty))
        else:
            store_partial(partials_ptr, split, accs[tap], offs_tap, None, K * 9 * C)
    if partials_ptr is not None:
        add_partials(
            partials_ptr,
            counters_ptr,
            dw_ptr,
            tl.program_id(0) // (3 // ROWS) * BLOCK_N,
            first_r * 3 * C,
            tl.program_id(0),
            split,
            tl.num_programs(1),
            K,
            9 * C,
            BLOCK_N,
            3 * ROWS * C,
            GROUP,
        )


def fprop_pixel_variant(
    config: ConvConfig,
    shape: ConvShape,
    x: torch.Tensor,
    w: torch.Tensor,
    residual: torch.Tensor | None,
) -> KernelVariant | None:
    """How conv(x, w) is launched in pixels of patches; None where it wants another form."""
    if not _fits(config, "fprop", shape, x, residual):
        return None
    args: dict[str, Any] = {"x_ptr": x, "w_ptr": w, "PLACES": tuple(range(16))}
    return _variant(_conv_fprop_pixel_kernel, config, shape, args)


def dgrad_pixel_variant(
    config: ConvConfig,
    shape: ConvShape,
    g: torch.Tensor,
    y: torch.Tensor | None,
    w: torch.Tensor,
    shortcut: torch.Tensor | None,
    producer_y: torch.Tensor | None,
) -> KernelVariant | None:
    """How the input gradient is launched in pixels of patches; None where it wants another form."""
    if not _fits(config, "dgrad", shape, g, y, shortcut, producer_y):
        return None
    args: dict[str, Any] = {"g_ptr": g, "y_ptr": y, "w_ptr": w}
    args |= {"P": shape.P, "Q": shape.Q, "R": shape.R, "STRIDE": shape.stride}
    # Of the 4x4 places of a window, dy of a strided convolution has pixels in rows and columns 1
    # and 3, of which a 1x1 filter meets the first.
    strided = (5, 7, 13, 15) if shape.R == 3 else (5,)
    args["PLACES"] = tuple(range(16)) if shape.stride == 1 else strided
    return _variant(_conv_dgrad_pixel_kernel, config, shape, args)


def wgrad_pixel_variant(
    config: ConvConfig,
    shape: ConvShape,
    x: torch.Tensor,
    g: torch.Tensor,
    y: torch.Tensor | None,
) -> KernelVariant | None:
    """How the filter gradient is launched in pixels of patches; None where it wants another form.

    One program a split, block of K and, with patches of one row, filter row.
    """
    if not _fits(config, "wgrad", shape, x, g, y) or config.block_n > shape.K:
        return None
    grid = patch_grid(shape, config.patch_h, config.block_m, config.patch_w)
    num_splits = min(config.split_k, grid.num_tiles)
    blocks = shape.K // config.block_n * (3 if config.patch_h == 1 else 1)
    args: dict[str, Any] = {"x_ptr": x, "g_ptr": g, "y_ptr": y, "BLOCK_N": config.block_n}
    args["num_tiles"] = grid.num_tiles
    args |= _common_args(config, shape, grid)
    trips = (grid.num_tiles / num_splits,)
    return KernelVariant(
        _conv_wgrad_pixel_kernel, (blocks, num_splits), args, num_splits, trips, blocks
    )


def _fits(config: ConvConfig, op: ConvOp, shape: ConvShape, *tensors: torch.Tensor | None) -> bool:
    """Whether configuration, shape and operands are those of this form."""
    dtypes = {t.dtype for t in tensors if t is not None}
    is_pixel = config.form == "pixel" and all(fits_pixels(op, shape, dtype) for dtype in dtypes)
    return is_pixel and are_dense(*tensors)


def _variant(
    kernel: Any, config: ConvConfig, shape: ConvShape, args: dict[str, Any]
) -> KernelVariant:
    """One program a tile of patches."""
    grid = patch_grid(shape, PATCH_H, config.block_m)
    args |= _common_args(config, shape, grid)
    return KernelVariant(kernel, (grid.num_tiles,), args, grid.num_tiles, (1.0,))


def _common_args(config: ConvConfig, shape: ConvShape, grid: PatchGrid) -> dict[str, Any]:
    return {
        "num_patches": grid.num_patches,
        "SHAPE": grid.shape,
        "C": shape.C,
        "K": shape.K,
        "BLOCK_M": config.block_m,
        "AHEAD": config.ahead,
        "ASM": uses_assembly(),
    }
