"""The head and the loss as torch sees them: registration, shapes, autograd, choice of backend.

    fastres::pool_linear_fwd, _bwd              logits = mean over pixels of x @ weight.T + bias
    fastres::smooth_cross_entropy_fwd, _bwd     F.cross_entropy with mean reduction

Conventions as in ops.py: ops change none of their inputs and are opaque to torch.compile; CUDA
tensors go through the Triton kernels, CPU tensors too under TRITON_INTERPRET=1; all others, and
float64, are computed in plain torch, as are tensors that are not plain and gradients of which a
graph is wanted.
"""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fastres.kernels.conv_types import stat_dtype
from fastres.kernels.dispatch import no_autocast, runs_on_triton
from fastres.kernels.flops import (
    count_flops,
    no_flops,
    pool_linear_backward_flops,
    pool_linear_flops,
)
from fastres.kernels.layout import to_channels_last
from fastres.kernels.plain_tensors import are_plain
from fastres.kernels.reference.head import (
    pool_linear_backward_ref,
    pool_linear_ref,
    smooth_cross_entropy_backward_ref,
    smooth_cross_entropy_ref,
)

__all__ = ["is_worth_an_op", "pool_linear", "smooth_cross_entropy"]

_POOL_LINEAR_FORWARD = "(Tensor x, Tensor weight, Tensor? bias) -> (Tensor, Tensor)"
_POOL_LINEAR_BACKWARD = (
    "(Tensor dlogits, Tensor pooled, Tensor weight, int height, int width) "
    "-> (Tensor, Tensor, Tensor)"
)
_CROSS_ENTROPY_FORWARD = "(Tensor logits, Tensor labels, float label_smoothing) -> (Tensor, Tensor)"
_CROSS_ENTROPY_BACKWARD = "(Tensor dloss, Tensor grad, ScalarType dtype) -> Tensor"


def _find_kernels(name: str, x: Tensor) -> ModuleType | None:
    """The module of Triton kernels that computes on x, or None where plain torch does."""
    return importlib.import_module(f"fastres.kernels.gpu.{name}") if runs_on_triton(x) else None


def is_worth_an_op(x: Tensor) -> bool:
    """Whether a registered op gains anything on x: kernels run on it, or torch.compile traces it.

    In plain torch an op computes what the reference does, and costs Python a fraction of a
    millisecond.
    """
    return are_plain(x) and (torch.compiler.is_compiling() or runs_on_triton(x))


