"""A first convolution that decorrelates its input from the start."""

import numpy as np
import torch
from torch import nn

__all__ = ["whiten_stem"]

_IMAGES = 2000
_EPSILON = 1e-2


@torch.no_grad()
def whiten_stem(
    model: nn.Module,
    images: np.ndarray,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> None:
    """Set the filters of `model.conv1` to the leading principal components of image patches.

    Each component is divided by the square root of its variance, so that the outputs start
    uncorrelated and of about unit variance; the second half of the filters are negated copies of
    the first, since the ReLU behind them keeps one sign alone. Filters beyond twice the
    components, 27 of a 3x3 RGB patch, keep their random start. All train on, unless --freeze-stem
    is given.

    Source: Page 2019, "How to train your ResNet 8: bag of tricks"
    (https://myrtle.ai/learn/how-to-train-your-resnet-8-bag-of-tricks/); negated copies as in
    hlb-CIFAR10 (https://github.com/tysam-code/hlb-CIFAR10).

    Args:
        model: a network whose first convolution is `conv1`; changed in place, on its device.
        images: (N, 32, 32, 3) uint8 training images; about 2,000 of them, evenly spread, are used,
            fewer for larger filters.
        mean, std: per channel, on the 0..1 scale.
    """
    weight = model.get_parameter("conv1.weight")
    size = weight.shape[2]
    # Sets are often sorted by class, so the sample is spread over the whole set.
    # Of larger patches there are more numbers in an image, and fewer images do.
    sample = images[:: max(1, len(images) * size * size // (9 * _IMAGES))]
    # In float64, so that the start is the same on every machine.
    pixels = torch.tensor(sample, device=weight.device).double().div_(255)
    pixels = (pixels - pixels.new_tensor(mean)) / pixels.new_tensor(std)
    patches = pixels.unfold(1, size, 1).unfold(2, size, 1).reshape(-1, 3 * size * size)
    variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (components / (variances + _EPSILON).sqrt()).T.flip(0)
    # An eigenvector's sign is arbitrary.
    filters = filters * filters.gather(1, filters.abs().argmax(dim=1, keepdim=True)).sign()
    half = min(len(filters), (len(weight) + 1) // 2)
    chosen = torch.cat([filters[:half], -filters[:half]])[: len(weight)]
    weight[: len(chosen)] = chosen.view(-1, 3, size, size).to(weight.dtype)
