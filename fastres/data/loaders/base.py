"""What all loaders share: which images make up a batch, and how epochs follow each other."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastres.data.dataset import ImageSet
from fastres.data.plan import Augmentation, Plan, plan_epoch
from fastres.errors import UsageError

__all__ = ["BatchSpec", "Loader"]


@dataclass(frozen=True)
class BatchSpec:
    """Which batches to serve; a loader decides only how to make them.

    Attributes:
        images: the set to serve.
        mean, std: per-channel statistics on the 0..1 scale, to normalise with.
        batch_size: images in a batch.
        seed: of the augmentation plan.
        augmentation: what varies the images.
        training: shuffle, and drop the last partial batch so that every step has one shape;
            otherwise serve every image exactly once, in order.
        rank, world_size: serve the share of process `rank` in every batch, of `world_size` equal
            shares.
    """

    images: ImageSet
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    batch_size: int
    seed: int
    augmentation: Augmentation
    training: bool
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.batch_size, int | np.integer) or self.batch_size < 1:
            raise UsageError(
                f"batch size must be a whole number of at least 1, got {self.batch_size!r}"
            )
        if self.training and self.batch_size > len(self.images):
            raise UsageError(
                f"batch size {self.batch_size} is larger than the {len(self.images)} training "
                "images; choose a smaller one (--batch-size)"
            )

    def __len__(self) -> int:
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole if self.training or rest == 0 else whole + 1

    def plan(self, epoch: int) -> Plan:
        """Return the plan of `epoch`, without the images of a dropped last batch."""
        plan = plan_epoch(
            len(self.images),
            seed=self.seed,
            epoch=epoch,
            augmentation=self.augmentation,
            shuffle=self.training,
        )
        return plan[: len(self) * self.batch_size]

    @property
    def size(self) -> int:
        """Return the number of images in a full batch of this process."""
        return self.batch_size // self.world_size

    def rows(self, batch: int) -> slice:
        """Return the rows of the plan that are this process's share of `batch`."""
        first = batch * self.batch_size + self.rank * self.size
        return slice(first, first + self.size)

    def cutout_colour(self) -> tuple[int, int, int]:
        """Return the mean colour of the training set in raw pixel values."""
        red, green, blue = (round(255 * value) for value in self.mean)
        return red, green, blue


class Loader(ABC):
    """Serves (images, labels), epoch after epoch.

    `images` are (B, 3, 32, 32) float32 with channels-last strides, normalised; `labels` are (B,)
    int64; both on `device`. Each pass over the loader serves the epoch `self.epoch` and leaves the
    next one there as it begins, so a `for` loop repeated n times sees n different epochs, even when
    left early. Passes may overlap: each serves its own epoch, whatever the others do.

    Attributes:
        name: "torch", "resident" or "dali", as in the options.
        detail: one line on what really runs.
    """

    name: str
    detail: str

    def __init__(self, spec: BatchSpec, device: torch.device, epoch: int = 0):
        self.spec = spec
        self.device = device
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.spec)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = self.epoch
        self.epoch += 1
        yield from self.serve(epoch)

    @abstractmethod
    def serve(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Serve `epoch` from its batch `start_batch` on, whatever else was or is being served."""

    def close(self) -> None:  # noqa: B027 - most loaders hold nothing to release
        """Release worker processes and pipelines; the loader may not be used afterwards."""
