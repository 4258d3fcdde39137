"""The mathematics of a fused block's steps in plain torch: implementation on any device, and truth.

Tensors are (N, C, H, W) in torch's words and channels_last in memory; letters as in the kernels:
x -conv-> y -batch norm-> z -(+ shortcut)-ReLU-> out, and g, dy, dx, dw for the gradients.

Every function takes any float dtype. Storage is rounded where the kernels round (y, out, g, dy, dx,
dw); per-channel numbers are computed and kept in `stat_dtype`: fp32 for bf16, fp16 and fp32, fp64
for fp64. Run in fp64 these functions are the truth that tests measure the kernels against; their
forwards are differentiable by torch, their backwards are derived by hand and tested against that.
backend.py puts them together as `block.Backend` wants them.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.nn.grad import conv2d_input, conv2d_weight

from fastres.kernels.conv_types import stat_dtype

__all__ = [
    "BNStats",
    "bn_apply_ref",
    "bn_backward_apply_ref",
    "bn_backward_coefficients_ref",
    "bn_backward_sums_ref",
    "bn_fold_ref",
    "bn_stats_ref",
    "conv_dgrad_ref",
    "conv_folded_ref",
    "conv_ref",
    "conv_wgrad_ref",
    "merge_stats_ref",
    "relu_grad_ref",
]


class BNStats(NamedTuple):
    """Statistics of y over its pixels, each (C,): mean, biased variance, 1 / sqrt(var + eps)."""

    mean: Tensor
    var: Tensor
    rstd: Tensor


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def conv_ref(x: Tensor, w: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
    """`y = conv(x, w)`, rounded once to the dtype of x."""
    return conv2d(x, w, stride=stride, padding=padding)


def conv_dgrad_ref(
    dy: Tensor, w: Tensor, input_size: tuple[int, int], *, stride: int = 1, padding: int = 0
) -> Tensor:
    """Gradient of `conv_ref` with respect to x, which is (N, C, *input_size)."""
    shape = (dy.shape[0], w.shape[1], *input_size)
    return conv2d_input(shape, w, dy, stride=stride, padding=padding)


def conv_wgrad_ref(
    x: Tensor, dy: Tensor, filter_size: tuple[int, int], *, stride: int = 1, padding: int = 0
) -> Tensor:
    """Gradient of `conv_ref` with respect to w, which is (K, C, *filter_size)."""
    shape = (dy.shape[1], x.shape[1], *filter_size)
    return conv2d_weight(x, shape, dy, stride=stride, padding=padding)


def bn_stats_ref(y: Tensor, *, eps: float = 1e-5) -> BNStats:
    """Statistics of y (as rounded) by two passes: the mean, then the distances from it.

    Raises: ValueError: when each channel has a single value.
    """
    if y.numel() == y.shape[1]:
        raise ValueError(f"training needs more than 1 value a channel, got {tuple(y.shape)}")
    wide = y.to(stat_dtype(y.dtype))
    mean = wide.mean((0, 2, 3))
    var = (wide - _per_channel(mean)).square().mean((0, 2, 3))
    return BNStats(mean, var, 1.0 / (var + eps).sqrt())


def merge_stats_ref(count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of tiles with `count` (T,) pixels, mean and M2 (C, T) each.

    M2 is the sum of squared distances from the tile's mean. Source: Chan, Golub, LeVeque (1979).
    """
    total = count.sum()
    pivot = mean[:, :1]
    merged = pivot + (count * (mean - pivot)).sum(1, keepdim=True) / total
    var = (m2 + count * (mean - merged).square()).sum(1) / total
    return merged.squeeze(1), var


def bn_fold_ref(mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The batch norm as z = a * y + b: (2, C), a above b."""
    a = weight * rstd
    return torch.stack([a, bias - mean * a])


def _affine(y: Tensor, scale_shift: Tensor) -> Tensor:
    """`a * y + b`, not rounded."""
    return y.to(scale_shift.dtype) * _per_channel(scale_shift[0]) + _per_channel(scale_shift[1])


def bn_apply_ref(
    y: Tensor,
    scale_shift: Tensor,
    *,
    residual: Tensor | None = None,
    residual_scale_shift: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """`out = relu(a * y + b + residual)`, or `+ a_s * residual + b_s`; rounded once."""
    z = _affine(y, scale_shift)
    if residual is not None:
        z = z + (
            residual if residual_scale_shift is None else _affine(residual, residual_scale_shift)
        )
    return (z.relu() if relu else z).to(y.dtype)


def relu_grad_ref(out: Tensor, dout: Tensor) -> Tensor:
    """The ReLU's g: dout where out > 0, else 0; a NaN in out passes dout, as in torch."""
    return torch.where(out <= 0, torch.zeros((), dtype=dout.dtype, device=dout.device), dout)


def bn_backward_sums_ref(g: Tensor, y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the pixels of g and of g * (y - mean), each (C,)."""
    wide = g.to(mean.dtype)
    centred = y.to(mean.dtype) - _per_channel(mean)
    return wide.sum((0, 2, 3)), (wide * centred).sum((0, 2, 3))


def bn_backward_coefficients_ref(
    sum_g: Tensor, sum_gy: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`dgamma` and `dbeta` (C,), and the coefficients (3, C) of dy = c0 * g + c1 * y + c2.

    The textbook's dy = gamma * rstd * (g - mean(g) - y^ * mean(g * y^)), where y^ is the normalised
    (y - mean) * rstd, is linear in g and y; c0, c1 and c2 collect its terms.
    """
    dbeta, dgamma = sum_g, sum_gy * rstd
    c0 = weight * rstd
    c1 = -c0 * rstd * dgamma / count
    c2 = -c0 * dbeta / count - c1 * mean
    return dgamma, dbeta, torch.stack([c0, c1, c2])


def bn_backward_apply_ref(g: Tensor, y: Tensor, coefficients: Tensor) -> Tensor:
    """`dy = c0 * g + c1 * y + c2`, rounded once to the dtype of g."""
    c0, c1, c2 = (_per_channel(c) for c in coefficients)
    return (c0 * g.to(c0.dtype) + (c1 * y.to(c1.dtype) + c2)).to(g.dtype)


def conv_folded_ref(
    x: Tensor,
    w: Tensor,
    scale_shift: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    residual: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """`out = relu(a * conv(x, w) + b + residual)`: a layer of inference."""
    y = conv_ref(x, w, stride=stride, padding=padding)
    return bn_apply_ref(y, scale_shift, residual=residual, relu=relu)
