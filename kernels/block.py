"""The fused block: convolutions with batch norm in a row and a shortcut around them, both ways.

    y_1 = conv(x);  y_i = conv(relu(bn(y_i-1)));  out = relu(bn(y_n) + shortcut)

The last ReLU may be left out, as behind the additions of MobileNetV2.

One layer is conv-BN-ReLU, two with a shortcut a basic block, three a bottleneck. No activation
between the layers is ever stored: each convolution forms it from the raw y of its producer.

The order of the steps is written here once. What a step is, a back end says: `reference/` in plain
torch, `gpu/` in Triton kernels with cuDNN convolutions where the launch table wants them, `cpu/` in
C++ kernels with oneDNN convolutions.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from fastres.kernels.conv_types import (
    BatchNormGrads,
    ConvBN,
    ConvBNGrads,
    ConvGrads,
    DeferredGrad,
    LayerState,
    stat_dtype,
)

__all__ = [
    "Backend",
    "Block",
    "BlockGrads",
    "Shortcut",
    "backward",
    "check_layer",
    "check_shortcut",
    "forward",
    "layer_states",
]

Shortcut = Literal["none", "input", "given", "projected"]


class Block(NamedTuple):
    """What is computed.

    layers: the main path. projection: the layer of a projected shortcut. shortcut: what is added
    behind the last batch norm: nothing, x itself, a given tensor, or the projection of x. relu:
    whether there is a ReLU behind that.
    """

    layers: Sequence[ConvBN]
    projection: ConvBN | None = None
    shortcut: Shortcut = "none"
    relu: bool = True

    @property
    def all_layers(self) -> list[ConvBN]:
        """The layers of the main path, then the projection."""
        return [*self.layers] if self.projection is None else [*self.layers, self.projection]


class BlockGrads(NamedTuple):
    """Gradients of a block: of x (None where unwanted), of a given residual, of the parameters.

    dresidual: without a last ReLU it may be dout itself. layers: in the order of
    `Block.all_layers`.
    """

    dx: Tensor | None
    dresidual: Tensor | None
    layers: list[ConvBNGrads]


class Backend(Protocol):
    """The steps of a block; a module with these functions is a back end.

    Tensors of images and filters arrive with unit channel stride, vectors contiguous.
    """

    def runs_on(self, x: Tensor) -> bool:
        """Whether this back end computes on x here."""

    def conv_bn(self, x: Tensor, layer: ConvBN, scale_shift: Tensor | None) -> LayerState:
        """`y = conv(x)`, with scale_shift (2, C) conv(relu(a * x + b)), and the statistics of y."""

    def apply(
        self,
        state: LayerState,
        shortcut: Tensor | None,
        shortcut_scale_shift: Tensor | None,
        relu: bool,
    ) -> Tensor:
        """`out = relu(bn(y) + shortcut)`, or `+ a * shortcut + b` with shortcut_scale_shift."""

    def reduce(
        self,
        dout: Tensor,
        state: LayerState,
        weight: Tensor,
        mask: Tensor | None,
        projected: LayerState | None,
        projected_weight: Tensor | None,
    ) -> tuple[BatchNormGrads, BatchNormGrads | None]:
        """Gradients of a batch norm behind a ReLU, and of that of a projected shortcut.

        mask: out (N, K, P, Q), or scale_shift (2, K) to recompute it from y; None: no ReLU, and
        dy.g may be dout itself.
        """

    def conv_backward(
        self,
        dy: DeferredGrad,
        x: Tensor,
        layer: ConvBN,
        *,
        producer: LayerState | None,
        producer_weight: Tensor | None,
        shortcut: Tensor | None,
        need_dx: bool,
    ) -> ConvGrads:
        """Gradients of a convolution of x, or of relu(bn(x)) where x is `producer.y`.

        producer_weight: of its batch norm. shortcut: gradient added to dx. need_dx: whether dx is
        wanted.
        """

    def adds_in_projection(self, x: Tensor, first: ConvBN, projection: ConvBN) -> bool:
        """Whether the gradient of the main path is added to that of the projection.

        Both convolve x, and the kernel of either may add what the other has left.
        """

    def conv_folded(
        self, x: Tensor, layer: ConvBN, scale_shift: Tensor, residual: Tensor | None, relu: bool
    ) -> Tensor:
        """`out = relu(a * conv(x) + b + residual)`: a layer of inference, dense channels_last."""

    def block_folded(
        self, x: Tensor, block: Block, scale_shifts: Sequence[Tensor]
    ) -> Tensor | None:
        """A block of inference in one kernel; None where this back end has none for it."""


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


def layer_states(block: Block, x: Tensor, backend: Backend) -> list[LayerState]:
    """Run all convolutions of the block with the statistics of this batch, the projection last.

    Raises: ValueError: when a layer does not fit its input.
    """
    states: list[LayerState] = []
    for layer in block.layers:
        if not states:
            check_layer(x, layer)
            states.append(backend.conv_bn(x, layer, None))
        else:
            producer = states[-1]
            check_layer(producer.y, layer)
            states.append(backend.conv_bn(producer.y, layer, producer.scale_shift))
    if block.projection is not None:
        check_layer(x, block.projection)
        states.append(backend.conv_bn(x, block.projection, None))
    return states


def forward(
    block: Block, x: Tensor, residual: Tensor | None, backend: Backend
) -> tuple[Tensor, list[LayerState]]:
    """Run the block with the statistics of this batch.

    Returns: out; the state of every layer, that of the projection last.

    Raises: ValueError: when a layer does not fit its input, or the shortcut out.
    """
    states = layer_states(block, x, backend)
    last = states[len(block.layers) - 1]
    shortcut, shortcut_scale_shift = (x if block.shortcut == "input" else residual), None
    if block.projection is not None:
        shortcut, shortcut_scale_shift = states[-1].y, states[-1].scale_shift
    check_shortcut(shortcut, x, last.y.shape)
    return backend.apply(last, shortcut, shortcut_scale_shift, block.relu), states


def backward(
    block: Block,
    dout: Tensor,
    x: Tensor,
    out: Tensor | None,
    states: Sequence[LayerState],
    backend: Backend,
    *,
    need_dx: bool,
) -> BlockGrads:
    """Gradients of `forward`; those of the projection's parameters last.

    Args:
        block: as in forward.
        dout: (N, K, P, Q) gradient of out.
        x: (N, C, H, W) input of the block.
        out: its output; None where there is no ReLU, which has no mask, or no shortcut, where the
            mask follows from y.
        states: as forward returned them.
        backend: as in forward.
        need_dx: whether the gradient of x is wanted.

    Returns: `BlockGrads`.
    """
    layers, projection = block.layers, block.projection
    last = len(layers) - 1
    mask = None
    if block.relu:
        mask = out if out is not None else states[last].scale_shift
    grads, projected = backend.reduce(
        dout,
        states[last],
        layers[last].weight,
        mask,
        None if projection is None else states[-1],
        None if projection is None else projection.weight,
    )
    dshortcut = grads.dy.g if block.shortcut == "input" else None
    dresidual = grads.dy.g if block.shortcut == "given" else None

    def of_input(dy: DeferredGrad, layer: ConvBN, shortcut: Tensor | None) -> ConvGrads:
        return backend.conv_backward(
            dy,
            x,
            layer,
            producer=None,
            producer_weight=None,
            shortcut=shortcut,
            need_dx=need_dx,
        )

    of_projection: list[ConvBNGrads] = []
    comes_last = projection is not None and backend.adds_in_projection(x, layers[0], projection)
    if projection is not None and projected is not None and not comes_last:
        dshortcut, dw, _ = of_input(projected.dy, projection, None)
        of_projection.append(ConvBNGrads(dw, projected.dgamma, projected.dbeta))

    of_layers: list[ConvBNGrads] = []
    for i in range(last, 0, -1):
        _, dw, producer = backend.conv_backward(
            grads.dy,
            states[i - 1].y,
            layers[i],
            producer=states[i - 1],
            producer_weight=layers[i - 1].weight,
            shortcut=None,
            need_dx=True,
        )
        of_layers.insert(0, ConvBNGrads(dw, grads.dgamma, grads.dbeta))
        assert producer is not None
        grads = producer
    dx, dw, _ = of_input(grads.dy, layers[0], dshortcut)
    of_layers.insert(0, ConvBNGrads(dw, grads.dgamma, grads.dbeta))
    if projection is not None and projected is not None and comes_last:
        dx, dw, _ = of_input(projected.dy, projection, dx)
        of_projection.append(ConvBNGrads(dw, projected.dgamma, projected.dbeta))
    return BlockGrads(dx, dresidual, of_layers + of_projection)
