"""The steps of a fused block in Triton kernels, each convolution on the route of the launch table.

`triton`: batch norm, ReLU, shortcut and sums happen in the convolution's prologue and epilogue.
`cudnn`: torch's convolution, with the Triton batch-norm kernels around it: an activation or dy is
stored, statistics and sums take a pass. Both routes meet in the same tensors, so every convolution
of a block chooses for itself, and each of its three products too.

fp32 products round to TF32 where torch allows its own convolutions to.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastres.kernels.block import Block
from fastres.kernels.conv_shape import ConvOp, ConvShape
from fastres.kernels.conv_types import (
    BatchNormGrads,
    ConvBN,
    ConvGrads,
    DeferredGrad,
    LayerState,
)
from fastres.kernels.gpu.batchnorm_bwd import bn_backward_apply, bn_backward_reduce
from fastres.kernels.gpu.batchnorm_fwd import bn_apply, bn_stats
from fastres.kernels.gpu.conv_backward import conv_gradients
from fastres.kernels.gpu.conv_dgrad import conv_dgrad
from fastres.kernels.gpu.conv_fprop import conv_fprop, conv_fprop_folded
from fastres.kernels.gpu.conv_wgrad import conv_wgrad
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.launch_rules import im2col_config, strip_config
from fastres.kernels.gpu.launch_table import conv_config
from fastres.kernels.gpu.primitives import INTERPRETED
from fastres.kernels.layout import to_dense_channels_last
from fastres.kernels.reference import block as ref

__all__ = [
    "adds_in_projection",
    "apply",
    "block_folded",
    "conv_backward",
    "conv_bn",
    "conv_folded",
    "filter_gradient",
    "input_gradient",
    "reduce",
    "runs_on",
    "shared_operands",
]


def runs_on(x: Tensor) -> bool:
    """Whether the kernels compute on x: on GPUs, and on CPUs in Triton's interpreter."""
    has_device = x.is_cuda or (x.device.type == "cpu" and bool(INTERPRETED.value))
    return has_device and x.dtype != torch.float64


def _allow_tf32(x: Tensor) -> bool:
    return x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32


def _shape(x: Tensor, layer: ConvBN) -> ConvShape:
    """Of the convolution of x."""
    n, c, h, w = x.shape
    k, _, r, s = layer.w.shape
    return ConvShape(n, h, w, c, k, r, s, layer.stride, layer.padding)


def _config(op: ConvOp, x: Tensor, layer: ConvBN) -> ConvConfig:
    """Form, tiles and route of one product of the convolution of x."""
    return conv_config(op, _shape(x, layer), x.dtype, x.device, tf32=_allow_tf32(x))


def _stores_operand(config: ConvConfig) -> bool:
    """Whether a pass of its own stores what a prologue would form."""
    return config.stored or config.route == "cudnn"


def conv_bn(x: Tensor, layer: ConvBN, scale_shift: Tensor | None) -> LayerState:
    """See `block.Backend`."""
    config = _config("fprop", x, layer)
    geometry = {"stride": layer.stride, "padding": layer.padding}
    if scale_shift is not None and _stores_operand(config):
        x, scale_shift = bn_apply(x, scale_shift), None
    if config.route == "cudnn":
        y = to_dense_channels_last(ref.conv_ref(x, layer.w, **geometry))
        return LayerState(y, bn_stats(y, layer.batch_norm))
    y, stats = conv_fprop(
        x,
        layer.w,
        stride=layer.stride,
        padding=layer.padding,
        scale_shift=scale_shift,
        batch_norm=layer.batch_norm,
        allow_tf32=_allow_tf32(x),
        config=config,
    )
    assert stats is not None
    return LayerState(y, stats)


