"""The loader built on torch.utils.data.DataLoader: worker processes, pinned memory.

Workers write their batches into slots of shared memory that the training process has allocated
before it starts them, and send back the number of the slot. So a /dev/shm that is too small shows
at once, in the training process, and no batch is lost on its way: torch would share each batch in a
thread of the worker's queue, where an exception is printed and the batch dropped.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastres.data.augmentation import TensorPlan, augment, normalize, shared_tensor, to_raw_scale
from fastres.data.dataset import IMAGE_SHAPE
from fastres.data.loaders.base import BatchSpec, Loader
from fastres.data.loaders.worker_failure import WAIT_SECONDS, batches_from_workers, explained
from fastres.data.loaders.worker_signals import obey_trainer
from fastres.data.plan import Plan

__all__ = ["TorchLoader"]

_PREFETCH = 2  # batches under way for each worker


class _Slots:
    """Shared memory for the batches under way.

    The worker that makes batch n is told slot n modulo their number. There is one slot more than
    batches under way, since the DataLoader asks for another batch just before it hands one over.

    Args:
        spec: how large a batch may be.
        workers: processes that prepare batches.
    """

    def __init__(self, spec: BatchSpec, workers: int):
        size = min(spec.size, len(spec.images))
        self.count = min(_PREFETCH * workers + 1, len(spec))
        self.images = [torch.empty(size, *IMAGE_SHAPE).share_memory_() for _ in range(self.count)]
        self.labels = torch.empty(self.count, size, dtype=torch.int64).share_memory_()

    def write(self, slot: int, images: Tensor, labels: Tensor) -> tuple[int, int]:
        """Store (B, 3, 32, 32) images and (B,) labels; return what `read` needs."""
        self.images[slot][: len(labels)].copy_(images.permute(0, 2, 3, 1))
        self.labels[slot, : len(labels)].copy_(labels)
        return slot, len(labels)

    def read(self, slot: int, size: int, *, pinned: bool) -> tuple[Tensor, Tensor]:
        """Return a copy of a batch, channels-last in memory."""
        images, labels = self.images[slot][:size], self.labels[slot, :size]
        if pinned:
            return images.pin_memory().permute(0, 3, 1, 2), labels.pin_memory()
        return images.clone().permute(0, 3, 1, 2), labels.clone()


class _PlannedBatches(Dataset):
    """Maps the plan of one batch to the batch, inside a worker process if there are slots."""

    def __init__(self, spec: BatchSpec, slots: _Slots | None):
        self.images = shared_tensor(spec.images.images)
        self.labels = shared_tensor(spec.images.labels)
        self.mean, self.std = to_raw_scale(spec.mean), to_raw_scale(spec.std)
        self.colour = torch.tensor(spec.cutout_colour(), dtype=torch.uint8)
        self.slots = slots

    def __getitem__(self, item: tuple[int, Plan]) -> tuple[Tensor, Tensor] | tuple[int, int]:
        number, batch = item
        plan = TensorPlan(batch, self.images.device)
        raw = augment(self.images, plan, slice(None), self.colour)
        images, labels = normalize(raw, self.mean, self.std), self.labels[plan.index]
        if self.slots is None:
            return images, labels
        return self.slots.write(number % self.slots.count, images, labels)


class _PlanSampler(Sampler):
    """Yields number and plan of one batch at a time, which torch sends to the workers."""

    def __init__(self, spec: BatchSpec):
        self.spec = spec
        self.epoch = 0
        self.start_batch = 0

    def __iter__(self) -> Iterator[tuple[int, Plan]]:
        plan = self.spec.plan(self.epoch)
        for batch in range(self.start_batch, len(self.spec)):
            yield batch, plan[self.spec.rows(batch)]

    def __len__(self) -> int:
        return len(self.spec) - self.start_batch


def _unchanged(batch: Any) -> Any:
    return batch


class _PlannedDataLoader:
    """A DataLoader that serves one pass at a time; its workers stay for the next pass."""

    def __init__(self, spec: BatchSpec, device: torch.device, workers: int):
        self.pinned = device.type == "cuda"
        self.slots = explained(lambda: _Slots(spec, workers)) if workers else None
        self.sampler = _PlanSampler(spec)
        self.loader = DataLoader(
            _PlannedBatches(spec, self.slots),
            batch_size=None,
            sampler=self.sampler,
            collate_fn=_unchanged,
            num_workers=workers,
            prefetch_factor=_PREFETCH if workers else None,
            timeout=WAIT_SECONDS if workers else 0,
            persistent_workers=workers > 0,
            pin_memory=self.pinned and not workers,
            worker_init_fn=obey_trainer,
        )

    def serve(self, epoch: int, start_batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.sampler.epoch, self.sampler.start_batch = epoch, start_batch
        if self.slots is None:
            yield from self.loader
            return
        for slot, size in batches_from_workers(self.loader):
            yield self.slots.read(slot, size, pinned=self.pinned)


class TorchLoader(Loader):
    """torch's DataLoader, whose sampler yields whole batches.

    Args:
        spec: which batches to serve.
        device: where the batches are wanted.
        epoch: the first epoch served.
        workers: processes that prepare batches; 0 prepares them in the training process.

    Raises:
        WorkerError: from a pass, when shared memory is too small or a worker process dies, raises
            or stalls.
    """

    name = "torch"

    def __init__(self, spec: BatchSpec, device: torch.device, epoch: int = 0, *, workers: int = 0):
        super().__init__(spec, device, epoch)
        where = f"{workers} worker processes" if workers else "in the training process"
        self.detail = f"torch DataLoader, {where}"
        self.workers = workers
        self._idle: list[_PlannedDataLoader] = []

    def serve(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Serve `epoch` from its batch `start_batch` on, whatever else was or is being served.

        The first pass starts the workers, and later ones take them over. A pass that is left early
        ends them, and a pass that begins beside another one starts its own.
        """
        planned = (
            self._idle.pop()
            if self._idle
            else _PlannedDataLoader(self.spec, self.device, self.workers)
        )
        for images, labels in planned.serve(epoch, start_batch):
            yield (
                images.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
            )
        self._idle = [planned]

    def close(self) -> None:
        """End the worker processes."""
        self._idle.clear()
