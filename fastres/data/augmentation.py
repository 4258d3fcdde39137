"""From raw pixels and a plan to the float images a network sees, in plain torch on any device."""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.data.plan import IMAGE_SIZE, Plan

__all__ = ["TensorPlan", "augment", "normalize", "shared_tensor", "to_raw_scale"]


class TensorPlan:
    """A Plan as tensors on one device, uploaded once and sliced there.

    Args:
        plan: the rows to upload.
        device: where the images are.
    """

    def __init__(self, plan: Plan, device: torch.device):
        self.padding = plan.padding
        self.has_flip = bool(plan.flip.any())
        self.has_cutout = bool((plan.cutout[:, 2] > plan.cutout[:, 0]).any())
        self.index, self.crop, self.flip, self.cutout = (
            torch.from_numpy(part).to(device, non_blocking=True)
            for part in (plan.index, plan.crop, plan.flip, plan.cutout)
        )


def shared_tensor(array: np.ndarray) -> Tensor:
    """Return a CPU tensor on the memory of `array`, which nobody may write to.

    Image sets are read-only, often mapped from a file; torch has no read-only tensors and warns.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def to_raw_scale(values: tuple[float, float, float]) -> Tensor:
    """Turn per-channel statistics of the 0..1 scale into float32 of the 0..255 scale."""
    return torch.tensor([255.0 * value for value in values], dtype=torch.float64).float()


def _crop(images: Tensor, crop: Tensor, padding: int) -> Tensor:
    """Cut one window out of each zero-padded image, in a single gather of rows.

    `runs[i]` is the row of a window that starts at pixel i of the padded batch: a view in which
    neighbouring runs overlap, so that a window is an index and every row is copied whole.
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
    """Mirror the images where `flip` says so, choosing eight bytes at a time."""
    as_they_are, mirrored = (t.flatten(1).view(torch.int64) for t in (images, images.flip(2)))
    chosen = torch.where(flip[:, None], mirrored, as_they_are)
    return chosen.view(torch.uint8).view(images.shape)


def _paint(images: Tensor, boxes: Tensor, colour: Tensor) -> Tensor:
    pixel = torch.arange(IMAGE_SIZE, device=images.device)
    inside_y = (pixel >= boxes[:, 0:1]) & (pixel < boxes[:, 2:3])
    inside_x = (pixel >= boxes[:, 1:2]) & (pixel < boxes[:, 3:4])
    inside = inside_y[:, :, None, None] & inside_x[:, None, :, None]
    return torch.where(inside, colour, images)


def augment(images: Tensor, plan: TensorPlan, rows: slice, colour: Tensor) -> Tensor:
    """Gather, crop, flip and cut out the images that rows of a plan name.

    Args:
        images: (N, 32, 32, 3) uint8, the whole set.
        plan: on the device of `images`.
        rows: the rows of the plan to serve.
        colour: (3,) uint8, what cutout paints.

    Returns:
        (B, 32, 32, 3) uint8.
    """
    # Not `images[...]`, which copies byte by byte what this copies image by image.
    out = images.index_select(0, plan.index[rows])
    if plan.padding:
        out = _crop(out, plan.crop[rows], plan.padding)
    if plan.has_flip:
        out = _flip(out, plan.flip[rows])
    if plan.has_cutout:
        out = _paint(out, plan.cutout[rows], colour)
    return out


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Compute (images - mean) / std in float32 and return it as a channels-last NCHW tensor.

    Args:
        images: (B, 32, 32, 3) uint8.
        mean, std: (3,) float32 on the 0..255 scale.

    Returns:
        (B, 3, 32, 32) float32 with channels-last strides.
    """
    # By rows of pixels: torch vectorises an operation over its last dimension, and three channels
    # would leave most of every vector empty.
    rows = images.flatten(2).float()
    rows.sub_(mean.repeat(IMAGE_SIZE)).mul_((1.0 / std).repeat(IMAGE_SIZE))
    return rows.view(images.shape).permute(0, 3, 1, 2)
