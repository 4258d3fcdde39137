"""The fused ops as torch sees them: registration, shapes, autograd, choice of backend.

    fastres::conv_bn_relu_fwd, _bwd      out = relu(bn(conv(x)))
    fastres::residual_block_fwd, _bwd      out = relu(bn(conv(.. relu(bn(conv(x))))) + shortcut)
    fastres::conv_bn_folded                out = relu(a * conv(x) + b + residual), for inference

`residual_block_folded` is no op of its own: several of the last, or one kernel on a CPU.

The two training ops have one signature and one implementation, `block.py`; their names tell a
profile what a model runs. Ops change none of their inputs: they return the statistics of the batch,
and the module moves its running averages. `custom_op` keeps them opaque to torch.compile, which so
compiles a model on machines without a GPU driver too.

CUDA tensors go through the Triton kernels, CPU tensors too under TRITON_INTERPRET=1; other CPU
tensors in bf16 and fp32 through the CPU kernels where there is a compiler for them; everything else
is computed in plain torch, and so are tensors that are not plain (plain_tensors.py) and gradients
of which a graph is wanted: higher derivatives, tangents and transforms are those of plain torch.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from fastres.kernels.autograd import (
    BlockSpec,
    block_gradients,
    eager_backend,
    flat_params,
    run_backward,
    run_eager,
    run_forward,
    save_block,
    to_states,
)
from fastres.kernels.block import Backend, Block, Shortcut, check_layer, check_shortcut, forward
from fastres.kernels.conv_shape import output_length
from fastres.kernels.conv_types import ConvBN, stat_dtype
from fastres.kernels.dispatch import choose_backend, no_autocast
from fastres.kernels.filter_copies import round_filter
from fastres.kernels.flops import block_backward_flops, block_flops, conv_flops, count_flops
from fastres.kernels.layout import empty_channels_last, to_channels_last
from fastres.kernels.plain_tensors import are_plain
from fastres.kernels.reference import backend as reference_backend

__all__ = [
    "BatchStats",
    "backward_impl",
    "conv_bn_folded",
    "conv_bn_relu",
    "forward_impl",
    "residual_block",
    "residual_block_folded",
]

# params: w, weight, bias of every layer, the projection's last; then the fields of BlockSpec.
_FORWARD_SCHEMA = (
    "(Tensor x, Tensor? residual, Tensor[] params, int[] geometry, float[] eps, str shortcut, "
    "bool relu) -> (Tensor, Tensor[])"
)
# saved: the fields of every LayerState in turn.
_BACKWARD_SCHEMA = (
    "(Tensor dout, Tensor x, Tensor? out, Tensor[] params, Tensor[] saved, int[] geometry, "
    "float[] eps, str shortcut, bool relu, bool need_dx) -> Tensor[]"
)
_FOLDED_SCHEMA = (
    "(Tensor x, Tensor w, Tensor scale_shift, Tensor? residual, int stride, int padding, "
    "bool relu) -> Tensor"
)


class BatchStats(NamedTuple):
    """Statistics of one layer's y in this batch, (K,) each: what running averages are made of."""

    mean: Tensor
    unbiased_var: Tensor

    @classmethod
    def of(cls, stats: Tensor) -> "BatchStats":
        """The first two rows of `LayerState.stats`."""
        return cls(stats[0], stats[1])


def forward_impl(
    x: Tensor,
    residual: Tensor | None,
    params: list[Tensor],
    geometry: list[int],
    eps: list[float],
    shortcut: Shortcut,
    relu: bool,
) -> tuple[Tensor, list[Tensor]]:
    """What the forward ops compute, by the back end of x; out, and the fields of every state."""
    spec = BlockSpec(geometry, eps, shortcut, relu)
    out, states = run_forward(spec, x, residual, params, choose_backend(x))
    return out, [tensor for state in states for tensor in state]


def backward_impl(
    dout: Tensor,
    x: Tensor,
    out: Tensor | None,
    params: list[Tensor],
    saved: list[Tensor],
    geometry: list[int],
    eps: list[float],
    shortcut: Shortcut,
    relu: bool,
    need_dx: bool,
) -> list[Tensor]:
    """What the backward ops compute, by the back end of x; see `run_backward`."""
    spec = BlockSpec(geometry, eps, shortcut, relu)
    backend = choose_backend(x)
    return run_backward(spec, dout, x, out, params, saved, backend, need_dx=need_dx)


