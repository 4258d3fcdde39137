"""A convolution and its batch norm, computed by the fused ops in the way that fits the mode.

Under autocast activations and filters are cast to its dtype; the parameters and statistics of batch
norm are used in float32.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.kernels import ops
from fastres.kernels.ops import BatchStats
from fastres.kernels.reference.block import ConvBN, bn_fold_ref, stat_dtype

__all__ = [
    "Pair",
    "block_folded",
    "can_fold",
    "can_train",
    "cast_dtype",
    "constant_parameters",
    "conv_bn",
    "conv_bn_folded",
    "has_equal_sides",
    "is_plain_relu",
    "is_seen",
    "move_running_statistics",
    "running_statistics_together",
    "to_layer",
    "to_pixels",
]

_kept: ContextVar[dict[Any, tuple[ConvBN, Tensor]] | None] = ContextVar(
    "fastres_kept", default=None
)
_moves: ContextVar[list[tuple[nn.BatchNorm2d, BatchStats]] | None] = ContextVar(
    "fastres_moves", default=None
)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Pair(NamedTuple):
    """A convolution and the batch norm that reads it."""

    conv: nn.Conv2d
    bn: nn.BatchNorm2d


def is_seen(module: nn.Module) -> bool:
    """Whether somebody outside would notice that the module's own forward is not called."""
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS)


def is_plain_relu(module: Any) -> bool:
    """Whether a module is a ReLU that an op may take over."""
    return type(module) is nn.ReLU and not is_seen(module)


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


def to_pixels(x: Tensor) -> Tensor:
    """X as the kernels take it: in the dtype of the computation, channels_last."""
    return x.to(cast_dtype(x)).contiguous(memory_format=torch.channels_last)


def to_layer(pair: Pair, x: Tensor) -> ConvBN:
    """The parameters of a pair as the kernels take them, beside activations like x."""
    conv, bn = pair
    wide = stat_dtype(x.dtype)
    w = conv.weight.to(cast_dtype(x)).contiguous(memory_format=torch.channels_last)
    padding = cast(tuple[int, int], conv.padding)
    return ConvBN(w, bn.weight.to(wide), bn.bias.to(wide), conv.stride[0], padding[0], bn.eps)


@contextmanager
def constant_parameters() -> Iterator[None]:
    """Fold each batch norm and cast each filter once for all batches of the `with` block.

    Nobody may change the network inside: what was folded from it would stay as it is.
    """
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def _fold(pair: Pair, x: Tensor) -> tuple[ConvBN, Tensor]:
    """A pair beside activations like x, and its running statistics as a * y + b: (2, K)."""
    bn, layer, wide = pair.bn, to_layer(pair, x), stat_dtype(x.dtype)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    rstd = (bn.running_var.to(wide) + bn.eps).rsqrt()
    return layer, bn_fold_ref(bn.running_mean.to(wide), rstd, layer.weight, layer.bias)


def _fold_once(pair: Pair, x: Tensor) -> tuple[ConvBN, Tensor]:
    """`_fold`, or what it returned before in the same `constant_parameters`."""
    kept = None if torch.compiler.is_compiling() else _kept.get()
    if kept is None:
        return _fold(pair, x)
    key = (*pair, x.dtype, cast_dtype(x))
    if key not in kept:
        kept[key] = _fold(pair, x)
    return kept[key]


def conv_bn_folded(x: Tensor, pair: Pair, *, relu: bool, residual: Tensor | None = None) -> Tensor:
    """`conv_bn` with the running statistics, in one op."""
    layer, scale_shift = _fold_once(pair, x)
    given = None if residual is None else to_pixels(residual)
    return ops.conv_bn_folded(to_pixels(x), layer, scale_shift, residual=given, relu=relu)


def block_folded(
    x: Tensor, pairs: Sequence[Pair], *, projection: Pair | None, add_input: bool
) -> Tensor:
    """A residual block with the running statistics."""
    everything = pairs if projection is None else [*pairs, projection]
    layers, scale_shifts = zip(*(_fold_once(pair, x) for pair in everything), strict=True)
    return ops.residual_block_folded(
        to_pixels(x),
        layers[: len(pairs)],
        scale_shifts,
        projection=None if projection is None else layers[-1],
        add_input=add_input,
    )


def move_running_statistics(pairs: Sequence[Pair], batches: Sequence[BatchStats]) -> None:
    """Move the running statistics towards those of the batch, as nn.BatchNorm2d does."""
    moves = [
        (bn, batch)
        for (_, bn), batch in zip(pairs, batches, strict=True)
        if bn.track_running_stats and bn.running_mean is not None
    ]
    waiting = None if torch.compiler.is_compiling() else _moves.get()
    if waiting is None:
        _move(moves)
    else:
        waiting += moves


