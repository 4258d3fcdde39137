"""Mixup and CutMix: the images of a batch mixed in pairs, inside the training step.

    image_i <- w * image_i + (1 - w) * image_j        w of each pixel
    loss    <- lam * loss(i's labels) + (1 - lam) * loss(j's labels)

i and j are neighbours, 2k and 2k + 1, and each is mixed with the other; of an odd batch the last
image stays. Batches are shuffled, so these pairs are random, and as long as every process has an
even share of a batch, several processes mix what one would. Mixup (Zhang et al. 2018,
https://arxiv.org/abs/1710.09412) has w = lam everywhere. CutMix (Yun et al. 2019,
https://arxiv.org/abs/1905.04899) has w = 0 in a box and 1 around it, and lam is the share of the
image around the box.

The choices of a step are a hash of (seed, step, purpose), so a resumed run makes the same ones.
They reach the device as one small tensor that the captured step reads, like the learning rate.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastres.config import Config
from fastres.data.augmentation import upload
from fastres.data.plan import IMAGE_SIZE, Purpose, below, hash_words

__all__ = ["BatchMixing", "Mix", "plan_mix"]


@dataclass(frozen=True)
class Mix:
    """How the batch of one step is mixed.

    Attributes:
        pixel_weight: (32, 32) float32, the share of the image itself in each pixel.
        label_weight: the share of its label.
    """

    pixel_weight: NDArray[np.float32]
    label_weight: float


def plan_mix(step: int, *, seed: int, mixup: float, cutmix: float) -> Mix:
    """Decide how the batch of a step is mixed.

    Args:
        step: 0-based number of the step in the whole run.
        seed: of the run.
        mixup, cutmix: alpha of the Beta(alpha, alpha) that the weight is drawn from, or 0 to leave
            the method out; with both given, one of the two is taken at random.
    """
    words = hash_words(seed, step, Purpose.MIX, np.arange(5))
    takes_cutmix = cutmix > 0 and (mixup == 0 or below(2, words)[4] == 1)
    weight = _symmetric_beta(cutmix if takes_cutmix else mixup, words[:2])
    if not takes_cutmix:
        return Mix(np.full((IMAGE_SIZE, IMAGE_SIZE), weight, np.float32), weight)
    half = int(IMAGE_SIZE * math.sqrt(1 - weight)) // 2
    rows, columns = (slice(max(0, c - half), c + half) for c in below(IMAGE_SIZE, words[2:4]))
    pixel_weight = np.ones((IMAGE_SIZE, IMAGE_SIZE), np.float32)
    pixel_weight[rows, columns] = 0
    return Mix(pixel_weight, float(pixel_weight.mean()))


def _symmetric_beta(alpha: float, words: NDArray[np.uint64]) -> float:
    """Map two random words to a number that is distributed as Beta(alpha, alpha).

    Exactly and without rejection, from Student's t with 2 alpha degrees of freedom (Bailey 1994,
    https://doi.org/10.2307/2153537): (1 + w / sqrt(1 + w^2)) / 2, w^2 = (u^(-1/alpha) - 1) cos^2.
    """
    radius, angle = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    # Past e**700 the result is 0 or 1, and a float has no room.
    square = math.expm1(min(-math.log(radius) / alpha, 700.0))
    w = math.sqrt(square) * math.cos(2 * math.pi * angle)
    return 0.5 * (1 + w / math.hypot(1, w))


def _neighbours(batch: Tensor) -> Tensor:
    """Swap rows 2k and 2k + 1; strides stay."""
    pairs = len(batch) // 2
    swapped = batch[: 2 * pairs].unflatten(0, (pairs, 2)).flip(1).flatten(0, 1)
    return swapped if len(batch) == 2 * pairs else torch.cat([swapped, batch[2 * pairs :]])


class BatchMixing:
    """Mixes batches on the device by weights that are set before each step.

    Args:
        config: seed, mixup, cutmix.
        device: of the batches.
    """

    def __init__(self, config: Config, device: torch.device):
        self.config = config
        # Of the pixels and last of the label: one copy for both.
        self._weights = torch.ones(IMAGE_SIZE**2 + 1, device=device)

    def set_step(self, step: int) -> None:
        """Set the weights of a step without waiting for the device."""
        config = self.config
        mix = plan_mix(step, seed=config.seed, mixup=config.mixup, cutmix=config.cutmix)
        weights = np.append(mix.pixel_weight, np.float32(mix.label_weight))
        self._weights.copy_(upload(weights, self._weights.device))

    def images(self, images: Tensor) -> Tensor:
        """Return (B, 3, 32, 32) images, mixed."""
        weight = self._weights[:-1].view(IMAGE_SIZE, IMAGE_SIZE)
        return torch.lerp(_neighbours(images), images, weight.to(images.dtype))

    def loss(
        self, loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor
    ) -> Tensor:
        """Return the mean loss () of (B, classes) logits against both labels of each image."""
        own, other = loss(logits, labels), loss(logits, _neighbours(labels))
        return torch.lerp(other, own, self._weights[-1].to(own.dtype))

    def main_labels(self, labels: Tensor) -> Tensor:
        """Return for each image that of its two labels which has the larger share."""
        return torch.where(self._weights[-1] >= 0.5, labels, _neighbours(labels))
