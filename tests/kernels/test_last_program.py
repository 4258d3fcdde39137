"""Partials that the last program merges, in kernels of the least other content, against fp64."""

import pytest
import torch
import triton
import triton.language as tl

from fastres.kernels.conv_types import BatchNorm, LayerState
from fastres.kernels.gpu import counters, last_program
from fastres.kernels.gpu.counters import own_counters, zero_counters
from fastres.kernels.gpu.epilogue import channel_stats
from fastres.kernels.gpu.last_program import (
    add_partials,
    allocate_partials,
    finish_batch_norm,
    finish_batch_norm_backward,
    finish_grads,
    finish_stats,
    is_last,
    store_partial,
    store_stats,
    store_sums,
)
from tests.helpers.interpreter import DEVICE, strict_memory  # noqa: F401
from tests.helpers.numerics import assert_keeps_small_spread, assert_statistics

pytestmark = pytest.mark.usefixtures("strict_memory")

# Programs of a column, tiles: one, less than a group, whole groups, a short last group, and
# persistent programs of which the last have a tile less.
PROGRAMS = [(1, 1), (3, 3), (16, 16), (21, 21), (7, 18), (21, 52)]
CHANNELS = 19
BLOCK = 16
EPS = 1e-3


@triton.jit
def _tickets_kernel(counter_ptr, last_ptr):
    last = is_last(counter_ptr, tl.num_programs(0))
    tl.store(last_ptr + tl.program_id(0), last)


