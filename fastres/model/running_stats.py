"""The running statistics of batch norms, moved towards those of a batch as nn.BatchNorm2d does.

The ops return the statistics of the batch and change nothing; here is what moves the running ones:
one kernel where Triton's run, else few calls of torch. A training step has all layers moved
together, at its end.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fastres.kernels.dispatch import runs_on_triton
from fastres.kernels.ops import BatchStats
from fastres.kernels.plain_tensors import are_plain

__all__ = ["Norm", "batched_running_stats", "update_running_stats"]


class Norm(Protocol):
    """What is asked of a batch norm: nn.BatchNorm2d has all of it."""

    running_mean: Any
    running_var: Any
    num_batches_tracked: Any
    momentum: Any
    track_running_stats: Any


_pending_updates: ContextVar[list[tuple[Norm, BatchStats]] | None] = ContextVar(
    "fastres_pending_updates", default=None
)


def update_running_stats(norms: Sequence[Norm], batches: Sequence[BatchStats]) -> None:
    """Move the running statistics towards those of the batch, as nn.BatchNorm2d does."""
    updates = [
        (bn, batch)
        for bn, batch in zip(norms, batches, strict=True)
        if bn.track_running_stats and bn.running_mean is not None
    ]
    pending = None if torch.compiler.is_compiling() else _pending_updates.get()
    if pending is None:
        _apply_updates(updates)
    else:
        pending += updates


@contextmanager
def batched_running_stats() -> Iterator[None]:
    """Update the running statistics of all layers at the end of the `with` block, in few launches.

    Inside they are what they were before it, and an exception leaves them so.
    """
    updates: list[tuple[Norm, BatchStats]] = []
    token = _pending_updates.set(updates)
    try:
        yield
    finally:
        _pending_updates.reset(token)
    _apply_updates(updates)


def _can_update_together(norms: Sequence[Norm]) -> bool:
    """Whether one call can update all: they have one momentum, and no statistics occur twice."""
    # A compiler would guard on these very norms, and compile anew for every other net.
    if torch.compiler.is_compiling() or norms[0].momentum is None:
        return False
    is_same = all(bn.momentum == norms[0].momentum for bn in norms)
    return is_same and len({id(bn.running_mean) for bn in norms}) == len(norms)


@torch.no_grad()
def _apply_updates(updates: Sequence[tuple[Norm, BatchStats]]) -> None:
    if not updates:
        return
    if len(updates) > 1 and not _can_update_together([bn for bn, _ in updates]):
        for update in updates:
            _apply_updates([update])
        return
    momentum = updates[0][0].momentum
    counts = [bn.num_batches_tracked for bn, _ in updates if bn.num_batches_tracked is not None]
    running = [cast(Tensor, t) for bn, _ in updates for t in (bn.running_mean, bn.running_var)]
    seen = [t for _, batch in updates for t in batch]
    if not torch.compiler.is_compiling():
        # As torch's batch norm does: an evaluation that awaits its backward has saved them.
        running = [average.data for average in running]
        if _move_in_one_launch(running, seen, counts, momentum):
            return
    if counts:
        torch._foreach_add_(counts, 1)
    seen = [value.to(average.dtype) for value, average in zip(seen, running, strict=True)]
    if momentum is not None:
        torch._foreach_lerp_(running, seen, momentum)
        return
    if not counts:
        return
    # Without a momentum the running statistics are the plain average of all batches.
    step = counts[0].to(running[0].dtype).reciprocal()
    for average, value in zip(running, seen, strict=True):
        average.lerp_(value, step)


def _move_in_one_launch(
    running: list[Tensor], seen: list[Tensor], counts: list[Tensor], momentum: float | None
) -> bool:
    """Move all by a kernel where one takes them, and return whether it did."""
    if not isinstance(momentum, int | float) or _is_traced():
        return False
    if not (runs_on_triton(seen[0]) and are_plain(*seen)):
        return False
    from fastres.kernels.gpu.running_stats import move_running_stats

    if not move_running_stats(running, seen, counts, momentum):
        return False
    increment_version(counts)
    return True


def _is_traced() -> bool:
    """Whether somebody makes a program of the operators called, which would lack a kernel."""
    modes = _get_current_dispatch_mode_stack()
    return not all(getattr(mode, "sees_fused_ops", False) for mode in modes)
