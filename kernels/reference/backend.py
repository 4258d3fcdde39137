"""The steps of a fused block in plain torch: for CPUs without other kernels, and for float64.

The functions are those of `block.Backend` and add to the reference only layout: results are dense
channels_last as the kernels' are, whatever torch's convolution chose.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastres.kernels.block import Block
from fastres.kernels.conv_types import (
    BatchNorm,
    BatchNormGrads,
    ConvBN,
    ConvGrads,
    DeferredGrad,
    LayerState,
)
from fastres.kernels.layout import to_dense_channels_last
from fastres.kernels.reference import block as ref

__all__ = [
    "adds_in_projection",
    "apply",
    "block_folded",
    "conv_backward",
    "conv_bn",
    "conv_folded",
    "measured",
    "reduce",
    "runs_on",
]


def runs_on(x: Tensor) -> bool:
    """Whether plain torch computes on x: always."""
    return True


def _conv_operands(*tensors: Tensor, layer: ConvBN) -> tuple[Tensor, ...]:
    """Give a strided 1x1 convolution NCHW operands on a CPU; leave others as they are.

    In NHWC order oneDNN's backward of it writes past its workspace for few channels
    (https://github.com/uxlfoundation/oneDNN/issues/6035).
    """
    if layer.w.device.type != "cpu" or layer.stride == 1 or layer.w.shape[2:] != (1, 1):
        return tensors
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in tensors)


def conv_bn(x: Tensor, layer: ConvBN, scale_shift: Tensor | None) -> LayerState:
    """See `block.Backend`."""
    source = x if scale_shift is None else ref.bn_apply_ref(x, scale_shift)
    source, w = _conv_operands(source, layer.w, layer=layer)
    y = to_dense_channels_last(ref.conv_ref(source, w, stride=layer.stride, padding=layer.padding))
    return measured(y, layer.batch_norm)


def measured(y: Tensor, batch_norm: BatchNorm) -> LayerState:
    """The state of the layer whose convolution left y."""
    stats = ref.bn_stats_ref(y, eps=batch_norm.eps)
    count = y.numel() // y.shape[1]
    fold = ref.bn_fold_ref(stats.mean, stats.rstd, batch_norm.weight, batch_norm.bias)
    unbiased_var = stats.var * (count / (count - 1))
    return LayerState(y, torch.stack([stats.mean, unbiased_var, stats.rstd, *fold]))


def apply(
    state: LayerState, shortcut: Tensor | None, shortcut_scale_shift: Tensor | None, relu: bool
) -> Tensor:
    """See `block.Backend`."""
    return to_dense_channels_last(
        ref.bn_apply_ref(
            state.y,
            state.scale_shift,
            residual=shortcut,
            residual_scale_shift=shortcut_scale_shift,
            relu=relu,
        )
    )


def reduce(
    dout: Tensor,
    state: LayerState,
    weight: Tensor,
    mask: Tensor | None,
    projected: LayerState | None,
    projected_weight: Tensor | None,
) -> tuple[BatchNormGrads, BatchNormGrads | None]:
    """See `block.Backend`."""
    g = dout
    if mask is not None:
        out = ref.bn_apply_ref(state.y, mask) if mask.dim() == 2 else mask
        g = to_dense_channels_last(ref.relu_grad_ref(out, dout))
    grads = _batch_norm_grads(g, state, weight)
    if projected is None or projected_weight is None:
        return grads, None
    return grads, _batch_norm_grads(g, projected, projected_weight)


def _batch_norm_grads(g: Tensor, state: LayerState, weight: Tensor) -> BatchNormGrads:
    """The gradients of a batch norm whose output has the gradient g."""
    sums = ref.bn_backward_sums_ref(g, state.y, state.mean)
    dgamma, dbeta, coefficients = ref.bn_backward_coefficients_ref(
        *sums, state.mean, state.rstd, weight, g.numel() // g.shape[1]
    )
    return BatchNormGrads(DeferredGrad(g, state.y, coefficients), dgamma, dbeta)


def conv_backward(
    dy: DeferredGrad,
    x: Tensor,
    layer: ConvBN,
    *,
    producer: LayerState | None,
    producer_weight: Tensor | None,
    shortcut: Tensor | None,
    need_dx: bool,
) -> ConvGrads:
    """See `block.Backend`."""
    geometry = {"stride": layer.stride, "padding": layer.padding}
    activation = x if producer is None else ref.bn_apply_ref(x, producer.scale_shift)
    computed = ref.bn_backward_apply_ref(*dy)
    source, computed, w = _conv_operands(activation, computed, layer.w, layer=layer)
    filter_size = (w.shape[2], w.shape[3])
    dw = to_dense_channels_last(ref.conv_wgrad_ref(source, computed, filter_size, **geometry))
    if not need_dx:
        return ConvGrads(None, dw)
    dx = ref.conv_dgrad_ref(computed, w, (x.shape[2], x.shape[3]), **geometry)
    if shortcut is not None:
        dx = dx + shortcut
    if producer is None or producer_weight is None:
        return ConvGrads(to_dense_channels_last(dx), dw)
    g = ref.relu_grad_ref(activation, dx)
    return ConvGrads(g, dw, _batch_norm_grads(g, producer, producer_weight))


def conv_folded(
    x: Tensor, layer: ConvBN, scale_shift: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    """`out = relu(a * conv(x) + b + residual)`: a layer of inference."""
    x, w = _conv_operands(x, layer.w, layer=layer)
    y = ref.conv_ref(x, w, stride=layer.stride, padding=layer.padding)
    return to_dense_channels_last(ref.bn_apply_ref(y, scale_shift, residual=residual, relu=relu))


def adds_in_projection(x: Tensor, first: ConvBN, projection: ConvBN) -> bool:
    """See `block.Backend`: the main path adds the projection's."""
    return False


def block_folded(x: Tensor, block: Block, scale_shifts: Sequence[Tensor]) -> Tensor | None:
    """See `block.Backend`: there is none."""
    return None
