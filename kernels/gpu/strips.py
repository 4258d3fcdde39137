"""Strips: the matrix products of 3x3 convolutions of few channels, row by row of a patch's window.

A row of the product is a patch of PATCH_H x 2 pixels (patches.py). Each of the PATCH_H + 2 rows of
its window is four neighbouring pixels, in memory one run of 4 * C numbers, and meets up to three
rows of the patch. Written with filters T that are spread over the two pixels of an output row,

    out[o] = sum over r of row[r] @ T[r - o],   T[t][(s, c), (q, k)] = w[k, t, s - q, c]

for 0 <= r - o <= 2, 0 <= s - q <= 2, and 0 elsewhere. A filter gradient is the same sum the other
way round: dT[t] = sum over o of row[o + t]^T @ dout[o], and dw adds up what dT has of both q.

A product of a warpgroup has 64 rows, and a window row of fewer than 16 channels has 16 lanes. Then
the rows are outputs, as many of them as it takes: JOIN rows of a patch stand side by side,

    dT[t][(o, q, k), (s, c)] = sum over p of dout[(o, q, k) of group p]^T @ row[JOIN * p + t]

for t from 0 to JOIN + 1, and w[k, t, u, c] collects dT[t + o] where s = q + u.

What it costs, for an output: zeros are multiplied horizontally only, so the products are 4/3 of
those that are needed. A window row is loaded and formed once for all rows of the patch: a pixel is
formed (PATCH_H + 2) / PATCH_H * 2 times, 3 for PATCH_H = 4 and 4 for 2, where im2col forms it 9
times. The filters are spread while they are loaded, once a program.

NaN and inf: the zeros of T are multiplied too, so both outputs of a patch's row are non-finite if
one of them should be. Of dT only products of taps are added up, among them those of a window pixel
with an output beyond the border, whose 0 makes NaN of inf.

Letters: C channels go in, K come out. Fewer than four channels stand in the lanes of four, so that
a window row has at least 16 lanes, the least of a tensor-core product. Source: own derivation.
"""

import triton
import triton.language as tl

from fastres.kernels.gpu.last_program import add_partials
from fastres.kernels.gpu.patches import window_mask
from fastres.kernels.gpu.primitives import add_outer, dot_fp32, round_to, zero_outer

__all__ = [
    "add_filter_products",
    "add_products",
    "finish_filter_sums",
    "fold_outputs",
    "load_rows",
    "load_spread_filters",
    "row_lanes",
    "row_masks",
    "zero_filter_sums",
    "zero_tiles",
]


@triton.jit
def row_lanes(C: tl.constexpr):
    """Window column s and channel c of the lanes of a window row, [4 * max(C, 4)] each."""
    lane = tl.arange(0, 4 * max(C, 4))
    return lane // max(C, 4), lane % max(C, 4)


@triton.jit
def row_masks(tile, SHAPE: tl.constexpr, C: tl.constexpr):
    """For every window row, which of its lanes are pixels of the image: [BLOCK_M, lanes] each."""
    s, c = row_lanes(C)
    masks: tl.tuple = ()
    for r in tl.static_range(SHAPE.PATCH_H + 2):
        inside = window_mask(tile, SHAPE, r, s[None, :])
        if C < 4:
            inside = inside & (c < C)[None, :]
        if not SHAPE.WHOLE:
            inside = inside & tile.exists[:, None]
        masks += (inside,)
    return masks


@triton.jit
def load_rows(
    ptr,  # dense NHWC
    tile,  # `PatchTile`
    SHAPE: tl.constexpr,  # `PatchShape`
    masks,  # of `row_masks`
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    C: tl.constexpr,
    ZERO: tl.constexpr,  # whether lanes outside are 0; anything where a prologue masks them
):
    """COUNT window rows from FIRST on, or as many as there are: [BLOCK_M, lanes] each."""
    s, c = row_lanes(C)
    rows: tl.tuple = ()
    for r in tl.static_range(FIRST, min(FIRST + COUNT, len(masks))):
        # The window starts one pixel above the patch and one to its left.
        step = (r - 1) * (SHAPE.W * C) + (s - 1) * C + c
        offs = (tile.pixels * C)[:, None] + step[None, :]
        if ZERO:
            rows += (tl.load(ptr + offs, mask=masks[r], other=0.0),)
        else:
            rows += (tl.load(ptr + offs, mask=masks[r]),)
    return rows


@triton.jit
def filter_offsets(t, tap, c, k, C: tl.constexpr, K: tl.constexpr, BACKWARD: tl.constexpr):
    """Offsets of the taps (t, tap) that lead from channels c to channels k.

    Forward they lie in a tensor (K, 3, 3, C). A backward product goes from dy to dx: its C is what
    comes out of the layer, and its taps run the other way in a tensor (C, 3, 3, K).
    """
    if BACKWARD:
        offs = c * (9 * K) + ((2 - t) * 3 + 2 - tap) * K + k
    else:
        offs = k * (9 * C) + (t * 3 + tap) * C + c
    return offs


