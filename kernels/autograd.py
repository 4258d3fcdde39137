"""How a fused block meets autograd: computed from flat tensors, saved, restored, differentiated.

A registered op takes and returns flat lists; `BlockSpec` is the rest of a block, and `run_forward`
and `run_backward` are its two halves for whoever calls them: the registered ops (ops.py), and here
`run_eager`, the same node of autograd without torch's dispatcher.

Where a graph of the gradients is wanted (`create_graph=True`), kernels would end it, and of
tangents, batched gradients and tensor subclasses they would see a part. Then both have
`recompute_gradients`, the formulas of reference/ from the inputs on, which torch can follow.

A registered op costs about 0.3 ms a call in Python, forward and backward, which is nothing beside a
captured or compiled step and 5 % of a ResNet-20 step on a CPU. So CPU kernels in eager mode run as
a plain autograd function; whatever traces or fakes tensors still sees the registered op.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastres.kernels.block import (
    Backend,
    Block,
    BlockGrads,
    Shortcut,
    backward,
    forward,
    layer_states,
)
from fastres.kernels.conv_types import ConvBN, LayerState
from fastres.kernels.cpu import backend as cpu_backend
from fastres.kernels.dispatch import choose_backend, no_autocast
from fastres.kernels.filter_copies import low_precision_filter, round_filter
from fastres.kernels.layout import to_channels_last, to_dense_channels_last
from fastres.kernels.plain_tensors import are_plain
from fastres.kernels.reference import backend as reference_backend

__all__ = [
    "BlockSpec",
    "block_gradients",
    "eager_backend",
    "flat_params",
    "recompute_gradients",
    "run_backward",
    "run_eager",
    "run_forward",
    "save_block",
    "to_states",
]

_NUM_STATE = len(LayerState._fields)


class BlockSpec(NamedTuple):
    """A block without its tensors: what a registered op takes beside them.

    geometry: stride and padding of every layer, the projection's last; eps likewise.
    """

    geometry: list[int]
    eps: list[float]
    shortcut: Shortcut
    relu: bool

    @property
    def keeps_out(self) -> bool:
        """Whether backward needs out, which alone tells the mask of a ReLU behind a shortcut."""
        return self.relu and self.shortcut != "none"

    @property
    def masks_residual(self) -> bool:
        """Whether a given residual has a gradient of its own; without a ReLU that is dout."""
        return self.relu and self.shortcut == "given"

    @classmethod
    def of(cls, block: Block) -> "BlockSpec":
        """Describe a block."""
        layers = block.all_layers
        geometry = [number for layer in layers for number in (layer.stride, layer.padding)]
        return cls(geometry, [layer.eps for layer in layers], block.shortcut, block.relu)

    def to_block(
        self,
        params: Sequence[Tensor],
        dtype: torch.dtype,
        rounded: Callable[[Tensor, torch.dtype], Tensor] = low_precision_filter,
    ) -> Block:
        """Put w, weight and bias of every layer back, beside activations in `dtype`.

        Filters become channels_last; fp32 ones beside a lower precision are `rounded` to it.
        """
        layers = [
            ConvBN(
                rounded(params[3 * i], dtype).contiguous(memory_format=torch.channels_last),
                params[3 * i + 1].contiguous(),
                params[3 * i + 2].contiguous(),
                self.geometry[2 * i],
                self.geometry[2 * i + 1],
                self.eps[i],
                params[3 * i].dtype,
            )
            for i in range(len(params) // 3)
        ]
        projection = layers.pop() if self.shortcut == "projected" else None
        return Block(layers, projection, self.shortcut, self.relu)


def flat_params(block: Block) -> list[Tensor]:
    """The tensors of a block in a row: w, weight, bias of every layer, the projection's last."""
    return [tensor for layer in block.all_layers for tensor in layer[:3]]


def to_states(saved: Sequence[Tensor]) -> list[LayerState]:
    """The states of layers whose fields stand in a row."""
    return [LayerState(*saved[i : i + _NUM_STATE]) for i in range(0, len(saved), _NUM_STATE)]


def run_forward(
    spec: BlockSpec,
    x: Tensor,
    residual: Tensor | None,
    params: Sequence[Tensor],
    backend: Backend,
) -> tuple[Tensor, list[LayerState]]:
    """`block.forward` of flat tensors in any layout."""
    given = None if residual is None else to_channels_last(residual)
    with no_autocast(x):
        return forward(spec.to_block(params, x.dtype), to_channels_last(x), given, backend)


def run_backward(
    spec: BlockSpec,
    dout: Tensor,
    x: Tensor,
    out: Tensor | None,
    params: Sequence[Tensor],
    saved: Sequence[Tensor],
    backend: Backend,
    *,
    need_dx: bool,
) -> list[Tensor]:
    """`block.backward` of flat tensors in any layout.

    Returns: dx where wanted, dresidual where it is not dout, then the gradients of all params.
    """
    with no_autocast(x):
        grads = backward(
            spec.to_block(params, x.dtype),
            to_channels_last(dout),
            to_channels_last(x),
            None if out is None else to_dense_channels_last(out),
            to_states([_as_kernels_left(t) for t in saved]),
            backend,
            need_dx=need_dx,
        )
    return _flat_grads(spec, grads, params)