def _output_size(x: Tensor, w: Tensor, stride: int, padding: int) -> tuple[int, int, int, int]:
    """The size (N, K, P, Q) of conv(x, w)."""
    p, q = (output_length(x.shape[d], w.shape[d], stride, padding) for d in (2, 3))
    return x.shape[0], w.shape[0], p, q


def _forward_fake(
    x: Tensor,
    residual: Tensor | None,
    params: list[Tensor],
    geometry: list[int],
    eps: list[float],
    shortcut: str,
    relu: bool,
) -> tuple[Tensor, list[Tensor]]:
    num_layers = len(params) // 3
    saved: list[Tensor] = []
    source = out = x
    for i in range(num_layers):
        projects = shortcut == "projected" and i == num_layers - 1
        given = x if projects else source
        size = _output_size(given, params[3 * i], *geometry[2 * i : 2 * i + 2])
        y = empty_channels_last(given, *size)
        source = y
        out = out if projects else y
        saved += [y, y.new_empty((5, y.shape[1]), dtype=stat_dtype(y.dtype))]
    return torch.empty_like(out), saved


def _backward_fake(
    dout: Tensor,
    x: Tensor,
    out: Tensor | None,
    params: list[Tensor],
    saved: list[Tensor],
    geometry: list[int],
    eps: list[float],
    shortcut: Shortcut,
    relu: bool,
    need_dx: bool,
) -> list[Tensor]:
    inputs = [empty_channels_last(x, *x.shape)] if need_dx else []
    if BlockSpec(geometry, eps, shortcut, relu).masks_residual:
        inputs.append(empty_channels_last(dout, *dout.shape))
    grads = [
        empty_channels_last(p, *p.shape) if p.dim() == 4 else torch.empty_like(p) for p in params
    ]
    return [*inputs, *grads]


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, list[Tensor]]) -> None:
    x, _, params, *spec = inputs
    out, saved = output
    ctx.mark_non_differentiable(*saved)
    save_block(ctx, BlockSpec(*spec), x, out, params, saved)


def _differentiate(backward_op: Callable[..., list[Tensor]]) -> Callable[..., tuple]:
    """The autograd formula of a training op: its second half, gradients handed to the inputs."""

    def run(spec: BlockSpec, *tensors: Any, need_dx: bool) -> list[Tensor]:
        return backward_op(*tensors, *spec, need_dx)

    def formula(ctx: Any, dout: Tensor | None, _: list[None]) -> tuple:
        need_dx = ctx.needs_input_grad[0]
        dx, dresidual, grads = block_gradients(ctx, dout, run, need_dx=need_dx)
        return dx, dresidual, grads, *[None] * len(BlockSpec._fields)

    return formula


def _register(name: str) -> Callable[..., tuple[Tensor, list[Tensor]]]:
    """Register `fastres::{name}_fwd` and `_bwd` and return the first."""
    backward_op = custom_op(
        f"fastres::{name}_bwd", backward_impl, mutates_args=(), schema=_BACKWARD_SCHEMA
    )
    backward_op.register_fake(_backward_fake)
    forward_op = custom_op(
        f"fastres::{name}_fwd", forward_impl, mutates_args=(), schema=_FORWARD_SCHEMA
    )
    forward_op.register_fake(_forward_fake)
    forward_op.register_autograd(_differentiate(backward_op), setup_context=_setup_context)
    count_flops(f"{name}_fwd", block_flops)
    count_flops(f"{name}_bwd", block_backward_flops)
    return forward_op


_conv_bn_relu = _register("conv_bn_relu")
_residual_block = _register("residual_block")


