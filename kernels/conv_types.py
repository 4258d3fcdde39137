"""What the steps of a fused block hand to each other: one set of types for every back end.

Tensors are (N, C, H, W) in torch's words and channels_last in memory; letters as in the kernels:
x -conv-> y -batch norm-> z -(+ shortcut)-ReLU-> out, and g, dy, dx, dw for the gradients.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ConvBN",
    "ConvBNGrads",
    "ConvGrads",
    "DeferredGrad",
    "GradSums",
    "LayerState",
    "stat_dtype",
]


class ConvBN(NamedTuple):
    """A convolution and its batch norm: w (K, C, R, S), weight and bias (K,).

    dw_dtype: of the gradient of w, for back ends that can round it once; None: that of w.
    """

    w: Tensor
    weight: Tensor
    bias: Tensor
    stride: int = 1
    padding: int = 0
    eps: float = 1e-5
    dw_dtype: torch.dtype | None = None


class LayerState(NamedTuple):
    """What a layer keeps for backward and for the running statistics of its batch norm.

    y: (N, K, P, Q) raw convolution output. mean, unbiased_var, rstd: (K,). scale_shift: (2, K), the
    batch norm as a * y + b, a above b.
    """

    y: Tensor
    mean: Tensor
    unbiased_var: Tensor
    rstd: Tensor
    scale_shift: Tensor


class GradSums(NamedTuple):
    """Sums over the pixels that the backward of batch norm needs.

    Each is (K,), or (K, num_tiles) where the sums of tiles are still to be added, in `stat_dtype`
    or wider.

    g: of g, the gradient of the batch norm's output. gy: of g * (y - mean). gy_shortcut: of the
    same against y and mean of a projected shortcut; None without one.
    """

    g: Tensor
    gy: Tensor
    gy_shortcut: Tensor | None = None


class DeferredGrad(NamedTuple):
    """A gradient dy = c0 * g + c1 * y + c2 that its readers compute while loading.

    g: (N, K, P, Q) gradient of the batch norm's output. y: (N, K, P, Q) input of the batch norm.
    coefficients: (3, K), c0 above c1 above c2.
    """

    g: Tensor
    y: Tensor
    coefficients: Tensor


class ConvGrads(NamedTuple):
    """Gradients that leave one convolution.

    dx: of its input; behind a layer, already masked by that layer's ReLU. None where unwanted.
    dw: of its filters. sums: of dx, for the batch norm of the layer before, where there is one.
    """

    dx: Tensor | None
    dw: Tensor
    sums: GradSums | None


class ConvBNGrads(NamedTuple):
    """Gradients of one layer's parameters: dw (K, C, R, S), dgamma and dbeta (K,)."""

    dw: Tensor
    dgamma: Tensor
    dbeta: Tensor


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, parameters and sums beside activations of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
