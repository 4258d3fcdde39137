"""Which tensors kernels may compute on: plain ones, whose numbers are all there is to them.

Kernels take pointers. A tangent of forward-mode differentiation, the batch of a `torch.vmap`, the
level of a `torch.func.grad` and the contents of a tensor subclass lie elsewhere, and a kernel would
pass them by without a word. Ops on such tensors are computed by the formulas of reference/, which
torch can follow.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

__all__ = ["are_plain", "has_functorch_levels"]

# A fake tensor has no numbers, and is what the fakes of the ops are for.
_PLAIN_TYPES = (Tensor, torch.nn.Parameter, FakeTensor)


def has_functorch_levels() -> bool:
    """Whether a transform of torch.func runs: each tensor may be the wrapper of another."""
    return torch._C._are_functorch_transforms_active()


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether ops may compute on all of `tensors`, which need not be tensors at all."""
    if has_functorch_levels() or forward_ad._current_level >= 0:
        return False
    for t in tensors:  # noqa: SIM110 - asked in every step of every layer, and all() takes longer
        if t is not None and type(t) not in _PLAIN_TYPES:
            return False
    return True
