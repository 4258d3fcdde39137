"""The loader built on an NVIDIA DALI pipeline, on the GPU or on DALI's CPU back end.

Crops, flips and boxes reach DALI as data through `fn.external_source`; DALI's own random generators
are not used. Padding is cut before normalisation, so the border is black in raw pixels, as with
the other loaders.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType
from torch import Tensor

from fastres.data.augmentation import shared_tensor
from fastres.data.loaders.base import Batches, Loader
from fastres.data.plan import IMAGE_SIZE, Plan

__all__ = ["DaliLoader"]


class _Source:
    """Feeds one epoch to the pipeline, batch by batch; what DALI calls ahead of the consumer."""

    def __init__(self, batches: Batches):
        self.batches = batches
        self.plan: Plan = batches.plan(0)[:0]
        self.next_batch = 0

    def start(self, plan: Plan, start_batch: int) -> None:
        self.plan, self.next_batch = plan, start_batch

    def __call__(self) -> tuple[np.ndarray, ...]:
        """Return the next batch: images and flips, then corners and boxes as far as they occur.

        DALI paints the box before it mirrors, so the box of a mirrored image is mirrored here.
        """
        if self.next_batch >= len(self.batches):
            raise StopIteration
        part = self.plan[self.batches.rows(self.next_batch)]
        self.next_batch += 1
        outputs = [self.batches.images.images[part.index], part.flip.astype(np.int32)]
        if self.batches.augmentation.crop_padding:
            outputs.append((part.crop - part.padding).astype(np.int32))
        if self.batches.augmentation.cutout:
            top, left, bottom, right = part.cutout.T
            left, right = (
                np.where(part.flip, IMAGE_SIZE - right, left),
                np.where(part.flip, IMAGE_SIZE - left, right),
            )
            outputs.append(np.stack([top, left], axis=1).astype(np.float32))
            outputs.append(np.stack([bottom - top, right - left], axis=1).astype(np.float32))
        return tuple(outputs)


def _inputs(batches: Batches, source: _Source) -> Iterator[Any]:
    """Declare what the source feeds: in the order and number of its outputs."""
    declared = [("HWC", DALIDataType.UINT8, 3), (None, DALIDataType.INT32, 0)]
    if batches.augmentation.crop_padding:
        declared.append((None, DALIDataType.INT32, 1))
    if batches.augmentation.cutout:
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


def _build(batches: Batches, source: _Source, device: torch.device, threads: int) -> Pipeline:
    """Describe the pipeline: slice with black padding, paint, mirror and normalise."""
    on_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=batches.size,
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=2,
    )
    with pipeline:
        inputs = _inputs(batches, source)
        images, flip = next(inputs), next(inputs)
        if on_gpu:
            images = images.gpu()
        if batches.augmentation.crop_padding:
            images = fn.slice(
                images,
                start=next(inputs),
                shape=[IMAGE_SIZE, IMAGE_SIZE],
                axes=[0, 1],
                out_of_bounds_policy="pad",
                fill_values=0,
            )
        if batches.augmentation.cutout:
            images = fn.erase(
                images,
                anchor=next(inputs),
                shape=next(inputs),
                axis_names="HW",
                fill_value=list(batches.cutout_colour()),
            )
        images = fn.crop_mirror_normalize(
            images,
            mirror=flip,
            mean=[255.0 * value for value in batches.mean],
            std=[255.0 * value for value in batches.std],
            dtype=DALIDataType.FLOAT,
            output_layout="HWC",
        )
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


class DaliLoader(Loader):
    """A DALI pipeline that augments and normalises ahead of the training step.

    DALI's executor hands out freshly allocated outputs, which torch then owns through DLPack: a
    batch stays valid after later ones were served.

    Args:
        batches: what to serve.
        device: a CUDA device runs the pipeline there, the CPU on DALI's CPU back end.
        epoch: the first epoch served.
        threads: CPU threads of the pipeline.
    """

    name = "dali"

    def __init__(self, batches: Batches, device: torch.device, epoch: int = 0, *, threads: int = 2):
        super().__init__(batches, device, epoch)
        back_end = f"on {device}" if device.type == "cuda" else "CPU back end"
        self.detail = f"DALI pipeline, {back_end}, {threads} CPU threads"
        self.threads = threads
        self.labels = shared_tensor(batches.images.labels)
        self._source = _Source(batches)
        self._pipeline: Pipeline | None = None

    def serve(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Serve `epoch` from its batch `start_batch` on.

        The pipeline is built at the first use, after a CUDA graph was captured, and used again
        from epoch to epoch. It runs ahead, so an epoch that was left early leaves batches inside;
        then a new pipeline is built.
        """
        plan = self.batches.plan(epoch)
        self._source.start(plan, start_batch)
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is None:
            pipeline = _build(self.batches, self._source, self.device, self.threads)
        else:
            pipeline.reset()
        labels = self.labels[torch.from_numpy(plan.index)].to(self.device, non_blocking=True)
        for batch in range(start_batch, len(self)):
            rows = self.batches.rows(batch)
            yield self._run(pipeline).permute(0, 3, 1, 2), labels[rows]
        if self._drained(pipeline):
            self._pipeline = pipeline

    def _run(self, pipeline: Pipeline) -> Tensor:
        """Return the next batch as (B, 32, 32, 3) float32 on the loader's device."""
        if self.device.type == "cuda":
            (images,) = pipeline.run(torch.cuda.current_stream(self.device))
        else:
            (images,) = pipeline.run()
        return torch.from_dlpack(images.as_tensor())

    def _drained(self, pipeline: Pipeline) -> bool:
        """Run into the end of the epoch, after which DALI allows a reset."""
        try:
            pipeline.run()
        except StopIteration:
            return True
        return False

    def close(self) -> None:
        """Give the pipeline back."""
        self._pipeline = None
