"""The last program of a kernel finishes what all of its programs left in parts; jit helpers.

    statistics      (count, mean, M2) of tiles       -> mean, var, rstd, a, b of a batch norm
    gradient sums   sum g, sum g * (y - mean)        -> dgamma, dbeta, c0, c1, c2 of its backward
    split-K         dw of a part of the pixels       -> dw

A kernel of its own for each of these would be a launch that computes next to nothing. Instead every
program, its partial stored, draws a ticket: it adds 1 to a counter. Who draws the last ticket knows
that all partials are in memory and adds them up. In two levels, since one program that reads
thousands of partials is a long tail: GROUP neighbouring programs share a counter, their last one
merges their partials into one, and the last program of the last group merges those of the groups.

Programs that own different numbers of the result, such as blocks of channels or tiles of dw, never
wait for each other: they are columns, with partials and counters of their own.

    partials   (num_tiles + num_groups, row) fp32: a row of every tile, then one of every group
    counters   (num_columns, 1 + num_groups) int32: of the groups of a column, then one of each of
               its groups; zero before the kernel and after it (counters.py)

A program is known by its number among the num_programs of its column. It stores the partial of one
tile, or in a persistent loop those of the tiles program, program + num_programs, ...; or it merges
its tiles itself, and then they count as one: num_tiles is num_programs. A kernel in any tiling so
ends with

    store_stats(batch_norm.partials_ptr, tile, count, mean, m2, offs_k, mask_k, K)  # every tile
    finish_batch_norm(batch_norm, offs_k, column, program, ...)                    # last statement

and all of its programs reach the last statement exactly once. A batch norm comes as one argument,
a `BatchNormForward` or a `BatchNormBackward`, and goes from hand to hand as one. On the host
`finish_stats` and `finish_grads` make these; `allocate_partials` sizes the buffers, a row of
statistics being 2 * K + 4 numbers and one of gradient sums 2 * C, or 3 * C with a projected
shortcut.

Memory order: a barrier puts the stores of all threads before the ticket, which is one atomic
operation with release and acquire semantics in the whole GPU; a second barrier puts all reads of
the last program behind it. Launches that overlap, as with programmatic dependent launch, must not
draw tickets before the launch ahead of them has ended.

Numerics: fp32. Means are merged relative to one of them and M2 by distances from the merged mean,
never by E[y^2] - E[y]^2. Only who merges depends on timing: the order is that of the rows, so every
result is bit-reproducible. Integer atomics alone.
Source: own derivation; Chan, Golub, LeVeque (1979) for the merge; the threadFenceReduction sample
of the CUDA toolkit for the tickets.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.kernels.conv_types import BatchNorm, BatchNormGrads, DeferredGrad, LayerState
from fastres.kernels.gpu.counters import zero_counters
from fastres.kernels.gpu.launch import num_bytes
from fastres.kernels.gpu.primitives import round_to

__all__ = [
    "BatchNormBackward",
    "BatchNormForward",
    "Finish",
    "Partials",
    "add_partials",
    "allocate_partials",
    "finish_batch_norm",
    "finish_batch_norm_backward",
    "finish_grads",
    "finish_stats",
    "is_last",
    "merge_stats",
    "store_partial",
    "store_stats",
    "store_sums",
]

# Numbers of a tile of partials that a merging program reads at a time: 8 a thread of 4 warps for
# means and M2 each, 64 for dw, whose kernel has more registers to give back.
STATS_NUMBERS = tl.constexpr(1024)
DW_NUMBERS = tl.constexpr(8192)

# Bytes that a program reads at most in one level, as far as two levels allow.
MOST_BYTES = 2**18


class BatchNormForward(NamedTuple):
    """A batch norm whose statistics a kernel finds: one of its arguments, or None for none.

    On the host pointers are tensors. A field in capitals is a constant of the kernel.
    """

    partials_ptr: Tensor  # (num_tiles + num_groups, 2 * K + 4) fp32: see `store_stats`
    counters_ptr: Tensor  # (num_columns, 1 + num_groups) int32: zeros
    gamma_ptr: Tensor  # (K,) fp32 in
    beta_ptr: Tensor  # (K,) fp32 in
    stats_ptr: Tensor  # (5, K) fp32 out: mean, unbiased variance, rstd, a, b
    num_pixels: int  # of all tiles
    eps: float
    GROUP: tl.constexpr


class BatchNormBackward(NamedTuple):
    """A batch norm whose gradients a kernel finds: as `BatchNormForward`.

    That of a projected shortcut has the partials and counters of the one beside it.
    """

    partials_ptr: Tensor  # (num_tiles + num_groups, 2 * C or 3 * C) fp32: see `store_sums`
    counters_ptr: Tensor  # (num_columns, 1 + num_groups) int32: zeros
    stats_ptr: Tensor  # (5, C) fp32 in: mean, unbiased variance, rstd, a, b
    gamma_ptr: Tensor  # (C,) fp32 in
    coefficients_ptr: Tensor  # (3, C) fp32 out: c0, c1, c2
    dgamma_ptr: Tensor  # (C,) fp32 out
    dbeta_ptr: Tensor  # (C,) fp32 out
    num_pixels: int  # of all tiles
    GROUP: tl.constexpr


@triton.jit
def is_last(counter_ptr, num_tickets):
    """Draw a ticket: whether the calling program is the last of num_tickets; sets 0 again then.

    What the others stored before their call may be read after it.
    """
    tl.debug_barrier()
    ticket = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    last = ticket == num_tickets - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def _members(group, num_programs, GROUP: tl.constexpr):
    """How many programs a group has: the last one may have fewer than GROUP."""
    return tl.minimum(GROUP, num_programs - group * GROUP)


@triton.jit
def store_stats(
    partials_ptr,  # (num_tiles + num_groups, 2 * K + 4) fp32: means, M2, the count, unused
    tile,
    count,  # pixels of the tile; with 0, mean and M2 must be finite
    mean,  # [BLOCK_K] fp32
    m2,  # [BLOCK_K] fp32: sum of squared distances from the mean
    offs_k,  # [BLOCK_K] channels
    mask_k,
    K: tl.constexpr,
):
    """Leave the statistics of one tile, as y was rounded, for `finish_batch_norm`."""
    row_ptr = partials_ptr + tl.cast(tile, tl.int64) * (2 * K + 4)
    tl.store(row_ptr + offs_k, mean, mask=mask_k)
    tl.store(row_ptr + K + offs_k, m2, mask=mask_k)
    tl.store(row_ptr + 2 * K, tl.cast(count, tl.float32))


@triton.jit
def merge_stats(count, mean, m2, other_count, other_mean, other_m2):
    """Count, mean and M2 of two disjoint sets of pixels together; either may be empty."""
    total = count + other_count
    share = other_count / tl.maximum(total, 1.0)
    distance = other_mean - mean
    # Multiplied in this order, so that a large distance from an empty set's mean does not overflow.
    m2 += other_m2 + distance * (distance * (count * share))
    return total, mean + distance * share, m2


@triton.jit
def _merge_rows(
    partials_ptr, first_row, num_rows, count, mean, m2, offs_k, mask_k, K: tl.constexpr
):
    """Merge rows of statistics, in order, into count, mean and M2."""
    ROWS: tl.constexpr = max(STATS_NUMBERS // offs_k.shape[0], 1)
    rows = tl.arange(0, ROWS)
    for first in range(0, num_rows, ROWS):
        row_ptr = partials_ptr + tl.cast(first_row + first, tl.int64) * (2 * K + 4)
        mask_rows = first + rows < num_rows
        mask = mask_rows[:, None] & mask_k[None, :]
        offs = rows[:, None] * (2 * K + 4) + offs_k[None, :]
        counts = tl.load(row_ptr + rows * (2 * K + 4) + 2 * K, mask=mask_rows, other=0.0)
        means = tl.load(row_ptr + offs, mask=mask, other=0.0)  # [ROWS, BLOCK_K]
        m2s = tl.load(row_ptr + K + offs, mask=mask, other=0.0)
        # Distances from one tile's mean, not from 0: a common offset must cost no digits.
        pivot = tl.load(row_ptr + offs_k, mask=mask_k, other=0.0)
        total = tl.sum(counts, axis=0)
        shift = tl.where(mask, counts[:, None] * (means - pivot[None, :]), 0.0)
        mean_of_rows = pivot + tl.sum(shift, axis=0) / tl.maximum(total, 1.0)
        distance = means - mean_of_rows[None, :]
        within = tl.where(mask, m2s + counts[:, None] * distance * distance, 0.0)
        count, mean, m2 = merge_stats(count, mean, m2, total, mean_of_rows, tl.sum(within, axis=0))
    return count, mean, m2


@triton.jit
def finish_batch_norm(
    batch_norm,  # `BatchNormForward`
    offs_k,  # [BLOCK_K] channels of this column
    column,
    program,
    num_programs,
    num_tiles,
    K: tl.constexpr,
):
    """Merge the statistics of all tiles: a = gamma * rstd, b = beta - mean * a."""
    GROUP: tl.constexpr = batch_norm.GROUP
    partials_ptr, num_pixels = batch_norm.partials_ptr, batch_norm.num_pixels
    mask_k = offs_k < K
    num_groups = tl.cdiv(num_programs, GROUP)
    counters_ptr = batch_norm.counters_ptr + column * (1 + num_groups)
    group = program // GROUP
    members = _members(group, num_programs, GROUP)
    nothing = tl.cast(0.0, tl.float32)
    zeros = tl.zeros(offs_k.shape, dtype=tl.float32)
    if is_last(counters_ptr + 1 + group, members):
        count, mean, m2 = nothing, zeros, zeros
        for first in range(group * GROUP, num_tiles, num_programs):
            rows = tl.minimum(members, num_tiles - first)
            count, mean, m2 = _merge_rows(
                partials_ptr, first, rows, count, mean, m2, offs_k, mask_k, K
            )
        store_stats(partials_ptr, num_tiles + group, count, mean, m2, offs_k, mask_k, K)
        if is_last(counters_ptr, num_groups):
            count, mean, m2 = _merge_rows(
                partials_ptr, num_tiles, num_groups, nothing, zeros, zeros, offs_k, mask_k, K
            )
            rstd = 1.0 / tl.sqrt_rn(m2 / num_pixels + batch_norm.eps)
            a = tl.load(batch_norm.gamma_ptr + offs_k, mask=mask_k, other=0.0) * rstd
            b = tl.load(batch_norm.beta_ptr + offs_k, mask=mask_k, other=0.0) - mean * a
            stats_ptr = batch_norm.stats_ptr + offs_k
            tl.store(stats_ptr, mean, mask=mask_k)
            tl.store(stats_ptr + K, m2 / (num_pixels - 1), mask=mask_k)
            tl.store(stats_ptr + 2 * K, rstd, mask=mask_k)
            tl.store(stats_ptr + 3 * K, a, mask=mask_k)
            tl.store(stats_ptr + 4 * K, b, mask=mask_k)


@triton.jit
def store_sums(
    partials_ptr,  # (num_tiles + num_groups, 2 * C) fp32, or 3 * C with a projected shortcut
    tile,
    sum_g,  # [BLOCK_C] fp32
    sum_gy,  # [BLOCK_C] fp32: of g * (y - mean)
    sum_gy_shortcut,  # [BLOCK_C] fp32: of g * (y_s - mean_s); None without a projected shortcut
    offs_c,  # [BLOCK_C] channels
    mask_c,
    C: tl.constexpr,
):
    """Leave the gradient sums of one tile, g as rounded, for `finish_batch_norm_backward`."""
    NUM_SUMS: tl.constexpr = 2 if sum_gy_shortcut is None else 3
    row_ptr = partials_ptr + tl.cast(tile, tl.int64) * (NUM_SUMS * C) + offs_c
    tl.store(row_ptr, sum_g, mask=mask_c)
    tl.store(row_ptr + C, sum_gy, mask=mask_c)
    if sum_gy_shortcut is not None:
        tl.store(row_ptr + 2 * C, sum_gy_shortcut, mask=mask_c)


@triton.jit
def _add_rows(
    partials_ptr,  # of the first row, moved to the sum in question
    first_row,
    num_rows,
    total,
    offs_c,
    mask_c,
    C: tl.constexpr,
    NUM_SUMS: tl.constexpr,
):
    """Add one sum of rows of gradient sums, in order, to total."""
    ROWS: tl.constexpr = max(STATS_NUMBERS // offs_c.shape[0], 1)
    rows = tl.arange(0, ROWS)
    for first in range(0, num_rows, ROWS):
        row_ptr = partials_ptr + tl.cast(first_row + first, tl.int64) * (NUM_SUMS * C)
        offs = rows[:, None] * (NUM_SUMS * C) + offs_c[None, :]
        mask = (first + rows < num_rows)[:, None] & mask_c[None, :]
        total += tl.sum(tl.load(row_ptr + offs, mask=mask, other=0.0), axis=0)
    return total


@triton.jit
def _store_grads(sum_g, sum_gy, batch_norm, num_pixels, offs_c, mask_c, C: tl.constexpr):
    """`dbeta = sum g`, `dgamma = rstd * sum g (y - mean)` and dy = c0 * g + c1 * y + c2."""
    mean = tl.load(batch_norm.stats_ptr + offs_c, mask=mask_c, other=0.0)
    rstd = tl.load(batch_norm.stats_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)
    dgamma = sum_gy * rstd
    c0 = tl.load(batch_norm.gamma_ptr + offs_c, mask=mask_c, other=0.0) * rstd
    c1 = -c0 * rstd * (dgamma / num_pixels)
    c2 = -c0 * (sum_g / num_pixels) - c1 * mean
    tl.store(batch_norm.dbeta_ptr + offs_c, sum_g, mask=mask_c)
    tl.store(batch_norm.dgamma_ptr + offs_c, dgamma, mask=mask_c)
    coefficients_ptr = batch_norm.coefficients_ptr + offs_c
    tl.store(coefficients_ptr, c0, mask=mask_c)
    tl.store(coefficients_ptr + C, c1, mask=mask_c)
    tl.store(coefficients_ptr + 2 * C, c2, mask=mask_c)


@triton.jit
def finish_batch_norm_backward(
    batch_norm,  # `BatchNormBackward`
    offs_c,  # [BLOCK_C] channels of this column
    column,
    program,
    num_programs,
    num_tiles,
    C: tl.constexpr,
    shortcut_batch_norm=None,  # that of a projected shortcut
):
    """Add the sums of all tiles: gradients of gamma and beta, and the coefficients of dy."""
    GROUP: tl.constexpr = batch_norm.GROUP
    NUM_SUMS: tl.constexpr = 2 if shortcut_batch_norm is None else 3
    partials_ptr, num_pixels = batch_norm.partials_ptr, batch_norm.num_pixels
    mask_c = offs_c < C
    num_groups = tl.cdiv(num_programs, GROUP)
    counters_ptr = batch_norm.counters_ptr + column * (1 + num_groups)
    group = program // GROUP
    members = _members(group, num_programs, GROUP)
    zeros = tl.zeros(offs_c.shape, dtype=tl.float32)
    if is_last(counters_ptr + 1 + group, members):
        row_ptr = partials_ptr + tl.cast(num_tiles + group, tl.int64) * (NUM_SUMS * C) + offs_c
        for i in tl.static_range(NUM_SUMS):
            total = zeros
            for first in range(group * GROUP, num_tiles, num_programs):
                rows = tl.minimum(members, num_tiles - first)
                total = _add_rows(
                    partials_ptr + i * C, first, rows, total, offs_c, mask_c, C, NUM_SUMS
                )
            tl.store(row_ptr + i * C, total, mask=mask_c)
        if is_last(counters_ptr, num_groups):
            sum_g = _add_rows(
                partials_ptr, num_tiles, num_groups, zeros, offs_c, mask_c, C, NUM_SUMS
            )
            sum_gy = _add_rows(
                partials_ptr + C, num_tiles, num_groups, zeros, offs_c, mask_c, C, NUM_SUMS
            )
            _store_grads(sum_g, sum_gy, batch_norm, num_pixels, offs_c, mask_c, C)
            if shortcut_batch_norm is not None:
                sum_gy = _add_rows(
                    partials_ptr + 2 * C, num_tiles, num_groups, zeros, offs_c, mask_c, C, NUM_SUMS
                )
                _store_grads(sum_g, sum_gy, shortcut_batch_norm, num_pixels, offs_c, mask_c, C)


@triton.jit
def store_partial(
    partials_ptr,  # (num_programs + num_groups, NUM_ELEMENTS) fp32
    program,
    value,  # a tile of fp32 sums of any shape
    offs,  # where they stand in the result, the same shape
    mask,
    NUM_ELEMENTS: tl.constexpr,
):
    """Leave one program's share of a sum of programs for `add_partials`."""
    tl.store(partials_ptr + tl.cast(program, tl.int64) * NUM_ELEMENTS + offs, value, mask=mask)


