"""The plan of an epoch: order, operations, crops, flips and cutout boxes, before a loader runs.

The random numbers are counter-based: each is a hash of (seed, epoch, image index, purpose) and does
not depend on the numbers drawn before it. Loaders take the plan as data, so all of them serve the
same pixels, with any number of workers and wherever a run is resumed.

The hash is the finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom
number generators"), applied once for each part of the key.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastres.errors import UsageError

__all__ = [
    "IMAGE_SIZE",
    "MAX_MAGNITUDE",
    "NO_AUGMENTATION",
    "Augmentation",
    "Operation",
    "Plan",
    "Purpose",
    "below",
    "hash_words",
    "plan_epoch",
]

IMAGE_SIZE = 32
# TrivialAugment draws magnitudes 0 to 30, each equally likely.
MAX_MAGNITUDE = 30


class Purpose(IntEnum):
    """What a random number decides; no two decisions share one."""

    ORDER = 1
    CROP_Y = 2
    CROP_X = 3
    FLIP = 4
    CUTOUT_Y = 5
    CUTOUT_X = 6
    OPERATION = 7
    MAGNITUDE = 8
    SIGN = 9
    MIX = 10


class Operation(IntEnum):
    """The random operations of TrivialAugment, in torchvision's order."""

    IDENTITY = 0
    SHEAR_X = 1
    SHEAR_Y = 2
    TRANSLATE_X = 3
    TRANSLATE_Y = 4
    ROTATE = 5
    BRIGHTNESS = 6
    COLOR = 7
    CONTRAST = 8
    SHARPNESS = 9
    POSTERIZE = 10
    SOLARIZE = 11
    AUTOCONTRAST = 12
    EQUALIZE = 13


# From the first to the last of these, half of the magnitudes are negative; the others know none.
_SIGNED = (Operation.SHEAR_X, Operation.SHARPNESS)


@dataclass(frozen=True)
class Augmentation:
    """How training images are augmented; it happens on raw pixels, before normalisation.

    Attributes:
        crop_padding: black pixels added on each side before a random 32x32 crop; 0 for no crop.
        flip: "random" mirrors left to right with probability one half; "alternating" mirrors each
            image in every other epoch, starting with a random half of the images (Jordan 2024,
            https://arxiv.org/abs/2404.00498); "none" never mirrors.
        cutout: side in pixels of a square around a random centre that is filled with the mean
            colour of the training set and clipped at the border (DeVries and Taylor 2017,
            https://arxiv.org/abs/1708.04552); 0 for none.
        trivial_augment: change each image by one random operation of a random magnitude, before
            the crop, as torchvision's TrivialAugmentWide does (Mueller and Hutter 2021,
            https://arxiv.org/abs/2103.10158).
    """

    crop_padding: int = 4
    flip: Literal["none", "random", "alternating"] = "random"
    cutout: int = 0
    trivial_augment: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.crop_padding <= IMAGE_SIZE:
            raise UsageError(f"crop padding must be 0 to {IMAGE_SIZE}, got {self.crop_padding}")
        if self.flip not in ("none", "random", "alternating"):
            raise UsageError(f"flip must be none, random or alternating, got {self.flip!r}")
        if not 0 <= self.cutout <= IMAGE_SIZE:
            raise UsageError(f"cutout must be 0 to {IMAGE_SIZE} pixels, got {self.cutout}")


NO_AUGMENTATION = Augmentation(crop_padding=0, flip="none", cutout=0)


