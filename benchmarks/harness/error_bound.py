"""No number for a wrong result: what a provider computes is compared before it is timed.

The rule is that of the kernel tests, kernels/reference/error_bound.py: a route may be off from the
truth by RATIO times what plain eager torch is off in the same dtype, and a floor. Here the RMS norm
alone counts. A benchmark uses millions of numbers, and in their maximum a single ReLU that two
correct networks decide differently would stand out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.kernels.reference.error_bound import FLOOR_RMS, RATIO

__all__ = [
    "FP32_BOUND",
    "LOGITS_BOUND",
    "LOSS_BOUND",
    "Distance",
    "check",
    "distance",
]

# Two float32 layouts move a network's first update by 0.6 % (20 layers) to 3 % (50 and 110 layers)
# of its RMS, measured: ReLUs near 0 tip over. A step that computes something else moves it by
# more than its own size. bfloat16 is off by 26 % and more, so 16 bits are compared by `check`.
FP32_BOUND = 0.1
# Of the first loss, relative; bfloat16 was measured to be off by up to 0.4 %.
LOSS_BOUND = 1e-2
# Of the logits, relative to their RMS; bfloat16 was measured to be off by up to 0.9 %.
LOGITS_BOUND = 0.03


class Distance(NamedTuple):
    """How far a result is from the truth, and how far it may be, relative to the truth's RMS."""

    error: float
    allowed: float


def distance(actual: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """RMS error over all tensors, each divided by the RMS of the truth."""
    total, count = 0.0, 0
    for a, t in zip(actual, truth, strict=True):
        scale = t.double().square().mean().sqrt().item() or 1.0
        total += ((a.double() - t.double()) / scale).square().sum().item()
        count += t.numel()
    return (total / count) ** 0.5


def check(
    name: str,
    actual: Sequence[Tensor],
    eager: Sequence[Tensor],
    truth: Sequence[Tensor],
    dtype: torch.dtype,
) -> Distance:
    """Raise AssertionError unless `actual` is as near to the truth as `eager` in `dtype` is."""
    error = distance(actual, truth)
    allowed = RATIO * distance(eager, truth) + FLOOR_RMS[dtype]
    # Written so that a NaN fails.
    if not error <= allowed:
        raise AssertionError(f"{name} is off by {error:.2e} of the scale, allowed {allowed:.2e}")
    return Distance(error, allowed)
