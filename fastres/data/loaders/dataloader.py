"""The loader built on torch.utils.data.DataLoader: worker processes, pinned memory."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastres.data.augmentation import TensorPlan, augment, normalize, shared_tensor, to_raw_scale
from fastres.data.loaders.base import Batches, Loader
from fastres.data.plan import Plan

__all__ = ["TorchLoader"]


class _PlannedImages(Dataset):
    """Maps a slice of the plan to its batch, inside a worker process."""

    def __init__(self, batches: Batches):
        self.images = shared_tensor(batches.images.images)
        self.labels = shared_tensor(batches.images.labels)
        self.mean, self.std = to_raw_scale(batches.mean), to_raw_scale(batches.std)
        self.colour = torch.tensor(batches.cutout_colour(), dtype=torch.uint8)

    def __getitem__(self, part: Plan) -> tuple[Tensor, Tensor]:
        plan = TensorPlan(part, self.images.device)
        raw = augment(self.images, plan, slice(None), self.colour)
        return normalize(raw, self.mean, self.std), self.labels[plan.index]


class _PlanSampler(Sampler):
    """Hands the plan out one batch at a time, so that it travels to the workers as data."""

    def __init__(self, batches: Batches):
        self.batches = batches
        self.epoch = 0
        self.start_batch = 0

    def __iter__(self) -> Iterator[Plan]:
        plan = self.batches.plan(self.epoch)
        for batch in range(self.start_batch, len(self.batches)):
            yield plan[self.batches.rows(batch)]

    def __len__(self) -> int:
        return len(self.batches) - self.start_batch


def _unchanged(batch: Any) -> Any:
    return batch


class TorchLoader(Loader):
    """torch's DataLoader with one sampler item a batch.

    Args:
        batches: what to serve.
        device: where the batches go.
        epoch: the first epoch served.
        workers: processes that prepare batches; 0 prepares them in the training process.
    """

    name = "torch"

    def __init__(self, batches: Batches, device: torch.device, epoch: int = 0, *, workers: int = 0):
        super().__init__(batches, device, epoch)
        where = f"{workers} worker processes" if workers else "in the training process"
        self.detail = f"torch DataLoader, {where}"
        self.sampler = _PlanSampler(batches)
        self.loader = DataLoader(
            _PlannedImages(batches),
            batch_size=None,
            sampler=self.sampler,
            collate_fn=_unchanged,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )

    def serve(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Serve `epoch` from its batch `start_batch` on."""
        self.sampler.epoch, self.sampler.start_batch = epoch, start_batch
        for images, labels in self.loader:
            yield (
                images.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
            )
