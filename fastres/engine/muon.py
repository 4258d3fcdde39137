"""Muon: SGD with momentum whose step is made orthogonal, for the filters of convolutions.

    buffer = momentum * buffer + g
    u      = g + momentum * buffer                     Nesterov's look ahead
    w      = w * sqrt(K) / |w| - lr * orthogonal(u)    K filters are the rows of a matrix

`orthogonal` brings the singular values of u near 1, so that a step moves all directions of a layer
alike, the rare ones too. A layer keeps its norm: batch norm behind it takes any factor out again,
so weight decay would set nothing but the rate, which is stated instead: `lr` is the length of a
step as a share of the layer's, where that has no more filters than inputs of one.

Filters of one shape are made orthogonal together, in a few batched products; nothing waits for the
device, so that a CUDA graph can capture the step.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, with the coefficients; fixed
norms: https://github.com/KellerJordan/cifar10-airbench.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonalize"]

# Of the quintic that one step applies to every singular value. They converge to no point, but bring
# what is above 0.1 to between 0.7 and 1.2 in three steps.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 3


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Bring all singular values of each matrix near 1, by three Newton-Schulz steps.

    Args:
        matrices: (B, M, N), any float dtype.
        dtype: of the products, whose error in bf16 is small beside what three steps leave.

    Returns: (B, M, N) in `dtype`; a matrix of zeros stays one.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    # The Frobenius norm is at least the largest singular value, which must not be above 1.
    x = (x / x.float().norm(dim=(1, 2), keepdim=True).clamp(min=1e-30)).to(dtype)
    for _ in range(_STEPS):
        gram = x @ x.mT
        # a x + (b gram + c gram gram) x, each sum by the product that ends it.
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _as_matrix(filters: Tensor) -> Tensor:
    """View (K, C, R, S) filters as K rows, their elements in the order of memory.

    The order of columns changes nothing: it is that of the result too.
    """
    return filters.permute(0, 2, 3, 1).flatten(1)


def _as_filters(matrix: Tensor, like: Tensor) -> Tensor:
    num, channels, height, width = like.shape
    return matrix.view(num, height, width, channels).permute(0, 3, 1, 2)


class Muon(torch.optim.Optimizer):
    """See the formulas above; every layer's gradient is needed in every step.

    Torch's own `torch.optim.Muon` takes matrices alone, one by one, and a rate that is a number.

    Args:
        params: (K, C, R, S) filters, each layer's followed by batch norm.
        lr: a number, or a tensor on the device, which is read when the step runs.
        momentum: share of the buffer that stays.
        dtype: of the products.
    """

    # Torch's loss scaler then gives this optimizer the scale and whether to move at all.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor,
        *,
        momentum: float = 0.6,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.dtype = dtype
        self._kept_norms: dict[tuple[int, ...], Tensor] = {}
        # From the start, so that a checkpoint before the first step has them too.
        for group in self.param_groups:
            for layer in group["params"]:
                self.state[layer]["momentum_buffer"] = torch.zeros_like(layer)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every layer that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            layers = [layer for layer in group["params"] if layer.grad is not None]
            if layers:
                self._move(layers, group["lr"], group["momentum"])
        return loss

    def _move(self, layers: list[Tensor], lr: float | Tensor, momentum: float) -> None:
        """Move layers of any shapes, in few launches: a step of a small net is short of them."""
        grads, moves = self._gradients(layers)
        buffers = [self.state[layer]["momentum_buffer"] for layer in layers]
        if moves is None:
            torch._foreach_mul_(buffers, momentum)
        else:
            torch._foreach_mul_(buffers, torch.where(moves, momentum, 1.0))
        torch._foreach_add_(buffers, grads)
        ahead = list(torch._foreach_add(grads, buffers, alpha=momentum))
        # A layer of zeros has no norm to keep.
        lengths = torch.stack(torch._foreach_norm(layers)).clamp_(min=1e-12)
        factors = self._norms(layers) / lengths
        if moves is not None:
            factors = torch.where(moves, factors, 1.0)
        torch._foreach_mul_(layers, list(factors.unbind()))
        torch._foreach_sub_(layers, self._moves(ahead, lr, moves))

    def _moves(self, ahead: list[Tensor], lr: float | Tensor, moves: Tensor | None) -> list[Tensor]:
        """Return what layers are moved by, those of one shape made orthogonal together."""
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for number, direction in enumerate(ahead):
            by_shape[direction.shape].append(number)
        moved = list(ahead)
        for numbers in by_shape.values():
            matrices = torch.stack([_as_matrix(ahead[n]) for n in numbers])
            directions = orthogonalize(matrices, self.dtype).float() * lr
            if moves is not None:
                directions = torch.where(moves, directions, 0.0)
            for n, matrix in zip(numbers, directions.unbind(), strict=True):
                moved[n] = _as_filters(matrix, ahead[n])
        return moved

    def _norms(self, layers: list[Tensor]) -> Tensor:
        """Return the norm that each layer keeps, on the device before a graph is captured."""
        shapes = tuple(layer.shape[0] for layer in layers)
        if shapes not in self._kept_norms:
            roots = torch.tensor(shapes, dtype=torch.float32).sqrt()
            self._kept_norms[shapes] = roots.to(layers[0].device)
        return self._kept_norms[shapes]

    def _gradients(self, layers: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """Return gradients without the loss scale, and whether anything moves; None: it does.

        Where a gradient is not finite, all are 0 and nothing moves.
        """
        grads = [layer.grad for layer in layers if layer.grad is not None]
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is not None:
            grads = [grad / scale for grad in grads]
        if found_inf is None:
            return grads, None
        moves = found_inf == 0
        return [torch.where(moves, grad, 0.0) for grad in grads], moves
