"""The steps of a fused block in C++ kernels, each convolution on the faster of two routes.

`fused`: bf16 convolutions of few channels in AVX-512, 3x3 and 1x1 (conv.cpp), with batch norm,
ReLU, shortcut and sums in their prologue and epilogue, an image at a time in the cache: the scheme
of the GPU kernels.
`onednn`: torch's convolution, with the batch-norm kernels around it (batchnorm.cpp), each one pass.

bf16 and fp32. Deterministic for one number of threads.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.kernels.block import Block
from fastres.kernels.conv_types import (
    BatchNormGrads,
    ConvBN,
    ConvGrads,
    DeferredGrad,
    LayerState,
)
from fastres.kernels.cpu import build as cpu_build
from fastres.kernels.layout import empty_channels_last, to_dense_channels_last

__all__ = [
    "adds_in_projection",
    "apply",
    "block_folded",
    "conv_backward",
    "conv_bn",
    "conv_folded",
    "fuses_conv",
    "reduce",
    "runs_on",
]

_DTYPES = (torch.bfloat16, torch.float32)
# Input and output channels that the fused convolutions are written for, by stride.
_CHANNELS = {
    1: ((16, 32, 64), (16, 32, 64)),
    2: ((16, 32, 64, 128), (16, 32, 64, 128, 256)),
}


def runs_on(x: Tensor) -> bool:
    """Whether the kernels compute on x."""
    return x.device.type == "cpu" and x.dtype in _DTYPES and cpu_build.library() is not None


def _is_fused(x: Tensor, layer: ConvBN) -> bool:
    """Whether the fused kernels know this convolution."""
    return x.dtype == torch.bfloat16 and fuses_conv(x.shape[2], x.shape[3], layer)


def fuses_conv(height: int, width: int, layer: ConvBN) -> bool:
    """Whether the fused kernels know this convolution of maps of a size, in bf16.

    height, width: of the input. layer: of it shape, stride and padding count.
    """
    k, c, *filter_size = layer.w.shape
    is_3x3 = filter_size == [3, 3] and layer.padding == 1
    inputs, outputs = _CHANNELS.get(layer.stride, ((), ()))
    return (
        (is_3x3 or (_is_1x1(layer) and layer.stride == 2))
        and (c in inputs or (c == 3 and is_3x3))
        and k in outputs
        and height % layer.stride == width % layer.stride == 0
        and width // layer.stride >= 8
        and cpu_build.has_fused_conv()
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
    """An uninitialised y of a fused convolution."""
    n, _, h, w = x.shape
    return empty_channels_last(x, n, layer.w.shape[0], h // layer.stride, w // layer.stride)


def _apply(
    y: Tensor,
    scale_shift: Tensor,
    shortcut: Tensor | None,
    shortcut_scale_shift: Tensor | None,
    relu: bool,
    *,
    in_place: bool = False,
) -> Tensor:
    out = y if in_place else torch.empty_like(y, memory_format=torch.channels_last)
    shortcut = None if shortcut is None else to_dense_channels_last(shortcut)
    operands = (y, scale_shift, shortcut, shortcut_scale_shift, out)
    cpu_build.call("bn_apply", *operands, *_image_shape(y), int(relu))
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
        return to_dense_channels_last(
            F.conv2d(x, layer.w, stride=layer.stride, padding=layer.padding)
        )
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
        return (to_dense_channels_last(dx) if need_dx else None), to_dense_channels_last(dw)
    k, c = layer.w.shape[:2]
    rows = dy.permute(0, 2, 3, 1).reshape(-1, k)
    dw = to_dense_channels_last((rows.t() @ _rows(x, layer)).view_as(layer.w))
    if not need_dx:
        return None, dw
    dx = torch.zeros_like(x) if layer.stride > 1 else torch.empty_like(x)
    seen = dx.permute(0, 2, 3, 1)[:, :: layer.stride, :: layer.stride]
    seen.copy_((rows @ layer.w.view(k, c)).view(seen.shape))
    return dx, dw


def conv_bn(x: Tensor, layer: ConvBN, scale_shift: Tensor | None) -> LayerState:
    """See `block.Backend`."""
    x, k = to_dense_channels_last(x), layer.w.shape[0]
    stats = _vectors(5, k)
    results: list[Tensor | float] = [*layer.batch_norm, stats]
    if _is_fused(x, layer):
        y = _empty_output(x, layer)
        _check_values(y)
        operands = (x, scale_shift, to_dense_channels_last(layer.w), y)
        cpu_build.call("conv_fprop", *operands, *results, *_sizes(x, layer))
    else:
        activation = x if scale_shift is None else _apply(x, scale_shift, None, None, True)
        y = _convolve(activation, layer)
        _check_values(y)
        cpu_build.call("bn_stats", y, *results, *_image_shape(y))
    return LayerState(y, stats)


def _check_values(y: Tensor) -> None:
    if y.numel() <= y.shape[1]:
        raise ValueError(f"training needs more than 1 value a channel, got {tuple(y.shape)}")


def apply(
    state: LayerState, shortcut: Tensor | None, shortcut_scale_shift: Tensor | None, relu: bool
) -> Tensor:
    """See `block.Backend`."""
    return _apply(state.y, state.scale_shift, shortcut, shortcut_scale_shift, relu)


def reduce(
    dout: Tensor,
    state: LayerState,
    weight: Tensor,
    mask: Tensor | None,
    projected: LayerState | None,
    projected_weight: Tensor | None,
) -> tuple[BatchNormGrads, BatchNormGrads | None]:
    """See `block.Backend`."""
    dout = to_dense_channels_last(dout)
    g = torch.empty_like(dout)
    sums, projected_sums = _reduce(dout, state, mask, projected, g)
    grads = _batch_norm_grads(g, sums[0], sums[1], state, weight)
    if projected is None or projected_weight is None:
        return grads, None
    return grads, _batch_norm_grads(g, sums[0], projected_sums[1], projected, projected_weight)


def _empty_sums(channels: int) -> Tensor:
    """Sums as the kernels write them: (2, K) fp64, of g above those of g * (y - mean)."""
    return torch.empty((2, channels), dtype=torch.float64, device="cpu")


def _reduce(
    dout: Tensor, state: LayerState, mask: Tensor | None, projected: LayerState | None, g: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the masked gradient into g, which may be dout itself; its sums, the projection's."""
    sums, projected_sums = (_empty_sums(dout.shape[1]) for _ in range(2))
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
    return sums, projected_sums


