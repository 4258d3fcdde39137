"""Layers in a row with a shortcut around them, by the fused ops where those compute the same.

    out = relu(bn(conv(.. relu(bn(conv(x))))) + shortcut)

In training with the statistics of the batch, and the running ones are moved; in evaluation with the
running statistics folded into the convolutions, where no gradient is wanted. Where no op computes
all of it the layers are computed one by one, and a layer that no op computes by its modules.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.kernels import ops
from fastres.kernels.conv_shape import output_length
from fastres.model.conv_bn import (
    ConvBNModules,
    can_fold,
    can_train,
    cast_dtype,
    fold_once,
    layer_params,
    normalize,
    to_compute_dtype,
)
from fastres.model.running_stats import Norm, update_running_stats

__all__ = ["conv_bn", "fold_layers", "is_addable", "residual_block", "train_layers"]


def conv_bn(
    x: Tensor, layer: ConvBNModules, *, relu: bool = True, residual: Tensor | None = None
) -> Tensor:
    """`relu(bn(conv(x)) + residual)`: a `residual_block` of one layer."""
    return residual_block(x, [layer], shortcut=residual, relu=relu)


def residual_block(
    x: Tensor,
    layers: Sequence[ConvBNModules],
    *,
    projection: ConvBNModules | None = None,
    shortcut: Tensor | None = None,
    relu: bool = True,
    adds_in_place: bool = False,
) -> Tensor:
    """`relu(bn(conv(.. relu(bn(conv(x))))) + shortcut)`, as the modules would compute it.

    Args:
        x: (N, C, H, W).
        layers: the convolutions and batch norms of the main path.
        projection: the layer that makes the shortcut from x.
        shortcut: where there is no projection, what is added: (N, K, P, Q), x itself, or None.
        relu: whether the last ReLU is applied.
        adds_in_place: whether the network adds by `+=`, which keeps the dtype of the left side.

    Returns: (N, K, P, Q), channels_last when fused.
    """
    if shortcut is not None and not is_addable(shortcut, x, layers):
        z = residual_block(x, layers, relu=False)
        return _activate(_add(z, shortcut, adds_in_place), relu)
    all_layers = layers if projection is None else [*layers, projection]
    if can_train(x, all_layers):
        return train_layers(x, layers, projection, shortcut, relu)
    if can_fold(x, all_layers, shortcut):
        return fold_layers(x, layers, projection, shortcut, relu)
    if projection is not None:
        given = residual_block(x, [projection], relu=False)
        return residual_block(x, layers, shortcut=given, relu=relu, adds_in_place=adds_in_place)
    if len(layers) > 1:
        z = residual_block(x, layers[:1])
        return residual_block(
            z, layers[1:], shortcut=shortcut, relu=relu, adds_in_place=adds_in_place
        )
    conv, bn = cast(tuple[nn.Conv2d, nn.BatchNorm2d], layers[0])
    z = normalize(bn, conv(x))
    return _activate(z if shortcut is None else _add(z, shortcut, adds_in_place), relu)


def _activate(z: Tensor, relu: bool) -> Tensor:
    return F.relu(z) if relu else z


def _add(z: Tensor, shortcut: Tensor, in_place: bool) -> Tensor:
    if in_place:
        z += shortcut
        return z
    return z + shortcut


def is_addable(shortcut: Any, x: Tensor, layers: Sequence[ConvBNModules]) -> bool:
    """Whether a shortcut has shape, dtype and device of what the layers make of x.

    Plain torch would also broadcast and promote it.
    """
    if not isinstance(shortcut, Tensor) or shortcut.dtype != cast_dtype(x):
        return False
    if x.dim() != 4 or shortcut.dim() != 4 or shortcut.device != x.device:
        return False
    # Convolutions may have been exchanged, also for other modules.
    if not all(isinstance(getattr(conv, "padding", None), tuple) for conv, _ in layers):
        return False
    size = tuple(x.shape)
    for conv, _ in layers:
        (k, _, *sides), padding = conv.weight.shape, cast(tuple[int, int], conv.padding)
        geometry = zip(size[2:], sides, conv.stride, padding, strict=True)
        size = (size[0], k, *(output_length(*of_one) for of_one in geometry))
    return tuple(shortcut.shape) == size


def train_layers(
    x: Tensor,
    layers: Sequence[ConvBNModules],
    projection: ConvBNModules | None,
    shortcut: Tensor | None,
    relu: bool,
) -> Tensor:
    """`residual_block` by the op of training; moves the running statistics."""
    operand, params = to_compute_dtype(x), [layer_params(layer, x) for layer in layers]
    if len(layers) == 1 and projection is None and shortcut is None:
        out, stats = ops.conv_bn_relu(operand, params[0], relu=relu)
    else:
        out, stats = ops.residual_block(
            operand,
            params,
            projection=None if projection is None else layer_params(projection, x),
            residual=None if shortcut is x else shortcut,
            add_input=shortcut is x,
            relu=relu,
        )
    all_layers = layers if projection is None else [*layers, projection]
    update_running_stats(
        [cast(Norm, layer.bn) for layer in all_layers],
        [
            batch if conv.bias is None else batch._replace(mean=batch.mean + conv.bias.detach())
            for (conv, _), batch in zip(all_layers, stats, strict=True)
        ],
    )
    _have_all_recomputed(out)
    return out


def fold_layers(
    x: Tensor,
    layers: Sequence[ConvBNModules],
    projection: ConvBNModules | None,
    shortcut: Tensor | None,
    relu: bool,
) -> Tensor:
    """`residual_block` by the ops of evaluation, with the running statistics."""
    all_layers = layers if projection is None else [*layers, projection]
    params, scale_shifts = zip(*(fold_once(layer, x) for layer in all_layers), strict=True)
    operand = to_compute_dtype(x)
    if shortcut is None or shortcut is x:
        if len(all_layers) == 1 and shortcut is None:
            return ops.conv_bn_folded(operand, params[0], scale_shifts[0], relu=relu)
        return ops.residual_block_folded(
            operand,
            params[: len(layers)],
            scale_shifts,
            projection=None if projection is None else params[-1],
            add_input=shortcut is x,
            relu=relu,
        )
    *inner, last = zip(params, scale_shifts, strict=True)
    for layer, scale_shift in inner:
        operand = ops.conv_bn_folded(operand, layer, scale_shift)
    return ops.conv_bn_folded(operand, *last, residual=shortcut, relu=relu)


class _SaveATensor(torch.autograd.Function):
    """Keeps something for backward."""

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        kept = out.new_zeros(1)
        ctx.save_for_backward(kept)
        return kept

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> None:
        return None


def _have_all_recomputed(out: Tensor) -> None:
    """Have torch.utils.checkpoint recompute all that came before out, running statistics too.

    Without reentrance it leaves a segment, by an exception, at the last tensor that backward needs.
    A plain batch norm has then moved its running statistics for the second time; a fused block
    saves its last tensor before it can. So one more is saved behind it.
    """
    if torch.compiler.is_compiling() or not out.requires_grad:
        return
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        _SaveATensor.apply(out)
