"""The steps of a chain in the CPU kernels, each convolution on the faster of two routes.

`direct`: bf16 convolutions of few channels, 3x3 and 1x1 (conv.cpp), with batch norm, ReLU,
shortcut and sums in their prologue and epilogue, an image at a time in the cache: the scheme of the
GPU kernels.
`onednn`: torch's convolution, with the batch-norm kernels around it (batchnorm.cpp), each one pass.

bf16 and fp32. Deterministic for one number of threads.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.kernels.block import BackwardStep, LayerState
from fastres.kernels.cpu import build as cpu_build
from fastres.kernels.reference.backend import FoldedGrad, to_nhwc
from fastres.kernels.reference.block import ConvBN

__all__ = [
    "apply",
    "block_folded",
    "conv_backward",
    "conv_bn",
    "conv_folded",
    "fold_grad",
    "is_direct_block",
    "reduce",
    "runs_on",
]

_DTYPES = (torch.bfloat16, torch.float32)
# Input and output channels that the direct convolutions are written for, by stride.
_CHANNELS = {
    1: ((16, 32, 64), (16, 32, 64)),
    2: ((16, 32, 64, 128), (16, 32, 64, 128, 256)),
}


class Sums(NamedTuple):
    """Sums over the pixels: (2, K) fp64, of g above those of g * (y - mean); and the shortcut's."""

    g: Tensor
    shortcut: Tensor | None = None


def runs_on(x: Tensor) -> bool:
    """Whether the kernels compute on x."""
    return x.device.type == "cpu" and x.dtype in _DTYPES and cpu_build.library() is not None


def _is_direct(x: Tensor, layer: ConvBN) -> bool:
    """Whether the direct kernels know this convolution."""
    return x.dtype == torch.bfloat16 and _is_direct_size(x.shape[2], x.shape[3], layer)


def _is_direct_size(height: int, width: int, layer: ConvBN) -> bool:
    """Whether the direct kernels know this convolution of maps of a size, in bf16."""
    k, c, *filter_size = layer.w.shape
    is_3x3 = filter_size == [3, 3] and layer.padding == 1
    inputs, outputs = _CHANNELS.get(layer.stride, ((), ()))
    return (
        (is_3x3 or (_is_1x1(layer) and layer.stride == 2))
        and (c in inputs or (c == 3 and is_3x3))
        and k in outputs
        and height % layer.stride == width % layer.stride == 0
        and width // layer.stride >= 8
        and cpu_build.has_direct_conv()
    )


def _image_shape(t: Tensor) -> tuple[int, int, int]:
    """Images, pixels of an image, channels."""
    n, c, h, w = t.shape
    return n, h * w, c


def _sizes(x: Tensor, layer: ConvBN) -> tuple[int, ...]:
    """Images, height, width, input channels, output channels, stride and filter side."""
    n, c, h, w = x.shape
    k, _, side, _ = layer.w.shape
    return n, h, w, c, k, layer.stride, side


def _vectors(*sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=torch.float32, device="cpu")