def _batch_norm_grads(
    g: Tensor, sum_g: Tensor, sum_gy: Tensor, state: LayerState, weight: Tensor
) -> BatchNormGrads:
    """The gradients of a batch norm from the sums of g and of g * (y - mean)."""
    k = g.shape[1]
    dgamma, dbeta, coefficients = (_vectors(*size) for size in ((k,), (k,), (3, k)))
    operands = (sum_g, sum_gy, state.mean, state.rstd, weight, g.numel() // k, k)
    cpu_build.call("defer_dy", *operands, dgamma, dbeta, coefficients)
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
    x = to_dense_channels_last(x)
    if _is_fused(x, layer) and not (need_dx and x.shape[1] == 3):
        return _fused_backward(dy, x, layer, producer, producer_weight, shortcut, need_dx)
    return _onednn_backward(dy, x, layer, producer, producer_weight, shortcut, need_dx)


def _fused_backward(
    dy: DeferredGrad,
    x: Tensor,
    layer: ConvBN,
    producer: LayerState | None,
    producer_weight: Tensor | None,
    shortcut: Tensor | None,
    need_dx: bool,
) -> ConvGrads:
    filters = to_dense_channels_last(layer.w)
    dw = torch.empty_like(filters)
    dx = torch.empty_like(x) if need_dx else None
    sums = None if producer is None else _empty_sums(x.shape[1])
    cpu_build.call(
        "conv_backward",
        *dy,
        x,
        None if producer is None else producer.scale_shift,
        None if producer is None else producer.mean,
        filters,
        None if shortcut is None else to_dense_channels_last(shortcut),
        dx,
        dw,
        sums,
        *_sizes(x, layer),
    )
    if dx is None or sums is None or producer is None or producer_weight is None:
        return ConvGrads(dx, dw)
    return ConvGrads(dx, dw, _batch_norm_grads(dx, sums[0], sums[1], producer, producer_weight))


def _onednn_backward(
    dy: DeferredGrad,
    x: Tensor,
    layer: ConvBN,
    producer: LayerState | None,
    producer_weight: Tensor | None,
    shortcut: Tensor | None,
    need_dx: bool,
) -> ConvGrads:
    computed_dy = torch.empty_like(dy.g)
    cpu_build.call("bn_compute_dy", *dy, computed_dy, *_image_shape(computed_dy))
    activation = x if producer is None else _apply(x, producer.scale_shift, None, None, True)
    dx, dw = _convolve_backward(computed_dy, activation, layer, need_dx)
    if dx is None:
        return ConvGrads(None, dw)
    if shortcut is not None:
        dx.add_(shortcut)
    if producer is None or producer_weight is None:
        return ConvGrads(dx, dw)
    sums, _ = _reduce(dx, producer, producer.scale_shift, None, dx)
    return ConvGrads(dx, dw, _batch_norm_grads(dx, sums[0], sums[1], producer, producer_weight))


def conv_folded(
    x: Tensor, layer: ConvBN, scale_shift: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    """`out = relu(a * conv(x) + b + residual)`: a layer of inference."""
    x = to_dense_channels_last(x)
    if not _is_fused(x, layer):
        return _apply(_convolve(x, layer), scale_shift, residual, None, relu, in_place=True)
    out = _empty_output(x, layer)
    given = None if residual is None else to_dense_channels_last(residual)
    operands = (x, to_dense_channels_last(layer.w), scale_shift, given, out)
    cpu_build.call("conv_folded", *operands, *_sizes(x, layer), int(relu))
    return out


def _fuses_block(x: Tensor, block: Block, scale_shifts: Sequence[Tensor]) -> bool:
    """Whether there is a kernel for a block; for layers that do not fit together there is none."""
    layers, projection = block.layers, block.projection
    if len(layers) != 2 or x.dim() != 4 or layers[0].w.dim() != 4 or x.dtype != torch.bfloat16:
        return False
    (n, c, h, w), (first, second) = x.shape, layers
    k, stride = first.w.shape[0], first.stride
    operands = [layer.w for layer in block.all_layers]
    wanted: list[tuple[int, ...]] = [(k, c, 3, 3), (k, k, 3, 3), (k, c, 1, 1)]
    return (
        n > 0
        and block.relu
        and [filters.shape for filters in operands] == wanted[: len(operands)]
        and all(filters.dtype == x.dtype for filters in operands)
        and [(t.shape, t.dtype) for t in scale_shifts] == [((2, k), torch.float32)] * len(operands)
        and all(t.device == x.device for t in (*operands, *scale_shifts))
        and c != 3
        and second.stride == 1
        and (projection is None or projection.stride == stride)
        and (block.shortcut != "input" or (c == k and stride == 1))
        and all(fuses_conv(h, w, layer) for layer in block.all_layers if layer is not second)
        and fuses_conv(h // stride, w // stride, second)
    )


def adds_in_projection(x: Tensor, first: ConvBN, projection: ConvBN) -> bool:
    """See `block.Backend`: the main path adds the projection's."""
    return False


def block_folded(x: Tensor, block: Block, scale_shifts: Sequence[Tensor]) -> Tensor | None:
    """See `block.Backend`: there is one for bf16 basic blocks of few channels, with ReLU."""
    if not _fuses_block(x, block, scale_shifts):
        return None
    x, first = to_dense_channels_last(x), block.layers[0]
    out = _empty_output(x, first)
    first_w, second_w, *projection_w = (
        to_dense_channels_last(layer.w) for layer in block.all_layers
    )
    first_scale_shift, second_scale_shift, *projection_scale_shift = (
        t.contiguous() for t in scale_shifts
    )
    projected = (*projection_w, *projection_scale_shift) or (None, None)
    operands = (x, first_w, first_scale_shift, second_w, second_scale_shift, *projected, out)
    add_input = int(block.shortcut == "input")
    cpu_build.call("block_folded", *operands, *_sizes(x, first)[:-1], add_input)
    return out
