"""`ImageSet`, images with labels, and `Dataset`, a training set and a test set.

Images are read-only NumPy arrays, so each loader can map, pin or upload them in its own way. This
module does not import torch.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastres import strict_json
from fastres.errors import FailureError

__all__ = [
    "CIFAR10_CLASSES",
    "IMAGE_SHAPE",
    "Dataset",
    "ImageSet",
    "channel_statistics",
    "class_difference",
    "content_fingerprint",
    "plural",
]

IMAGE_SHAPE = (32, 32, 3)
CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

# A channel that never varies has a standard deviation of 0. Dividing by one grey level instead maps
# that channel to exactly 0.
_SMALLEST_STD = 1 / 255
_CHUNK_IMAGES = 2048


def plural(count: int, noun: str) -> str:
    """Count and noun in the right number: `1 image`, `60,000 images`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and their labels, in one fixed order; both arrays are made read-only.

    Args:
        images: (N, 32, 32, 3) uint8, RGB, C-contiguous (NHWC).
        labels: (N,) int64, class indices.

    Raises:
        ValueError: when a shape, dtype, layout or length is not the one above.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != IMAGE_SHAPE:
            raise ValueError(
                f"images must be uint8 (N, 32, 32, 3), not {images.dtype} {images.shape}"
            )
        if not images.flags.c_contiguous:
            raise ValueError("images must be C-contiguous (NHWC)")
        if labels.dtype != np.int64 or labels.shape != (len(images),):
            raise ValueError(
                f"labels must be int64 ({len(images)},), not {labels.dtype} {labels.shape}"
            )
        object.__setattr__(self, "images", _read_only(images))
        object.__setattr__(self, "labels", _read_only(labels))

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training set, a test set, and what records say about them.

    Args:
        name: the dataset's name in results, e.g. `cifar10` or `cifar10-jpeg`.
        classes: the class names; label k means `classes[k]`.
        train: the training images.
        test: the test images; they are never used to choose a checkpoint.
        mean: per channel, in units of 0..1, over the training images, rounded to 4 decimals.
        std: likewise, the population standard deviation.
        fingerprint: SHA-256 over classes, labels and pixels; equal means the same data.
        source: where the data came from, for people.
        notices: one-line messages for the user: what was resized, converted or not verified.
    """

    name: str
    classes: tuple[str, ...]
    train: ImageSet
    test: ImageSet
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fingerprint: str
    source: str
    notices: tuple[str, ...] = ()

    @classmethod
    def from_sets(
        cls,
        name: str,
        classes: tuple[str, ...],
        train: ImageSet,
        test: ImageSet,
        *,
        source: str,
        notices: tuple[str, ...] = (),
    ) -> "Dataset":
        """Make a dataset of two sets: check the labels, compute statistics and fingerprint.

        Raises:
            FailureError: when a set is empty or a label names no class.
        """
        for split, images in (("training", train), ("test", test)):
            if not len(images):
                raise FailureError(f"the {split} set of {source} holds no image")
            low, high = int(images.labels.min()), int(images.labels.max())
            if low < 0 or high >= len(classes):
                raise FailureError(
                    f"the {split} set of {source} holds label {low if low < 0 else high}, "
                    f"outside 0..{len(classes) - 1}"
                )
        mean, std = channel_statistics(train.images)
        fingerprint = content_fingerprint(classes, train, test)
        return cls(name, classes, train, test, mean, std, fingerprint, source, notices)


def class_difference(trained: Sequence[str], found: Sequence[str]) -> str | None:
    """Say how classes `found` differ from those that a network was trained on, None if not at all.

    Label k means the k-th name on either side, so another order is a difference too.
    """
    if len(trained) != len(found):
        return f"it was trained on {len(trained):,} classes, and there are {len(found):,} here"
    pairs = enumerate(zip(trained, found, strict=True))
    label = next((label for label, (was, now) in pairs if was != now), None)
    if label is None:
        return None
    what = "the same classes in another order" if set(trained) == set(found) else "other classes"
    return f"{what}: label {label} was {trained[label]!r} in training, and is {found[label]!r} here"


def channel_statistics(
    images: np.ndarray,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """`mean_c = sum(x_c) / 255n` and `std_c = sqrt(n * sum(x_c^2) - sum(x_c)^2) / 255n`.

    The sums come from a histogram of the 256 values and are exact integers, so the result depends
    neither on the order of the images nor on the machine.

    Args:
        images: (N, 32, 32, 3) uint8, N >= 1.

    Returns:
        mean and std of each channel in units of 0..1, rounded to 4 decimals. A channel that never
        varies gets the std of one grey level, 0.0039, so that dividing by it stays finite.
    """
    counts = np.zeros((3, 256), dtype=np.int64)
    for start in range(0, len(images), _CHUNK_IMAGES):
        chunk = images[start : start + _CHUNK_IMAGES]
        for channel in range(3):
            counts[channel] += np.bincount(chunk[..., channel].ravel(), minlength=256)
    pixels = images.shape[0] * images.shape[1] * images.shape[2]
    values = np.arange(256, dtype=np.int64)
    mean, std = [], []
    for histogram in counts:
        total, squares = int(histogram @ values), int(histogram @ values**2)
        mean.append(round(total / (255 * pixels), 4))
        spread = math.sqrt(pixels * squares - total**2) / (255 * pixels)
        std.append(round(max(spread, _SMALLEST_STD), 4))
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def content_fingerprint(classes: tuple[str, ...], train: ImageSet, test: ImageSet) -> str:
    """SHA-256 over class names, lengths, labels and pixels, as 64 hex digits.

    The lengths are hashed first, so two different datasets never give the hash the same bytes.
    Labels are hashed as little-endian int64, so every machine computes the same value.
    """
    head = strict_json.dumps([list(classes), len(train), len(test)])
    digest = hashlib.sha256(head.encode())
    for images in (train, test):
        digest.update(np.ascontiguousarray(images.labels, dtype="<i8").data)
        digest.update(images.images.data)
    return digest.hexdigest()


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view(np.ndarray)
    view.flags.writeable = False
    return view