def _empty_output(x: Tensor, layer: ConvBN) -> Tensor:
    """An uninitialised y of a direct convolution."""
    n, _, h, w = x.shape
    size = (n, layer.w.shape[0], h // layer.stride, w // layer.stride)
    return torch.empty(size, dtype=x.dtype, device="cpu", memory_format=torch.channels_last)


def _apply(
    y: Tensor,
    scale_shift: Tensor,
    shortcut: Tensor | None,
    fold: Tensor | None,
    relu: bool,
    *,
    in_place: bool = False,
) -> Tensor:
    out = y if in_place else torch.empty_like(y, memory_format=torch.channels_last)
    shortcut = None if shortcut is None else to_nhwc(shortcut)
    cpu_build.call("bn_apply", y, scale_shift, shortcut, fold, out, *_image_shape(y), int(relu))
    return out


def _is_1x1(layer: ConvBN) -> bool:
    """Whether the convolution is a matrix product of pixels: 1x1 without padding."""
    return layer.w.shape[2:] == (1, 1) and layer.padding == 0


def _rows(x: Tensor, layer: ConvBN) -> Tensor:
    """The pixels that a 1x1 convolution looks at: (N * P * Q, C)."""
    seen = x.permute(0, 2, 3, 1)[:, :: layer.stride, :: layer.stride]
    return seen.reshape(-1, x.shape[1])


def _convolve(x: Tensor, layer: ConvBN) -> Tensor:
    """Torch's convolution of x; a strided 1x1 as a matrix product, which is safe and faster."""
    if layer.stride == 1 or not _is_1x1(layer):
        return to_nhwc(F.conv2d(x, layer.w, stride=layer.stride, padding=layer.padding))
    n, _, h, w = x.shape
    k, c = layer.w.shape[:2]
    y = _rows(x, layer) @ layer.w.view(k, c).t()
    p, q = (-(-size // layer.stride) for size in (h, w))
    return y.view(n, p, q, k).permute(0, 3, 1, 2)


def _convolve_backward(
    dy: Tensor, x: Tensor, layer: ConvBN, need_dx: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients dx (None where unwanted) and dw of `_convolve`."""
    if layer.stride == 1 or not _is_1x1(layer):
        geometry = [[layer.stride] * 2, [layer.padding] * 2, [1, 1], False, [0, 0], 1]
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy, x, layer.w, None, *geometry, [need_dx, True, False]
        )
        return (to_nhwc(dx) if need_dx else None), to_nhwc(dw)
    k, c = layer.w.shape[:2]
    rows = dy.permute(0, 2, 3, 1).reshape(-1, k)
    dw = to_nhwc((rows.t() @ _rows(x, layer)).view_as(layer.w))
    if not need_dx:
        return None, dw
    dx = torch.zeros_like(x) if layer.stride > 1 else torch.empty_like(x)
    seen = dx.permute(0, 2, 3, 1)[:, :: layer.stride, :: layer.stride]
    seen.copy_((rows @ layer.w.view(k, c)).view(seen.shape))
    return dx, dw


def conv_bn(x: Tensor, layer: ConvBN, fold: Tensor | None) -> LayerState:
    """See `chain.Backend`."""
    x, k = to_nhwc(x), layer.w.shape[0]
    mean, unbiased_var, rstd, scale_shift = (_vectors(*size) for size in ((k,), (k,), (k,), (2, k)))
    results = (layer.weight, layer.bias, layer.eps, mean, unbiased_var, rstd, scale_shift)
    if _is_direct(x, layer):
        y = _empty_output(x, layer)
        _check_values(y)
        cpu_build.call("conv_fprop", x, fold, to_nhwc(layer.w), y, *results, *_sizes(x, layer))
    else:
        y = _convolve(x if fold is None else _apply(x, fold, None, None, True), layer)
        _check_values(y)
        cpu_build.call("bn_stats", y, *results, *_image_shape(y))
    return LayerState(y, mean, unbiased_var, rstd, scale_shift)


def _check_values(y: Tensor) -> None:
    if y.numel() <= y.shape[1]:
        raise ValueError(f"training needs more than 1 value a channel, got {tuple(y.shape)}")


def apply(state: LayerState, shortcut: Tensor | None, fold: Tensor | None, relu: bool) -> Tensor:
    """See `chain.Backend`."""
    return _apply(state.y, state.scale_shift, shortcut, fold, relu)


def reduce(
    dout: Tensor, state: LayerState, mask: Tensor | None, projected: LayerState | None
) -> tuple[Tensor, Sums]:
    """See `chain.Backend`."""
    dout = to_nhwc(dout)
    return _reduce(dout, state, mask, projected, torch.empty_like(dout))


def _reduce(
    dout: Tensor, state: LayerState, mask: Tensor | None, projected: LayerState | None, g: Tensor
) -> tuple[Tensor, Sums]:
    """`reduce` into g, which may be dout itself."""
    k = dout.shape[1]
    sums = torch.empty((2, k), dtype=torch.float64, device="cpu")
    projected_sums = None if projected is None else torch.empty_like(sums)
    from_y = mask is not None and mask.dim() == 2
    cpu_build.call(
        "bn_reduce",
        dout,
        state.y,
        None if from_y else mask,
        mask if from_y else None,
        state.mean,
        None if projected is None else projected.y,
        None if projected is None else projected.mean,
        g,
        sums,
        projected_sums,
        *_image_shape(dout),
    )
    return g, Sums(sums, projected_sums)


def fold_grad(
    g: Tensor, sums: Sums, state: LayerState, weight: Tensor, *, of_projection: bool
) -> tuple[FoldedGrad, Tensor, Tensor]:
    """See `chain.Backend`."""
    k = g.shape[1]
    along_y = sums.shortcut if of_projection else sums.g
    assert along_y is not None
    dgamma, dbeta, coefficients = (_vectors(*size) for size in ((k,), (k,), (3, k)))
    count = g.numel() // k
    inputs = (sums.g, along_y[1], state.mean, state.rstd, weight)
    cpu_build.call("fold_grad", *inputs, count, k, dgamma, dbeta, coefficients)
    return FoldedGrad(g, state.y, coefficients), dgamma, dbeta


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
    x = to_nhwc(x)
    if _is_direct(x, layer) and not (need_dx and x.shape[1] == 3):
        return _direct_backward(dy, x, layer, before, shortcut, need_dx)
    return _onednn_backward(dy, x, layer, before, shortcut, need_dx)


def _direct_backward(
    dy: FoldedGrad,
    x: Tensor,
    layer: ConvBN,
    before: LayerState | None,
    shortcut: Tensor | None,
    need_dx: bool,
) -> BackwardStep:
    filters = to_nhwc(layer.w)
    dw = torch.empty_like(filters)
    dx = torch.empty_like(x) if need_dx else None
    sums = (
        None if before is None else torch.empty((2, x.shape[1]), dtype=torch.float64, device="cpu")
    )
    cpu_build.call(
        "conv_backward",
        *dy,
        x,
        None if before is None else before.scale_shift,
        None if before is None else before.mean,
        filters,
        None if shortcut is None else to_nhwc(shortcut),
        dx,
        dw,
        sums,
        *_sizes(x, layer),
    )
    return BackwardStep(dx, dw, None if sums is None else Sums(sums))


def _onednn_backward(
    dy: FoldedGrad,
    x: Tensor,
    layer: ConvBN,
    before: LayerState | None,
    shortcut: Tensor | None,
    need_dx: bool,
) -> BackwardStep:
    formed = torch.empty_like(dy.g)
    cpu_build.call("bn_form_dy", *dy, formed, *_image_shape(formed))
    activation = x if before is None else _apply(x, before.scale_shift, None, None, True)
    dx, dw = _convolve_backward(formed, activation, layer, need_dx)
    if dx is None:
        return BackwardStep(None, dw, None)
    if shortcut is not None:
        dx.add_(shortcut)
    if before is None:
        return BackwardStep(dx, dw, None)
    g, sums = _reduce(dx, before, before.scale_shift, None, dx)
    return BackwardStep(g, dw, sums)


def conv_folded(
    x: Tensor, layer: ConvBN, scale_shift: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    """`out = relu(a * conv(x) + b + residual)`: a layer of inference."""
    x = to_nhwc(x)
    if not _is_direct(x, layer):
        return _apply(_convolve(x, layer), scale_shift, residual, None, relu, in_place=True)
    out = _empty_output(x, layer)
    given = None if residual is None else to_nhwc(residual)
    operands = (x, to_nhwc(layer.w), scale_shift, given, out)
    cpu_build.call("conv_folded", *operands, *_sizes(x, layer), int(relu))
    return out


def is_direct_block(
    x: Tensor,
    layers: Sequence[ConvBN],
    scale_shifts: Sequence[Tensor],
    projection: ConvBN | None,
    add_input: bool,
) -> bool:
    """Whether `block_folded` knows a block. Layers that do not fit together it does not know."""
    if len(layers) != 2 or x.dim() != 4 or layers[0].w.dim() != 4 or x.dtype != torch.bfloat16:
        return False
    (n, c, h, w), (first, second) = x.shape, layers
    k, stride = first.w.shape[0], first.stride
    everything = [first, second] if projection is None else [first, second, projection]
    wanted: list[tuple[int, ...]] = [(k, c, 3, 3), (k, k, 3, 3), (k, c, 1, 1)]
    operands = [layer.w for layer in everything]
    return (
        n > 0
        and [layer.w.shape for layer in everything] == wanted[: len(everything)]
        and all(w.dtype == x.dtype for w in operands)
        and [(t.shape, t.dtype) for t in scale_shifts] == [((2, k), torch.float32)] * len(operands)
        and all(t.device == x.device for t in (*operands, *scale_shifts))
        and c != 3
        and second.stride == 1
        and (projection is None or projection.stride == stride)
        and (projection is not None or not add_input or (c == k and stride == 1))
        and all(_is_direct_size(h, w, layer) for layer in everything if layer is not second)
        and _is_direct_size(h // stride, w // stride, second)
    )


def block_folded(
    x: Tensor,
    layers: Sequence[ConvBN],
    scale_shifts: Sequence[Tensor],
    projection: ConvBN | None,
    add_input: bool,
) -> Tensor:
    """A basic block of inference, see `fused.residual_block_folded`."""
    x, first = to_nhwc(x), layers[0]
    out = _empty_output(x, first)
    filters = [to_nhwc(layer.w) for layer in layers]
    folds = [t.contiguous() for t in scale_shifts]
    projected = (None, None) if projection is None else (to_nhwc(projection.w), folds[2])
    operands = (x, filters[0], folds[0], filters[1], folds[1], *projected, out)
    cpu_build.call("block_folded", *operands, *_sizes(x, first)[:-1], int(add_input))
    return out
