"""The DALI loader: an NVIDIA DALI pipeline on the GPU, or on DALI's CPU back end.

The plan reaches DALI as data, through `fn.external_source`; DALI's random generators are not used.
Images are padded before they are normalised, so the border is black in raw pixels, as with the
other loaders. TrivialAugment changes them on the CPU before they enter the pipeline: DALI's own
operations differ in their rounding.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType
from torch import Tensor

from fastres.data.augmentation import TensorPlan, select_images, shared_tensor
from fastres.data.loaders.base import BatchSpec, Loader
from fastres.data.loaders.plan_ahead import PlanAhead
from fastres.data.plan import IMAGE_SIZE, Plan

__all__ = ["DaliLoader"]


class _Source:
    """The callback that feeds one epoch to the pipeline; DALI calls it ahead of the consumer."""

    def __init__(self, spec: BatchSpec):
        self.spec = spec
        self.images = shared_tensor(spec.images.images)
        self.plan: Plan = spec.plan(0)[:0]
        self.next_batch = 0

    def start(self, plan: Plan, start_batch: int) -> None:
        """Feed the batches of `plan` from `start_batch` on."""
        self.plan, self.next_batch = plan, start_batch

    def __call__(self) -> tuple[np.ndarray, ...]:
        """Return images and flips of the next batch, then crop corners and cutout boxes if used.

        The pipeline erases the box before it mirrors, so the box of a mirrored image is mirrored
        here.
        """
        if self.next_batch >= len(self.spec):
            raise StopIteration
        batch = self.plan[self.spec.rows(self.next_batch)]
        self.next_batch += 1
        images = select_images(self.images, TensorPlan(batch, self.images.device), slice(None))
        outputs = [images.numpy(), batch.flip.astype(np.int32)]
        if self.spec.augmentation.crop_padding:
            outputs.append((batch.crop - batch.padding).astype(np.int32))
        if self.spec.augmentation.cutout:
            top, left, bottom, right = batch.cutout.T
            left, right = (
                np.where(batch.flip, IMAGE_SIZE - right, left),
                np.where(batch.flip, IMAGE_SIZE - left, right),
            )
            outputs.append(np.stack([top, left], axis=1).astype(np.float32))
            outputs.append(np.stack([bottom - top, right - left], axis=1).astype(np.float32))
        return tuple(outputs)


def _inputs(spec: BatchSpec, source: _Source) -> Iterator[Any]:
    """Declare the outputs of `source`, in its order."""
    declared = [("HWC", DALIDataType.UINT8, 3), (None, DALIDataType.INT32, 0)]
    if spec.augmentation.crop_padding:
        declared.append((None, DALIDataType.INT32, 1))
    if spec.augmentation.cutout:
        declared += [(None, DALIDataType.FLOAT, 1), (None, DALIDataType.FLOAT, 1)]
    layouts, dtypes, ndims = (list(column) for column in zip(*declared, strict=True))
    return iter(
        fn.external_source(
            source=source,
            num_outputs=len(declared),
            batch=True,
            layout=layouts,
            dtype=dtypes,
            ndim=ndims,
        )
    )


def _build(spec: BatchSpec, source: _Source, device: torch.device, threads: int) -> Pipeline:
    """Build the pipeline: pad and crop, erase the box, mirror, normalise."""
    on_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=spec.size,
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=2,
    )
    with pipeline:
        inputs = _inputs(spec, source)
        images, flip = next(inputs), next(inputs)
        if on_gpu:
            images = images.gpu()
        if spec.augmentation.crop_padding:
            images = fn.slice(
                images,
                start=next(inputs),
                shape=[IMAGE_SIZE, IMAGE_SIZE],
                axes=[0, 1],
                out_of_bounds_policy="pad",
                fill_values=0,
            )
        if spec.augmentation.cutout:
            images = fn.erase(
                images,
                anchor=next(inputs),
                shape=next(inputs),
                axis_names="HW",
                fill_value=list(spec.cutout_colour()),
            )
        images = fn.crop_mirror_normalize(
            images,
            mirror=flip,
            mean=[255.0 * value for value in spec.mean],
            std=[255.0 * value for value in spec.std],
            dtype=DALIDataType.FLOAT,
            output_layout="HWC",
        )
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


class _PlannedPipeline:
    """A DALI pipeline and the source that feeds it; it serves one pass at a time."""

    def __init__(self, spec: BatchSpec, device: torch.device, threads: int):
        self.device = device
        self.source = _Source(spec)
        self.pipeline = _build(spec, self.source, device, threads)
        self._is_new = True

    def start(self, plan: Plan, start_batch: int) -> None:
        """Begin a pass; the one before it, if any, was drained."""
        self.source.start(plan, start_batch)
        if not self._is_new:
            self.pipeline.reset()
        self._is_new = False

    def run(self) -> Tensor:
        """Return the next batch as (B, 32, 32, 3) float32 on the device."""
        if self.device.type == "cuda":
            (images,) = self.pipeline.run(torch.cuda.current_stream(self.device))
        else:
            (images,) = self.pipeline.run()
        return torch.from_dlpack(images.as_tensor())

    def drain(self) -> None:
        """Run past the last batch, which DALI requires before a reset."""
        with contextlib.suppress(StopIteration):
            self.pipeline.run()


class DaliLoader(Loader):
    """A DALI pipeline that augments and normalises ahead of the training step.

    DALI allocates every output anew and torch owns it through DLPack, so a batch stays valid after
    later ones were served.

    Args:
        spec: which batches to serve.
        device: a CUDA device runs the pipeline there, the CPU on DALI's CPU back end.
        epoch: the first epoch served.
        threads: CPU threads of the pipeline.
    """

    name = "dali"

    def __init__(self, spec: BatchSpec, device: torch.device, epoch: int = 0, *, threads: int = 2):
        super().__init__(spec, device, epoch)
        back_end = f"on {device}" if device.type == "cuda" else "CPU back end"
        self.detail = f"DALI pipeline, {back_end}, {threads} CPU threads"
        self.threads = threads
        self.labels = shared_tensor(spec.images.labels)
        self._plans = PlanAhead(spec)
        self._idle: list[_PlannedPipeline] = []

    def serve(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Serve `epoch` from its batch `start_batch` on, whatever else was or is being served.

        The first pass builds a pipeline, so after the capture of a CUDA graph, and later ones take
        it over. It prefetches: a pass that is left early drops it with the batches in it, and a
        pass that begins beside another one builds its own.
        """
        plan = self._plans.take(epoch)
        planned = (
            self._idle.pop()
            if self._idle
            else _PlannedPipeline(self.spec, self.device, self.threads)
        )
        planned.start(plan, start_batch)
        labels = self.labels[torch.from_numpy(plan.index)].to(self.device, non_blocking=True)
        for batch in range(start_batch, len(self)):
            yield planned.run().permute(0, 3, 1, 2), labels[self.spec.rows(batch)]
            if batch == start_batch:
                self._plans.prepare_after(epoch)
        planned.drain()
        self._idle = [planned]

    def close(self) -> None:
        """Release the pipeline."""
        self._idle.clear()
