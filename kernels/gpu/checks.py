"""What kernels hand to each other, and the checks their launchers share. Host code only.

Per-channel numbers travel as small fp32 tensors: `scale_shift` (2, C) holds a above b of
z = a * y + b; `coefficients` (3, C) holds c0, c1, c2 of dy = c0 * g + c1 * y + c2. Reductions over
pixels travel as one number a tile and channel, and a second kernel adds the tiles in fixed order:
no float atomics, so every result is bit-reproducible.
"""

from typing import NamedTuple

import torch
import triton.language as tl

__all__ = [
    "BNInput",
    "FoldedGrad",
    "TileStats",
    "TileSums",
    "check_activation",
    "check_bn_input",
    "check_filter",
    "check_folded_grad",
    "check_vector",
    "empty_nhwc",
    "index_dtype",
    "nhwc_strides",
]

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TileStats(NamedTuple):
    """Batch-norm statistics of y by tiles of consecutive pixels.

    partials: (2, C, num_tiles) fp32: the mean of each tile above its M2, the sum of squared
        distances from that mean. Tile t starts at pixel t * tile_rows.
    tile_rows: pixels in every tile but the last.
    num_rows: pixels in all tiles, N * P * Q.
    """

    partials: torch.Tensor
    tile_rows: int
    num_rows: int


class TileSums(NamedTuple):
    """Sums that the backward of batch norm needs, by tiles; each (C, num_tiles) fp32.

    g: sum of g, the gradient of the batch norm's output.
    gy: sum of g * (y - mean).
    gy_shortcut: the same against the shortcut's y and mean, where there is a projected shortcut.
    """

    g: torch.Tensor
    gy: torch.Tensor
    gy_shortcut: torch.Tensor | None = None


class FoldedGrad(NamedTuple):
    """A gradient dy = c0 * g + c1 * y + c2 that is formed while loading and never stored.

    g: (N, K, P, Q) channels_last gradient of the batch norm's output.
    y: (N, K, P, Q) channels_last input of the batch norm.
    coefficients: (3, K) fp32, from `bn_backward_finalize`.
    """

    g: torch.Tensor
    y: torch.Tensor
    coefficients: torch.Tensor


class BNInput(NamedTuple):
    """How the input x of a convolution was made: x = relu(a * y + b), or a stored block output.

    Exactly one of scale_shift and out is given; it decides the mask of the ReLU.

    y: (N, C, H, W) channels_last input of the batch norm that made x.
    mean: (C,) fp32 mean of y.
    scale_shift: (2, C) fp32; the mask is a * y + b > 0.
    out: (N, C, H, W) channels_last; the mask is out > 0.
    """

    y: torch.Tensor
    mean: torch.Tensor
    scale_shift: torch.Tensor | None = None
    out: torch.Tensor | None = None


def nhwc_strides(tensor: torch.Tensor | None) -> tuple[int, int, int]:
    """Strides of (n, h, w); where a dimension has one element, the stride a dense tensor has.

    torch leaves the stride of such a dimension open, and a kernel compiles once per stride.
    """
    if tensor is None:
        return (0, 0, 0)
    n, c, h, w = tensor.shape
    stride_n, _, stride_h, stride_w = tensor.stride()
    stride_w = stride_w if w > 1 else c
    stride_h = stride_h if h > 1 else w * stride_w
    stride_n = stride_n if n > 1 else h * stride_h
    return stride_n, stride_h, stride_w


def index_dtype(*tensors: torch.Tensor | None) -> tl.dtype:
    """int32 while every element offset, tails of tiles included, fits in it; else int64."""
    tail = 2**20
    for t in tensors:
        if t is None:
            continue
        last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        if last + tail >= 2**31:
            return tl.int64
    return tl.int32


def empty_nhwc(like: torch.Tensor, n: int, c: int, h: int, w: int) -> torch.Tensor:
    """An uninitialised dense channels_last tensor with the dtype and device of `like`."""
    return torch.empty(
        (n, c, h, w), dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def check_activation(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Demand an (N, C, H, W) float tensor with unit channel stride (channels_last, gaps allowed).

    Raises: ValueError: when rank, shape, dtype or layout differ, or the tensor is empty.
    """
    if tensor.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions (N, C, H, W), got {tuple(tensor.shape)}")
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(tensor.shape)}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be bfloat16, float16 or float32, got {tensor.dtype}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} must have dtype {dtype}, got {tensor.dtype}")
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(
            f"{name} must be channels_last (channel stride 1), got strides {tensor.stride()}"
        )


def check_filter(w: torch.Tensor, dtype: torch.dtype) -> None:
    """Demand dense filters, (K, C, R, S) in torch's words and (K, R, S, C) in memory.

    Raises: ValueError: when rank, dtype or layout differ, or the tensor is empty.
    """
    check_activation("w", w, dtype=dtype)
    _, c, r, s = w.shape
    if nhwc_strides(w) != (r * s * c, s * c, c):
        raise ValueError(f"w must be dense channels_last, got strides {w.stride()}")


def check_vector(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Demand a contiguous fp32 tensor of per-channel numbers.

    Raises: ValueError: when shape, dtype or layout differ.
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != torch.float32:
        raise ValueError(f"{name} must be float32, got {tensor.dtype}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


class GradParts(NamedTuple):
    """A gradient as a kernel takes it: read (g alone), or formed from all three."""

    g: torch.Tensor
    y: torch.Tensor | None
    coefficients: torch.Tensor | None


def check_folded_grad(dy: torch.Tensor | FoldedGrad) -> GradParts:
    """Check a gradient given in either form and return its parts.

    Raises: ValueError: when a part differs in shape, dtype or layout.
    """
    if isinstance(dy, torch.Tensor):
        check_activation("dy", dy)
        return GradParts(dy, None, None)
    check_activation("dy.g", dy.g)
    check_activation("dy.y", dy.y, tuple(dy.g.shape), dy.g.dtype)
    check_vector("dy.coefficients", dy.coefficients, (3, dy.g.shape[1]))
    return GradParts(*dy)


class BNInputParts(NamedTuple):
    """`BNInput`, or four times None."""

    y: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    scale_shift: torch.Tensor | None = None
    out: torch.Tensor | None = None


def check_bn_input(
    bn_input: BNInput | None, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> BNInputParts:
    """Check how the input of a convolution was made and return the parts.

    Raises: ValueError: when a part differs in shape, dtype or layout, or the mask is given twice.
    """
    if bn_input is None:
        return BNInputParts()
    if (bn_input.scale_shift is None) == (bn_input.out is None):
        raise ValueError("bn_input must have exactly one of scale_shift and out")
    check_activation("bn_input.y", bn_input.y, shape, dtype)
    check_vector("bn_input.mean", bn_input.mean, (shape[1],))
    if bn_input.scale_shift is not None:
        check_vector("bn_input.scale_shift", bn_input.scale_shift, (2, shape[1]))
    if bn_input.out is not None:
        check_activation("bn_input.out", bn_input.out, shape, dtype)
    return BNInputParts(*bn_input)
