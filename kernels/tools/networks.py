"""The chains of convolutions of the real networks, and the launches that they make.

A chain is what one fused op runs: the stem, or a residual block. The functions `record_...` run
chains, the head and the augmentation on meta tensors through the very steps of training, so what
they return is what a GPU would be given, prologues, epilogues and all, without a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fastres.kernels import block as block_ops
from fastres.kernels.block import Chain, Shortcut
from fastres.kernels.conv_shape import ConvShape, NamedConv, resnet18_convs, resnet20_convs
from fastres.kernels.gpu import backend as gpu_backend
from fastres.kernels.gpu.augment import augment_normalize
from fastres.kernels.gpu.cross_entropy import smooth_cross_entropy_bwd, smooth_cross_entropy_fwd
from fastres.kernels.gpu.launch import Launch, recording
from fastres.kernels.gpu.pool_linear import pool_linear_bwd, pool_linear_fwd
from fastres.kernels.reference.block import ConvBN

__all__ = [
    "MODELS",
    "PRECISIONS",
    "NamedChain",
    "Precision",
    "network_chains",
    "precision_set",
    "record_augmentation",
    "record_head",
    "record_inference",
    "record_training",
]

MODELS: dict[str, Callable[[int], list[NamedConv]]] = {
    "resnet20": resnet20_convs,
    "resnet18": resnet18_convs,
}


@dataclass(frozen=True)
class Precision:
    """How a network computes: the dtype of its tensors, and whether fp32 rounds to TF32."""

    dtype: torch.dtype
    tf32: bool = False


PRECISIONS = {
    "bf16": Precision(torch.bfloat16),
    "fp16": Precision(torch.float16),
    "tf32": Precision(torch.float32, tf32=True),
    "fp32": Precision(torch.float32),
}


@dataclass(frozen=True)
class NamedChain:
    """A stem or a residual block, and how many of the network are like it.

    layers: shapes on the main path. projection: that of the shortcut, or None. shortcut: as in
    `block_ops.Chain`. need_dx: whether the gradient of its input is wanted.
    """

    name: str
    layers: tuple[ConvShape, ...]
    projection: ConvShape | None
    shortcut: Shortcut
    count: int
    need_dx: bool = True

    def conv_shapes(self) -> list[ConvShape]:
        """The shapes of all its convolutions, the projection's last."""
        return [*self.layers, *([] if self.projection is None else [self.projection])]


def network_chains(convs: list[NamedConv]) -> list[NamedChain]:
    """Put the convolutions of a network of basic blocks together into its stem and blocks."""
    named = {conv.name: conv for conv in convs}
    stem = named["stem"].shape
    chains = [NamedChain("stem", (stem,), None, "none", 1, need_dx=False)]
    for name, conv in named.items():
        down, projection = named.get(f"{name} down"), named.get(f"{name} projection")
        num_plain = conv.num_layers
        if down is not None and projection is not None:
            layers = (down.shape, conv.shape)
            chains.append(NamedChain(f"{name} first", layers, projection.shape, "projected", 1))
            num_plain -= 1
        if name.startswith("stage") and " " not in name:
            layers = (conv.shape, conv.shape)
            chains.append(NamedChain(name, layers, None, "input", num_plain // 2))
    return chains


@contextmanager
def precision_set(precision: Precision) -> Iterator[None]:
    """Let fp32 convolutions round to TF32, or not, inside the `with` block."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = precision.tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


# Images and classes of CIFAR-10.
NUM_IMAGES = 50_000
NUM_CLASSES = 10


def _empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A meta tensor, channels_last where it has four dimensions."""
    layout = torch.channels_last if len(size) == 4 else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device="meta", memory_format=layout)


def _layer(shape: ConvShape, dtype: torch.dtype) -> ConvBN:
    w = _empty(shape.K, shape.C, shape.R, shape.S, dtype=dtype)
    return ConvBN(w, _empty(shape.K), _empty(shape.K), shape.stride, shape.padding)


def record_training(named: NamedChain, precision: Precision) -> list[Launch]:
    """The launches of forward and backward of one chain."""
    dtype = precision.dtype
    first = named.layers[0]
    x = _empty(first.N, first.C, first.H, first.W, dtype=dtype)
    projection = None if named.projection is None else _layer(named.projection, dtype)
    layers = [_layer(shape, dtype) for shape in named.layers]
    steps = Chain(layers, projection, named.shortcut)
    with precision_set(precision), recording() as launches:
        out, states = block_ops.forward(steps, x, None, gpu_backend)
        mask = None if named.shortcut == "none" else out
        dout = torch.empty_like(out)
        block_ops.backward(steps, dout, x, mask, states, gpu_backend, need_dx=named.need_dx)
    return launches


def record_inference(named: NamedChain, precision: Precision) -> list[Launch]:
    """The launches of one chain with every batch norm folded into its convolution."""
    dtype = precision.dtype
    first = named.layers[0]
    x = _empty(first.N, first.C, first.H, first.W, dtype=dtype)

    def folded(source: torch.Tensor, shape: ConvShape, residual: torch.Tensor | None, relu: bool):
        layer = _layer(shape, dtype)
        return gpu_backend.conv_folded(source, layer, _empty(2, shape.K), residual, relu)

    with precision_set(precision), recording() as launches:
        shortcut = x if named.shortcut == "input" else None
        if named.projection is not None:
            shortcut = folded(x, named.projection, None, False)
        *inner, last = named.layers
        source = x
        for shape in inner:
            source = folded(source, shape, None, True)
        folded(source, last, shortcut, True)
    return launches


def record_head(convs: list[NamedConv], precision: Precision, *, training: bool) -> list[Launch]:
    """The launches of pool and classifier and, in training, of the loss and backward too."""
    last, dtype = convs[-1].shape, precision.dtype
    x = _empty(last.N, last.K, last.P, last.Q, dtype=dtype)
    weight, bias = _empty(NUM_CLASSES, last.K), _empty(NUM_CLASSES)
    with recording() as launches:
        logits, pooled = pool_linear_fwd(x, weight, bias)
        if training:
            labels = _empty(last.N, dtype=torch.int64)
            loss, grad = smooth_cross_entropy_fwd(logits, labels, 0.1)
            dlogits = smooth_cross_entropy_bwd(loss, grad, dtype)
            pool_linear_bwd(dlogits, pooled, weight, (last.P, last.Q))
    return launches


def record_augmentation(batch: int, precision: Precision) -> list[Launch]:
    """The launch that crops, mirrors, paints and normalises a batch for the stem."""
    images = torch.empty((NUM_IMAGES, 32, 32, 3), dtype=torch.uint8, device="meta")
    with recording() as launches:
        augment_normalize(
            images,
            _empty(batch, dtype=torch.int64),
            _empty(3),
            _empty(3),
            crop=_empty(batch, 2, dtype=torch.int64),
            padding=4,
            flip=_empty(batch, dtype=torch.bool),
            cutout=_empty(batch, 4, dtype=torch.int64),
            colour=_empty(3, dtype=torch.uint8),
            dtype=precision.dtype,
        )
    return launches
