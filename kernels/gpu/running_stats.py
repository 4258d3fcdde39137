"""The running statistics of all batch norms of a network, moved in one launch.

    average = average + momentum * (value - average)          momentum < 0.5
    average = value + (momentum - 1) * (value - average)      else
    count   = count + 1

Letters: average (K,) a running mean or variance, value (K,) that of the batch, count () the batches
that a batch norm has seen.

A network has dozens of these vectors, of 16 to 512 numbers. Their addresses are arguments of the
kernel, which a CUDA graph keeps and an eager step, whose values lie elsewhere each time, hands over
with the launch: a table of them on the device, as sgd.py has of gradients, would be copied there in
a launch of its own. Program i searches its pointers among all, which takes a warp five instructions
a vector.

Bytes: average and count read and written, value read: 12 for each fp32 number.

Numerics: fp32, in one fused multiply-add after the difference, as torch's lerp on a GPU; values are
rounded to the dtype of their average first, and averages once, to nearest even. So the result is
that of `torch._foreach_lerp_` bit for bit. Deterministic.
Source: torch.lerp, aten/src/ATen/native/Lerp.h; Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl

from fastres.kernels.gpu.launch import Traffic, launch, num_bytes
from fastres.kernels.gpu.primitives import round_to, wait_for_previous_kernel

__all__ = ["move_running_stats"]

# Averages of one launch: with as many counts their addresses and sizes are 3.6 KB of arguments,
# and 4 KB are what every GPU and driver takes.
MAX_AVERAGES = 128

# Elements of a program, which is one warp.
MAX_BLOCK = 512

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _pick(items, index):
    """`items[index]` of a tuple, for an index that is known to a program alone."""
    item = items[0]
    for i in tl.static_range(1, len(items)):
        item = tl.where(index == i, items[i], item)
    return item


@triton.jit
def _running_stats_kernel(
    average_ptrs,  # of (sizes[i],) fp32, bf16 or fp16 in and out, all of one dtype
    value_ptrs,  # of (sizes[i],) fp32 in, as many
    count_ptrs,  # of () int64 in and out, at most as many
    sizes,
    momentum,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    index = tl.program_id(0)
    average_ptr = _pick(average_ptrs, index)
    value_ptr = _pick(value_ptrs, index)
    dtype: tl.constexpr = average_ptr.dtype.element_ty
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < _pick(sizes, index)
    average = tl.load(average_ptr + offs, mask=mask).to(tl.float32)
    value = round_to(tl.load(value_ptr + offs, mask=mask), dtype).to(tl.float32)
    # Either starts from the nearer of the two, so that momentum 1 is the value and 0 the average.
    momentum = tl.cast(momentum, tl.float32)  # the interpreter is given fp64
    is_small = tl.abs(momentum) < 0.5
    start = tl.where(is_small, average, value)
    weight = tl.where(is_small, momentum, momentum - 1.0)
    moved = tl.fma(weight, value - average, start)
    tl.store(average_ptr + offs, round_to(moved, dtype), mask=mask)
    if len(count_ptrs) > 0:  # noqa: SIM102 - known to the compiler, and known to a program
        if (index < len(count_ptrs)) & (tl.program_id(1) == 0):
            count_ptr = _pick(count_ptrs, index)
            tl.store(count_ptr, tl.load(count_ptr) + 1)


def move_running_stats(
    averages: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    counts: Sequence[torch.Tensor],
    momentum: float,
) -> bool:
    """Move averages towards values and add 1 to counts, in place, where the kernel can.

    It takes plain, contiguous tensors on one device, values in fp32, none of which share memory.

    Args:
        averages: running means and variances, (K,) each, all fp32, all bf16 or all fp16.
        values: those of the batch, in the same order.
        counts: () int64 each, at most as many as averages.
        momentum: share of the value in the new average.

    Returns: whether they were moved; else nothing has changed.

    Numerics: bit for bit `torch._foreach_lerp_` of values in the dtype of the averages.
    """
    if not _can_move(averages, values, counts):
        return False
    for first in range(0, len(averages), MAX_AVERAGES):
        chunk = slice(first, first + MAX_AVERAGES)
        _launch(tuple(averages[chunk]), tuple(values[chunk]), tuple(counts[chunk]), momentum)
    return True


def _launch(
    averages: tuple[torch.Tensor, ...],
    values: tuple[torch.Tensor, ...],
    counts: tuple[torch.Tensor, ...],
    momentum: float,
) -> None:
    sizes = tuple(average.numel() for average in averages)
    block = min(MAX_BLOCK, max(16, triton.next_power_of_2(max(sizes))))
    launch(
        _running_stats_kernel,
        (len(averages), triton.cdiv(max(sizes), block)),
        {
            "average_ptrs": averages,
            "value_ptrs": values,
            "count_ptrs": counts,
            "sizes": sizes,
            "momentum": float(momentum),
            "BLOCK": block,
        },
        num_warps=1,
        num_stages=1,
        traffic=Traffic(
            reads=num_bytes(*averages, *values, *counts),
            writes=num_bytes(*averages, *counts),
            flops=3 * sum(sizes),
        ),
    )


def _can_move(
    averages: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    counts: Sequence[torch.Tensor],
) -> bool:
    """Whether the tensors are what the docstring of `move_running_stats` says."""
    tensors = [*averages, *values, *counts]
    dtype, device = averages[0].dtype, averages[0].device
    return (
        all(type(t) is torch.Tensor and t.is_contiguous() and t.device == device for t in tensors)
        and dtype in _DTYPES
        and all(average.dtype == dtype for average in averages)
        and all(value.dtype == torch.float32 for value in values)
        and all(count.dtype == torch.int64 and count.numel() == 1 for count in counts)
        and [average.shape for average in averages] == [value.shape for value in values]
        and len(counts) <= len(averages)
        and _are_apart([*averages, *counts])
    )


def _are_apart(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether no two tensors share memory; those on meta have none."""
    if tensors[0].is_meta:
        return True
    spans = sorted((t.data_ptr(), t.data_ptr() + num_bytes(t)) for t in tensors)
    return all(end <= start for (_, end), (start, _) in pairwise(spans))
