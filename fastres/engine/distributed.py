"""Several processes that train one network: `torchrun --nproc-per-node 2 -m fastres.train --fast`.

Every process takes its share of each batch, and after every step all of them hold the same weights
and running statistics, bit for bit. So any of them can save for all, and a run may be resumed by
another number of processes. Batch norm sees the share of a process, as with torch's
DistributedDataParallel; the pixels of a batch are those of a run by one process, mixed ones where
the share of a process is even.

The processes end together: when torchrun ends, each of them is asked to save and stop, and when one
of them ends, the others fail in their next exchange with it.
"""

import ctypes
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from fastres.data.dataset import ImageSet
from fastres.data.loaders import BatchSpec
from fastres.errors import FailureError, UsageError, sentence_for

__all__ = ["ALONE", "Processes", "join_processes"]

# From sys/prctl.h.
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: number of this process, from 0; number 0 speaks and writes for all.
        size: how many there are.
        local_rank, local_size: the same among those on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Return whether this process speaks and writes for all."""
        return self.rank == 0

    def share(self, batches: BatchSpec) -> BatchSpec:
        """Return this process's part of every training batch.

        Raises:
            UsageError: when a batch cannot be split evenly.
        """
        if batches.batch_size % self.size:
            raise UsageError(
                f"a batch of {batches.batch_size} images cannot be split over {self.size} "
                "processes evenly; choose a multiple with --batch-size"
            )
        return replace(batches, rank=self.rank, world_size=self.size)

    def share_of_set(self, images: ImageSet) -> ImageSet:
        """Return this process's part of a set: every image belongs to exactly one process."""
        if self.size == 1:
            return images
        first, last = (len(images) * rank // self.size for rank in (self.rank, self.rank + 1))
        return ImageSet(images.images[first:last], images.labels[first:last])

    def average(self, model: nn.Module) -> None:
        """Give all processes the mean of their gradients and of their running statistics."""
        if self.size == 1:
            return
        tensors = [p.grad for p in model.parameters() if p.grad is not None]
        tensors += [b for b in model.buffers() if b.is_floating_point()]
        # Into the gradients themselves: fused optimizers rely on their having their parameters'
        # strides, and an exchanged tensor has those of a contiguous one.
        with torch.no_grad():
            for tensor, value in zip(tensors, self._averages(tensors), strict=True):
                tensor.copy_(value)

    def _averages(self, tensors: Sequence[Tensor]) -> Iterable[Tensor]:
        """Return the mean over the processes of every tensor, exchanged as one."""
        flat = _flatten_dense_tensors(list(tensors))
        with _named_failures():
            dist.all_reduce(flat)
        return _unflatten_dense_tensors(flat.div_(self.size), list(tensors))

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over the processes of `values`."""
        if self.size == 1:
            return values
        summed = values.clone()
        with _named_failures():
            dist.all_reduce(summed)
        return summed

    def all_gather(self, values: Tensor) -> list[Tensor]:
        """Return the values of every process, in the processes' order.

        Args:
            values: (N,), of any length in each process, none included.
        """
        if self.size == 1:
            return [values]
        counts = torch.zeros(self.size, dtype=torch.int64, device=values.device)
        counts[self.rank] = len(values)
        lengths = self.total(counts).tolist()
        shares = [values.new_zeros(length) for length in lengths]
        shares[self.rank] = values
        # Every place has a number of one process, and the zeros of all others.
        return list(self.total(torch.cat(shares)).split(lengths))

    def any(self, number: int | None) -> int | None:
        """Return the largest number that a process has, or None where nobody has one."""
        if self.size == 1:
            return number
        largest = torch.tensor(number or 0)
        with _named_failures():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest) or None

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let process 0 of this machine go through the context before the others."""
        if self.size > 1 and self.local_rank:
            self._wait_for_all()
        yield
        if self.size > 1 and not self.local_rank:
            self._wait_for_all()

    def _wait_for_all(self) -> None:
        with _named_failures():
            dist.barrier()


ALONE = Processes()


@contextmanager
def _named_failures() -> Iterator[None]:
    """Put into words what the back ends raise when another process has ended."""
    try:
        yield
    except RuntimeError as error:
        if sentence_for(error) is not None:
            raise
        # Without the line of the back end's source before it, and its advice after it.
        reason = re.sub(r"^\[\S+\] ", "", str(error)).splitlines()[0].partition(". ")[0]
        raise FailureError(f"another process of this run cannot be reached: {reason}") from error


def _stop_with_launcher() -> None:
    """Get a SIGTERM when the process that started this one ends, be it by SIGKILL; Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """Join the others that torchrun started, for the time of the context; alone without it.

    Args:
        device: "auto", "cpu" or "cuda", as in the options. On GPUs every process takes its own.

    Raises:
        UsageError: when there are fewer GPUs than processes.
        FailureError: when the others cannot be reached.
    """
    if dist.is_torchelastic_launched():
        _stop_with_launcher()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_torchelastic_launched():
        yield ALONE
        return
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    processes = Processes(*(int(os.environ[name]) for name in names))
    on_cuda = device != "cpu" and torch.cuda.is_available()
    if on_cuda:
        if torch.cuda.device_count() < processes.local_size:
            raise UsageError(
                f"{processes.local_size} processes need a GPU each and there are "
                f"{torch.cuda.device_count()}; start fewer, or give --device cpu"
            )
        torch.cuda.set_device(processes.local_rank)
    with _named_failures():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    try:
        yield processes
    finally:
        dist.destroy_process_group()
