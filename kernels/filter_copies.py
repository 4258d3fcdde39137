"""Filters in fp32 beside activations in a lower precision, and the copies that the ops read.

Mixed precision keeps filters in fp32 and computes with rounded ones. The ops take the fp32 filters
themselves and return their gradients in fp32, straight from the sums of the kernels. What they
compute with is looked up here: a copy that whoever moves the filters keeps up to date, as the
optimizer's kernel does by one more store. Without one the op rounds the filter itself.

A copy knows the version of the filter that it was made from, the counter that autograd keeps too.
Whatever changes a filter in place, a checkpoint or an average, is so seen at the next use.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastres.kernels.override import Override

__all__ = ["FilterCopies", "low_precision_filter", "round_filter"]

_LOW_PRECISIONS = (torch.bfloat16, torch.float16)


@dataclass
class _Copy:
    """A filter rounded to a lower precision, and the version of the filter that it holds."""

    filters: Tensor
    rounded: Tensor
    version: int = -1

    @property
    def is_fresh(self) -> bool:
        return self.version == self.filters._version


class FilterCopies:
    """Copies in a lower precision of the filters of a network, for the ops inside `in_use()`.

    Args:
        params: parameters of a network. Those in fp32, (K, C, R, S) and dense channels_last, get a
            copy with the same strides; the ops round others themselves.
        dtype: of the copies.
    """

    def __init__(self, params: Iterable[Tensor], dtype: torch.dtype):
        self.dtype = dtype
        # By address: between an op and its caller stand autograd and compilers, which may hand on
        # another tensor object.
        self._copies = {
            param.data_ptr(): _Copy(param, torch.empty_like(param, dtype=dtype).detach())
            for param in params
            if param.dim() == 4
            and param.dtype == torch.float32
            and param.is_contiguous(memory_format=torch.channels_last)
        }
        self.refresh()

    def in_use(self) -> AbstractContextManager[None]:
        """Have the ops inside the `with` block, and their backward passes, read these copies."""
        return _in_use.set(self)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the copies of changed filters again, in one call."""
        stale = [copy for copy in self._copies.values() if not copy.is_fresh]
        if stale:
            torch._foreach_copy_([c.rounded for c in stale], [c.filters for c in stale])
        for copy in stale:
            copy.version = copy.filters._version

    def of(self, param: Tensor) -> Tensor | None:
        """Return the copy of a filter as it is, fresh or not: for who writes it."""
        copy = self._find(param)
        return None if copy is None else copy.rounded

    def read(self, w: Tensor) -> Tensor | None:
        """Return a copy that holds what the filters w hold now, or None where there is none."""
        copy = self._find(w)
        if copy is None:
            return None
        if not copy.is_fresh:
            with torch.no_grad():
                copy.rounded.copy_(copy.filters)
            copy.version = copy.filters._version
        return copy.rounded

    def note_joint_update(self, params: Sequence[Tensor]) -> None:
        """Tell autograd that a kernel has changed `params`, and here that it has their copies too.

        A copy that was not fresh before stays so: the kernel may have left both as they were.
        """
        found = [copy for copy in map(self._find, params) if copy is not None and copy.is_fresh]
        increment_version(params)
        for copy in found:
            copy.version = copy.filters._version

    def _find(self, w: Tensor) -> _Copy | None:
        address = w.data_ptr()
        copy = self._copies.get(address)
        # The memory of a parameter that was given another may be anybody's.
        if copy is None or copy.filters.data_ptr() != address or copy.filters.shape != w.shape:
            return None
        return copy if copy.filters.stride() == w.stride() else None


_in_use: Override[FilterCopies] = Override()


def _is_wide(w: Tensor, dtype: torch.dtype) -> bool:
    return w.dtype == torch.float32 and dtype in _LOW_PRECISIONS


def round_filter(w: Tensor, dtype: torch.dtype) -> Tensor:
    """Return w as an op of activations in `dtype` computes with it; autograd can follow."""
    return w.to(dtype) if _is_wide(w, dtype) else w


def low_precision_filter(w: Tensor, dtype: torch.dtype) -> Tensor:
    """`round_filter` for kernels: a copy in use where there is one."""
    copies = _in_use.value
    if copies is not None and copies.dtype == dtype and _is_wide(w, dtype):
        rounded = copies.read(w)
        if rounded is not None:
            return rounded
    return round_filter(w, dtype)
