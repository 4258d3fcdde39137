"""The launches that the real networks make, recorded on meta tensors without a GPU.

Blocks, the head and the augmentation run through the very steps of training, so what is recorded is
what a GPU would be given, prologues, epilogues and all.
"""

import torch

from fastres.kernels import block as block_ops
from fastres.kernels.block import Block
from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.conv_types import ConvBN
from fastres.kernels.gpu import backend as gpu_backend
from fastres.kernels.gpu.augment import augment_normalize
from fastres.kernels.gpu.cross_entropy import smooth_cross_entropy_bwd, smooth_cross_entropy_fwd
from fastres.kernels.gpu.launch import Launch, recording
from fastres.kernels.gpu.pool_linear import pool_linear_bwd, pool_linear_fwd
from fastres.kernels.tools.networks import NamedBlock, Precision, precision_set

__all__ = ["record_augmentation", "record_head", "record_inference", "record_training"]

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


def record_training(named: NamedBlock, precision: Precision) -> list[Launch]:
    """The launches of forward and backward of one block."""
    dtype = precision.dtype
    first = named.layers[0]
    x = _empty(first.N, first.C, first.H, first.W, dtype=dtype)
    projection = None if named.projection is None else _layer(named.projection, dtype)
    layers = [_layer(shape, dtype) for shape in named.layers]
    block = Block(layers, projection, named.shortcut)
    with precision_set(precision), recording() as launches:
        out, states = block_ops.forward(block, x, None, gpu_backend)
        mask = None if named.shortcut == "none" else out
        dout = torch.empty_like(out)
        block_ops.backward(block, dout, x, mask, states, gpu_backend, need_dx=named.need_dx)
    return launches


def record_inference(named: NamedBlock, precision: Precision) -> list[Launch]:
    """The launches of one block with every batch norm folded into its convolution."""
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


def record_head(last: ConvShape, precision: Precision, *, training: bool) -> list[Launch]:
    """The launches of pool and classifier and, in training, of the loss and backward too.

    last: the network's last convolution.
    """
    dtype = precision.dtype
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
