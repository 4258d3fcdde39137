"""How good a network is on labelled images: accuracy and its interval, classes, calibration.

All of it is counted from the log-probabilities of a whole set.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "CalibrationBin",
    "ClassScore",
    "Evaluation",
    "Mistake",
    "score_predictions",
    "wilson_interval",
]

# Of the normal distribution, two-sided.
_Z_95 = 1.959963984540054
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class ClassScore:
    """One class: shares in percent, None where there is nothing that they are a share of.

    Attributes:
        name: of the class.
        images: that belong to it.
        predicted: that were said to.
        recall: of its images, how many were recognised: the accuracy on this class.
        precision: of those said to belong to it, how many do.
        f1: the harmonic mean of both.
    """

    name: str
    images: int
    predicted: int
    recall: float | None
    precision: float | None
    f1: float | None


@dataclass(frozen=True)
class CalibrationBin:
    """The predictions of one range of confidence: how many, how sure, how often right (0..1)."""

    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Mistake:
    """A wrong prediction: the image's index in the set, its label, what was said, how surely."""

    index: int
    label: int
    predicted: int
    confidence: float


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What is known of a network on a set of images.

    Attributes:
        accuracy: in percent.
        interval: 95 % interval of the accuracy on images like these, in percent (Wilson 1927).
        loss: mean cross-entropy, in nats.
        top5: share in percent whose label is among the five most likely; None below six classes.
        calibration_error: expected calibration error in percent: the mean distance between how
            sure and how often right, over 15 ranges of confidence (Guo et al. 2017,
            https://arxiv.org/abs/1706.04599).
        images: counted.
        classes: one a class, in the order of the labels.
        confusion: (C, C) int64, rows the labels, columns what was said.
        bins: of the calibration, from least to most sure; empty ones are left out.
        mistakes: the wrong predictions, the surest first.
    """

    accuracy: float
    interval: tuple[float, float]
    loss: float
    top5: float | None
    calibration_error: float
    images: int
    classes: tuple[ClassScore, ...]
    confusion: Tensor
    bins: tuple[CalibrationBin, ...]
    mistakes: tuple[Mistake, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values, the surest hundred mistakes alone."""
        return {
            "accuracy": self.accuracy,
            "accuracy_interval_95": list(self.interval),
            "loss": self.loss,
            "top5_accuracy": self.top5,
            "calibration_error": self.calibration_error,
            "images": self.images,
            "classes": [vars(score) for score in self.classes],
            "confusion": self.confusion.tolist(),
            "calibration": [vars(part) for part in self.bins],
            "mistakes": [vars(mistake) for mistake in self.mistakes[:100]],
        }


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval, in percent, of a share of which `right` of `total` were seen.

    Wilson 1927, doi 10.1080/01621459.1927.10502953: unlike mean +- 1.96 standard errors it stays
    within 0 and 100 and holds its promise near them.

    Raises:
        ValueError: for no observation.
    """
    if total < 1:
        raise ValueError("an interval needs at least one observation")
    share, z2 = right / total, _Z_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    spread = share * (1 - share) / total + z2 / (4 * total**2)
    half = _Z_95 * math.sqrt(spread) / (1 + z2 / total)
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def score_predictions(log_probs: Tensor, labels: Tensor, classes: Sequence[str]) -> Evaluation:
    """Count what the predictions of a set are worth.

    Args:
        log_probs: (N, C) float32 log-probabilities, N >= 1, on the CPU.
        labels: (N,) int64.
        classes: C names.
    """
    count = len(classes)
    confidence, predicted = log_probs.double().exp().max(dim=1)
    # Rounding may carry the sum of a softmax past one.
    confidence = confidence.clamp(max=1.0)
    right = predicted == labels
    confusion = torch.bincount(labels * count + predicted, minlength=count * count)
    bins = tuple(_bins(confidence, right))
    gap = sum(part.images * abs(part.confidence - part.accuracy) for part in bins)
    total, num_right = len(labels), int(right.sum())
    losses = -log_probs.double().gather(1, labels[:, None])
    top5 = None
    if count > 5:
        among = (log_probs.topk(5, dim=1).indices == labels[:, None]).any(dim=1)
        top5 = 100 * int(among.sum()) / total
    return Evaluation(
        accuracy=100 * num_right / total,
        interval=wilson_interval(num_right, total),
        loss=float(losses.mean()),
        top5=top5,
        calibration_error=100 * gap / total,
        images=total,
        classes=_class_scores(confusion.reshape(count, count), classes),
        confusion=confusion.reshape(count, count),
        bins=bins,
        mistakes=_mistakes(confidence, predicted, labels),
    )


def _share(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def _class_scores(confusion: Tensor, classes: Sequence[str]) -> tuple[ClassScore, ...]:
    found = zip(
        classes,
        confusion.sum(dim=1).tolist(),
        confusion.sum(dim=0).tolist(),
        confusion.diagonal().tolist(),
        strict=True,
    )
    return tuple(
        ClassScore(
            name,
            images,
            predicted,
            recall=_share(right, images),
            precision=_share(right, predicted),
            f1=_share(2 * right, images + predicted),
        )
        for name, images, predicted, right in found
    )


def _bins(confidence: Tensor, right: Tensor) -> list[CalibrationBin]:
    """Cut (0, 1] into equal ranges, each closed above."""
    numbers = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
    found = []
    for number in range(CALIBRATION_BINS):
        inside = numbers == number
        if images := int(inside.sum()):
            means = (float(values[inside].double().mean()) for values in (confidence, right))
            found.append(CalibrationBin(images, *means))
    return found


def _mistakes(confidence: Tensor, predicted: Tensor, labels: Tensor) -> tuple[Mistake, ...]:
    wrong = (predicted != labels).nonzero().flatten()
    order = confidence[wrong].argsort(descending=True, stable=True)
    rows = wrong[order]
    columns = (rows, labels[rows], predicted[rows], confidence[rows])
    return tuple(
        Mistake(*values) for values in zip(*(column.tolist() for column in columns), strict=True)
    )
