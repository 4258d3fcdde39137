"""The resident loader: the whole set stays on the device as uint8 and is augmented there."""

import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastres.data.augmentation import (
    TensorPlan,
    augment,
    normalize,
    select_images,
    shared_tensor,
    to_raw_scale,
)
from fastres.data.loaders.base import BatchSpec, Loader
from fastres.data.loaders.plan_ahead import PlanAhead

__all__ = ["ResidentLoader"]


def _find_kernel(device: torch.device) -> Callable[..., Tensor] | None:
    """The Triton kernel that makes a batch, or None where there is no GPU or no Triton."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from fastres.kernels.gpu.augment import augment_normalize

    return augment_normalize


class ResidentLoader(Loader):
    """Makes every batch on the device: by one kernel on a GPU, else by a few tensor operations.

    TrivialAugment comes before that kernel, as tensor operations on the raw images of the batch.
    Only the plan is copied to the device, once an epoch, and nothing waits for the device. The
    next plan is made while an epoch is served. An image takes 3,072 bytes of the device's memory:
    the training images of CIFAR-10 154 MB, a million images 3.1 GB.

    Args:
        spec: which batches to serve.
        device: where the set is kept and the batches are made.
        epoch: the first epoch served.
        dtype: of the images; they are computed in float32 and rounded once.
    """

    name = "resident"

    def __init__(
        self,
        spec: BatchSpec,
        device: torch.device,
        epoch: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(spec, device, epoch)
        self.dtype = dtype
        self.images = shared_tensor(spec.images.images).to(device)
        self.labels = shared_tensor(spec.images.labels).to(device)
        self.mean = to_raw_scale(spec.mean).to(device)
        self.std = to_raw_scale(spec.std).to(device)
        self.scale = 1.0 / self.std
        self.colour = torch.tensor(spec.cutout_colour(), dtype=torch.uint8, device=device)
        self._plans = PlanAhead(spec)
        self._kernel = _find_kernel(device)
        how = "by tensor operations" if self._kernel is None else "by one Triton kernel a batch"
        self.detail = f"the whole set as uint8 on {device}, augmented there {how}"

    def serve(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Serve `epoch` from its batch `start_batch` on, whatever else was or is being served."""
        plan = TensorPlan(self._plans.take(epoch), self.device)
        labels = self.labels[plan.index]
        for batch in range(start_batch, len(self)):
            rows = self.spec.rows(batch)
            yield self._make(plan, rows), labels[rows]
            if batch == start_batch:
                # Not before: by now the device has a batch to work on.
                self._plans.prepare_after(epoch)

    def _make(self, plan: TensorPlan, rows: slice) -> Tensor:
        """Return the images that `rows` of the plan name, (B, 3, 32, 32) channels-last."""
        if self._kernel is None:
            raw = augment(self.images, plan, rows, self.colour)
            return normalize(raw, self.mean, self.std).to(self.dtype)
        images, index = self.images, plan.index[rows]
        if plan.operation is not None:
            images = select_images(images, plan, rows)
            index = torch.arange(len(images), device=self.device)
        return self._kernel(
            images,
            index,
            self.mean,
            self.scale,
            crop=None if plan.crop is None else plan.crop[rows],
            padding=plan.padding,
            flip=None if plan.flip is None else plan.flip[rows],
            cutout=None if plan.cutout is None else plan.cutout[rows],
            colour=None if plan.cutout is None else self.colour,
            dtype=self.dtype,
        )
