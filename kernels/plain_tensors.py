"""Which tensors kernels may compute on: plain ones, whose numbers are all there is to them.

Kernels take pointers. A tangent of forward-mode differentiation, the batch of a `torch.vmap`, the
level of a `torch.func.grad` and the contents of a tensor subclass lie elsewhere, and a kernel would
pass them by without a word. Ops on such tensors are computed by the formulas of reference/, which
torch can follow.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

__all__ = ["are_plain", "has_layout", "have_plain_types"]

# The last two stand for plain tensors while torch.compile traces, or somebody asks for shapes: they
# have no numbers, and are what the fakes of the ops are for.
_PLAIN_TYPES = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


def _is_batched(t: Tensor) -> bool:
    """Whether t is a batch, as `torch.autograd.grad(is_grads_batched=True)` makes of gradients."""
    return torch._C._functorch.is_legacy_batchedtensor(t)


def has_layout(t: Tensor) -> bool:
    """Whether the strides of t are those of its numbers in memory."""
    if torch._C._are_functorch_transforms_active():
        return False
    return torch.compiler.is_compiling() or not _is_batched(t)


def are_plain(x: Tensor | None, *others: Tensor | None) -> bool:
    """Whether ops may compute on x and, with it, on parameters and what kernels have made."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return have_plain_types(x, *others) and (x is None or not _is_special(x))


def have_plain_types(*tensors: Tensor | None) -> bool:
    """Whether no tensor is of a class that gives its operations another meaning."""
    for t in tensors:  # noqa: SIM110 - asked of every layer in every step; all() takes longer
        if t is not None and type(t) not in _PLAIN_TYPES:
            return False
    return True


def _is_special(t: Tensor) -> bool:
    """Whether the numbers of t are not those that lie in its memory by its strides."""
    # A compiler asks for these itself, and cannot trace the questions.
    return not torch.compiler.is_compiling() and (
        t.is_neg() or t.is_mkldnn or t.is_sparse or t.is_nested or t.is_quantized or _is_batched(t)
    )
