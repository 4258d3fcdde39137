"""The loader built on torch.utils.data.DataLoader: worker processes, pinned memory."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastres.data.augmentation import TensorPlan, augment, normalize, shared_tensor, to_raw_scale
from fastres.data.loaders.base import BatchSpec, Loader
from fastres.data.loaders.worker_signals import obey_trainer, signals_held
from fastres.data.plan import Plan

__all__ = ["TorchLoader"]


class _PlannedBatches(Dataset):
    """Maps the plan of one batch to the batch, inside a worker process."""

    def __init__(self, spec: BatchSpec):
        self.images = shared_tensor(spec.images.images)
        self.labels = shared_tensor(spec.images.labels)
        self.mean, self.std = to_raw_scale(spec.mean), to_raw_scale(spec.std)
        self.colour = torch.tensor(spec.cutout_colour(), dtype=torch.uint8)

    def __getitem__(self, batch: Plan) -> tuple[Tensor, Tensor]:
        plan = TensorPlan(batch, self.images.device)
        raw = augment(self.images, plan, slice(None), self.colour)
        return normalize(raw, self.mean, self.std), self.labels[plan.index]


class _PlanSampler(Sampler):
    """Yields the plan of one batch at a time, which torch sends to the workers."""

    def __init__(self, spec: BatchSpec):
        self.spec = spec
        self.epoch = 0
        self.start_batch = 0

    def __iter__(self) -> Iterator[Plan]:
        plan = self.spec.plan(self.epoch)
        for batch in range(self.start_batch, len(self.spec)):
            yield plan[self.spec.rows(batch)]

    def __len__(self) -> int:
        return len(self.spec) - self.start_batch


def _unchanged(batch: Any) -> Any:
    return batch


class TorchLoader(Loader):
    """torch's DataLoader, whose sampler yields whole batches.

    Args:
        spec: which batches to serve.
        device: where the batches are wanted.
        epoch: the first epoch served.
        workers: processes that prepare batches; 0 prepares them in the training process.
    """

    name = "torch"

    def __init__(self, spec: BatchSpec, device: torch.device, epoch: int = 0, *, workers: int = 0):
        super().__init__(spec, device, epoch)
        where = f"{workers} worker processes" if workers else "in the training process"
        self.detail = f"torch DataLoader, {where}"
        self.sampler = _PlanSampler(spec)
        self.loader = DataLoader(
            _PlannedBatches(spec),
            batch_size=None,
            sampler=self.sampler,
            collate_fn=_unchanged,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=obey_trainer,
        )

    def _serve(self, epoch: int, start_batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.sampler.epoch, self.sampler.start_batch = epoch, start_batch
        with signals_held():
            batches = iter(self.loader)
        for images, labels in batches:
            yield (
                images.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
            )