@contextmanager
def running_statistics_together() -> Iterator[None]:
    """Move the running statistics of all layers at the end of the `with` block, in a few calls.

    Inside they are what they were before it, and an exception leaves them so.
    """
    moves: list[tuple[nn.BatchNorm2d, BatchStats]] = []
    token = _moves.set(moves)
    try:
        yield
    finally:
        _moves.reset(token)
    _move(moves)


def _are_alike(norms: Sequence[nn.BatchNorm2d]) -> bool:
    """Whether the statistics of all can move in one call: one momentum, and nobody moves twice."""
    # A compiler would take down which norms these are, and compile anew for every other net.
    if torch.compiler.is_compiling() or norms[0].momentum is None:
        return False
    is_same = all(bn.momentum == norms[0].momentum for bn in norms)
    return is_same and len({id(bn) for bn in norms}) == len(norms)


@torch.no_grad()
def _move(moves: Sequence[tuple[nn.BatchNorm2d, BatchStats]]) -> None:
    if not moves:
        return
    if len(moves) > 1 and not _are_alike([bn for bn, _ in moves]):
        for move in moves:
            _move([move])
        return
    momentum = moves[0][0].momentum
    counts = [bn.num_batches_tracked for bn, _ in moves if bn.num_batches_tracked is not None]
    if counts:
        torch._foreach_add_(counts, 1)
    running = [cast(Tensor, t) for bn, _ in moves for t in (bn.running_mean, bn.running_var)]
    seen = [t for _, batch in moves for t in batch]
    seen = [value.to(average.dtype) for value, average in zip(seen, running, strict=True)]
    if momentum is not None:
        torch._foreach_lerp_(running, seen, momentum)
        return
    if not counts:
        return
    # Without a momentum the running statistics are the plain average of all batches.
    step = counts[0].to(running[0].dtype).reciprocal()
    for average, value in zip(running, seen, strict=True):
        average.lerp_(value, step)


def has_equal_sides(*sizes: Any) -> bool:
    """Whether every stride or padding is a pair of equal numbers: no word, no rectangle."""
    return all(isinstance(size, tuple) and len(set(size)) == 1 for size in sizes)


def _is_plain(x: Tensor, pair: Pair) -> bool:
    """Whether the op computes on x what calling the two modules would.

    A fused net can be changed: hooked, pruned, given another convolution or norm, or images of
    another dtype. Then the modules themselves are called, and raise what they raise.
    """
    conv, bn = pair
    return (
        type(conv) is nn.Conv2d
        and type(bn) is nn.BatchNorm2d
        and conv.bias is None
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and has_equal_sides(conv.stride, conv.padding)
        and bn.affine
        and (x.dtype == conv.weight.dtype or _is_cast(x))
        and not (is_seen(conv) or is_seen(bn))
    )


def can_train(x: Tensor, pairs: Iterable[Pair]) -> bool:
    """Whether all batch norms use the statistics of a batch that is not empty."""
    return x.shape[0] > 0 and all(pair.bn.training and _is_plain(x, pair) for pair in pairs)


def can_fold(x: Tensor, pairs: Sequence[Pair], residual: Tensor | None = None) -> bool:
    """Whether all batch norms use running statistics and nobody wants a gradient."""
    if x.shape[0] == 0 or any(pair.bn.training or not _is_plain(x, pair) for pair in pairs):
        return False
    if any(pair.bn.running_mean is None or pair.bn.running_var is None for pair in pairs):
        return False
    if not torch.is_grad_enabled():
        return True
    learns = any(p.requires_grad for pair in pairs for m in pair for p in m.parameters())
    return not (learns or x.requires_grad or (residual is not None and residual.requires_grad))


def conv_bn(x: Tensor, pair: Pair, *, relu: bool = True, residual: Tensor | None = None) -> Tensor:
    """`relu(bn(conv(x)) + residual)` on the way that fits the mode; see layers.py.

    Args:
        x: (N, C, H, W).
        pair: the convolution, without bias, groups and dilation, and its batch norm.
        relu: whether the ReLU is applied; no op adds a residual without it while training.
        residual: (N, K, P, Q), or None.

    Returns: (N, K, P, Q), channels_last when fused.
    """
    if can_train(x, [pair]) and (relu or residual is None):
        pixels, layer = to_pixels(x), to_layer(pair, x)
        if residual is None:
            out, stats = ops.conv_bn_relu(pixels, layer, relu=relu)
        else:
            out, stats = ops.conv_bn_add_relu(pixels, layer, residual.to(pixels.dtype))
        move_running_statistics([pair], stats)
        return out
    if can_fold(x, [pair], residual):
        return conv_bn_folded(x, pair, relu=relu, residual=residual)
    z = pair.bn(pair.conv(x))
    if residual is not None:
        z = z + residual
    return F.relu(z) if relu else z
