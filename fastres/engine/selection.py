"""The hardest images of a batch: those with the largest losses, found at a low resolution.

Easy images move a network little and cost as much as hard ones. A forward pass that tells them
apart takes a quarter of the arithmetic on images of half the side. In short runs it loses more than
it saves: docs/performance-log.md.

Source: Jiang et al. 2019, "Accelerating Deep Learning by Focusing on the Biggest Losers"
(https://arxiv.org/abs/1910.00762); the hardest half of a batch, chosen by a cheaper pass, is what
airbench96_faster trains on (Jordan 2024, https://github.com/KellerJordan/cifar10-airbench).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.data.augmentation import shrink

__all__ = ["SELECTION_SIZE", "count_hardest", "hardest_images"]

# Side in pixels of the images that are told apart.
SELECTION_SIZE = 16


def count_hardest(batch_size: int, share: float) -> int:
    """Return how many images of a batch are trained on, at least one."""
    return max(1, math.ceil(share * batch_size))


@torch.no_grad()
def hardest_images(
    model: nn.Module, images: Tensor, labels: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """Return the images with the largest cross-entropies and their labels, hardest first.

    The network is in evaluation mode meanwhile and its statistics stay as they are. Nothing waits
    for the device.

    Args:
        model: maps images (N, 3, h, w) of any size to logits (N, classes).
        images: (B, 3, 32, 32) float.
        labels: (B,) int64.
        share: of the batch that is wanted.

    Returns:
        (K, 3, 32, 32) and (K,), K = `count_hardest(B, share)`.
    """
    was_training = model.training
    model.eval()
    logits = model(shrink(images, SELECTION_SIZE)).float()
    model.train(was_training)
    losses = F.cross_entropy(logits, labels, reduction="none")
    chosen = losses.topk(count_hardest(len(labels), share)).indices
    return images.index_select(0, chosen), labels.index_select(0, chosen)
