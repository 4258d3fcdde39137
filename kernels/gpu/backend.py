"""The steps of a chain in Triton kernels, each convolution on the route of the launch table.

`triton`: batch norm, ReLU, shortcut and sums happen in the convolution's prologue and epilogue.
`cudnn`: torch's convolution, with what it cannot fold made by the Triton batch-norm kernels around
it: an activation or dy stored, a pass for statistics or sums. Both routes meet in the same tensors,
so every convolution of a chain chooses for itself, and each of its three products too.

fp32 products round to TF32 where torch allows its own convolutions to.
"""

import torch
from torch import Tensor

from fastres.kernels.block import BackwardStep, LayerState
from fastres.kernels.conv_shape import ConvOp, ConvShape
from fastres.kernels.gpu.batchnorm_bwd import (
    bn_backward_apply,
    bn_backward_finalize,
    bn_backward_reduce,
)
from fastres.kernels.gpu.batchnorm_fwd import bn_apply, bn_finalize, bn_stats
from fastres.kernels.gpu.checks import BNInput, FoldedGrad, TileSums
from fastres.kernels.gpu.conv_dgrad import conv_dgrad
from fastres.kernels.gpu.conv_fprop import conv_fprop, conv_fprop_folded
from fastres.kernels.gpu.conv_wgrad import conv_wgrad
from fastres.kernels.gpu.launch_config import ConvConfig, conv_config
from fastres.kernels.gpu.primitives import INTERPRETED
from fastres.kernels.reference import block as ref
from fastres.kernels.reference.backend import to_nhwc
from fastres.kernels.reference.block import ConvBN

__all__ = [
    "apply",
    "conv_backward",
    "conv_bn",
    "conv_folded",
    "fold_grad",
    "reduce",
    "runs_on",
]


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on tensors of `device`: GPUs, and CPUs in Triton's interpreter."""
    return device.type == "cuda" or (device.type == "cpu" and bool(INTERPRETED.value))


def _allow_tf32(x: Tensor) -> bool:
    return x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32


def _config(op: ConvOp, x: Tensor, layer: ConvBN) -> ConvConfig:
    """Tiles and route of one product of the convolution of x."""
    n, c, h, w = x.shape
    k, _, r, s = layer.w.shape
    shape = ConvShape(n, h, w, c, k, r, s, layer.stride, layer.padding)
    return conv_config(op, shape, x.dtype, x.device, tf32=_allow_tf32(x))


def conv_bn(x: Tensor, layer: ConvBN, fold: Tensor | None) -> LayerState:
    """See `chain.Backend`."""
    config = _config("fprop", x, layer)
    geometry = {"stride": layer.stride, "padding": layer.padding}
    if config.route == "cudnn":
        activation = x if fold is None else bn_apply(x, fold)
        y = to_nhwc(ref.conv_ref(activation, layer.w, **geometry))
        stats = bn_stats(y)
    else:
        y, tile_stats = conv_fprop(
            x,
            layer.w,
            stride=layer.stride,
            padding=layer.padding,
            scale_shift=fold,
            store_stats=True,
            allow_tf32=_allow_tf32(x),
            config=config,
        )
        assert tile_stats is not None
        stats = tile_stats
    bn = bn_finalize(stats, layer.weight, layer.bias, eps=layer.eps)
    return LayerState(y, bn.mean, bn.unbiased_var, bn.rstd, bn.scale_shift)


def apply(state: LayerState, shortcut: Tensor | None, fold: Tensor | None, relu: bool) -> Tensor:
    """See `chain.Backend`."""
    return bn_apply(
        state.y, state.scale_shift, residual=shortcut, residual_scale_shift=fold, relu=relu
    )