@dataclass(frozen=True)
class Plan:
    """The plan of an epoch or of a slice of it; row i is the image served as number i.

    Attributes:
        index: (B,) int64, index of the image in the set.
        crop: (B, 2) int64, top and left corner of the crop in the padded image, 0 to 2 * padding.
        flip: (B,) bool, mirror left to right after the crop.
        cutout: (B, 4) int64, top, left, bottom and right (exclusive) of the cutout box, clipped to
            the image and applied last; top equals bottom where there is none.
        padding: black pixels on each side of the padded image.
        operation: (B,) int64, the `Operation` that changes the image before all else.
        magnitude: (B,) int64, how much it does, -MAX_MAGNITUDE to MAX_MAGNITUDE.
    """

    index: NDArray[np.int64]
    crop: NDArray[np.int64]
    flip: NDArray[np.bool_]
    cutout: NDArray[np.int64]
    padding: int
    operation: NDArray[np.int64]
    magnitude: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: slice) -> "Plan":
        return Plan(
            self.index[rows],
            self.crop[rows],
            self.flip[rows],
            self.cutout[rows],
            self.padding,
            self.operation[rows],
            self.magnitude[rows],
        )


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijective hash of 64-bit words; every input bit affects every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_words(
    seed: int, epoch: int, purpose: Purpose, index: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """Return one random 64-bit word for each index, keyed by all arguments.

    Args:
        seed: of the run.
        epoch: 0-based; of what is decided once a training step, the number of the step.
        purpose: what the words decide.
        index: (N,) int64, of images.
    """
    key = np.zeros(1, np.uint64)
    for part in (seed, epoch, purpose):
        key = _mix(key ^ np.uint64(part))
    return _mix(key ^ _mix(index.astype(np.uint64)))


def below(bound: int, words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Map 64-bit words to 0 .. bound - 1, each equally likely to within bound / 2**32."""
    return ((words >> np.uint64(32)) * np.uint64(bound) >> np.uint64(32)).astype(np.int64)


def plan_epoch(
    num_images: int, *, seed: int, epoch: int, augmentation: Augmentation, shuffle: bool
) -> Plan:
    """Decide order, operations, crops, flips and cutouts of one epoch over `num_images` images.

    Args:
        num_images: size of the set; every image occurs exactly once.
        seed: 0 to 2**64 - 1.
        epoch: 0-based.
        augmentation: `NO_AUGMENTATION` for evaluation.
        shuffle: serve in a random order instead of that of the set.

    Raises:
        UsageError: for a negative number of images, seed or epoch.
    """
    if num_images < 0 or not 0 <= seed < 2**64 or epoch < 0:
        raise UsageError(
            f"num_images, seed and epoch must not be negative, got {num_images}, {seed}, {epoch}"
        )
    index = np.arange(num_images, dtype=np.int64)
    if shuffle:
        index = np.argsort(hash_words(seed, epoch, Purpose.ORDER, index), kind="stable")

    def draw(purpose: Purpose, bound: int) -> NDArray[np.int64]:
        return below(bound, hash_words(seed, epoch, purpose, index))

    positions = 2 * augmentation.crop_padding + 1
    crop = np.stack([draw(Purpose.CROP_Y, positions), draw(Purpose.CROP_X, positions)], axis=1)
    return Plan(
        index,
        crop,
        _plan_flips(seed, epoch, index, augmentation.flip),
        _plan_cutout(draw, len(index), augmentation.cutout),
        augmentation.crop_padding,
        *_plan_operations(draw, len(index), augmentation.trivial_augment),
    )


def _plan_flips(
    seed: int, epoch: int, index: NDArray[np.int64], kind: Literal["none", "random", "alternating"]
) -> NDArray[np.bool_]:
    if kind == "none":
        return np.zeros(len(index), np.bool_)
    if kind == "random":
        return below(2, hash_words(seed, epoch, Purpose.FLIP, index)) == 1
    first = below(2, hash_words(seed, 0, Purpose.FLIP, index))
    return (first + epoch) % 2 == 1


def _plan_cutout(draw, num_images: int, side: int) -> NDArray[np.int64]:
    if side == 0:
        return np.zeros((num_images, 4), np.int64)
    centre = np.stack(
        [draw(Purpose.CUTOUT_Y, IMAGE_SIZE), draw(Purpose.CUTOUT_X, IMAGE_SIZE)], axis=1
    )
    corner = centre - side // 2
    return np.concatenate([corner, corner + side], axis=1).clip(0, IMAGE_SIZE)


def _plan_operations(
    draw, num_images: int, enabled: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if not enabled:
        none = np.zeros(num_images, np.int64)
        return none, none
    operation = draw(Purpose.OPERATION, len(Operation))
    magnitude = draw(Purpose.MAGNITUDE, MAX_MAGNITUDE + 1)
    signed = (operation >= _SIGNED[0]) & (operation <= _SIGNED[1])
    return operation, np.where(signed & (draw(Purpose.SIGN, 2) == 1), -magnitude, magnitude)