def apply(
    state: LayerState, shortcut: Tensor | None, shortcut_scale_shift: Tensor | None, relu: bool
) -> Tensor:
    """See `block.Backend`."""
    return bn_apply(
        state.y,
        state.scale_shift,
        residual=shortcut,
        residual_scale_shift=shortcut_scale_shift,
        relu=relu,
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
    from_y = mask is not None and mask.dim() == 2
    return bn_backward_reduce(
        dout,
        state,
        weight,
        out=None if from_y else mask,
        scale_shift=mask if from_y else None,
        projected=projected,
        projected_weight=projected_weight,
    )


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
    """See `block.Backend`; dy is stored once for both products where either wants it."""
    dgrad, wgrad = _config("dgrad", x, layer), _config("wgrad", x, layer)
    if need_dx and (dgrad.route, dgrad.form) == ("triton", "fused"):
        both = conv_gradients(
            dy,
            x,
            layer.w,
            stride=layer.stride,
            padding=layer.padding,
            shortcut=shortcut,
            producer=producer,
            producer_weight=producer_weight,
            dw_dtype=layer.dw_dtype,
            config=dgrad,
        )
        if both is not None:
            return both
        shape, tf32 = _shape(x, layer), _allow_tf32(x)
        dgrad = strip_config("dgrad", shape, x.dtype) or im2col_config(
            "dgrad", shape, x.dtype, tf32=tf32
        )
    if not need_dx:
        gradient = bn_backward_apply(dy) if _stores_operand(wgrad) else dy
        return ConvGrads(None, filter_gradient(gradient, x, layer, producer, wgrad))
    gradient, activation = shared_operands(dy, x, producer, dgrad, wgrad)
    dx, grads = input_gradient(
        gradient, x, layer, producer, producer_weight, shortcut, activation, dgrad
    )
    if activation is not None:
        x, producer = activation, None
    return ConvGrads(dx, filter_gradient(gradient, x, layer, producer, wgrad), grads)


def shared_operands(
    dy: DeferredGrad, x: Tensor, producer: LayerState | None, dgrad: ConvConfig, wgrad: ConvConfig
) -> tuple[Tensor | DeferredGrad, Tensor | None]:
    """What both gradients read: dy, stored where either wants it; room for the activation, or None.

    The kernel of dx reads the producer's y for its mask: there the activation costs a store.
    """
    stores = _stores_operand(wgrad) or _stores_operand(dgrad)
    gradient: Tensor | DeferredGrad = bn_backward_apply(dy) if stores else dy
    can_store = dgrad.route == "triton" and dgrad.form in ("im2col", "tma")
    if producer is None or not _stores_operand(wgrad) or not can_store:
        return gradient, None
    return gradient, torch.empty_like(x, memory_format=torch.channels_last)


def filter_gradient(
    dy: Tensor | DeferredGrad,
    x: Tensor,
    layer: ConvBN,
    producer: LayerState | None,
    config: ConvConfig,
) -> Tensor:
    """dw alone: that half of `conv_backward`."""
    scale_shift = None if producer is None else producer.scale_shift
    filter_size = (layer.w.shape[2], layer.w.shape[3])
    if scale_shift is not None and _stores_operand(config):
        x, scale_shift = bn_apply(x, scale_shift), None
    if config.route == "cudnn":
        assert isinstance(dy, Tensor)
        dw = ref.conv_wgrad_ref(x, dy, filter_size, stride=layer.stride, padding=layer.padding)
        return to_dense_channels_last(dw).to(layer.dw_dtype or dw.dtype)
    return conv_wgrad(
        x,
        dy,
        filter_size,
        stride=layer.stride,
        padding=layer.padding,
        scale_shift=scale_shift,
        allow_tf32=_allow_tf32(x),
        dw_dtype=layer.dw_dtype,
        config=config,
    )


def input_gradient(
    dy: Tensor | DeferredGrad,
    x: Tensor,
    layer: ConvBN,
    producer: LayerState | None,
    producer_weight: Tensor | None,
    shortcut: Tensor | None,
    activation: Tensor | None,
    config: ConvConfig,
) -> tuple[Tensor, BatchNormGrads | None]:
    """dx alone: the other half of `conv_backward`, which may fill in the activation too."""
    input_size = (x.shape[2], x.shape[3])
    if config.route == "cudnn":
        assert isinstance(dy, Tensor)
        dx = to_dense_channels_last(
            ref.conv_dgrad_ref(dy, layer.w, input_size, stride=layer.stride, padding=layer.padding)
        )
        if shortcut is not None:
            dx = dx.add_(shortcut)
        if producer is None or producer_weight is None:
            return dx, None
        grads, _ = bn_backward_reduce(
            dx, producer, producer_weight, scale_shift=producer.scale_shift
        )
        return grads.dy.g, grads
    return conv_dgrad(
        dy,
        layer.w,
        input_size,
        stride=layer.stride,
        padding=layer.padding,
        shortcut=shortcut,
        producer=producer,
        producer_weight=producer_weight,
        activation=activation,
        allow_tf32=_allow_tf32(x),
        config=config,
    )


def conv_folded(
    x: Tensor, layer: ConvBN, scale_shift: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    """`out = relu(a * conv(x) + b + residual)`: a layer of inference."""
    config = _config("fprop", x, layer)
    if config.route == "cudnn":
        y = to_dense_channels_last(
            ref.conv_ref(x, layer.w, stride=layer.stride, padding=layer.padding)
        )
        return bn_apply(y, scale_shift, residual=residual, relu=relu)
    return conv_fprop_folded(
        x,
        layer.w,
        scale_shift,
        stride=layer.stride,
        padding=layer.padding,
        residual=residual,
        relu=relu,
        allow_tf32=_allow_tf32(x),
        config=config,
    )


def adds_in_projection(x: Tensor, first: ConvBN, projection: ConvBN) -> bool:
    """See `block.Backend`: where cuDNN has no epilogue to add in, and the projection has."""
    routes = _config("dgrad", x, first).route, _config("dgrad", x, projection).route
    return routes == ("cudnn", "triton")


def block_folded(x: Tensor, block: Block, scale_shifts: Sequence[Tensor]) -> Tensor | None:
    """See `block.Backend`: there is none, each layer is a kernel."""
    return None