def _as_kernels_left(t: Tensor) -> Tensor:
    """Return t in the layout that kernels gave it: hooks on saved tensors may return another."""
    return to_dense_channels_last(t) if t.dim() == 4 else t.contiguous()


def recompute_gradients(
    spec: BlockSpec,
    dout: Tensor,
    x: Tensor,
    out: Tensor | None,
    params: Sequence[Tensor],
    *,
    need_dx: bool,
) -> list[Tensor]:
    """`run_backward` as a function of dout, x and params that autograd can differentiate.

    The states of the layers are computed again, in plain torch; out decides the ReLU's mask alone.
    """
    with no_autocast(x):
        block = spec.to_block(params, x.dtype, round_filter)
        dout, x = to_channels_last(dout), to_channels_last(x)
        states = layer_states(block, x, reference_backend)
        mask = None if out is None else out.detach()
        grads = backward(block, dout, x, mask, states, reference_backend, need_dx=need_dx)
        return _flat_grads(spec, grads, params)


def _flat_grads(spec: BlockSpec, grads: BlockGrads, params: Sequence[Tensor]) -> list[Tensor]:
    """Return what `run_backward` does; dout is none of it, for no op may return its input."""
    dresidual = grads.dresidual if spec.masks_residual else None
    inputs = [t for t in (grads.dx, dresidual) if t is not None]
    of_params = (tensor for layer in grads.layers for tensor in layer)
    return [*inputs, *(t.to(param.dtype) for t, param in zip(of_params, params, strict=True))]


def save_block(
    ctx: Any,
    spec: BlockSpec,
    x: Tensor,
    out: Tensor,
    params: Sequence[Tensor],
    saved: Sequence[Tensor],
) -> None:
    """Keep in an autograd context what `block_gradients` needs."""
    ctx.set_materialize_grads(False)
    # An out that is not kept may be changed in place before backward.
    ctx.save_for_backward(x, out if spec.keeps_out else None, *params, *saved)
    ctx.spec, ctx.num_params = spec, len(params)


def block_gradients(
    ctx: Any, dout: Tensor | None, run: Callable[..., list[Tensor]], *, need_dx: bool
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of x, of a given residual and of the params, from what `save_block` kept.

    run: called with spec, dout, x, out, params, saved and need_dx as `run_backward` is, where plain
        gradients are all that is wanted.
    """
    if dout is None:
        return None, None, [None] * ctx.num_params
    x, out, *rest = ctx.saved_tensors
    params, saved = rest[: ctx.num_params], rest[ctx.num_params :]
    # Autograd has gradients on in a backward pass where it is to build a graph of them.
    if torch.is_grad_enabled() or not are_plain(dout, x, out, *params):
        grads = recompute_gradients(ctx.spec, dout, x, out, params, need_dx=need_dx)
    else:
        grads = run(ctx.spec, dout, x, out, params, saved, need_dx=need_dx)
    dx = grads.pop(0) if need_dx else None
    dresidual = None
    if ctx.spec.shortcut == "given":
        dresidual = grads.pop(0) if ctx.spec.masks_residual else dout
    return dx, dresidual, [*grads]


def eager_backend(x: Tensor, *others: Tensor | None) -> Backend | None:
    """The back end to call without a registered op, or None where one is wanted.

    It is the CPU kernels', where they compute on x, all hold numbers and nobody traces.
    """
    if _is_traced() or any(isinstance(t, FakeTensor) for t in (x, *others)):
        return None
    backend = choose_backend(x)
    return backend if backend is cpu_backend else None


def _is_traced() -> bool:
    """Whether somebody looks for operators: then there must be one."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode()


def _run_backward_op(spec: BlockSpec, *tensors: Any, need_dx: bool) -> list[Tensor]:
    return torch.ops.fastres.residual_block_bwd(*tensors, *spec, need_dx)


class _EagerBlock(torch.autograd.Function):
    """A block as one node of autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        spec: BlockSpec,
        backend: Backend,
        x: Tensor,
        residual: Tensor | None,
        *params: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return out, and the state's stats of every layer."""
        out, states = run_forward(spec, x, residual, params, backend)
        stats = [state.stats for state in states]
        ctx.mark_non_differentiable(*stats)
        save_block(ctx, spec, x, out, params, [t for state in states for t in state])
        ctx.backend = backend
        return out, *stats

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Gradients of x, the residual and the parameters."""
        kernels = functools.partial(run_backward, backend=ctx.backend)
        run = _run_backward_op if _is_traced() else kernels
        dx, dresidual, grads = block_gradients(ctx, dout, run, need_dx=ctx.needs_input_grad[2])
        return None, None, dx, dresidual, *grads


def run_eager(
    block: Block, x: Tensor, residual: Tensor | None, backend: Backend
) -> tuple[Tensor, list[Tensor]]:
    """Run a block as one node of autograd, without a registered op.

    Returns: out; `LayerState.stats` of every layer.
    """
    out, *stats = _EagerBlock.apply(BlockSpec.of(block), backend, x, residual, *flat_params(block))
    return out, stats
