"""A convolution and its batch norm, as they stand in a network, and what ops need of the two.

Which parameters an op takes, which layers it may compute, and the batch norm folded into its
convolution for evaluation. residual_block.py calls the ops.

Under autocast activations and filters are cast to its dtype, the filters by the ops where kernels
run; parameters and statistics of batch norm are used in float32. The bias of a convolution has no
place in an op: a batch norm that uses the statistics of the batch takes it away again, so that it
moves the running mean alone, and in evaluation it is folded with the batch norm.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from fastres.kernels.conv_types import ConvBN, stat_dtype
from fastres.kernels.dispatch import runs_on_triton
from fastres.kernels.plain_tensors import have_plain_types
from fastres.kernels.reference.block import bn_fold_ref
from fastres.model.interception import computes_as, is_overridden

__all__ = [
    "ConvArguments",
    "ConvBNModules",
    "NormArguments",
    "are_images",
    "can_fold",
    "can_train",
    "cast_dtype",
    "constant_parameters",
    "fold_once",
    "is_unmodified_relu",
    "layer_params",
    "normalize",
    "takes_tensors",
    "to_compute_dtype",
    "wants_gradient",
    "why_not_fused",
]

_folded_layers: ContextVar[dict[Any, tuple[ConvBN, Tensor]] | None] = ContextVar(
    "fastres_folded_layers", default=None
)


class ConvArguments(NamedTuple):
    """What F.conv2d is called with, named as the attributes of nn.Conv2d."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]


class NormArguments(NamedTuple):
    """What F.batch_norm is called with, named as the attributes of nn.BatchNorm2d."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor
    bias: Tensor
    training: bool
    momentum: float
    eps: float
    # Whoever calls the function counts the batches.
    num_batches_tracked: None = None
    track_running_stats: bool = True


class ConvBNModules(NamedTuple):
    """One layer of a net: a convolution and the batch norm that reads it."""

    conv: nn.Conv2d | ConvArguments
    bn: nn.BatchNorm2d | NormArguments


def is_unmodified_relu(module: Any) -> bool:
    """Whether a module is a ReLU that an op may take over."""
    return computes_as(module, nn.ReLU) and not is_overridden(module)


def _is_cast(x: Tensor) -> bool:
    """Whether autocast casts the operands of a convolution of x."""
    device = x.device.type
    # Torch refuses to say whether autocast is on for devices that have none, such as meta.
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return False
    return x.is_floating_point() and torch.is_autocast_enabled(device)


def cast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution of x computes, as autocast would choose it."""
    return torch.get_autocast_dtype(x.device.type) if _is_cast(x) else x.dtype


def to_compute_dtype(x: Tensor) -> Tensor:
    """Return x in the dtype of the computation; the ops bring it into their layout."""
    return x.to(cast_dtype(x))


def layer_params(layer: ConvBNModules, x: Tensor) -> ConvBN:
    """The parameters of a layer as the training ops take them, beside activations like x.

    Filters in fp32 stay so where kernels return their gradient in fp32: they are rounded in the op.
    """
    conv, bn = layer
    wide = stat_dtype(x.dtype)
    w = conv.weight
    # A compiler cannot ask for kernels. Where none run, the op does what is done here.
    if w.dtype != torch.float32 or not (torch.compiler.is_compiling() or runs_on_triton(x)):
        w = w.to(cast_dtype(x))
    bias = bn.bias.to(wide)
    if conv.bias is not None:
        # The mean of the batch takes it away again; its gradient is zero, but it has one.
        bias = bias + 0 * conv.bias.to(wide)
    padding = cast(tuple[int, int], conv.padding)
    return ConvBN(w, bn.weight.to(wide), bias, conv.stride[0], padding[0], float(bn.eps))


@contextmanager
def constant_parameters() -> Iterator[None]:
    """Fold each batch norm and cast each filter once for all batches of the `with` block.

    Nobody may change the network inside: what was folded from it would stay as it is.
    """
    token = _folded_layers.set({})
    try:
        yield
    finally:
        _folded_layers.reset(token)


def _fold(layer: ConvBNModules, x: Tensor) -> tuple[ConvBN, Tensor]:
    """Parameters beside activations like x, and the batch norm as a * y + b: (2, K)."""
    bn, params, wide = layer.bn, layer_params(layer, x), stat_dtype(x.dtype)
    # Here, where it is kept, and not in every call of an op.
    w = params.w.to(cast_dtype(x)).contiguous(memory_format=torch.channels_last)
    params = params._replace(w=w)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    rstd = (bn.running_var.to(wide) + bn.eps).rsqrt()
    mean = bn.running_mean.to(wide)
    if layer.conv.bias is not None:
        mean = mean - layer.conv.bias.to(wide)
    return params, bn_fold_ref(mean, rstd, params.weight, bn.bias.to(wide))


