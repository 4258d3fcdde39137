"""The fused ops on the layers of real networks: inputs, eager and fused, bytes and flops."""

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.launch_bytes import tensor_bytes
from fastres.kernels import ops
from fastres.kernels.block import Block, Shortcut
from fastres.kernels.block import backward as run_backward
from fastres.kernels.block import forward as run_forward
from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.conv_types import ConvBN, stat_dtype
from fastres.kernels.reference.block import bn_fold_ref
from fastres.kernels.tools.networks import resnet18_convs, resnet20_convs

__all__ = [
    "Inputs",
    "OpCase",
    "Pass",
    "all_cases",
    "count_bytes",
    "eager",
    "fused_op",
    "make_inputs",
]

Pass = Literal["forward", "backward", "both"]
Op = Literal["conv_bn_relu", "residual_block", "conv_bn_folded"]


@dataclass(frozen=True)
class OpCase:
    """A fused op on one layer, or on one block, of a network.

    Attributes:
        op: which.
        layers: the convolutions of the main path.
        projection: the convolution of the shortcut.
        residual: whether the input of the block is added.
    """

    op: Op
    net: str
    layer: str
    layers: tuple[ConvShape, ...]
    projection: ConvShape | None = None
    residual: bool = False

    @property
    def name(self) -> str:
        """Op, network and layer, in one word each."""
        return f"{self.op} {self.net} {self.layer}"

    @property
    def shortcut(self) -> Shortcut:
        """What is added before the last ReLU, as `kernels.block.Block` says it."""
        if self.projection is not None:
            return "projected"
        return "input" if self.residual else "none"

    def flops(self, what: Pass) -> int:
        """Operations of the convolutions; backward has two products where forward has one."""
        convs = [*self.layers, self.projection] if self.projection else self.layers
        return {"forward": 1, "backward": 2, "both": 3}[what] * sum(c.flops for c in convs)


@functools.lru_cache
def count_bytes(case: OpCase, dtype: torch.dtype) -> dict[Pass, int] | None:
    """Bytes of images and filters that the fused op moves, by pass; None where Triton is missing.

    The same count stands for every route, so GB/s compare times.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    from fastres.kernels.gpu import backend
    from fastres.kernels.gpu.launch import recording

    inputs = make_inputs(case, dtype, torch.device("meta"), nhwc=True)
    with recording() as forward, torch.no_grad():
        if case.op == "conv_bn_folded":
            (layer,) = inputs.layers
            backend.conv_folded(
                inputs.x, layer, layer.weight.new_empty((2, layer.w.shape[0])), None, True
            )
            state = None
        else:
            block = Block(inputs.layers, inputs.projection, case.shortcut)
            state = run_forward(block, inputs.x, None, backend)
    with recording() as backward, torch.no_grad():
        if state is not None:
            out, states = state
            mask = None if case.shortcut == "none" else out
            run_backward(block, inputs.dout, inputs.x, mask, states, backend, need_dx=True)
    counts = tensor_bytes(forward), tensor_bytes(backward)
    return {"forward": counts[0], "backward": counts[1], "both": sum(counts)}


def _named(net: str, batch: int) -> dict[str, ConvShape]:
    convs = resnet20_convs(batch) if net == "resnet20" else resnet18_convs(batch)
    return {conv.name.replace(" ", "_"): conv.shape for conv in convs}


def _make_cases(net: str, batch: int) -> Iterator[OpCase]:
    """Yield every fused op on the layers of a net of basic blocks."""
    shapes = _named(net, batch)
    for layer, shape in shapes.items():
        if "projection" not in layer:
            yield OpCase("conv_bn_relu", net, layer, (shape,))
            yield OpCase("conv_bn_folded", net, layer, (shape,))
    for layer, shape in shapes.items():
        if layer.startswith("stage") and "_" not in layer:
            yield OpCase("residual_block", net, layer, (shape, shape), residual=True)
            if f"{layer}_down" in shapes:
                down, projection = shapes[f"{layer}_down"], shapes[f"{layer}_projection"]
                yield OpCase("residual_block", net, f"{layer}_down", (down, shape), projection)


def _make_bottlenecks(batch: int) -> Iterator[OpCase]:
    """Yield the plain blocks of ResNet-50: 1x1 narrow, 3x3, 1x1 wide."""
    for stage in range(4):
        size, narrow = 32 >> stage, 64 << stage
        layers = (
            ConvShape(batch, size, size, 4 * narrow, narrow, 1, 1, padding=0),
            ConvShape(batch, size, size, narrow, narrow),
            ConvShape(batch, size, size, narrow, 4 * narrow, 1, 1, padding=0),
        )
        yield OpCase("residual_block", "resnet50", f"stage{stage + 1}", layers, residual=True)


def all_cases(batches: dict[str, int]) -> list[OpCase]:
    """Every op of every network, at that network's batch size."""
    cases = [
        *_make_cases("resnet20", batches["resnet20"]),
        *_make_cases("resnet18", batches["resnet18"]),
        *_make_bottlenecks(batches["resnet50"]),
    ]
    order = ("residual_block", "conv_bn_relu", "conv_bn_folded")
    return sorted(cases, key=lambda case: order.index(case.op))


