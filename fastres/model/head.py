"""The end of a classifier on the fused ops: pooling with the linear layer, and the loss."""

import torch.nn.functional as F
from torch import Tensor, nn

from fastres.kernels.conv_types import stat_dtype
from fastres.kernels.ops_head import is_worth_an_op, pool_linear, smooth_cross_entropy
from fastres.model.conv_bn import cast_dtype
from fastres.model.interception import is_overridden

__all__ = ["SmoothCrossEntropy", "pool_classify"]


def pool_classify(x: Tensor, fc: nn.Module) -> Tensor:
    """`fc(mean over pixels of x)`, in one op where fc is a plain nn.Linear and kernels run on x.

    Args:
        x: (N, C, H, W).
        fc: the classifier; the op uses its parameters as they are, in float32 under autocast.
            With a hook on it, it is called itself.

    Returns: (N, classes) in the dtype that autocast gives a linear layer.
    """
    if type(fc) is nn.Linear and not is_overridden(fc) and x.shape[0] > 0 and is_worth_an_op(x):
        return pool_linear(x, fc.weight, fc.bias).to(cast_dtype(x))
    return fc(x.mean(dim=(2, 3)))


class SmoothCrossEntropy(nn.Module):
    """`nn.CrossEntropyLoss(label_smoothing=...)`, in one op where kernels run on the logits.

    In float32 whatever the dtype of the logits. The op cannot wait to see labels that are no class
    and makes the loss NaN for them; elsewhere torch raises.

    Args:
        label_smoothing: share of the target spread evenly over all classes, 0 to 1.
    """

    def __init__(self, label_smoothing: float = 0.0):
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Map logits (N, classes) and labels (N,) int64 to the mean loss ()."""
        if is_worth_an_op(logits):
            return smooth_cross_entropy(logits, labels, self.label_smoothing)
        wide = logits.to(stat_dtype(logits.dtype))
        return F.cross_entropy(wide, labels, label_smoothing=self.label_smoothing)