def _run(
    op: Callable[..., tuple[Tensor, list[Tensor]]],
    block: Block,
    x: Tensor,
    residual: Tensor | None = None,
) -> tuple[Tensor, list[BatchStats]]:
    """Compute a block by a training op, the same without torch's dispatcher, or plain torch."""
    params = flat_params(block)
    if not are_plain(x, residual, *params):
        layers = [layer._replace(w=round_filter(layer.w, x.dtype)) for layer in block.all_layers]
        projection = None if block.projection is None else layers.pop()
        with no_autocast(x):
            out, states = forward(
                block._replace(layers=layers, projection=projection), x, residual, reference_backend
            )
        return out, [BatchStats.of(state.stats.detach()) for state in states]
    backend = eager_backend(x, residual, *params)
    if backend is not None:
        out, stats = run_eager(block, x, residual, backend)
        return out, [BatchStats.of(of_layer) for of_layer in stats]
    out, saved = op(x, residual, params, *BlockSpec.of(block))
    return out, [BatchStats.of(state.stats) for state in to_states(saved)]


def conv_bn_relu(x: Tensor, layer: ConvBN, *, relu: bool = True) -> tuple[Tensor, list[BatchStats]]:
    """`out = relu(bn(conv(x)))` with the statistics of this batch; differentiable.

    Saved for backward: x, the raw convolution output y and per-channel numbers.

    Args:
        x: (N, C, H, W) channels_last; bf16, fp16, fp32, or fp64 in plain torch.
        layer: w (K, C, R, S) in the dtype of x, or in fp32: then it is rounded to the dtype of x,
            see filter_copies.py, and its gradient is fp32; weight and bias (K,) fp32 (fp64 beside
            fp64).
        relu: whether the ReLU is applied.

    Returns: out: (N, K, P, Q) dense channels_last, dtype of x; the statistics of its one layer.

    Raises: ValueError: when a tensor's shape, dtype or layout is not as above, or each channel has
        a single value.

    Numerics: products in the dtype of x, sums and statistics in fp32. Deterministic.
    """
    return _run(_conv_bn_relu, Block([layer], relu=relu), x)


def residual_block(
    x: Tensor,
    layers: Sequence[ConvBN],
    *,
    projection: ConvBN | None = None,
    residual: Tensor | None = None,
    add_input: bool = True,
    relu: bool = True,
) -> tuple[Tensor, list[BatchStats]]:
    """`relu(bn(conv(.. relu(bn(conv(x))))) + shortcut)`: two layers basic, three bottleneck.

    Fused: no activation between the layers is stored; the shortcut's gradient is added by the last
    kernel of backward. Saved: x, the raw y of every convolution, per-channel numbers, and out where
    a ReLU follows a shortcut; an out that is not saved may be changed in place.

    Args:
        x: as in `conv_bn_relu`, as are the numerics.
        layers: the main path.
        projection: the layer that makes the shortcut from x.
        residual: (N, K, P, Q) channels_last, dtype of x: a shortcut made elsewhere.
        add_input: without the two above, x itself is the shortcut; False: there is none.
        relu: whether the last ReLU is applied; those between the layers always are.

    Returns: out: (N, K, P, Q) dense channels_last; the statistics of the layers, the projection's
        last.

    Raises: ValueError: when both projection and residual are given, or as `conv_bn_relu`.
    """
    if projection is not None and residual is not None:
        raise ValueError("give at most one of projection and residual")
    shortcut: Shortcut = "input" if add_input else "none"
    if projection is not None:
        shortcut = "projected"
    elif residual is not None:
        shortcut = "given"
    return _run(_residual_block, Block(layers, projection, shortcut, relu), x, residual)


def _fold(
    backend: Backend,
    x: Tensor,
    w: Tensor,
    scale_shift: Tensor,
    residual: Tensor | None,
    stride: int,
    padding: int,
    relu: bool,
) -> Tensor:
    """Compute `conv_bn_folded` of tensors in any layout by a back end."""
    wanted = (2, *w.shape[:1])
    if scale_shift.shape != wanted:
        raise ValueError(f"scale_shift must have shape {wanted}, got {tuple(scale_shift.shape)}")
    layer = ConvBN(w, scale_shift[0], scale_shift[1], stride, padding)
    check_layer(x, layer)
    layer = layer._replace(w=to_channels_last(w))
    given = None if residual is None else to_channels_last(residual)
    check_shortcut(given, x, _output_size(x, w, stride, padding))
    with no_autocast(x):
        return backend.conv_folded(
            to_channels_last(x), layer, scale_shift.contiguous(), given, relu
        )