@dataclass
class Inputs:
    """What an op is called with; the tensors to differentiate require gradients."""

    x: Tensor
    layers: list[ConvBN]
    projection: ConvBN | None
    dout: Tensor

    def learned(self) -> list[Tensor]:
        """All tensors with a gradient: x, and the parameters of every layer."""
        layers = [*self.layers, self.projection] if self.projection else self.layers
        return [self.x, *(tensor for layer in layers for tensor in layer[:3])]

    def require_grad(self) -> "Inputs":
        """Make `learned` differentiable, in place."""
        for tensor in self.learned():
            tensor.requires_grad_()
        return self


def make_inputs(
    case: OpCase, dtype: torch.dtype, device: torch.device, *, nhwc: bool, batch: int | None = None
) -> Inputs:
    """Seeded inputs of unit scale, the same numbers in every dtype and layout.

    Args:
        case: shapes.
        dtype: of activations and filters; numbers are rounded to bfloat16 first, so that all
            dtypes hold the same.
        device: where.
        nhwc: whether tensors are channels_last.
        batch: another batch size than the case's.
    """
    # Drawn where they are wanted: a CPU takes a second for the images of a large batch.
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
    layout = torch.channels_last if nhwc else torch.contiguous_format

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    def pixels(*size: int, scale: float = 1.0) -> Tensor:
        return (normal(*size) * scale).bfloat16().to(dtype).to(memory_format=layout)

    def layer(conv: ConvShape) -> ConvBN:
        w = pixels(conv.K, conv.C, conv.R, conv.S, scale=conv.RSC**-0.5)
        wide = stat_dtype(dtype)
        vectors = (1 + 0.1 * normal(conv.K)).to(wide), normal(conv.K).to(wide)
        return ConvBN(w, *vectors, conv.stride, conv.padding)

    first, last = case.layers[0], case.layers[-1]
    n = batch or first.N
    out_size = (n, last.K, last.P, last.Q)
    return Inputs(
        x=pixels(n, first.C, first.H, first.W),
        layers=[layer(conv) for conv in case.layers],
        projection=None if case.projection is None else layer(case.projection),
        dout=pixels(*out_size),
    )


def _eager_layer(x: Tensor, layer: ConvBN) -> Tensor:
    y = F.conv2d(x, layer.w, stride=layer.stride, padding=layer.padding)
    return F.batch_norm(y, None, None, layer.weight, layer.bias, True, 0.1, layer.eps)


def eager(case: OpCase, inputs: Inputs) -> Tensor:
    """The op as the reference network computes it."""
    if case.op == "conv_bn_folded":
        (layer,) = inputs.layers
        y = F.conv2d(inputs.x, layer.w, stride=layer.stride, padding=layer.padding)
        mean, var = torch.zeros_like(layer.bias), torch.ones_like(layer.bias)
        z = F.batch_norm(y, mean, var, layer.weight, layer.bias, False, 0.1, layer.eps)
        return F.relu(z)
    z = inputs.x
    for layer in inputs.layers[:-1]:
        z = F.relu(_eager_layer(z, layer))
    z = _eager_layer(z, inputs.layers[-1])
    if inputs.projection is not None:
        z = z + _eager_layer(inputs.x, inputs.projection)
    elif case.residual:
        z = z + inputs.x
    return F.relu(z)


def fused_op(case: OpCase, inputs: Inputs) -> Tensor:
    """The same by the fused op."""
    layers: Sequence[ConvBN] = inputs.layers
    if case.op == "conv_bn_folded":
        (layer,) = layers
        rstd = torch.full_like(layer.bias, (1 + layer.eps) ** -0.5)
        fold = bn_fold_ref(torch.zeros_like(layer.bias), rstd, layer.weight, layer.bias)
        return ops.conv_bn_folded(inputs.x, layer, fold)
    if case.op == "conv_bn_relu":
        return ops.conv_bn_relu(inputs.x, layers[0])[0]
    return ops.residual_block(inputs.x, layers, projection=inputs.projection)[0]