def reduce(
    dout: Tensor, state: LayerState, mask: Tensor | None, projected: LayerState | None
) -> tuple[Tensor, TileSums]:
    """See `chain.Backend`."""
    from_y = mask is not None and mask.dim() == 2
    return bn_backward_reduce(
        dout,
        state.y,
        state.mean,
        out=None if from_y else mask,
        scale_shift=mask if from_y else None,
        y_shortcut=None if projected is None else projected.y,
        mean_shortcut=None if projected is None else projected.mean,
    )


def fold_grad(
    g: Tensor, sums: TileSums, state: LayerState, weight: Tensor, *, of_projection: bool
) -> tuple[FoldedGrad, Tensor, Tensor]:
    """See `chain.Backend`."""
    sum_gy = sums.gy_shortcut if of_projection else sums.gy
    assert sum_gy is not None
    count = g.numel() // g.shape[1]
    grads = bn_backward_finalize(sums.g, sum_gy, state.mean, state.rstd, weight, count)
    return FoldedGrad(g, state.y, grads.coefficients), grads.dgamma, grads.dbeta


def conv_backward(
    dy: FoldedGrad,
    x: Tensor,
    layer: ConvBN,
    *,
    before: LayerState | None,
    shortcut: Tensor | None,
    need_dx: bool,
) -> BackwardStep:
    """See `chain.Backend`; dy is stored once where either product is cuDNN's."""
    dgrad, wgrad = _config("dgrad", x, layer), _config("wgrad", x, layer)
    gradient: Tensor | FoldedGrad = dy
    if wgrad.route == "cudnn" or (need_dx and dgrad.route == "cudnn"):
        gradient = bn_backward_apply(dy)
    dw = _filter_gradient(gradient, x, layer, before, wgrad)
    if not need_dx:
        return BackwardStep(None, dw, None)
    dx, sums = _input_gradient(gradient, x, layer, before, shortcut, dgrad)
    return BackwardStep(dx, dw, sums)


def _filter_gradient(
    dy: Tensor | FoldedGrad, x: Tensor, layer: ConvBN, before: LayerState | None, config: ConvConfig
) -> Tensor:
    fold = None if before is None else before.scale_shift
    filter_size = (layer.w.shape[2], layer.w.shape[3])
    if config.route == "cudnn":
        assert isinstance(dy, Tensor)
        activation = x if fold is None else bn_apply(x, fold)
        return to_nhwc(
            ref.conv_wgrad_ref(
                activation, dy, filter_size, stride=layer.stride, padding=layer.padding
            )
        )
    return conv_wgrad(
        x,
        dy,
        filter_size,
        stride=layer.stride,
        padding=layer.padding,
        scale_shift=fold,
        allow_tf32=_allow_tf32(x),
        config=config,
    )


def _input_gradient(
    dy: Tensor | FoldedGrad,
    x: Tensor,
    layer: ConvBN,
    before: LayerState | None,
    shortcut: Tensor | None,
    config: ConvConfig,
) -> tuple[Tensor, TileSums | None]:
    input_size = (x.shape[2], x.shape[3])
    if config.route == "cudnn":
        assert isinstance(dy, Tensor)
        dx = to_nhwc(
            ref.conv_dgrad_ref(dy, layer.w, input_size, stride=layer.stride, padding=layer.padding)
        )
        if shortcut is not None:
            dx = dx.add_(shortcut)
        if before is None:
            return dx, None
        return bn_backward_reduce(dx, before.y, before.mean, scale_shift=before.scale_shift)
    return conv_dgrad(
        dy,
        layer.w,
        input_size,
        stride=layer.stride,
        padding=layer.padding,
        shortcut=shortcut,
        bn_input=None if before is None else BNInput(before.y, before.mean, before.scale_shift),
        allow_tf32=_allow_tf32(x),
        config=config,
    )


def conv_folded(
    x: Tensor, layer: ConvBN, scale_shift: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    """`out = relu(a * conv(x) + b + residual)`: a layer of inference."""
    config = _config("fprop", x, layer)
    if config.route == "cudnn":
        y = to_nhwc(ref.conv_ref(x, layer.w, stride=layer.stride, padding=layer.padding))
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
