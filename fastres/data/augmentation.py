"""Augment and normalise batches as a plan says, in plain torch on any device."""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.data.plan import IMAGE_SIZE, Plan
from fastres.data.trivial_augment import count_operations, trivial_augment

__all__ = [
    "TensorPlan",
    "augment",
    "normalize",
    "select_images",
    "shared_tensor",
    "shrink",
    "to_raw_scale",
    "upload",
]


class TensorPlan:
    """A Plan as tensors on one device: uploaded once, sliced there.

    Args:
        plan: the rows to upload.
        device: where the images are.

    Attributes:
        index, crop, flip, cutout, padding, operation, magnitude: those of the plan. What changes
            no image is None, and is not uploaded.
    """

    def __init__(self, plan: Plan, device: torch.device):
        has_cutout = (plan.cutout[:, 2] > plan.cutout[:, 0]).any()
        self.padding = plan.padding
        self.index = upload(plan.index, device)
        self.crop = upload(plan.crop, device) if plan.padding else None
        self.flip = upload(plan.flip, device) if plan.flip.any() else None
        self.cutout = upload(plan.cutout, device) if has_cutout else None
        self.operation = self.magnitude = None
        if plan.operation.any():
            self.operation = upload(plan.operation, device)
            self.magnitude = upload(plan.magnitude, device)
        self._host_operation = plan.operation

    def count_operations(self, rows: slice) -> list[int]:
        """Return how many images of some rows each operation changes, without asking the device."""
        return count_operations(self._host_operation[rows])


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device, behind whatever a GPU has queued and without waiting for it.

    That takes pinned memory: torch reuses a buffer of its own only after the copy out of it, while
    a copy of pageable memory would block.
    """
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def shared_tensor(array: np.ndarray) -> Tensor:
    """Return a CPU tensor that shares the memory of `array` and must not be written to.

    Image sets are read-only and often mapped from a file. Torch has no read-only tensors and warns.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def to_raw_scale(values: tuple[float, float, float]) -> Tensor:
    """Convert per-channel statistics from the 0..1 scale to float32 on the 0..255 scale."""
    return torch.tensor([255.0 * value for value in values], dtype=torch.float64).float()


def _crop(images: Tensor, crop: Tensor, padding: int) -> Tensor:
    """Cut one window out of each zero-padded image, with a single `index_select` of rows.

    `runs` is a strided view of the padded batch: `runs[i]` are the 32 pixels that start at pixel i,
    and neighbouring runs overlap. A window is 32 such runs, and each is copied whole.
    """
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    height, width, channels = padded.shape[1:]
    run = IMAGE_SIZE * channels
    num_runs = max(0, len(images) * height * width - IMAGE_SIZE + 1)
    runs = padded.as_strided((num_runs, run), (channels, 1))
    image = torch.arange(len(images), device=images.device)
    row = torch.arange(IMAGE_SIZE, device=images.device)
    first = (image * height + crop[:, 0]) * width + crop[:, 1]
    starts = first[:, None] + row * width
    return runs.index_select(0, starts.flatten()).view(len(images), IMAGE_SIZE, *images.shape[2:])


def _flip(images: Tensor, flip: Tensor) -> Tensor:
    """Mirror the images where `flip` is true; `where` selects eight bytes at a time."""
    original, mirrored = (t.flatten(1).view(torch.int64) for t in (images, images.flip(2)))
    chosen = torch.where(flip[:, None], mirrored, original)
    return chosen.view(torch.uint8).view(images.shape)


def _cutout(images: Tensor, boxes: Tensor, colour: Tensor) -> Tensor:
    """Fill one box of each image with `colour`."""
    pixel = torch.arange(IMAGE_SIZE, device=images.device)
    inside_y = (pixel >= boxes[:, 0:1]) & (pixel < boxes[:, 2:3])
    inside_x = (pixel >= boxes[:, 1:2]) & (pixel < boxes[:, 3:4])
    inside = inside_y[:, :, None, None] & inside_x[:, None, :, None]
    return torch.where(inside, colour, images)


def select_images(images: Tensor, plan: TensorPlan, rows: slice) -> Tensor:
    """Select the images of some rows of a plan, each changed by its random operation.

    Args:
        images: (N, 32, 32, 3) uint8, the whole set.
        plan: on the device of `images`.
        rows: the rows of the plan to serve.

    Returns:
        (B, 32, 32, 3) uint8.
    """
    # Not `images[index]`, which copies single bytes; `index_select` copies whole images.
    out = images.index_select(0, plan.index[rows])
    if plan.operation is None or plan.magnitude is None:
        return out
    counts = plan.count_operations(rows)
    return trivial_augment(out, plan.operation[rows], plan.magnitude[rows], counts)


def augment(images: Tensor, plan: TensorPlan, rows: slice, colour: Tensor) -> Tensor:
    """Select and change the images of some rows of a plan, then crop, flip and cut out.

    Args:
        images: (N, 32, 32, 3) uint8, the whole set.
        plan: on the device of `images`.
        rows: the rows of the plan to serve.
        colour: (3,) uint8, fills the cutout boxes.

    Returns:
        (B, 32, 32, 3) uint8.
    """
    out = select_images(images, plan, rows)
    if plan.crop is not None:
        out = _crop(out, plan.crop[rows], plan.padding)
    if plan.flip is not None:
        out = _flip(out, plan.flip[rows])
    if plan.cutout is not None:
        out = _cutout(out, plan.cutout[rows], colour)
    return out


def shrink(images: Tensor, size: int) -> Tensor:
    """Resample a batch to (B, C, size, size), by triangles as wide as two pixels of the result.

    Args:
        images: (B, C, H, W) float, any memory format, which is kept.
        size: at most H and W.
    """
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Compute `(images - mean) / std` in float32; return an NCHW tensor, channels-last in memory.

    Args:
        images: (B, 32, 32, 3) uint8.
        mean, std: (3,) float32 on the 0..255 scale.

    Returns:
        (B, 3, 32, 32) float32 with channels-last strides.
    """
    # As rows of 96 values: torch vectorises over the last dimension, and the three channels alone
    # would leave most of a vector empty.
    rows = images.flatten(2).float()
    rows.sub_(mean.repeat(IMAGE_SIZE)).mul_((1.0 / std).repeat(IMAGE_SIZE))
    return rows.view(images.shape).permute(0, 3, 1, 2)
