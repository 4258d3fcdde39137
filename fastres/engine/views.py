"""Test-time augmentation: the class probabilities of several views of an image, averaged.

The views are the image, its mirror image, and both shifted by a pixel in two directions.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.engine.runtime import Runtime

__all__ = ["FURTHER_VIEWS", "VIEW_WEIGHTS", "further_views", "log_probs_of", "mean_probability"]

# The image, its mirror image, and two shifts of each.
VIEW_WEIGHTS = (0.25, 0.25, 0.125, 0.125, 0.125, 0.125)
FURTHER_VIEWS = len(VIEW_WEIGHTS) - 1


def further_views(images: Tensor) -> Tensor:
    """Return all views of (B, C, H, W) images but the first, (5 B, C, H, W), view by view.

    Pixels beyond the border are those within, mirrored.
    """
    shifted = F.pad(images, (1, 1, 1, 1), mode="reflect")
    corners = (shifted[:, :, :-2, :-2], shifted[:, :, 2:, 2:])
    return torch.cat([images.flip(3), *(view for x in corners for view in (x, x.flip(3)))])


def mean_probability(log_probs: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the logarithm of the weighted mean of probabilities, all in logarithms."""
    scaled = [x + math.log(weight) for x, weight in zip(log_probs, weights, strict=True)]
    return torch.stack(scaled).logsumexp(dim=0)


def log_probs_of(model: nn.Module, images: Tensor, runtime: Runtime) -> Tensor:
    """Return (B, classes) float32 log-probabilities."""
    with runtime.autocast():
        logits = model(images.contiguous(memory_format=runtime.memory_format))
    return logits.float().log_softmax(dim=1)
