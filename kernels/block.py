"""Convolutions with batch norm in a row, and a shortcut around them: forward and backward.

    y_1 = conv(x);  y_i = conv(relu(bn(y_i-1)));  out = relu(bn(y_n) + shortcut)

One layer is conv-BN-ReLU, two with a shortcut a basic block, three a bottleneck. No activation
between the layers is ever stored: each convolution forms it from the raw y before it.

The order of the steps is written here once. What a step is, a backend says: `chain_plain` in plain
torch, `chain_triton` in Triton kernels with cuDNN convolutions where the launch table wants them.
A backend hands back sums and folded gradients of its own kind, which only it looks into.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from fastres.kernels.reference.block import ConvBN, ConvBNGrads, stat_dtype

__all__ = [
    "Backend",
    "BackwardStep",
    "Chain",
    "ChainGrads",
    "LayerState",
    "Shortcut",
    "backward",
    "check_layer",
    "check_shortcut",
    "forward",
]

Shortcut = Literal["none", "input", "given", "projected"]


class Chain(NamedTuple):
    """What is computed.

    layers: the main path. projection: the layer of a projected shortcut. shortcut: what is added
    before the last ReLU: nothing, x itself, a given tensor, or the projection of x. relu: whether
    there is a last ReLU; with a shortcut there is.
    """

    layers: list[ConvBN]
    projection: ConvBN | None = None
    shortcut: Shortcut = "none"
    relu: bool = True


class LayerState(NamedTuple):
    """What a layer keeps for backward and for the running statistics of its batch norm.

    y: (N, K, P, Q) raw convolution output. mean, unbiased_var, rstd: (K,). scale_shift: (2, K), the
    batch norm as a * y + b, a above b.
    """

    y: Tensor
    mean: Tensor
    unbiased_var: Tensor
    rstd: Tensor
    scale_shift: Tensor


class BackwardStep(NamedTuple):
    """Gradients that leave one convolution.

    dx: of its input; behind a layer, already masked by that layer's ReLU. None where unwanted.
    dw: of its filters. sums: of dx, for the batch norm before it, where there is one.
    """

    dx: Tensor | None
    dw: Tensor
    sums: Any


class Backend(Protocol):
    """The five steps of a chain; a module with these functions is a backend."""

    def conv_bn(self, x: Tensor, layer: ConvBN, fold: Tensor | None) -> LayerState:
        """Y = conv(x), or conv(relu(a * x + b)) with fold (2, C), and the statistics of y."""

    def apply(
        self, state: LayerState, shortcut: Tensor | None, fold: Tensor | None, relu: bool
    ) -> Tensor:
        """`out = relu(bn(y) + shortcut)`, or `+ a * shortcut + b` with fold (2, K)."""

    def reduce(
        self, dout: Tensor, state: LayerState, mask: Tensor | None, projected: LayerState | None
    ) -> tuple[Tensor, Any]:
        """Gradient g of the batch norm's output and its sums.

        mask: out (N, K, P, Q), or scale_shift (2, K) to recompute it from y; None: no ReLU.
        """

    def fold_grad(
        self, g: Tensor, sums: Any, state: LayerState, weight: Tensor, *, of_projection: bool
    ) -> tuple[Any, Tensor, Tensor]:
        """Gradient of y, folded; dgamma; dbeta."""

    def conv_backward(
        self,
        dy: Any,
        x: Tensor,
        layer: ConvBN,
        *,
        before: LayerState | None,
        shortcut: Tensor | None,
        need_dx: bool,
    ) -> BackwardStep:
        """Gradients of a convolution of x, or of relu(bn(x)) where x is `before.y`.

        shortcut: gradient added to dx. need_dx: whether dx is wanted.
        """


def check_layer(x: Tensor, layer: ConvBN) -> None:
    """Refuse a layer that kernels would misread beside x: they take pointers and ask no more.

    Raises: ValueError: when a shape, a dtype or a device is not as `ConvBN` wants it.
    """
    wide, size = stat_dtype(x.dtype), tuple(layer.w.shape)
    if x.dim() != 4 or len(size) != 4 or x.shape[1] != size[1]:
        raise ValueError(
            f"x (N, C, H, W) and w (K, C, R, S) must have the same C, got {tuple(x.shape)}, {size}"
        )
    wanted = {"w": (size, x.dtype), "weight": (size[:1], wide), "bias": (size[:1], wide)}
    for name, (shape, dtype) in wanted.items():
        t: Tensor = getattr(layer, name)
        if (tuple(t.shape), t.dtype, t.device) != (shape, dtype, x.device):
            raise ValueError(
                f"{name} must be {shape} {dtype} on {x.device} beside x in {x.dtype}, "
                f"got {tuple(t.shape)} {t.dtype} on {t.device}"
            )


def check_shortcut(shortcut: Tensor | None, x: Tensor, size: Sequence[int]) -> None:
    """Refuse a shortcut that cannot be added to an output of `size` beside x.

    Raises: ValueError: when its shape, dtype or device is another.
    """
    wanted = (tuple(size), x.dtype, x.device)
    if shortcut is not None and (tuple(shortcut.shape), shortcut.dtype, shortcut.device) != wanted:
        raise ValueError(
            f"the shortcut must have shape {wanted[0]} and dtype {x.dtype} on {x.device}, "
            f"got {tuple(shortcut.shape)} and {shortcut.dtype} on {shortcut.device}"
        )


def forward(
    chain: Chain, x: Tensor, residual: Tensor | None, backend: Backend
) -> tuple[Tensor, list[LayerState]]:
    """Run the chain with the statistics of this batch.

    Returns: out; the state of every layer, that of the projection last.

    Raises: ValueError: when a layer does not fit its input, or the shortcut out.
    """
    states: list[LayerState] = []
    for layer in chain.layers:
        before = states[-1] if states else None
        check_layer(x if before is None else before.y, layer)
        if before is None:
            states.append(backend.conv_bn(x, layer, None))
        else:
            states.append(backend.conv_bn(before.y, layer, before.scale_shift))
    last = states[-1]
    shortcut, fold = (x if chain.shortcut == "input" else residual), None
    if chain.projection is not None:
        check_layer(x, chain.projection)
        states.append(backend.conv_bn(x, chain.projection, None))
        shortcut, fold = states[-1].y, states[-1].scale_shift
    check_shortcut(shortcut, x, last.y.shape)
    return backend.apply(last, shortcut, fold, chain.relu), states


class ChainGrads(NamedTuple):
    """Gradients of a chain: of x (None where unwanted), of a given residual, of the parameters."""

    dx: Tensor | None
    dresidual: Tensor | None
    layers: list[ConvBNGrads]


def backward(
    chain: Chain,
    dout: Tensor,
    x: Tensor,
    out: Tensor | None,
    states: list[LayerState],
    backend: Backend,
    *,
    need_dx: bool,
) -> ChainGrads:
    """Gradients of `forward`; those of the projection's parameters last.

    Args:
        chain: as in forward.
        dout: (N, K, P, Q) gradient of out.
        x: (N, C, H, W) input of the chain.
        out: its output; None where there is no shortcut, and the mask follows from y.
        states: as forward returned them.
        backend: as in forward.
        need_dx: whether the gradient of x is wanted.

    Returns: `ChainGrads`.
    """
    last = len(chain.layers) - 1
    projected = states[-1] if chain.projection is not None else None
    mask = None
    if chain.relu:
        mask = out if out is not None else states[last].scale_shift
    g, sums = backend.reduce(dout, states[last], mask, projected)

    grads: list[ConvBNGrads] = []
    dshortcut = g if chain.shortcut == "input" else None
    dresidual = g if chain.shortcut == "given" else None
    if chain.projection is not None and projected is not None:
        dy, dgamma, dbeta = backend.fold_grad(
            g, sums, projected, chain.projection.weight, of_projection=True
        )
        step = backend.conv_backward(
            dy, x, chain.projection, before=None, shortcut=None, need_dx=need_dx
        )
        dshortcut = step.dx
        grads.append(ConvBNGrads(step.dw, dgamma, dbeta))

    dx: Tensor | None = g
    for i in range(last, -1, -1):
        assert dx is not None
        before = states[i - 1] if i > 0 else None
        dy, dgamma, dbeta = backend.fold_grad(
            dx, sums, states[i], chain.layers[i].weight, of_projection=False
        )
        dx, dw, sums = backend.conv_backward(
            dy,
            x if before is None else before.y,
            chain.layers[i],
            before=before,
            shortcut=dshortcut if before is None else None,
            need_dx=need_dx or before is not None,
        )
        grads.insert(0, ConvBNGrads(dw, dgamma, dbeta))
    return ChainGrads(dx, dresidual, grads)
