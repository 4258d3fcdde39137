"""What the steps of a fused block hand to each other: one set of types for every back end.

Tensors are (N, C, H, W) in torch's words and channels_last in memory; letters as in the kernels:
x -conv-> y -batch norm-> z -(+ shortcut)-ReLU-> out, and g, dy, dx, dw for the gradients.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "BatchNorm",
    "BatchNormGrads",
    "ConvBN",
    "ConvBNGrads",
    "ConvGrads",
    "DeferredGrad",
    "LayerState",
    "stat_dtype",
]


class BatchNorm(NamedTuple):
    """The parameters of a batch norm: weight and bias (K,)."""

    weight: Tensor
    bias: Tensor
    eps: float = 1e-5


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

    @property
    def batch_norm(self) -> BatchNorm:
        """Its batch norm alone."""
        return BatchNorm(self.weight, self.bias, self.eps)


class LayerState(NamedTuple):
    """What a layer keeps for backward and for the running statistics of its batch norm.

    y: (N, K, P, Q) raw convolution output. stats: (5, K), all that follows from its statistics in
    one tensor, in rows: mean, unbiased variance, rstd, and the batch norm as a * y + b: a, b.
    """

    y: Tensor
    stats: Tensor

    @property
    def mean(self) -> Tensor:
        """(K,)."""
        return self.stats[0]

    @property
    def unbiased_var(self) -> Tensor:
        """(K,): what torch feeds to running_var."""
        return self.stats[1]

    @property
    def rstd(self) -> Tensor:
        """(K,): 1 / sqrt(var + eps) of the biased variance."""
        return self.stats[2]

    @property
    def scale_shift(self) -> Tensor:
        """(2, K): a above b."""
        return self.stats[3:]


class DeferredGrad(NamedTuple):
    """A gradient dy = c0 * g + c1 * y + c2 that its readers compute while loading.

    g: (N, K, P, Q) gradient of the batch norm's output. y: (N, K, P, Q) input of the batch norm.
    coefficients: (3, K), c0 above c1 above c2.
    """

    g: Tensor
    y: Tensor
    coefficients: Tensor


class BatchNormGrads(NamedTuple):
    """Gradients that leave a batch norm: of its input, to be computed; dgamma and dbeta (K,)."""

    dy: DeferredGrad
    dgamma: Tensor
    dbeta: Tensor


class ConvGrads(NamedTuple):
    """Gradients that leave one convolution.

    dx: of its input; None where unwanted. dw: of its filters. producer: of the batch norm of the
    layer that made its input, where there is one; dx is then masked by that layer's ReLU, and is
    producer.dy.g.
    """

    dx: Tensor | None
    dw: Tensor
    producer: BatchNormGrads | None = None


class ConvBNGrads(NamedTuple):
    """Gradients of one layer's parameters: dw (K, C, R, S), dgamma and dbeta (K,)."""

    dw: Tensor
    dgamma: Tensor
    dbeta: Tensor


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, parameters and sums beside activations of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