@triton.jit
def load_spread_filters(w_ptr, C: tl.constexpr, K: tl.constexpr, BACKWARD: tl.constexpr):
    """T[0], T[1], T[2], [lanes of C, (q, k)] each."""
    s, c = row_lanes(C)
    column = tl.arange(0, 2 * K)
    tap = s[:, None] - (column // K)[None, :]
    mask = (tap >= 0) & (tap < 3) & (c < C)[:, None]
    filters: tl.tuple = ()
    for t in tl.static_range(3):
        offs = filter_offsets(t, tap, c[:, None], (column % K)[None, :], C, K, BACKWARD)
        filters += (tl.load(w_ptr + offs, mask=mask, other=0.0),)
    return filters


@triton.jit
def zero_tiles(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tuple of COUNT fp32 tiles of zeros."""
    tiles: tl.tuple = ()
    for _ in tl.static_range(COUNT):
        tiles += (tl.zeros((ROWS, COLUMNS), tl.float32),)
    return tiles


@triton.jit
def add_products(sums, row, filters, r: tl.constexpr):
    """`sums[o] + row @ filters[r - o]` for every output row o that window row r meets."""
    added: tl.tuple = ()
    for o in tl.static_range(len(sums)):
        if r - o >= 0 and r - o < 3:
            added += (dot_fp32(row, filters[r - o], sums[o], "ieee"),)
        else:
            added += (sums[o],)
    return added


@triton.jit
def fold_outputs(tile, CHANNELS: tl.constexpr):
    """Add up [rows, (q, c)] outputs as far as one thread holds them: [rows // 16, 8, CHANNELS].

    A thread has both pixels and rows i and i + 8 of a product; the rest of a sum over pixels takes
    shuffles and barriers, which a loop over tiles can leave to its end.
    """
    halves = tile.reshape(tile.shape[0] // 16, 2, 8, 2, CHANNELS)
    return tl.sum(tl.sum(halves, axis=3), axis=1)


@triton.jit
def zero_filter_sums(C: tl.constexpr, K: tl.constexpr, JOIN: tl.constexpr):
    """Where `add_filter_products` begins: dT[0] to dT[JOIN + 1]."""
    return (zero_outer(4 * max(C, 4), JOIN * 2 * K),) * (2 + JOIN)


@triton.jit
def add_filter_products(sums, row, outputs, r: tl.constexpr):
    """`sums[t] + row^T @ outputs[p]`, or transposed, for all t and p with t + JOIN * p = r.

    outputs: of JOIN rows of the patch each; filter row t leads window row r to the first of them.
    """
    JOIN: tl.constexpr = len(sums) - 2
    added: tl.tuple = ()
    for t in tl.static_range(len(sums)):
        if r >= t and (r - t) % JOIN == 0 and (r - t) // JOIN < len(outputs):
            added += (add_outer(sums[t], row, outputs[(r - t) // JOIN]),)
        else:
            added += (sums[t],)
    return added


@triton.jit
def _store_filter_sums(
    dw_ptr,  # dense filters, one partial of them: fp32, or the dtype of dw
    sums,  # of `add_filter_products`
    C: tl.constexpr,
    K: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Add up what the output pixels of a product gave each tap, and store it."""
    JOIN: tl.constexpr = len(sums) - 2
    s, _ = row_lanes(C)
    column = tl.arange(0, JOIN * 2 * K)
    tap = s[:, None] - (column // K % 2)[None, :]
    c = tl.arange(0, max(C, 4))[:, None]
    k = tl.arange(0, K)[None, :]
    for t in tl.static_range(3):
        # Output row o of those that are joined meets filter row t in dT[t + o].
        of_row = tl.zeros((4 * max(C, 4), JOIN * 2 * K), tl.float32)
        for o in tl.static_range(JOIN):
            dT = sums[t + o] if sums[0].shape[0] == 4 * max(C, 4) else tl.trans(sums[t + o])
            of_row = dT if JOIN == 1 else tl.where((column // (2 * K) == o)[None, :], dT, of_row)
        for u in tl.static_range(3):
            of_tap = tl.where(tap == u, of_row, 0.0).reshape(4, max(C, 4), 2 * JOIN, K)
            dw = round_to(tl.sum(tl.sum(of_tap, axis=2), axis=0), dw_ptr.dtype.element_ty)
            offs = filter_offsets(t, u, c, k, C, K, BACKWARD)
            tl.store(dw_ptr + offs, dw, mask=(c < C) & (k < K))


@triton.jit
def finish_filter_sums(
    dw_ptr,  # (filters) out: dense, of K x 3 x 3 x C or with BACKWARD of C x 3 x 3 x K elements
    partials_ptr,  # (num_programs + num_groups, filters) fp32; None where there is one program
    counters_ptr,  # (1 + num_groups,) int32
    sums,  # as in `_store_filter_sums`
    C: tl.constexpr,
    K: tl.constexpr,
    BACKWARD: tl.constexpr,
    GROUP: tl.constexpr,
):
    """End a kernel whose programs each have sums of all filters: the last one adds them up."""
    if partials_ptr is None:
        _store_filter_sums(dw_ptr, sums, C, K, BACKWARD)
    else:
        program = tl.program_id(0)
        partial = tl.cast(program, tl.int64) * (9 * C * K)
        _store_filter_sums(partials_ptr + partial, sums, C, K, BACKWARD)
        add_partials(
            partials_ptr,
            counters_ptr,
            dw_ptr,
            0,
            0,
            0,
            program,
            tl.num_programs(0),
            K,
            9 * C,
            K,
            9 * C,
            GROUP,
        )
