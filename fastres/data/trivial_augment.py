"""TrivialAugment on batches of raw images: one random operation of a random magnitude each.

The operations, their magnitudes and their order are those of torchvision's TrivialAugmentWide on
tensors, with nearest-neighbour sampling and black outside. The images of a batch are sorted by
operation, and each operation changes all of its images at once, every one by its own magnitude.

Numerics: integers throughout, since factors are multiples of 0.033 and sampling goes by a table. So
every device and every loader makes the same pixels. torchvision rounds a float32 down and is one
level off in rare pixels whose exact value is an integer.
Source: Mueller and Hutter 2021, https://arxiv.org/abs/2103.10158.
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastres.data.plan import IMAGE_SIZE, MAX_MAGNITUDE, Operation

__all__ = ["count_operations", "trivial_augment"]

_NUM_MAGNITUDES = 2 * MAX_MAGNITUDE + 1
_NUM_PIXELS = IMAGE_SIZE * IMAGE_SIZE


def count_operations(operation: np.ndarray) -> list[int]:
    """Return how many images of a batch, (B,) int64 on the host, each operation changes."""
    return np.bincount(operation, minlength=len(Operation)).tolist()


def trivial_augment(
    images: Tensor, operation: Tensor, magnitude: Tensor, counts: Sequence[int]
) -> Tensor:
    """Change every image by its operation, without waiting for the device.

    Args:
        images: (B, 32, 32, 3) uint8.
        operation: (B,) int64, an `Operation` each.
        magnitude: (B,) int64, -30 to 30.
        counts: what `count_operations` says of `operation`.

    Returns:
        (B, 32, 32, 3) uint8.
    """
    order = operation.argsort(stable=True)
    # What moves pixels is one table and so one group.
    first, last = Operation.SHEAR_X, Operation.ROTATE
    sizes = [counts[0], sum(counts[first : last + 1]), *counts[last + 1 :]]
    groups = zip(
        (_keep, _move, *_COLOUR_OPERATIONS),
        *(t.index_select(0, order).split(sizes) for t in (images, operation, magnitude)),
        strict=True,
    )
    changed = [change(*group) for change, *group in groups if len(group[0])]
    return torch.empty_like(images).index_copy_(0, order, torch.cat(changed))


def _keep(images: Tensor, _operation: Tensor, _magnitude: Tensor) -> Tensor:
    return images


def _move(images: Tensor, operation: Tensor, magnitude: Tensor) -> Tensor:
    """Shear, translate or rotate."""
    row = (operation - Operation.SHEAR_X) * _NUM_MAGNITUDES + magnitude + MAX_MAGNITUDE
    source = _source_pixels(images.device).index_select(0, row).long()
    black = images.new_zeros(len(images), 1, 3)
    pixels = torch.cat([images.flatten(1, 2), black], dim=1)
    first = torch.arange(len(images), device=images.device) * (_NUM_PIXELS + 1)
    moved = pixels.flatten(0, 1).index_select(0, (first[:, None] + source).flatten())
    return moved.view(images.shape)


@functools.cache
def _source_pixels(device: torch.device) -> Tensor:
    """Return which pixel each pixel is taken from, a row for each operation and magnitude.

    (5 * 61, 1024) int16; 1024 is no pixel. The coordinates are those of the centres of pixels,
    around the centre of the image.
    """
    pixel = np.arange(IMAGE_SIZE) - (IMAGE_SIZE - 1) / 2
    y, x = np.meshgrid(pixel, pixel, indexing="ij")
    corner = IMAGE_SIZE / 2
    rows = []
    for operation in range(Operation.SHEAR_X, Operation.ROTATE + 1):
        for magnitude in range(-MAX_MAGNITUDE, MAX_MAGNITUDE + 1):
            from_y, from_x = y, x
            shear, shift = 0.033 * magnitude, math.trunc(32 * magnitude / MAX_MAGNITUDE)
            if operation == Operation.SHEAR_X:
                from_x = x + shear * (y + corner)
            elif operation == Operation.SHEAR_Y:
                from_y = y + shear * (x + corner)
            elif operation == Operation.TRANSLATE_X:
                from_x = x - shift
            elif operation == Operation.TRANSLATE_Y:
                from_y = y - shift
            else:
                angle = math.radians(4.5 * magnitude)
                from_x = math.cos(angle) * x - math.sin(angle) * y
                from_y = math.sin(angle) * x + math.cos(angle) * y
            row, column = (np.rint(c - pixel[0]).astype(np.int64) for c in (from_y, from_x))
            inside = (row >= 0) & (row < IMAGE_SIZE) & (column >= 0) & (column < IMAGE_SIZE)
            rows.append(np.where(inside, row * IMAGE_SIZE + column, _NUM_PIXELS).flatten())
    return torch.from_numpy(np.stack(rows).astype(np.int16)).to(device)


def _each(values: Tensor) -> Tensor:
    """Shape one number an image to go with (B, 32, 32, 3), in int32."""
    return values.to(torch.int32)[:, None, None, None]


def _blend(images: Tensor, other: Tensor | int, magnitude: Tensor, scale: int = 1) -> Tensor:
    """Return `other + factor * (images - other)` for a factor of 1 + 0.033 * magnitude.

    Args:
        images: (B, 32, 32, 3) int32, the pixels times `scale`.
        other: goes with `images`, on the same scale.
        magnitude: (B,) int64.
        scale: up to 1024, which int32 has room for.
    """
    thousandths = (images - other) * _each(1000 + 33 * magnitude) + 1000 * other
    return thousandths.div_(1000 * scale, rounding_mode="floor").clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """Luma of ITU-R BT.601, rounded down: (B, 32, 32, 1) int32."""
    red, green, blue = images.to(torch.int32).split(1, dim=3)
    return (2989 * red + 5870 * green + 1140 * blue).div_(10_000, rounding_mode="floor")


def _brightness(images: Tensor, _operation: Tensor, magnitude: Tensor) -> Tensor:
    return _blend(images.to(torch.int32), 0, magnitude)


def _color(images: Tensor, _operation: Tensor, magnitude: Tensor) -> Tensor:
    return _blend(images.to(torch.int32), _grey(images), magnitude)


def _contrast(images: Tensor, _operation: Tensor, magnitude: Tensor) -> Tensor:
    total = _grey(images).sum(dim=(1, 2, 3), keepdim=True, dtype=torch.int32)
    return _blend(images.to(torch.int32) * _NUM_PIXELS, total, magnitude, _NUM_PIXELS)


def _sharpness(images: Tensor, _operation: Tensor, magnitude: Tensor) -> Tensor:
    """Blend with the mean of the pixels around, the middle one counted five times."""
    wide = images.to(torch.int32)
    rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    around = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    smooth = wide.clone()
    inner = wide[:, 1:-1, 1:-1]
    # Rounded to nearest: a thirteenth is never a half.
    smooth[:, 1:-1, 1:-1] = (around + 4 * inner + 6).div_(13, rounding_mode="floor")
    return _blend(wide, smooth, magnitude)


def _posterize(images: Tensor, _operation: Tensor, magnitude: Tensor) -> Tensor:
    """Clear up to six low bits, a fifth of the magnitude rounded to nearest."""
    cleared = (magnitude + 2).div(5, rounding_mode="floor")
    step = 1 << _each(cleared)
    return (images & (256 - step)).to(torch.uint8)


def _solarize(images: Tensor, _operation: Tensor, magnitude: Tensor) -> Tensor:
    """Invert what is at least 255 * (1 - magnitude / 30)."""
    threshold = 255 * (MAX_MAGNITUDE - _each(magnitude))
    return torch.where(MAX_MAGNITUDE * images.to(torch.int32) >= threshold, 255 - images, images)


def _autocontrast(images: Tensor, _operation: Tensor, _magnitude: Tensor) -> Tensor:
    """Stretch each channel to 0 .. 255; one of a single value stays."""
    low, high = (
        extreme(images, dim=(1, 2), keepdim=True).to(torch.int32)
        for extreme in (torch.amin, torch.amax)
    )
    stretched = (255 * (images - low)).div_((high - low).clamp_(min=1), rounding_mode="floor")
    return torch.where(high > low, stretched, images).to(torch.uint8)


def _equalize(images: Tensor, _operation: Tensor, _magnitude: Tensor) -> Tensor:
    """Give every value of a channel about as many pixels, as Pillow does it."""
    pixels = images.permute(0, 3, 1, 2).flatten(2).long()  # (B, 3, 1024)
    histogram = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(2, pixels, torch.ones_like(pixels))
    below_or_equal = histogram.cumsum(2)
    # Pixels of the largest value do not count.
    largest = histogram.gather(2, pixels.amax(2, keepdim=True))
    step = (_NUM_PIXELS - largest).div_(255, rounding_mode="floor")
    below = below_or_equal - histogram
    table = (below + step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(max=255)
    equalized = torch.where(step > 0, table.gather(2, pixels), pixels).to(torch.uint8)
    return equalized.view(len(images), 3, IMAGE_SIZE, IMAGE_SIZE).permute(0, 2, 3, 1)


# In the order of `Operation`.
_COLOUR_OPERATIONS: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (
    _brightness,
    _color,
    _contrast,
    _sharpness,
    _posterize,
    _solarize,
    _autocontrast,
    _equalize,
)
