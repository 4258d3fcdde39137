"""The check of interpreted kernels' memory sees an access beyond a tensor, and lets others pass."""

import pytest
import torch
import triton
import triton.language as tl

from tests.helpers.interpreter import HAS_GPU
from tests.helpers.memcheck import checked_memory  # noqa: F401

pytestmark = [
    pytest.mark.usefixtures("checked_memory"),
    pytest.mark.skipif(HAS_GPU, reason="kernels are not interpreted on a GPU"),
]


@triton.jit
def _copy_kernel(
    x_ptr,  # (n,) fp32 in
    out_ptrs,  # (n,) fp32 out, in a tuple
    count_ptr,  # (1,) int32 in and out
    n,
    FIRST: tl.constexpr,
    COUNTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + FIRST + offs, mask=offs < n)
    tl.store(out_ptrs[0] + offs, x, mask=offs < n)
    tl.atomic_add(count_ptr + COUNTER, 1)


def copy(x, out, n, first=0, counter=0):
    count = torch.zeros(1, dtype=torch.int32)
    _copy_kernel[(1,)](x, (out,), count, n, FIRST=first, COUNTER=counter, BLOCK=16)
    return count


def test_what_lies_inside_passes():
    wide = torch.arange(20.0)
    out = torch.zeros(10)
    assert copy(wide, out, 10, first=10) == 1
    assert torch.equal(out, wide[10:])


@pytest.mark.parametrize(
    ("x", "out", "n", "first", "counter", "access"),
    [
        (10, 16, 11, 0, 0, "load of 1"),
        (10, 16, 8, 4, 0, "load of 2"),
        (10, 16, 8, -1, 0, "load of 1"),
        (16, 10, 11, 0, 0, "store of 1"),
        (16, 16, 16, 0, 1, "atomic operation of 1"),
    ],
)
def test_what_lies_outside_is_refused(x, out, n, first, counter, access):
    # Slices of larger tensors: nothing else is near, and nothing is harmed without the check.
    x, out = torch.zeros(64)[16 : 16 + x], torch.zeros(64)[16 : 16 + out]
    with pytest.raises(Exception, match=f"{access} elements outside of all tensors"):
        copy(x, out, n, first, counter)
