"""The mathematics of head and loss in plain torch: implementation on any device, truth in fp64.

Conventions as in block.py: any float dtype, storage rounded where the kernels round, all else
in `stat_dtype`, backwards derived by hand.
"""

import torch
from torch import Tensor

from fastres.kernels.conv_types import stat_dtype

__all__ = [
    "pool_linear_backward_ref",
    "pool_linear_ref",
    "smooth_cross_entropy_backward_ref",
    "smooth_cross_entropy_ref",
]


def pool_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) in the dtype of x, and the means over the pixels, (N, C)."""
    wide = stat_dtype(x.dtype)
    pooled = x.mean((2, 3), dtype=wide)
    logits = pooled @ weight.to(wide).T
    if bias is not None:
        logits = logits + bias.to(wide)
    return logits.to(x.dtype), pooled


def pool_linear_backward_ref(
    dlogits: Tensor, pooled: Tensor, weight: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dx (N, C, H, W) dense channels_last, dw (classes, C), dbias (classes,)."""
    wide = dlogits.to(pooled.dtype)
    dpooled = wide @ weight.to(pooled.dtype) / (size[0] * size[1])
    dw = wide.T @ pooled
    dx = dpooled.to(dlogits.dtype)[:, :, None, None].expand(-1, -1, *size)
    dense = torch.empty(
        dx.shape, dtype=dx.dtype, device=dx.device, memory_format=torch.channels_last
    )
    return dense.copy_(dx), dw.to(weight.dtype), wide.sum(0).to(weight.dtype)


def smooth_cross_entropy_ref(
    logits: Tensor, labels: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Mean loss () and its gradient (N, classes), both in `stat_dtype`.

    A label that is no class makes the loss and its row of the gradient NaN.
    """
    wide = logits.to(stat_dtype(logits.dtype))
    n, num_classes = wide.shape
    logp = wide.log_softmax(1)
    is_class = ((labels >= 0) & (labels < num_classes))[:, None]
    on_target = torch.arange(num_classes, device=labels.device) == labels[:, None]
    # Chosen, not multiplied by 0: the other classes may stand at minus infinity.
    losses = -(1 - label_smoothing) * torch.where(on_target, logp, 0).sum(1, keepdim=True)
    grad = logp.exp() - on_target.to(wide.dtype) * (1 - label_smoothing)
    if label_smoothing > 0:
        share = label_smoothing / num_classes
        losses = losses - share * logp.sum(1, keepdim=True)
        grad = grad - share
    nan = float("nan")
    return torch.where(is_class, losses, nan).mean(), torch.where(is_class, grad / n, nan)


def smooth_cross_entropy_backward_ref(dloss: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """`dlogits = dloss * grad`, rounded once to `dtype`."""
    return (dloss * grad).to(dtype)
