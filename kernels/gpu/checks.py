"""What the launchers of the kernels share: checks of their tensors, strides. Host code only.

Per-channel numbers travel as small fp32 tensors: `scale_shift` (2, C) holds a above b of
z = a * y + b; `coefficients` (3, C) holds c0, c1, c2 of dy = c0 * g + c1 * y + c2.
"""

from typing import NamedTuple

import torch
import triton.language as tl

from fastres.kernels.conv_types import BatchNorm, DeferredGrad, LayerState

__all__ = [
    "check_activation",
    "check_batch_norm",
    "check_deferred_grad",
    "check_filter",
    "check_state",
    "check_vector",
    "index_dtype",
    "nhwc_strides",
]

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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


class GradOperands(NamedTuple):
    """A gradient as a kernel takes it: stored (g alone), or computed from all three."""

    g: torch.Tensor
    y: torch.Tensor | None
    coefficients: torch.Tensor | None


def check_deferred_grad(dy: torch.Tensor | DeferredGrad) -> GradOperands:
    """Check a gradient, stored or deferred, and return what a kernel reads.

    Raises: ValueError: when a tensor differs in shape, dtype or layout.
    """
    if isinstance(dy, torch.Tensor):
        check_activation("dy", dy)
        return GradOperands(dy, None, None)
    check_activation("dy.g", dy.g)
    check_activation("dy.y", dy.y, tuple(dy.g.shape), dy.g.dtype)
    check_vector("dy.coefficients", dy.coefficients, (3, dy.g.shape[1]))
    return GradOperands(*dy)


def check_batch_norm(batch_norm: BatchNorm, channels: int, num_pixels: int) -> None:
    """Check the parameters of a batch norm of `num_pixels` values a channel.

    Raises: ValueError: when weight or bias differs in shape, dtype or layout, or num_pixels is 1.
    """
    check_vector("weight", batch_norm.weight, (channels,))
    check_vector("bias", batch_norm.bias, (channels,))
    if num_pixels < 2:
        raise ValueError(f"training needs more than 1 value a channel, got {num_pixels}")


def check_state(
    name: str,
    state: LayerState | None,
    weight: torch.Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    """Check a layer whose batch norm is differentiated, where there is one, and its weight.

    Raises: ValueError: when one is given without the other, or differs in shape, dtype or layout.
    """
    if (state is None) != (weight is None):
        raise ValueError(f"give both of {name} and {name}_weight, or neither")
    if state is not None and weight is not None:
        check_activation(f"{name}.y", state.y, shape, dtype)
        check_vector(f"{name}.stats", state.stats, (5, shape[1]))
        check_vector(f"{name}_weight", weight, (shape[1],))
