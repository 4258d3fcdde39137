"""How far a result may be from the truth: the numbers of every parity check, with their derivation.

The truth is the plain-torch reference in fp64 on the very inputs of the check. Eager torch in the
check's dtype makes an error against it, and so does the fused result:

    err(fused) <= RATIO * err(eager) + FLOOR[dtype],   in the RMS norm and in the max norm,

each relative to the same norm of the truth. Derivation of the numbers:

RATIO: kernels keep fp32 wherever eager keeps it and round no more often than eager, so their errors
    have the same size. The RMS of n independent errors is known to 1 / sqrt(2 n): 13 % for the 32
    channels of a typical gradient. Two such errors, fused and eager, differ by 1.19 at one standard
    deviation; 1.25 leaves a little room and still fails on one additional rounding (sqrt(2)).

FLOOR: what remains when eager's error is small by luck or by shortness (a 1x1 convolution of 5
    channels, a channel of 12 pixels). With u the unit roundoff of the dtype:
    fp32: another order of summation. RMS 2 u: two roundings. Max 4 u: the largest of many.
    fp16, bf16: sums are in fp32 on both sides and both round to the dtype, which eager's own error
    holds already; left are the fp32 differences that tip a rounding the other way, in one element
    of many: u / 8 in the RMS norm, u / 2 in the max norm.

STATISTICS: means, variances and sums are fp32 whatever the activations' dtype. Torch on CPU sums
    them in fp64, so eager is nearly exact there and cannot be the baseline. A GPU adds the n rows
    of a tile pairwise, log2(n) u at most; the interpreter adds them one by one, a random walk of n
    roundings: 0.27 u sqrt(n) was measured in the RMS of 6,400 sums of squares for n from 32 to 512,
    and 2 u sqrt(n) in their maximum. Allowed are 4 u sqrt(n), of the sum of magnitudes.
"""

import torch

__all__ = ["FLOOR_MAX", "FLOOR_RMS", "RATIO", "UNIT_ROUNDOFF", "statistics_rtol"]

RATIO = 1.25
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
FLOOR_RMS = {
    torch.float32: 2 * UNIT_ROUNDOFF[torch.float32],
    torch.float16: UNIT_ROUNDOFF[torch.float16] / 8,
    torch.bfloat16: UNIT_ROUNDOFF[torch.bfloat16] / 8,
}
FLOOR_MAX = {
    torch.float32: 4 * UNIT_ROUNDOFF[torch.float32],
    torch.float16: UNIT_ROUNDOFF[torch.float16] / 2,
    torch.bfloat16: UNIT_ROUNDOFF[torch.bfloat16] / 2,
}


def statistics_rtol(rows: int = 128) -> float:
    """Relative error allowed in a sum of magnitudes over tiles of `rows` pixels."""
    return 4 * UNIT_ROUNDOFF[torch.float32] * rows**0.5
