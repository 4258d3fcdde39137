"""compute-sanitizer's memcheck for Triton's interpreter: no access outside of a launch's tensors.

The interpreter reads and writes wherever a kernel points to. A load beyond a tensor goes unnoticed
there and a store corrupts memory of the process; on a GPU both may be an illegal address.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.helpers.interpreter import HAS_GPU

__all__ = ["checked_memory"]


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, tuple):
            yield from _tensors(value)
        elif isinstance(value, TensorDescriptor):
            yield value.base
        elif isinstance(value, torch.Tensor):
            yield value


def _span(t: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor and the byte behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


class _Memory:
    """What the launch that is running may touch."""

    def __init__(self, values: Iterable[Any]):
        spans = sorted(_span(t) for t in _tensors(values) if t.numel() > 0)
        self.firsts = np.array([first for first, _ in spans], dtype=np.uint64)
        # Spans may overlap: an address is inside if it is before the farthest end so far.
        self.ends = np.maximum.accumulate(np.array([end for _, end in spans], dtype=np.uint64))

    def check(self, pointers: Any, mask: Any, access: str) -> None:
        found = np.broadcast_to(mask, pointers.data.shape).astype(bool)
        addresses = pointers.data[found].astype(np.uint64)
        bits = pointers.get_element_ty().primitive_bitwidth
        place = np.searchsorted(self.firsts, addresses, side="right") - 1
        inside = (place >= 0) & (addresses + np.uint64(bits // 8) <= self.ends[place])
        assert inside.all(), f"{access} of {int((~inside).sum())} elements outside of all tensors"


@pytest.fixture
def checked_memory(monkeypatch):
    """Let every interpreted kernel fail at its first access outside of the tensors it is given."""
    if HAS_GPU:
        return
    from triton.runtime import interpreter

    memory: list[_Memory] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    start, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    add = builder.create_atomic_rmw

    def start_checked(self, *args, **options):
        memory.append(_Memory([*args, *options.values()]))
        try:
            return start(self, *args, **options)
        finally:
            memory.pop()

    def load_checked(self, ptrs, mask, *options):
        memory[-1].check(ptrs, mask.data, "load")
        return load(self, ptrs, mask, *options)

    def store_checked(self, ptrs, value, mask, *options):
        memory[-1].check(ptrs, mask.data, "store")
        return store(self, ptrs, value, mask, *options)

    def add_checked(self, operation, ptr, value, mask, *options):
        memory[-1].check(ptr, mask.data, "atomic operation")
        return add(self, operation, ptr, value, mask, *options)

    monkeypatch.setattr(executor, "__call__", start_checked)
    monkeypatch.setattr(builder, "create_masked_load", load_checked)
    monkeypatch.setattr(builder, "create_masked_store", store_checked)
    monkeypatch.setattr(builder, "create_atomic_rmw", add_checked)
