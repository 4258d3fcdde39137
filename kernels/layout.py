"""Memory layout of images and filters: channels_last, as every kernel reads and writes it.

Tensors inside a transform of torch.func, and those of batched gradients, have no layout that could
be asked for or changed; the plain formulas, which alone compute on them, want none.
"""

import torch
from torch import Tensor

from fastres.kernels.plain_tensors import has_layout

__all__ = ["empty_channels_last", "to_channels_last", "to_dense_channels_last"]


def to_channels_last(t: Tensor) -> Tensor:
    """Return t with unit channel stride, as the kernels read it; gaps between pixels may stay."""
    if t.stride(1) == 1 or not has_layout(t):
        return t
    return t.contiguous(memory_format=torch.channels_last)


def to_dense_channels_last(t: Tensor) -> Tensor:
    """Return t in the strides that `torch.empty` gives a dense channels_last tensor."""
    _, c, h, w = t.shape
    if t.stride() == (h * w * c, 1, w * c, c) or not has_layout(t):
        return t
    return empty_channels_last(t, *t.shape).copy_(t)


def empty_channels_last(like: Tensor, *size: int) -> Tensor:
    """Return an uninitialised dense channels_last tensor with dtype and device of `like`."""
    return torch.empty(
        size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )
