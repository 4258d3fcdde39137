"""The mathematics of every fused op in plain torch: CPU implementation, and referee in fp64.

Tensors are (N, C, H, W) in torch's words and channels_last in memory; letters as in the kernels:
x -conv-> y -batch norm-> z -(+ shortcut)-ReLU-> out, and g, dy, dx, dw for the gradients.

Every function takes any float dtype. Storage is rounded where the kernels round (y, out, g, dy, dx,
dw); everything per channel is computed and kept in `stat_dtype`: fp32 for bf16, fp16 and fp32, fp64
for fp64. Run in fp64 these functions are the truth that tests measure both routes against; their
forwards are differentiable by torch, their backwards are derived by hand and tested against that.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

__all__ = [
    "BNStats",
    "BlockGrads",
    "BlockSaved",
    "ConvBN",
    "ConvBNForward",
    "ConvBNGrads",
    "bn_apply_ref",
    "bn_backward_apply_ref",
    "bn_backward_coefficients_ref",
    "bn_backward_sums_ref",
    "bn_fold_ref",
    "bn_stats_ref",
    "conv_bn_add_relu_backward_ref",
    "conv_bn_add_relu_ref",
    "conv_bn_relu_backward_ref",
    "conv_bn_relu_ref",
    "conv_dgrad_ref",
    "conv_folded_ref",
    "conv_ref",
    "conv_wgrad_ref",
    "merge_stats_ref",
    "relu_grad_ref",
    "residual_block_backward_ref",
    "residual_block_folded_ref",
    "residual_block_ref",
    "stat_dtype",
]


class BNStats(NamedTuple):
    """Statistics of y over its pixels, each (C,): mean, biased variance, 1 / sqrt(var + eps)."""

    mean: Tensor
    var: Tensor
    rstd: Tensor


class ConvBN(NamedTuple):
    """A convolution and its batch norm: w (K, C, R, S), weight and bias (K,)."""

    w: Tensor
    weight: Tensor
    bias: Tensor
    stride: int = 1
    padding: int = 0
    eps: float = 1e-5


class ConvBNForward(NamedTuple):
    """Result of one layer: the activation, the raw convolution output, its statistics."""

    out: Tensor
    y: Tensor
    stats: BNStats


class ConvBNGrads(NamedTuple):
    """Gradients of one layer's parameters: dw (K, C, R, S), dgamma and dbeta (K,)."""

    dw: Tensor
    dgamma: Tensor
    dbeta: Tensor


class BlockSaved(NamedTuple):
    """What a residual block keeps for its backward: no activation between its convolutions.

    x: the block's input. out: its output. y, stats: raw output and statistics of every layer of the
    main path. y_shortcut, stats_shortcut: the same of the projection, or None.
    """

    x: Tensor
    out: Tensor
    y: list[Tensor]
    stats: list[BNStats]
    y_shortcut: Tensor | None = None
    stats_shortcut: BNStats | None = None


