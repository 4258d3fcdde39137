"""The training ops without torch's dispatcher, for the CPU kernels in eager mode.

A registered op costs about 0.3 ms a call in Python, forward and backward, which is nothing beside a
captured or compiled step and 5 % of a ResNet-20 step on a CPU. Here autograd calls the same chain
directly; whatever traces or fakes tensors still sees the registered op.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastres.kernels.block import LayerState, backward, forward
from fastres.kernels.cpu import backend as cpu_backend
from fastres.kernels.dispatch import choose_backend, make_chain, no_autocast, pixels

__all__ = ["can_run_eager", "run_eager"]

_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def can_run_eager(x: Tensor, *others: Tensor | None) -> bool:
    """Whether all are ordinary tensors, the CPU kernels compute on x, and nobody traces them."""
    is_traced = (
        torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode()
    )
    if is_traced or not all(type(t) in _PLAIN_TENSORS for t in (x, *others) if t is not None):
        return False
    return choose_backend(x) is cpu_backend


class _EagerChain(torch.autograd.Function):
    """`chain.forward` and `chain.backward` as one node of autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        arguments: tuple[list[int], list[float], str, bool],
        x: Tensor,
        residual: Tensor | None,
        *params: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return out, and mean and unbiased variance of every layer."""
        geometry, eps, shortcut, relu = arguments
        chain = make_chain(params, geometry, shortcut, relu, eps)
        given = None if residual is None else pixels(residual)
        with no_autocast(x):
            out, states = forward(chain, pixels(x), given, cpu_backend)
        stats = [vector for state in states for vector in (state.mean, state.unbiased_var)]
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        # Without a shortcut the ReLU's mask follows from y, which is kept anyway.
        mask = None if shortcut == "none" else out
        saved = [tensor for state in states for tensor in state]
        ctx.save_for_backward(x, mask, *params, *saved)
        ctx.num_params = len(params)
        ctx.arguments = (geometry, shortcut, relu)
        return out, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Gradients of x, the residual and the parameters."""
        x, out, *rest = ctx.saved_tensors
        params, saved = rest[: ctx.num_params], rest[ctx.num_params :]
        if dout is None:
            return (None,) * (3 + len(params))
        size = len(LayerState._fields)
        states = [LayerState(*saved[i : i + size]) for i in range(0, len(saved), size)]
        chain = make_chain(params, *ctx.arguments)
        need_dx = ctx.needs_input_grad[1]
        with no_autocast(x):
            grads = backward(
                chain, pixels(dout), pixels(x), out, states, cpu_backend, need_dx=need_dx
            )
        of_params = [tensor for layer in grads.layers for tensor in layer]
        return None, grads.dx if need_dx else None, grads.dresidual, *of_params


def run_eager(
    x: Tensor,
    residual: Tensor | None,
    params: list[Tensor],
    geometry: list[int],
    eps: list[float],
    shortcut: str,
    relu: bool,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Run a training op; the arguments are those of the registered ones.

    Returns: out; mean and unbiased variance of the batch, a pair a layer.
    """
    out, *stats = _EagerChain.apply((geometry, eps, shortcut, relu), x, residual, *params)
    return out, list(zip(stats[::2], stats[1::2], strict=True))