def _pool_linear_impl(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    kernels = _find_kernels("pool_linear", x)
    if kernels is None:
        # Autocast is still on in here, and would round the products.
        with no_autocast(x):
            return pool_linear_ref(x, weight, bias)
    return kernels.pool_linear_fwd(
        to_channels_last(x), weight.contiguous(), None if bias is None else bias.contiguous()
    )


def _pool_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    n, c = x.shape[:2]
    return x.new_empty((n, weight.shape[0])), x.new_empty((n, c), dtype=stat_dtype(x.dtype))


def _pool_linear_backward_impl(
    dlogits: Tensor, pooled: Tensor, weight: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _find_kernels("pool_linear", dlogits)
    if kernels is None:
        with no_autocast(dlogits):
            return pool_linear_backward_ref(dlogits, pooled, weight, (height, width))
    return tuple(
        kernels.pool_linear_bwd(dlogits.contiguous(), pooled, weight.contiguous(), (height, width))
    )


def _pool_linear_backward_fake(
    dlogits: Tensor, pooled: Tensor, weight: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    size = (*pooled.shape, height, width)
    dx = torch.empty(
        size, dtype=dlogits.dtype, device=dlogits.device, memory_format=torch.channels_last
    )
    return dx, weight.new_empty(weight.shape), weight.new_empty((weight.shape[0],))


_pool_linear_bwd = custom_op(
    "fastres::pool_linear_bwd",
    _pool_linear_backward_impl,
    mutates_args=(),
    schema=_POOL_LINEAR_BACKWARD,
)
_pool_linear_bwd.register_fake(_pool_linear_backward_fake)
_pool_linear = custom_op(
    "fastres::pool_linear_fwd", _pool_linear_impl, mutates_args=(), schema=_POOL_LINEAR_FORWARD
)
_pool_linear.register_fake(_pool_linear_fake)


def _pool_linear_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias = inputs
    _, pooled = output
    ctx.mark_non_differentiable(pooled)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, pooled, weight)
    ctx.has_bias = bias is not None


def _pool_linear_formula(ctx: Any, dlogits: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dlogits is None:
        return None, None, None
    x, pooled, weight = ctx.saved_tensors
    size = x.shape[2], x.shape[3]
    # Autograd has gradients on in a backward pass where it is to build a graph of them.
    if torch.is_grad_enabled() or not are_plain(dlogits, x, weight):
        with no_autocast(x):
            pooled = pool_linear_ref(x, weight, None)[1]
            dx, dw, dbias = pool_linear_backward_ref(dlogits, pooled, weight, size)
    else:
        dx, dw, dbias = _pool_linear_bwd(dlogits, pooled, weight, *size)
    return dx, dw, dbias if ctx.has_bias else None


_pool_linear.register_autograd(_pool_linear_formula, setup_context=_pool_linear_setup)
count_flops("pool_linear_fwd", pool_linear_flops)
count_flops("pool_linear_bwd", pool_linear_backward_flops)


def pool_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`logits = mean over pixels of x @ weight.T + bias`; differentiable.

    Saved for backward: the means; x for gradients of gradients alone.

    Args:
        x: (N, C, H, W) channels_last; bf16, fp16, fp32, or fp64 in plain torch.
        weight: (classes, C), fp32 beside any x (fp64 beside fp64), or in the dtype of x.
        bias: (classes,), dtype of weight; None adds nothing.

    Returns: logits: (N, classes), dtype of x.

    Raises: ValueError: when a tensor's shape, dtype or layout is not as above.

    Numerics: means, products and sums in fp32, one rounding of each result. Deterministic.
    """
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"x must have shape (N, C, H, W) and elements, got {list(x.shape)}")
    if not are_plain(x, weight, bias):
        with no_autocast(x):
            return pool_linear_ref(x, weight, bias)[0]
    return _pool_linear(x, weight, bias)[0]


def _cross_entropy_impl(
    logits: Tensor, labels: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    kernels = _find_kernels("cross_entropy", logits)
    if kernels is None:
        return smooth_cross_entropy_ref(logits, labels, label_smoothing)
    return kernels.smooth_cross_entropy_fwd(
        logits.contiguous(), labels.contiguous(), label_smoothing
    )


def _cross_entropy_fake(
    logits: Tensor, labels: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    wide = stat_dtype(logits.dtype)
    return logits.new_empty((), dtype=wide), logits.new_empty(logits.shape, dtype=wide)


def _cross_entropy_backward_impl(dloss: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    kernels = _find_kernels("cross_entropy", grad)
    if kernels is None:
        return smooth_cross_entropy_backward_ref(dloss, grad, dtype)
    return kernels.smooth_cross_entropy_bwd(dloss, grad, dtype)


def _cross_entropy_backward_fake(dloss: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(grad, dtype=dtype)


_cross_entropy_bwd = custom_op(
    "fastres::smooth_cross_entropy_bwd",
    _cross_entropy_backward_impl,
    mutates_args=(),
    schema=_CROSS_ENTROPY_BACKWARD,
)
_cross_entropy_bwd.register_fake(_cross_entropy_backward_fake)
_cross_entropy = custom_op(
    "fastres::smooth_cross_entropy_fwd",
    _cross_entropy_impl,
    mutates_args=(),
    schema=_CROSS_ENTROPY_FORWARD,
)
_cross_entropy.register_fake(_cross_entropy_fake)


def _cross_entropy_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    logits, labels, ctx.label_smoothing = inputs
    _, grad = output
    ctx.mark_non_differentiable(grad)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, grad)


def _cross_entropy_formula(
    ctx: Any, dloss: Tensor | None, _: None
) -> tuple[Tensor | None, None, None]:
    if dloss is None:
        return None, None, None
    logits, labels, grad = ctx.saved_tensors
    if torch.is_grad_enabled() or not are_plain(dloss, logits):
        grad = smooth_cross_entropy_ref(logits, labels, ctx.label_smoothing)[1]
        return smooth_cross_entropy_backward_ref(dloss, grad, logits.dtype), None, None
    return _cross_entropy_bwd(dloss, grad, logits.dtype), None, None


_cross_entropy.register_autograd(_cross_entropy_formula, setup_context=_cross_entropy_setup)
count_flops("smooth_cross_entropy_fwd", no_flops)
count_flops("smooth_cross_entropy_bwd", no_flops)


def smooth_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """`F.cross_entropy(logits, labels, label_smoothing=...)` under autocast; differentiable.

    Saved for backward: the gradient by the logits, made in the same pass as the loss; the logits
    for gradients of gradients alone.

    Args:
        logits: (N, classes); bf16, fp16, fp32, or fp64 in plain torch.
        labels: (N,) int64, 0 to classes - 1. Another label, torch's ignore_index of -100 included,
            makes the loss NaN: a check would have to wait for the device.
        label_smoothing: share of the target spread evenly over all classes, 0 to 1.

    Returns: loss: () fp32 (fp64 beside fp64), the mean over the images.

    Raises: ValueError: when a tensor's shape or dtype is not as above, or the smoothing no share.

    Numerics: fp32; the gradient is rounded once, after it was multiplied by that of the loss.
        Deterministic.
    """
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be 0 to 1, got {label_smoothing}")
    if logits.dim() != 2 or logits.numel() == 0:
        raise ValueError(f"logits must have shape (N, classes), got {list(logits.shape)}")
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be ({logits.shape[0]},) int64, got {list(labels.shape)} {labels.dtype}"
        )
    if not are_plain(logits, labels):
        return smooth_cross_entropy_ref(logits, labels, label_smoothing)[0]
    return _cross_entropy(logits, labels, label_smoothing)[0]
