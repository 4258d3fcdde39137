"""A convolution and its batch norm as modules, computed by the fused ops.

In training with the statistics of the batch, in evaluation with the running statistics folded into
the convolution, and by the modules themselves wherever an op would compute something else. Under
autocast activations and filters are cast to its dtype, the filters by the ops where kernels run;
parameters and statistics of batch norm are used in float32.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.kernels import ops
from fastres.kernels.conv_types import ConvBN, stat_dtype
from fastres.kernels.dispatch import runs_on_triton
from fastres.kernels.plain_tensors import have_plain_types
from fastres.kernels.reference.block import bn_fold_ref
from fastres.model.interception import is_overridden
from fastres.model.running_stats import update_running_stats

__all__ = [
    "ConvBNModules",
    "block_folded",
    "can_fold",
    "can_train",
    "cast_dtype",
    "constant_parameters",
    "conv_bn",
    "conv_bn_folded",
    "is_unmodified_relu",
    "layer_params",
    "recomputed_to_here",
    "to_compute_dtype",
    "why_not_fused",
]

_folded_layers: ContextVar[dict[Any, tuple[ConvBN, Tensor]] | None] = ContextVar(
    "fastres_folded_layers", default=None
)


class ConvBNModules(NamedTuple):
    """One layer of a net: a convolution and the batch norm that reads it."""

    conv: nn.Conv2d
    bn: nn.BatchNorm2d


def is_unmodified_relu(module: Any) -> bool:
    """Whether a module is a ReLU that an op may take over."""
    return type(module) is nn.ReLU and not is_overridden(module)


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
    padding = cast(tuple[int, int], conv.padding)
    return ConvBN(
        w, bn.weight.to(wide), bn.bias.to(wide), conv.stride[0], padding[0], float(bn.eps)
    )


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
    return params, bn_fold_ref(bn.running_mean.to(wide), rstd, params.weight, params.bias)


def _fold_once(layer: ConvBNModules, x: Tensor) -> tuple[ConvBN, Tensor]:
    """`_fold`, or what it returned before in the same `constant_parameters`."""
    folded = None if torch.compiler.is_compiling() else _folded_layers.get()
    if folded is None:
        return _fold(layer, x)
    key = (*layer, x.dtype, cast_dtype(x))
    if key not in folded:
        folded[key] = _fold(layer, x)
    return folded[key]


def conv_bn_folded(
    x: Tensor, layer: ConvBNModules, *, relu: bool, residual: Tensor | None = None
) -> Tensor:
    """`conv_bn` with the running statistics, in one op."""
    params, scale_shift = _fold_once(layer, x)
    given = None if residual is None else to_compute_dtype(residual)
    return ops.conv_bn_folded(to_compute_dtype(x), params, scale_shift, residual=given, relu=relu)


def block_folded(
    x: Tensor, layers: Sequence[ConvBNModules], *, projection: ConvBNModules | None, add_input: bool
) -> Tensor:
    """A residual block with the running statistics."""
    all_layers = layers if projection is None else [*layers, projection]
    params, scale_shifts = zip(*(_fold_once(layer, x) for layer in all_layers), strict=True)
    return ops.residual_block_folded(
        to_compute_dtype(x),
        params[: len(layers)],
        scale_shifts,
        projection=None if projection is None else params[-1],
        add_input=add_input,
    )


class _SaveATensor(torch.autograd.Function):
    """The identity, with something kept for backward."""

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        ctx.save_for_backward(out.new_zeros(1))
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        return dout


def recomputed_to_here(out: Tensor) -> Tensor:
    """Return out, having torch.utils.checkpoint recompute all that came before.

    Without reentrance it leaves a segment, by an exception, at the last tensor that backward needs.
    A plain batch norm has then moved its running statistics for the second time; a fused block
    saves its last tensor before it can.
    """
    if torch.compiler.is_compiling() or not out.requires_grad:
        return out
    has_hooks = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    return _SaveATensor.apply(out) if has_hooks else out


def why_not_fused(conv: Any, bn: Any) -> str | None:
    """Say why a convolution and the module behind it cannot be one op, or return None.

    Asked when a net is fused, and again whenever it runs: a fused net can be hooked, pruned, given
    another convolution or norm. Then the modules themselves are called.
    """
    if type(conv) is not nn.Conv2d or type(bn) is not nn.BatchNorm2d:
        return f"{type(conv).__name__} before {type(bn).__name__}"
    if is_overridden(conv) or is_overridden(bn):
        return "a hook or a replaced method on convolution or batch norm"
    if conv.groups != 1:
        return f"{conv.groups} groups"
    if conv.dilation != (1, 1):
        return f"dilation {conv.dilation}"
    if conv.bias is not None:
        return "a bias"
    if conv.padding_mode != "zeros":
        return f"padding mode {conv.padding_mode}"
    if not _are_square(conv.stride, conv.padding):
        return f"stride {conv.stride}, padding {conv.padding}"
    if bn._parameters.get("weight", bn) is None or bn._parameters.get("bias", bn) is None:
        return "batch norm without parameters"
    if bn.running_mean is None or bn.running_var is None:
        return "batch norm without running statistics"
    if bn.num_features != conv.out_channels:
        return "batch norm of other channels"
    return None


def _are_square(*sizes: Any) -> bool:
    """Whether every stride or padding is two equal numbers, and none a word or a rectangle."""
    return all(isinstance(size, tuple) and len(set(size)) == 1 for size in sizes)


def _computes(x: Tensor, layer: ConvBNModules) -> bool:
    """Whether an op computes on activations like x what calling the two modules would.

    Images of another dtype are left to the modules, which raise what they raise.
    """
    conv, bn = layer
    return (
        why_not_fused(conv, bn) is None
        and (x.dtype == conv.weight.dtype or _is_cast(x))
        and x.is_floating_point()
        # Straight from the dictionaries: a module takes as long to find an attribute of these.
        and have_plain_types(
            *conv._parameters.values(), *bn._parameters.values(), *bn._buffers.values()
        )
    )


def _are_images(x: Tensor, layers: Sequence[ConvBNModules]) -> bool:
    """Whether x holds images for the first layer; to all else the modules say what is wrong."""
    return x.dim() == 4 and x.shape[0] > 0 and x.shape[1] == layers[0].conv.in_channels


def can_train(x: Tensor, layers: Sequence[ConvBNModules]) -> bool:
    """Whether all batch norms use the statistics of a batch that is not empty."""
    is_training = all(layer.bn.training and _computes(x, layer) for layer in layers)
    return is_training and _are_images(x, layers)


def can_fold(x: Tensor, layers: Sequence[ConvBNModules], residual: Tensor | None = None) -> bool:
    """Whether all batch norms use running statistics and nobody wants a gradient."""
    if any(layer.bn.training or not _computes(x, layer) for layer in layers):
        return False
    if not _are_images(x, layers):
        return False
    if not torch.is_grad_enabled():
        return True
    learns = any(p.requires_grad for layer in layers for m in layer for p in m.parameters())
    return not (learns or x.requires_grad or (residual is not None and residual.requires_grad))


def conv_bn(
    x: Tensor, layer: ConvBNModules, *, relu: bool = True, residual: Tensor | None = None
) -> Tensor:
    """`relu(bn(conv(x)) + residual)`: by an op where one computes the same, else by the modules.

    Args:
        x: (N, C, H, W).
        layer: the convolution and its batch norm.
        relu: whether the ReLU is applied.
        residual: (N, K, P, Q), or None.

    Returns: (N, K, P, Q), channels_last when fused.
    """
    if can_train(x, [layer]):
        operand, params = to_compute_dtype(x), layer_params(layer, x)
        if residual is None:
            out, stats = ops.conv_bn_relu(operand, params, relu=relu)
        else:
            given = residual.to(operand.dtype)
            out, stats = ops.residual_block(operand, [params], residual=given, relu=relu)
        update_running_stats([layer.bn], stats)
        return recomputed_to_here(out)
    if can_fold(x, [layer], residual):
        return conv_bn_folded(x, layer, relu=relu, residual=residual)
    z = layer.bn(layer.conv(x))
    if residual is not None:
        z = z + residual
    return F.relu(z) if relu else z
