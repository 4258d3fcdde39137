"""The steps of a chain in plain torch: for CPUs without the interpreter, and for float64.

The functions are those of `chain.Backend` and add to the reference only layout: results are dense
channels_last as the kernels' are, whatever torch's convolution chose.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastres.kernels.block import BackwardStep, LayerState
from fastres.kernels.reference import block as ref
from fastres.kernels.reference.block import ConvBN

__all__ = [
    "FoldedGrad",
    "Sums",
    "apply",
    "conv_backward",
    "conv_bn",
    "conv_folded",
    "fold_grad",
    "reduce",
    "to_nhwc",
]


class Sums(NamedTuple):
    """Sums over the pixels, (K,) each: of g, of g * (y - mean), and of the same for y_shortcut."""

    g: Tensor
    gy: Tensor
    gy_shortcut: Tensor | None = None


class FoldedGrad(NamedTuple):
    """Gradient dy = c0 * g + c1 * y + c2, with coefficients (3, K)."""

    g: Tensor
    y: Tensor
    coefficients: Tensor


def to_nhwc(t: Tensor) -> Tensor:
    """Return t in the strides that `torch.empty` gives a dense channels_last tensor."""
    _, c, h, w = t.shape
    if t.stride() == (h * w * c, 1, w * c, c):
        return t
    dense = torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=torch.channels_last)
    return dense.copy_(t)


def _conv_operands(*tensors: Tensor, layer: ConvBN) -> tuple[Tensor, ...]:
    """Give a strided 1x1 convolution NCHW operands on a CPU; leave others as they are.

    In NHWC order oneDNN's backward of it writes past its workspace for few channels
    (https://github.com/uxlfoundation/oneDNN/issues/6035).
    """
    if layer.w.device.type != "cpu" or layer.stride == 1 or layer.w.shape[2:] != (1, 1):
        return tensors
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in tensors)


def conv_bn(x: Tensor, layer: ConvBN, fold: Tensor | None) -> LayerState:
    """See `chain.Backend`."""
    source = x if fold is None else ref.bn_apply_ref(x, fold)
    source, w = _conv_operands(source, layer.w, layer=layer)
    y = to_nhwc(ref.conv_ref(source, w, stride=layer.stride, padding=layer.padding))
    stats = ref.bn_stats_ref(y, eps=layer.eps)
    count = y.numel() // y.shape[1]
    scale_shift = ref.bn_fold_ref(stats.mean, stats.rstd, layer.weight, layer.bias)
    return LayerState(y, stats.mean, stats.var * (count / (count - 1)), stats.rstd, scale_shift)


def apply(state: LayerState, shortcut: Tensor | None, fold: Tensor | None, relu: bool) -> Tensor:
    """See `chain.Backend`."""
    return to_nhwc(
        ref.bn_apply_ref(
            state.y, state.scale_shift, residual=shortcut, residual_scale_shift=fold, relu=relu
        )
    )


def reduce(
    dout: Tensor, state: LayerState, mask: Tensor | None, projected: LayerState | None
) -> tuple[Tensor, Sums]:
    """See `chain.Backend`."""
    g = dout
    if mask is not None:
        out = ref.bn_apply_ref(state.y, mask) if mask.dim() == 2 else mask
        g = to_nhwc(ref.relu_grad_ref(out, dout))
    sum_g, sum_gy = ref.bn_backward_sums_ref(g, state.y, state.mean)
    if projected is None:
        return g, Sums(sum_g, sum_gy)
    _, sum_gy_shortcut = ref.bn_backward_sums_ref(g, projected.y, projected.mean)
    return g, Sums(sum_g, sum_gy, sum_gy_shortcut)


def fold_grad(
    g: Tensor, sums: Sums, state: LayerState, weight: Tensor, *, of_projection: bool
) -> tuple[FoldedGrad, Tensor, Tensor]:
    """See `chain.Backend`."""
    sum_gy = sums.gy_shortcut if of_projection else sums.gy
    assert sum_gy is not None
    count = g.numel() // g.shape[1]
    dgamma, dbeta, coefficients = ref.bn_backward_coefficients_ref(
        sums.g, sum_gy, state.mean, state.rstd, weight, count
    )
    return FoldedGrad(g, state.y, coefficients), dgamma, dbeta.clone()


def conv_backward(
    dy: FoldedGrad,
    x: Tensor,
    layer: ConvBN,
    *,
    before: LayerState | None,
    shortcut: Tensor | None,
    need_dx: bool,
) -> BackwardStep:
    """See `chain.Backend`."""
    geometry = {"stride": layer.stride, "padding": layer.padding}
    activation = x if before is None else ref.bn_apply_ref(x, before.scale_shift)
    formed = ref.bn_backward_apply_ref(*dy)
    source, formed, w = _conv_operands(activation, formed, layer.w, layer=layer)
    filter_size = (w.shape[2], w.shape[3])
    dw = to_nhwc(ref.conv_wgrad_ref(source, formed, filter_size, **geometry))
    if not need_dx:
        return BackwardStep(None, dw, None)
    dx = ref.conv_dgrad_ref(formed, w, (x.shape[2], x.shape[3]), **geometry)
    if shortcut is not None:
        dx = dx + shortcut
    if before is None:
        return BackwardStep(to_nhwc(dx), dw, None)
    g = ref.relu_grad_ref(activation, dx)
    return BackwardStep(g, dw, Sums(*ref.bn_backward_sums_ref(g, before.y, before.mean)))


def conv_folded(
    x: Tensor, layer: ConvBN, scale_shift: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    """`out = relu(a * conv(x) + b + residual)`: a layer of inference."""
    x, w = _conv_operands(x, layer.w, layer=layer)
    y = ref.conv_ref(x, w, stride=layer.stride, padding=layer.padding)
    return to_nhwc(ref.bn_apply_ref(y, scale_shift, residual=residual, relu=relu))