def _folded_impl(
    x: Tensor,
    w: Tensor,
    scale_shift: Tensor,
    residual: Tensor | None,
    stride: int,
    padding: int,
    relu: bool,
) -> Tensor:
    return _fold(choose_backend(x), x, w, scale_shift, residual, stride, padding, relu)


def _folded_fake(
    x: Tensor,
    w: Tensor,
    scale_shift: Tensor,
    residual: Tensor | None,
    stride: int,
    padding: int,
    relu: bool,
) -> Tensor:
    return empty_channels_last(x, *_output_size(x, w, stride, padding))


_conv_bn_folded = custom_op(
    "fastres::conv_bn_folded", _folded_impl, mutates_args=(), schema=_FOLDED_SCHEMA
)
_conv_bn_folded.register_fake(_folded_fake)
count_flops("conv_bn_folded", conv_flops)


def conv_bn_folded(
    x: Tensor,
    layer: ConvBN,
    scale_shift: Tensor,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """`out = relu(a * conv(x) + b + residual)`: a layer of inference in one kernel.

    Where a gradient is wanted it is computed in plain torch, which differentiates it.

    Args:
        x: (N, C, H, W) channels_last; bf16, fp16, fp32, or fp64 in plain torch.
        layer: its w (K, C, R, S), in the dtype of x, stride and padding are used.
        scale_shift: (2, K) fp32 (fp64 beside fp64), a above b: the batch norm folded.
        residual: (N, K, P, Q) channels_last, dtype of x; None adds nothing.
        relu: whether the ReLU is applied.

    Returns: out: (N, K, P, Q) dense channels_last, dtype of x.

    Raises: ValueError: when a tensor's shape, dtype or layout is not as above.
    """
    operands = (x, layer.w, scale_shift, residual)
    geometry = (layer.stride, layer.padding, relu)
    if not _is_constant(*operands):
        return _fold(reference_backend, *operands, *geometry)
    backend = eager_backend(*operands)
    if backend is not None:
        return _fold(backend, *operands, *geometry)
    return _conv_bn_folded(*operands, *geometry)


def _is_constant(*tensors: Tensor | None) -> bool:
    """Whether all are plain and none wants a gradient: what the ops of inference are for."""
    if not are_plain(*tensors):
        return False
    return not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors if t is not None)


def residual_block_folded(
    x: Tensor,
    layers: Sequence[ConvBN],
    scale_shifts: Sequence[Tensor],
    *,
    projection: ConvBN | None = None,
    add_input: bool = True,
    relu: bool = True,
) -> Tensor:
    """`residual_block` for inference, each layer as in `conv_bn_folded`.

    Args:
        x: as in `conv_bn_folded`, as are the layers.
        layers: the main path.
        scale_shifts: (2, K) of each layer, the projection's last.
        projection: the layer that makes the shortcut from x.
        add_input: without a projection, x itself is the shortcut; False: there is none.
        relu: whether the last ReLU is applied.

    Returns, raises: as `conv_bn_folded`; ValueError too where a layer has no scale_shift.
    """
    shortcut: Shortcut = "input" if add_input else "none"
    block = Block(layers, projection, shortcut if projection is None else "projected", relu)
    filters = [layer.w for layer in block.all_layers]
    if not layers or len(scale_shifts) != len(filters):
        raise ValueError(f"got {len(scale_shifts)} scale_shifts for {len(filters)} layers")
    operands = (x, *filters, *scale_shifts)
    backend = eager_backend(*operands) if _is_constant(*operands) else None
    if backend is not None:
        out = backend.block_folded(x, block, scale_shifts)
        if out is not None:
            return out
    residual = x if add_input else None
    if projection is not None:
        residual = conv_bn_folded(x, projection, scale_shifts[-1], relu=False)
    *inner, last = zip(layers, scale_shifts, strict=False)
    for layer, scale_shift in inner:
        x = conv_bn_folded(x, layer, scale_shift)
    return conv_bn_folded(x, *last, residual=residual, relu=relu)