@triton.jit
def _stats_kernel(
    order_ptr, y_ptr, batch_norm, num_rows, num_tiles, K: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1)
    program = tl.load(order_ptr + tl.program_id(0))
    offs_k = column * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    for tile in range(program, num_tiles, tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & mask_k[None, :]
        y = tl.load(y_ptr + rows[:, None] * K + offs_k[None, :], mask=mask, other=0.0)
        count = tl.minimum(num_rows - tile * ROWS, ROWS)
        mean = tl.sum(y, axis=0) / count
        distance = tl.where(mask, y - mean[None, :], 0.0)
        m2 = tl.sum(distance * distance, axis=0)
        store_stats(batch_norm.partials_ptr, tile, count, mean, m2, offs_k, mask_k, K)
    finish_batch_norm(batch_norm, offs_k, column, program, tl.num_programs(0), num_tiles, K)


@triton.jit
def _sums_kernel(
    sums_ptr, batch_norm, shortcut_batch_norm, num_tiles, C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1)
    offs_c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        row_ptr = sums_ptr + tile * 3 * C + offs_c
        g = tl.load(row_ptr, mask=mask_c)
        gy = tl.load(row_ptr + C, mask=mask_c)
        if shortcut_batch_norm is not None:
            gy_s = tl.load(row_ptr + 2 * C, mask=mask_c)
            store_sums(batch_norm.partials_ptr, tile, g, gy, gy_s, offs_c, mask_c, C)
        else:
            store_sums(batch_norm.partials_ptr, tile, g, gy, None, offs_c, mask_c, C)
    finish_batch_norm_backward(
        batch_norm, offs_c, column, tl.program_id(0), tl.num_programs(0), num_tiles, C,
        shortcut_batch_norm,
    )  # fmt: skip


@triton.jit
def _partials_kernel(
    values_ptr, partials_ptr, counters_ptr, out_ptr, K: tl.constexpr, RSC: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_RSC: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    TILES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    program, column = tl.program_id(0), tl.program_id(1)
    first_k = column % TILES_K * BLOCK_K
    first_rsc = column // TILES_K * BLOCK_RSC
    offs_k = first_k + tl.arange(0, BLOCK_K)
    offs_rsc = first_rsc + tl.arange(0, BLOCK_RSC)
    offs = offs_k[:, None] * RSC + offs_rsc[None, :]
    mask = (offs_k < K)[:, None] & (offs_rsc < RSC)[None, :]
    value = tl.load(values_ptr + program * K * RSC + offs, mask=mask)
    store_partial(partials_ptr, program, value, offs, mask, K * RSC)
    add_partials(
        partials_ptr, counters_ptr, out_ptr, first_k, first_rsc, column, program,
        tl.num_programs(0), K, RSC, BLOCK_K, BLOCK_RSC, GROUP,
    )  # fmt: skip


@triton.jit
def _merge_kernel(rows_ptr, batch_norm, K: tl.constexpr):
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    offs_k = tl.arange(0, K)
    row_ptr = rows_ptr + program * (2 * K + 1)
    mean, m2 = tl.load(row_ptr + offs_k), tl.load(row_ptr + K + offs_k)
    count = tl.load(row_ptr + 2 * K)
    store_stats(batch_norm.partials_ptr, program, count, mean, m2, offs_k, offs_k < K, K)
    finish_batch_norm(batch_norm, offs_k, 0, program, num_programs, num_programs, K)


@triton.jit
def _tile_kernel(
    y_ptr, out_ptr, num_rows, K: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, 2 * K)
    tiles: tl.tuple = ()
    masks: tl.tuple = ()
    for i in tl.static_range(TILES):
        rows = i * ROWS + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & (column >= 0)[None, :]
        masks += (mask,)
        offs = rows[:, None] * (2 * K) + column[None, :]
        tiles += (tl.load(y_ptr + offs, mask=mask, other=0.0),)
    mean, m2 = channel_stats(tiles, masks, num_rows * 2.0, K, WHOLE)
    tl.store(out_ptr + tl.arange(0, K), mean)
    tl.store(out_ptr + K + tl.arange(0, K), m2)


def normal(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def run_stats(y, num_programs, num_tiles, order=None):
    """Statistics of y (rows, CHANNELS): (5, CHANNELS), and the counters afterwards."""
    rows = triton.cdiv(len(y), num_tiles)
    columns = triton.cdiv(CHANNELS, BLOCK)
    batch_norm = BatchNorm(normal(CHANNELS, seed=1), normal(CHANNELS, seed=2), EPS)
    finish, stats = finish_stats(
        y, batch_norm, num_programs, num_tiles=num_tiles, num_columns=columns
    )
    order = torch.arange(num_programs) if order is None else order
    _stats_kernel[(num_programs, columns)](
        order.to(DEVICE, torch.int32), y, **finish.args, num_rows=len(y), num_tiles=num_tiles,
        K=CHANNELS, ROWS=triton.next_power_of_2(rows), BLOCK_K=BLOCK,
    )  # fmt: skip
    return stats, finish.args["batch_norm"].counters_ptr


def test_one_program_is_the_last():
    counter, last = zero_counters(normal(1), 1), torch.full((5,), -1, device=DEVICE)
    _tickets_kernel[(5,)](counter, last)
    assert last.sum() == 1
    assert DEVICE.type == "cuda" or last[-1] == 1
    assert counter[0] == 0


@pytest.mark.parametrize(("num_programs", "num_tiles"), PROGRAMS)
@pytest.mark.parametrize("few_numbers", [False, True], ids=["one read", "several reads"])
def test_statistics(num_programs, num_tiles, few_numbers, monkeypatch):
    if few_numbers:
        monkeypatch.setattr(last_program, "STATS_NUMBERS", tl.constexpr(2 * BLOCK))
    y = 100 + normal(4 * num_tiles - (num_tiles > 1), CHANNELS)
    out, left = run_stats(y, num_programs, num_tiles)
    wide = y.double()
    mean, var, size = wide.mean(0), wide.var(0, unbiased=False), wide.abs().mean(0)
    assert_statistics("mean", out[0], mean, size)
    assert_statistics("unbiased var", out[1], wide.var(0), var + size)
    assert_statistics("rstd", out[2], (var + EPS).rsqrt(), (1 + size) * (var + EPS).rsqrt())
    gamma, beta = normal(CHANNELS, seed=1), normal(CHANNELS, seed=2)
    torch.testing.assert_close(out[3], gamma * out[2], rtol=1e-6, atol=0)
    torch.testing.assert_close(out[4], beta - out[0] * out[3], rtol=1e-5, atol=1e-5)
    assert not left.any()


def test_merged_statistics_keep_a_small_spread_beside_a_large_mean():
    """Means of tiles are added up as distances from one of them: sums from 0 would lose it."""
    k, num_programs = 16, 64
    counts = torch.arange(num_programs) % 7 + 90
    means = 1000 + 1e-3 * normal(num_programs, k).cpu()
    rows = torch.cat([means, torch.zeros_like(means), counts[:, None].float()], dim=1)
    pixels = means.repeat_interleave(counts, dim=0)
    ones = torch.ones(k, device=DEVICE)
    finish, stats = finish_stats(pixels.to(DEVICE), BatchNorm(ones, ones, EPS), num_programs)
    # One group: a second merge would add the roundings of the first one's means.
    batch_norm = finish.args["batch_norm"]._replace(GROUP=tl.constexpr(num_programs))
    _merge_kernel[(num_programs,)](rows.to(DEVICE), batch_norm, K=k)
    var = stats[1].cpu().double() * (len(pixels) - 1) / len(pixels)
    assert_keeps_small_spread(stats[0].cpu(), var, pixels)


@pytest.mark.parametrize(("num_rows", "whole"), [(64, True), (57, False)])
def test_statistics_of_a_tile_keep_a_small_spread_beside_a_large_mean(num_rows, whole):
    """The second pass over a tile corrects what rounding left out of the mean, and M2 by that."""
    k = 16
    y = 1000 + 1e-3 * normal(num_rows, 2 * k)
    out = torch.empty(2, k, device=DEVICE)
    _tile_kernel[(1,)](y, out, num_rows, K=k, TILES=2, ROWS=32, WHOLE=whole)
    rows = y.cpu().double().reshape(-1, k)
    mean, m2 = out.cpu().double()
    assert_keeps_small_spread(mean, m2 / len(rows), rows)


def test_statistics_do_not_depend_on_who_is_last():
    """Bit for bit, in whatever order the programs end."""
    y = 100 + normal(83, CHANNELS)
    first, _ = run_stats(y, 21, 21)
    for seed in range(3):
        order = torch.randperm(21, generator=torch.Generator().manual_seed(seed))
        again, left = run_stats(y, 21, 21, order)
        assert first.equal(again)
        assert not left.any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_and_inf_stay_in_their_channels():
    y = normal(83, CHANNELS)
    y[40, 3], y[82, 4] = torch.nan, torch.inf
    out, _ = run_stats(y, 21, 21)
    assert out[:, 3].isnan().all()
    assert not out[:2, 4].isfinite().any()
    assert out[:, 5:].isfinite().all()


@pytest.mark.parametrize(("num_programs", "num_tiles"), PROGRAMS)
@pytest.mark.parametrize("projected", [False, True])
def test_gradient_sums(num_programs, num_tiles, projected):
    c, columns, num_pixels = CHANNELS, triton.cdiv(CHANNELS, BLOCK), 640
    sums = normal(num_tiles, 3, c)
    g = sums.new_empty(num_pixels // 64, c, 8, 8)
    layers = {
        "batch_norm": (LayerState(g, normal(5, c, seed=1)), normal(c, seed=11)),
        "shortcut_batch_norm": (None, None),
    }
    if projected:
        layers["shortcut_batch_norm"] = LayerState(g, normal(5, c, seed=2)), normal(c, seed=12)
    finish, grads = finish_grads(g, layers, num_programs, num_tiles=num_tiles, num_columns=columns)
    _sums_kernel[(num_programs, columns)](
        sums, **finish.args, num_tiles=num_tiles, C=c, BLOCK_C=BLOCK
    )
    assert not finish.args["batch_norm"].counters_ptr.any()
    assert (grads[1] is not None) == projected
    total, size = sums.double().sum(0), sums.double().abs().sum(0)
    for i, (state, gamma) in enumerate(list(layers.values())[: 1 + projected]):
        (_, _, coefficients), dgamma, dbeta = grads[i]
        mean, rstd = state.stats[0].double(), state.stats[2].double()
        assert_statistics("dbeta", dbeta, total[0], size[0])
        assert_statistics("dgamma", dgamma, total[1 + i] * rstd, size[1 + i] * rstd.abs())
        c0 = gamma.double() * rstd
        c1 = -c0 * rstd * total[1 + i] * rstd / num_pixels
        c2 = -c0 * total[0] / num_pixels - c1 * mean
        expected = torch.stack([c0, c1, c2]).float()
        torch.testing.assert_close(coefficients, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_programs", [1, 3, 16, 21, 70])
@pytest.mark.parametrize("block", [(16, 32), (8, 16)], ids=["one column", "columns with tails"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_added_partials(num_programs, block, dtype, monkeypatch):
    k, rsc = (16, 32) if block == (16, 32) else (13, 37)
    monkeypatch.setattr(last_program, "DW_NUMBERS", tl.constexpr(8 * 64))
    values = normal(num_programs, k, rsc)
    columns = triton.cdiv(k, block[0]) * triton.cdiv(rsc, block[1])
    parts = allocate_partials(values, k * rsc, num_programs, num_columns=columns)
    out = values.new_empty((k, rsc), dtype=dtype)
    _partials_kernel[(num_programs, columns)](
        values, parts.buffer, parts.counters, out,
        K=k, RSC=rsc, BLOCK_K=block[0], BLOCK_RSC=block[1], GROUP=parts.group,
    )  # fmt: skip
    assert not parts.counters.any()
    exact = values.double().sum(0)
    if dtype == torch.float32:
        assert_statistics("dw", out, exact, values.double().abs().sum(0))
    else:
        torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-4)


def test_group_sizes():
    """Near the square root, a power of two, and no more bytes than one program should read."""
    sizes = [allocate_partials(torch.empty(0), 4, n).group for n in (1, 2, 4, 5, 16, 264, 4096)]
    assert sizes == [1, 2, 2, 4, 4, 32, 64]
    wide = allocate_partials(torch.empty(0, device="meta"), 9 * 512 * 512, 44, num_columns=288)
    assert wide.group == 8
    assert wide.group * 9 * 512 * 512 * 4 // 288 <= last_program.MOST_BYTES


def test_launches_inside_own_counters_share_none(monkeypatch):
    like = torch.empty(0)
    with own_counters(torch.device("cpu"), 8) as buffer:
        slices = [zero_counters(like, 3) for _ in range(4)]
    assert all(counters._own.value is None for _ in slices)
    assert [s.untyped_storage().data_ptr() == buffer.data_ptr() for s in slices] == [
        True, True, False, False,
    ]  # fmt: skip
    slices[0].add_(1)
    assert buffer.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert not slices[1].any()
    # Another alignment than before would compile a kernel anew inside a capture.
    assert all(s.data_ptr() % 16 == 0 for s in slices)


def test_counters_of_a_stream_go_around_and_never_overlap_in_a_launch(monkeypatch):
    monkeypatch.setattr(counters, "BUFFER_SIZE", 16)
    monkeypatch.setattr(counters, "_of_stream", {})

    def first(stream, count):
        taken = counters._next_of_stream(torch.device("cpu"), stream, count)
        assert len(taken) == count
        return taken.storage_offset(), taken.untyped_storage().data_ptr()

    (a, buffer), (b, same), (c, _) = first(1, 3), first(1, 6), first(1, 5)
    assert (a, b, c) == (0, 4, 0)
    assert same == buffer
    assert first(2, 4)[1] != buffer
    # A buffer holds two of the largest count, or the second of a launch might meet the first: nine
    # take up 12 of its 16.
    _, larger = first(1, 9)
    assert larger != buffer
    assert len(counters._of_stream[torch.device("cpu"), 1].buffer) == 48
