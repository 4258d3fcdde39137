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
    """Cut one window out of each zero-padded image, in a single gather.

    `windows[n, y, x]` is the crop of image n at (y, x): a view in which all crops of an image
    overlap, so that choosing one is an index and not a loop.
    """
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    n, y, x, c = padded.stride()
    positions = 2 * padding + 1
    size = (len(images), positions, positions, IMAGE_SIZE, IMAGE_SIZE, images.shape[3])
    windows = padded.as_strided(size, (n, y, x, y, x, c))
    return windows[torch.arange(len(images), device=images.device), crop[:, 0], crop[:, 1]]


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
    out = images[plan.index[rows]]
    if plan.padding:
        out = _crop(out, plan.crop[rows], plan.padding)
    if plan.has_flip:
        out = torch.where(plan.flip[rows, None, None, None], out.flip(2), out)
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
    return images.float().sub_(mean).mul_(1.0 / std).permute(0, 3, 1, 2)
