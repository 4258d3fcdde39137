"""What `torch.utils.flop_counter.FlopCounterMode` counts for the ops.

As for torch's own operators: two for each multiplication and addition of a convolution or a linear
layer, nothing for what is done element by element. A formula gets the arguments of its op and what
it returns, the shape of each tensor in the tensor's place.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from fastres.kernels.conv_types import LayerState

__all__ = [
    "block_backward_flops",
    "block_flops",
    "conv_flops",
    "count_flops",
    "no_flops",
    "pool_linear_backward_flops",
    "pool_linear_flops",
]

Shape = Sequence[int]


def count_flops(op_name: str, formula: Callable[..., int]) -> None:
    """Have every FlopCounterMode that is made from now on count `fastres::{op_name}`."""
    register_flop_formula(getattr(torch.ops.fastres, op_name))(formula)


def _products(w: Shape, y: Shape) -> int:
    """Of one convolution with filters w (K, C, R, S) and output y (N, K, P, Q), or of a gradient.

    Forward, gradient of the input and gradient of the filters multiply the same pairs.
    """
    k, c, r, s = w
    n, _, p, q = y
    return 2 * n * p * q * k * c * r * s


def conv_flops(x: Shape, w: Shape, *_: Any, out_shape: Shape) -> int:
    """Of `conv_bn_folded`."""
    return _products(w, out_shape)


def _layer_flops(params: Sequence[Shape], saved: Sequence[Shape]) -> list[int]:
    """Of the convolution of every layer: w is the first of its params, y of its state."""
    layers = zip(params[::3], saved[:: len(LayerState._fields)], strict=True)
    return [_products(w, y) for w, y in layers]


def block_flops(
    x: Shape, residual: Shape | None, params: Sequence[Shape], *_: Any, out_shape: Any
) -> int:
    """Of the forward of a block."""
    _, saved = out_shape
    return sum(_layer_flops(params, saved))


def block_backward_flops(
    dout: Shape,
    x: Shape,
    out: Shape | None,
    params: Sequence[Shape],
    saved: Sequence[Shape],
    geometry: list[int],
    eps: list[float],
    shortcut: str,
    relu: bool,
    need_dx: bool,
    *,
    out_shape: Any,
) -> int:
    """Of the backward of a block: two gradients a layer, without dx one for those that read x."""
    flops = _layer_flops(params, saved)
    reads_x = flops[:1] + (flops[-1:] if shortcut == "projected" else [])
    return 2 * sum(flops) - (0 if need_dx else sum(reads_x))


def pool_linear_flops(x: Shape, weight: Shape, *_: Any, out_shape: Any) -> int:
    """Of the linear layer."""
    return 2 * x[0] * weight[0] * weight[1]


def pool_linear_backward_flops(
    dlogits: Shape, pooled: Shape, weight: Shape, *_: Any, out_shape: Any
) -> int:
    """Of both gradients of the linear layer."""
    return 2 * pool_linear_flops(pooled, weight, out_shape=None)


def no_flops(*_: Any, out_shape: Any) -> int:
    """Of an op that multiplies no matrices, as torch counts those of its own."""
    return 0