@triton.jit
def _add_block(
    partials_ptr,
    first_row,
    num_rows,
    to_ptr,
    first_k,
    first_rsc,
    K: tl.constexpr,
    RSC: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_RSC: tl.constexpr,
):
    """Store at to_ptr the sum over rows of partials, in order, of one block of (K, RSC)."""
    SIZE: tl.constexpr = BLOCK_K * BLOCK_RSC
    ROWS: tl.constexpr = 8
    NUMBERS: tl.constexpr = min(DW_NUMBERS // ROWS, triton.next_power_of_2(SIZE))
    rows = tl.arange(0, ROWS)
    for first in range(0, SIZE, NUMBERS):
        place = first + tl.arange(0, NUMBERS)
        k = first_k + place // BLOCK_RSC
        rsc = first_rsc + place % BLOCK_RSC
        mask = (place < SIZE) & (k < K) & (rsc < RSC)
        offs = k * RSC + rsc
        total = tl.zeros((NUMBERS,), dtype=tl.float32)
        for row in range(0, num_rows, ROWS):
            row_ptr = partials_ptr + (first_row + row + rows).to(tl.int64) * (K * RSC)
            mask_rows = (row + rows < num_rows)[:, None] & mask[None, :]
            values = tl.load(row_ptr[:, None] + offs[None, :], mask=mask_rows, other=0.0)
            total += tl.sum(values, axis=0)
        tl.store(to_ptr + offs, round_to(total, to_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_partials(
    partials_ptr,  # (num_programs + num_groups, K, RSC) fp32: see `store_partial`
    counters_ptr,  # (num_columns, 1 + num_groups) int32
    out_ptr,  # (K, RSC) out: the sum, rounded to its dtype
    first_k,  # first element of the block of (K, RSC) that this column is
    first_rsc,
    column,
    program,
    num_programs,
    K: tl.constexpr,
    RSC: tl.constexpr,
    BLOCK_K: tl.constexpr,  # size of the block, in any numbers; what exceeds (K, RSC) is left out
    BLOCK_RSC: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Add what the programs of a column stored; a kernel of one column has one block, (K, RSC)."""
    num_groups = tl.cdiv(num_programs, GROUP)
    counters_ptr += column * (1 + num_groups)
    group = program // GROUP
    members = _members(group, num_programs, GROUP)
    if is_last(counters_ptr + 1 + group, members):
        sum_ptr = partials_ptr + tl.cast(num_programs + group, tl.int64) * (K * RSC)
        _add_block(
            partials_ptr,
            group * GROUP,
            members,
            sum_ptr,
            first_k,
            first_rsc,
            K,
            RSC,
            BLOCK_K,
            BLOCK_RSC,
        )
        if is_last(counters_ptr, num_groups):
            _add_block(
                partials_ptr,
                num_programs,
                num_groups,
                out_ptr,
                first_k,
                first_rsc,
                K,
                RSC,
                BLOCK_K,
                BLOCK_RSC,
            )


class Partials(NamedTuple):
    """What programs leave their shares in.

    buffer: (num_tiles + num_groups, row) fp32, uninitialised. counters: int32 zeros. group: GROUP.
    last_programs: how many programs merge, those of both levels together.
    """

    buffer: Tensor
    counters: Tensor
    group: int
    last_programs: int


def allocate_partials(
    like: Tensor,
    row: int,
    num_programs: int,
    *,
    num_tiles: int | None = None,
    num_columns: int = 1,
) -> Partials:
    """Allocate partials and counters on the device of `like`.

    Args:
        like: any tensor there.
        row: numbers in one partial, of all columns.
        num_programs: programs of one column.
        num_tiles: partials that they store; by default one each.
        num_columns: columns, which share the numbers of a row.

    Returns: `Partials`.
    """
    group = _group_size(num_programs, 4 * row // num_columns)
    num_groups = triton.cdiv(num_programs, group)
    rows = num_groups + (num_programs if num_tiles is None else num_tiles)
    buffer = like.new_empty((rows, row), dtype=torch.float32)
    last_programs = num_columns * (1 + num_groups)
    return Partials(buffer, zero_counters(like, last_programs), group, last_programs)


def _group_size(num_programs: int, row_bytes: int) -> int:
    """A power of two near the square root, so that both levels read about as many partials."""
    group = 1
    while group * group < num_programs:
        group *= 2
    while group > 1 and group * row_bytes > MOST_BYTES:
        group //= 2
    return group


class Finish(NamedTuple):
    """What a launch takes to be finished by its last program.

    args: the kernel's batch norms, by parameter; None where it is to find nothing. reads, writes:
    bytes, partials on both sides. last_programs: as in `Partials`.
    """

    args: dict[str, BatchNormForward | BatchNormBackward | None]
    reads: int
    writes: int
    last_programs: int


def finish_stats(
    y: Tensor,
    batch_norm: BatchNorm | None,
    num_programs: int,
    *,
    num_tiles: int | None = None,
    num_columns: int = 1,
) -> tuple[Finish, Tensor | None]:
    """Prepare a kernel that ends with `finish_batch_norm`, or with None leaves it out.

    Args:
        y: (N, K, P, Q) whose statistics the kernel finds.
        batch_norm: that of y.

    Returns: `Finish` with the argument batch_norm; and the tensor that will be `LayerState.stats`.
        Others as in `allocate_partials`.
    """
    if batch_norm is None:
        return Finish({"batch_norm": None}, 0, 0, 0), None
    weight, bias, eps = batch_norm
    channels = len(weight)
    row = 2 * channels + 4  # A multiple of 16 bytes where the channels are.
    buffer, counters, group, last_programs = allocate_partials(
        y, row, num_programs, num_tiles=num_tiles, num_columns=num_columns
    )
    stats = weight.new_empty((5, channels))
    forward = BatchNormForward(
        partials_ptr=buffer,
        counters_ptr=counters,
        gamma_ptr=weight,
        beta_ptr=bias,
        stats_ptr=stats,
        num_pixels=y.numel() // channels,
        eps=eps,
        GROUP=tl.constexpr(group),
    )
    reads, writes = num_bytes(buffer, weight, bias), num_bytes(buffer, stats)
    return Finish({"batch_norm": forward}, reads, writes, last_programs), stats


def finish_grads(
    g: Tensor,
    layers: Mapping[str, tuple[LayerState | None, Tensor | None]],
    num_programs: int,
    *,
    num_tiles: int | None = None,
    num_columns: int = 1,
) -> tuple[Finish, list[BatchNormGrads | None]]:
    """Prepare a kernel that ends with `finish_batch_norm_backward`, or leaves it out.

    Args:
        g: (N, C, H, W) gradient of the batch norms' output, which the kernel writes.
        layers: by the kernel's parameters, the layer and, if there is one, that of a projected
            shortcut, each with its weight; (None, None) where there is none.

    Returns: `Finish` with an argument a layer, and the gradients of each. Others as in
        `allocate_partials`.
    """
    num_layers = sum(state is not None for state, _ in layers.values())
    if num_layers == 0:
        return Finish(dict.fromkeys(layers), 0, 0, 0), [None] * len(layers)
    row = (1 + num_layers) * g.shape[1]
    buffer, counters, group, last_programs = allocate_partials(
        g, row, num_programs, num_tiles=num_tiles, num_columns=num_columns
    )
    args: dict[str, BatchNormForward | BatchNormBackward | None] = dict.fromkeys(layers)
    grads: list[BatchNormGrads | None] = []
    reads = writes = num_bytes(buffer)
    for name, (state, weight) in layers.items():
        grads.append(None)
        if state is None or weight is None:
            continue
        made = weight.new_empty((3, len(weight))), *(torch.empty_like(weight) for _ in range(2))
        coefficients, dgamma, dbeta = made
        args[name] = BatchNormBackward(
            partials_ptr=buffer,
            counters_ptr=counters,
            stats_ptr=state.stats,
            gamma_ptr=weight,
            coefficients_ptr=coefficients,
            dgamma_ptr=dgamma,
            dbeta_ptr=dbeta,
            num_pixels=g.numel() // g.shape[1],
            GROUP=tl.constexpr(group),
        )
        grads[-1] = BatchNormGrads(DeferredGrad(g, state.y, coefficients), dgamma, dbeta)
        reads, writes = reads + num_bytes(state.stats, weight), writes + num_bytes(*made)
    return Finish(args, reads, writes, last_programs), grads