class BlockGrads(NamedTuple):
    """Gradients of a residual block: its input, every layer of the main path, the projection."""

    dx: Tensor
    layers: list[ConvBNGrads]
    projection: ConvBNGrads | None = None


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, parameters and sums beside activations of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def conv_ref(x: Tensor, w: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
    """`y = conv(x, w)`, rounded once to the dtype of x."""
    return F.conv2d(x, w, stride=stride, padding=padding)


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
    """Dgamma and dbeta (C,), and the coefficients (3, C) of dy = c0 * g + c1 * y + c2.

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


def conv_bn_relu_ref(x: Tensor, layer: ConvBN) -> ConvBNForward:
    """`out = relu(bn(conv(x)))` with the statistics of this batch."""
    return _layer_forward(x, layer, relu=True)


def conv_bn_add_relu_ref(x: Tensor, layer: ConvBN, residual: Tensor) -> ConvBNForward:
    """`out = relu(bn(conv(x)) + residual)` with the statistics of this batch."""
    return _layer_forward(x, layer, residual=residual, relu=True)


def _layer_forward(
    x: Tensor, layer: ConvBN, *, residual: Tensor | None = None, relu: bool
) -> ConvBNForward:
    y = conv_ref(x, layer.w, stride=layer.stride, padding=layer.padding)
    stats = bn_stats_ref(y, eps=layer.eps)
    scale_shift = bn_fold_ref(stats.mean, stats.rstd, layer.weight, layer.bias)
    return ConvBNForward(bn_apply_ref(y, scale_shift, residual=residual, relu=relu), y, stats)


def conv_bn_relu_backward_ref(
    dout: Tensor, x: Tensor, layer: ConvBN, saved: ConvBNForward
) -> tuple[Tensor, ConvBNGrads]:
    """Gradients of `conv_bn_relu_ref`: dx, and those of the parameters."""
    return _layer_backward(relu_grad_ref(saved.out, dout), x, layer, saved.y, saved.stats)


def conv_bn_add_relu_backward_ref(
    dout: Tensor, x: Tensor, layer: ConvBN, saved: ConvBNForward
) -> tuple[Tensor, Tensor, ConvBNGrads]:
    """Gradients of `conv_bn_add_relu_ref`: dx, that of the residual, those of the parameters."""
    g = relu_grad_ref(saved.out, dout)
    dx, grads = _layer_backward(g, x, layer, saved.y, saved.stats)
    return dx, g, grads


def _layer_backward(
    g: Tensor, x: Tensor, layer: ConvBN, y: Tensor, stats: BNStats
) -> tuple[Tensor, ConvBNGrads]:
    """From the gradient of the batch norm's output to those of the layer's input and parameters."""
    sum_g, sum_gy = bn_backward_sums_ref(g, y, stats.mean)
    dgamma, dbeta, coefficients = bn_backward_coefficients_ref(
        sum_g, sum_gy, stats.mean, stats.rstd, layer.weight, y.numel() // y.shape[1]
    )
    dy = bn_backward_apply_ref(g, y, coefficients)
    geometry = {"stride": layer.stride, "padding": layer.padding}
    _, _, h, w = x.shape
    _, _, r, s = layer.w.shape
    dx = conv_dgrad_ref(dy, layer.w, (h, w), **geometry)
    return dx, ConvBNGrads(conv_wgrad_ref(x, dy, (r, s), **geometry), dgamma, dbeta)


def residual_block_ref(
    x: Tensor, layers: Sequence[ConvBN], projection: ConvBN | None = None
) -> tuple[Tensor, BlockSaved]:
    """`relu(bn(conv(.. relu(bn(conv(x))))) + shortcut)`: two layers basic, three bottleneck.

    The shortcut is x, or bn(conv(x)) of the projection. Returns the output and what backward needs.
    """
    y: list[Tensor] = []
    stats: list[BNStats] = []
    activation = x
    for i, layer in enumerate(layers):
        y.append(conv_ref(activation, layer.w, stride=layer.stride, padding=layer.padding))
        stats.append(bn_stats_ref(y[i], eps=layer.eps))
        if i + 1 < len(layers):
            activation = bn_apply_ref(y[i], _folded(layer, stats[i]))
    shortcut, y_shortcut, stats_shortcut, shortcut_fold = x, None, None, None
    if projection is not None:
        y_shortcut = conv_ref(x, projection.w, stride=projection.stride, padding=projection.padding)
        stats_shortcut = bn_stats_ref(y_shortcut, eps=projection.eps)
        shortcut, shortcut_fold = y_shortcut, _folded(projection, stats_shortcut)
    out = bn_apply_ref(
        y[-1],
        _folded(layers[-1], stats[-1]),
        residual=shortcut,
        residual_scale_shift=shortcut_fold,
    )
    return out, BlockSaved(x, out, y, stats, y_shortcut, stats_shortcut)


def _folded(layer: ConvBN, stats: BNStats) -> Tensor:
    return bn_fold_ref(stats.mean, stats.rstd, layer.weight, layer.bias)


def residual_block_backward_ref(
    dout: Tensor, saved: BlockSaved, layers: Sequence[ConvBN], projection: ConvBN | None = None
) -> BlockGrads:
    """Gradients of `residual_block_ref`; activations between layers are formed anew from y."""
    shortcut_g = g = relu_grad_ref(saved.out, dout)
    grads: list[ConvBNGrads] = []
    for i in reversed(range(len(layers))):
        x = saved.x
        if i > 0:
            x = bn_apply_ref(saved.y[i - 1], _folded(layers[i - 1], saved.stats[i - 1]))
        dx, layer_grads = _layer_backward(g, x, layers[i], saved.y[i], saved.stats[i])
        grads.insert(0, layer_grads)
        g = relu_grad_ref(x, dx) if i > 0 else dx
    if projection is None:
        return BlockGrads(g + shortcut_g, grads)
    if saved.y_shortcut is None or saved.stats_shortcut is None:
        raise ValueError("saved holds no projection, but a projection is given")
    dx_shortcut, projection_grads = _layer_backward(
        shortcut_g, saved.x, projection, saved.y_shortcut, saved.stats_shortcut
    )
    return BlockGrads(g + dx_shortcut, grads, projection_grads)


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


def residual_block_folded_ref(
    x: Tensor,
    layers: Sequence[ConvBN],
    scale_shifts: Sequence[Tensor],
    projection: ConvBN | None = None,
    projection_scale_shift: Tensor | None = None,
) -> Tensor:
    """A residual block in inference: each layer's batch norm folded to (2, K), a above b."""
    shortcut = x
    if projection is not None:
        if projection_scale_shift is None:
            raise ValueError("projection_scale_shift must be given with a projection")
        shortcut = conv_folded_ref(
            x,
            projection.w,
            projection_scale_shift,
            stride=projection.stride,
            padding=projection.padding,
            relu=False,
        )
    out = x
    for i, (layer, scale_shift) in enumerate(zip(layers, scale_shifts, strict=True)):
        out = conv_folded_ref(
            out,
            layer.w,
            scale_shift,
            stride=layer.stride,
            padding=layer.padding,
            residual=shortcut if i + 1 == len(layers) else None,
        )
    return out
