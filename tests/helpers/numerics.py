"""Every numerical tolerance of the kernel tests, and the checks that apply it.

RATIO, FLOOR, STATISTICS: fastres/kernels/reference/error_bound.py says what is bounded, and derives
    the numbers.

RELU_TIES: where z is within rounding of 0 two correct networks may disagree on the mask. Elements
    within 4 u of the scale of z are left out of gradient checks; were they more than 0.1 % of all,
    or 8 elements in tests too small for a percentage, the test would fail.
"""

import math
import statistics
from collections.abc import Sequence

import torch

from fastres.kernels.reference.error_bound import (
    FLOOR_MAX,
    FLOOR_RMS,
    RATIO,
    UNIT_ROUNDOFF,
    statistics_rtol,
)

RELU_TIES = 1e-3
RELU_TIE_ELEMENTS = 8


def rms(t: torch.Tensor) -> float:
    return t.double().square().mean().sqrt().item()


def largest(t: torch.Tensor) -> float:
    return t.double().abs().max().item()


def assert_like_eager(
    name: str,
    fused: torch.Tensor,
    eager: torch.Tensor,
    truth: torch.Tensor,
    dtype: torch.dtype | None = None,
    keep: torch.Tensor | None = None,
) -> None:
    """Fail unless `fused` is as near to the fp64 truth as `eager` is.

    dtype: whose floor counts, by default that of the fused result; an fp32 gradient of a bf16
        network inherits the network's roundings and is measured as bf16. keep: what to compare.
    """
    assert fused.shape == truth.shape == eager.shape, f"{name}: {fused.shape} {truth.shape}"
    fused, eager = fused.detach(), eager.detach()
    dtype = dtype or fused.dtype
    if keep is not None:
        fused, eager, truth = fused[keep], eager[keep], truth[keep]
    tf32 = torch.backends.cudnn.allow_tf32
    for norm, floor in ((rms, FLOOR_RMS[dtype]), (largest, FLOOR_MAX[dtype])):
        scale = norm(truth) or 1.0
        error = norm(fused.double() - truth) / scale
        allowed = RATIO * norm(eager.double() - truth) / scale + floor
        assert error <= allowed, (
            f"{name}: {norm.__name__} error {error:.3e} of the scale, allowed {allowed:.3e} "
            f"({fused.dtype}, floor of {dtype}, cudnn tf32 {tf32})"
        )


def assert_rounded_once(name: str, actual: torch.Tensor, truth: torch.Tensor) -> None:
    """Fail where a half-precision result is further from the truth than one rounding of it.

    The sums before it are in fp32, whose error, 2**-16 of the scale at most, is added.
    """
    allowed = UNIT_ROUNDOFF[actual.dtype] * truth.abs() + 2.0**-16 * truth.abs().max()
    worst = ((actual.double() - truth).abs() / allowed).max().item()
    assert worst <= 1, f"{name}: {worst:.2f} of one rounding to {actual.dtype}"


def assert_statistics(
    name: str, actual: torch.Tensor, truth: torch.Tensor, magnitude: torch.Tensor, rows: int = 128
) -> None:
    """Fail unless fp32 sums over tiles are right to `statistics_rtol` of the magnitudes added."""
    assert actual.dtype == torch.float32
    error = ((actual.double() - truth).abs() / magnitude.clamp_min(1e-30)).max().item()
    allowed = statistics_rtol(rows)
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def assert_keeps_small_spread(
    mean: torch.Tensor, var: torch.Tensor, rows: torch.Tensor, num_merges: int = 0
) -> None:
    """Fail unless fp32 statistics keep the spread of rows [pixels, channels] beside a large mean.

    The mean of a set is rounded twice, once more in each merge with another set. The biased
    variance is that about such a mean, e from the right one: it exceeds by e^2, and where sets are
    merged whose own means are d apart from theirs by 2 d e, d the standard deviation at most.
    """
    rows = rows.double()
    truth, exact = rows.mean(0), rows.var(0, unbiased=False)
    unit = UNIT_ROUNDOFF[torch.float32] * truth.abs()
    assert ((mean.double() - truth).abs() <= (2 + num_merges) * unit).all()
    e = (1 + num_merges) * unit
    apart = exact.sqrt() if num_merges else 0.0
    allowed = statistics_rtol() * exact + e.square() + 2 * apart * e
    assert ((var.double() - exact).abs() <= allowed).all()


def away_from_ties(z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where the fp64 pre-activation is too far from 0 for two correct ReLU masks to differ."""
    near = z.abs() <= 4 * UNIT_ROUNDOFF[dtype] * z.abs().max()
    assert near.sum() <= max(RELU_TIES * z.numel(), RELU_TIE_ELEMENTS), f"{near.sum()} ties"
    return ~near


class PooledErrorBound:
    """The error bound over several draws of a case: for tensors too small for a single one.

    The RMS of a handful of errors says little: two equal distributions of one error each differ by
    more than RATIO in 43 % of all draws. Drawing other numbers adds independent errors. The error
    of each draw is measured by what the bound allows in that draw, so that one badly conditioned
    draw does not outweigh the others, and the RMS over the draws must not exceed 1. A kernel that
    is right is accepted after a few draws; one that is wrong stays refused, whatever is drawn.
    RATIO and the floors are those of a single draw, for which the rule is `assert_like_eager`'s.

    Behind a ReLU some draw has a pre-activation within rounding of 0, and one flipped mask
    outweighs all roundings of all draws, eager's as often as the fused op's. There the median of
    the draws must not exceed 1 (has_relu): what is wrong with a kernel is wrong in every draw.
    """

    def __init__(self, dtype: torch.dtype, *, has_relu: bool = False):
        self.dtype = dtype
        self.has_relu = has_relu
        self.num_draws = 0
        self._shares: dict[tuple[str, str], list[float]] = {}

    def add(
        self,
        name: str,
        fused: torch.Tensor,
        baselines: Sequence[torch.Tensor],
        truth: torch.Tensor,
    ) -> None:
        """Add one draw of the tensor `name`; the worst of the baselines counts, norm by norm."""
        assert fused.shape == truth.shape, f"{name}: {fused.shape} {truth.shape}"
        for norm, floor in ((rms, FLOOR_RMS[self.dtype]), (largest, FLOOR_MAX[self.dtype])):
            scale = norm(truth) or 1.0
            error, *others = (
                norm(t.detach().double() - truth) / scale for t in (fused, *baselines)
            )
            shares = self._shares.setdefault((name, norm.__name__), [])
            shares.append(error / (RATIO * max(others) + floor))
            self.num_draws = len(shares)

    def refused(self) -> list[str]:
        """What is not as right as eager, in words."""
        pool = statistics.median if self.has_relu else lambda shares: rms(torch.tensor(shares))
        # The median of a NaN and other numbers may be any of them.
        pooled = {
            key: pool(shares) if all(map(math.isfinite, shares)) else math.nan
            for key, shares in self._shares.items()
        }
        # A NaN is refused too.
        return [
            f"{name}: {norm} error {share:.3f} of what is allowed in {self.num_draws} draws"
            for (name, norm), share in pooled.items()
            if not share <= 1
        ]