def fold_once(layer: ConvBNModules, x: Tensor) -> tuple[ConvBN, Tensor]:
    """`_fold`, or what it returned before in the same `constant_parameters`."""
    folded = None if torch.compiler.is_compiling() else _folded_layers.get()
    if folded is None:
        return _fold(layer, x)
    key = (*layer, x.dtype, cast_dtype(x))
    if key not in folded:
        folded[key] = _fold(layer, x)
    return folded[key]


def why_not_fused(conv: Any, bn: Any, *, is_norm_alone: bool = False) -> str | None:
    """Say why a convolution and the module behind it cannot be one op, or return None.

    Asked when a net is fused, and again whenever it runs: a fused net can be hooked, pruned, given
    another convolution or norm. Then the modules themselves are called.

    is_norm_alone: whether only the batch norm is meant that a module of another class begins with.
    """
    if not (computes_as(conv, nn.Conv2d) and (is_norm_alone or _begins_with_norm(bn))):
        return f"{type(conv).__name__} before {type(bn).__name__}"
    if is_overridden(conv) or is_overridden(bn):
        return "a hook or a replaced method on convolution or batch norm"
    if conv.groups != 1:
        return f"{conv.groups} groups"
    if conv.dilation != (1, 1):
        return f"dilation {conv.dilation}"
    if conv.padding_mode != "zeros":
        return f"padding mode {conv.padding_mode}"
    if not _are_square(conv.stride, conv.padding):
        return f"stride {conv.stride}, padding {conv.padding}"
    if conv._parameters.get("weight") is None or isinstance(conv, LazyModuleMixin):
        return "filters that are computed or not made yet"
    if bn._parameters.get("weight") is None or bn._parameters.get("bias") is None:
        return "batch norm without parameters"
    if bn.running_mean is None or bn.running_var is None:
        return "batch norm without running statistics"
    if bn.num_features != conv.out_channels:
        return "batch norm of other channels"
    return None


def _begins_with_norm(bn: Any) -> bool:
    """Whether a module is a batch norm, or known to compute one before all else."""
    return computes_as(bn, nn.BatchNorm2d) or _is_marked(bn)


def _is_marked(bn: Any) -> bool:
    if not isinstance(bn, nn.BatchNorm2d):
        return False
    return vars(bn).get("begins_with_norm", vars) is type(bn).forward


def normalize(bn: nn.BatchNorm2d, y: Tensor) -> Tensor:
    """`bn(y)`, and nothing that a module of another class is known to compute behind it."""
    return nn.BatchNorm2d.forward(bn, y) if _is_marked(bn) else bn(y)


def _are_square(*sizes: Any) -> bool:
    """Whether every stride or padding is two equal numbers, and none a word or a rectangle."""
    return all(isinstance(size, tuple) and len(set(size)) == 1 for size in sizes)


def takes_tensors(x: Tensor, weight: Tensor, tensors: Iterable[Tensor | None]) -> bool:
    """Whether ops take activations like x beside a layer's filters, and all of its tensors.

    Images of another dtype are left to the modules, which raise what they raise.
    """
    return (
        x.is_floating_point()
        and (x.dtype == weight.dtype or _is_cast(x))
        and have_plain_types(*tensors)
    )


def _computes(x: Tensor, layer: ConvBNModules) -> bool:
    """Whether an op computes on activations like x what calling the two modules would."""
    conv, bn = cast(tuple[nn.Conv2d, nn.BatchNorm2d], layer)
    if why_not_fused(conv, bn) is not None:
        return False
    # Straight from the dictionaries: a module takes as long to find an attribute of these.
    tensors = (*conv._parameters.values(), *bn._parameters.values(), *bn._buffers.values())
    return takes_tensors(x, conv.weight, tensors)


def are_images(x: Tensor, layers: Sequence[ConvBNModules]) -> bool:
    """Whether x holds images for the first layer; to all else the modules say what is wrong."""
    return x.dim() == 4 and x.shape[0] > 0 and x.shape[1] == layers[0].conv.weight.shape[1]


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be wanted of any of these."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None)


def can_train(x: Tensor, layers: Sequence[ConvBNModules]) -> bool:
    """Whether all batch norms use the statistics of a batch that is not empty."""
    is_training = all(layer.bn.training and _computes(x, layer) for layer in layers)
    return is_training and are_images(x, layers)


def can_fold(x: Tensor, layers: Sequence[ConvBNModules], residual: Tensor | None = None) -> bool:
    """Whether all batch norms use running statistics and nobody wants a gradient."""
    if any(layer.bn.training or not _computes(x, layer) for layer in layers):
        return False
    if not are_images(x, layers):
        return False
    if not torch.is_grad_enabled():
        return True
    modules = cast(list[nn.Module], [module for layer in layers for module in layer])
    return not wants_gradient(x, residual, *(p for m in modules for p in m.parameters()))
