"""The launches that the real networks make, recorded on meta tensors without a GPU.

Blocks, the head and the augmentation run through the very steps of training, so what is recorded is
what a GPU would be given, prologues, epilogues and all. `record_update` lists what a step launches
besides; `network_launches` is all of it, and `other_launches` what differs with the recipe.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastres.kernels import block as block_ops
from fastres.kernels.block import Block
from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.conv_types import ConvBN
from fastres.kernels.gpu import backend as gpu_backend
from fastres.kernels.gpu.augment import augment_normalize
from fastres.kernels.gpu.cross_entropy import smooth_cross_entropy_bwd, smooth_cross_entropy_fwd
from fastres.kernels.gpu.launch import Launch
from fastres.kernels.gpu.pool_linear import pool_linear_bwd, pool_linear_fwd
from fastres.kernels.gpu.running_stats import move_running_stats
from fastres.kernels.gpu.sgd import SGDTensors, SGDUpdate
from fastres.kernels.gpu.totals import add_to_totals
from fastres.kernels.tools.networks import (
    PRECISIONS,
    NamedBlock,
    Precision,
    network_blocks,
    network_convs,
    precision_set,
)
from fastres.kernels.tools.torch_launches import AnyLaunch, recording_all

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "NamedLaunch",
    "computes",
    "network_launches",
    "other_launches",
    "record_augmentation",
    "record_head",
    "record_inference",
    "record_training",
    "record_update",
]

# Images and classes of CIFAR-10.
NUM_IMAGES = 50_000
NUM_CLASSES = 10


class Augmentation(NamedTuple):
    """What is done to images beside their normalisation: cropped in a border, mirrored, painted."""

    padding: int
    flips: bool
    cuts_out: bool


# What the recipes ask for in training, the most first.
AUGMENTATIONS = (
    Augmentation(4, True, True),
    Augmentation(4, True, False),
    Augmentation(2, True, False),
)
NO_AUGMENTATION = Augmentation(0, False, False)


def _empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A meta tensor, channels_last where it has four dimensions."""
    layout = torch.channels_last if len(size) == 4 else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device="meta", memory_format=layout)


def _layer(shape: ConvShape, dtype: torch.dtype) -> ConvBN:
    w = _empty(shape.K, shape.C, shape.R, shape.S, dtype=dtype)
    # The optimizer's filters are fp32, and so are their gradients.
    layer = ConvBN(w, _empty(shape.K), _empty(shape.K), shape.stride, shape.padding)
    return layer._replace(dw_dtype=torch.float32)


def record_training(named: NamedBlock, precision: Precision) -> list[AnyLaunch]:
    """The launches of forward and backward of one block."""
    dtype = precision.dtype
    first = named.layers[0]
    x = _empty(first.N, first.C, first.H, first.W, dtype=dtype)
    projection = None if named.projection is None else _layer(named.projection, dtype)
    layers = [_layer(shape, dtype) for shape in named.layers]
    block = Block(layers, projection, named.shortcut)
    with precision_set(precision), recording_all() as launches:
        out, states = block_ops.forward(block, x, None, gpu_backend)
        mask = None if named.shortcut == "none" else out
        dout = torch.empty_like(out)
        block_ops.backward(block, dout, x, mask, states, gpu_backend, need_dx=named.need_dx)
    return launches


def record_inference(named: NamedBlock, precision: Precision) -> list[AnyLaunch]:
    """The launches of one block with every batch norm folded into its convolution."""
    dtype = precision.dtype
    first = named.layers[0]
    x = _empty(first.N, first.C, first.H, first.W, dtype=dtype)

    def folded(source: torch.Tensor, shape: ConvShape, residual: torch.Tensor | None, relu: bool):
        layer = _layer(shape, dtype)
        return gpu_backend.conv_folded(source, layer, _empty(2, shape.K), residual, relu)

    with precision_set(precision), recording_all() as launches:
        shortcut = x if named.shortcut == "input" else None
        if named.projection is not None:
            shortcut = folded(x, named.projection, None, False)
        *inner, last = named.layers
        source = x
        for shape in inner:
            source = folded(source, shape, None, True)
        folded(source, last, shortcut, True)
    return launches


def record_head(
    last: ConvShape, precision: Precision, *, training: bool, label_smoothing: float = 0.1
) -> list[AnyLaunch]:
    """The launches of pool and classifier and, in training, of the loss and backward too.

    last: the network's last convolution.
    """
    dtype = precision.dtype
    x = _empty(last.N, last.K, last.P, last.Q, dtype=dtype)
    weight, bias = _empty(NUM_CLASSES, last.K), _empty(NUM_CLASSES)
    with recording_all() as launches:
        logits, pooled = pool_linear_fwd(x, weight, bias)
        if training:
            labels = _empty(last.N, dtype=torch.int64)
            loss, grad = smooth_cross_entropy_fwd(logits, labels, label_smoothing)
            dlogits = smooth_cross_entropy_bwd(loss, grad, dtype)
            pool_linear_bwd(dlogits, pooled, weight, (last.P, last.Q))
    return launches


def record_augmentation(
    batch: int, precision: Precision, augmentation: Augmentation = AUGMENTATIONS[0]
) -> list[AnyLaunch]:
    """The launch that crops, mirrors, paints and normalises a batch for the stem."""
    padding, flips, cuts_out = augmentation
    images = torch.empty((NUM_IMAGES, 32, 32, 3), dtype=torch.uint8, device="meta")
    with recording_all() as launches:
        augment_normalize(
            images,
            _empty(batch, dtype=torch.int64),
            _empty(3),
            _empty(3),
            crop=_empty(batch, 2, dtype=torch.int64) if padding else None,
            padding=padding,
            flip=_empty(batch, dtype=torch.bool) if flips else None,
            cutout=_empty(batch, 4, dtype=torch.int64) if cuts_out else None,
            colour=_empty(3, dtype=torch.uint8) if cuts_out else None,
            dtype=precision.dtype,
        )
    return launches


def record_update(
    network: str, batch: int, precision: Precision, *, nesterov: bool = True
) -> list[AnyLaunch]:
    """What a training step launches besides blocks, head and augmentation.

    That of `python -m fastres.train --fast` on a GPU, with SGD, as one CUDA graph: learning rate
    and batch are put where the graph reads them, then running statistics, optimizer and sums of the
    epoch; in fp16 the scaling of the loss.
    """
    dtype = precision.dtype
    layers = [s for _, s, count in network_convs(network, batch) for _ in range(count)]
    filters = [_empty(s.K, s.C, s.R, s.S) for s in layers]
    vectors = [_empty(s.K) for s in layers for _ in ("weight", "bias")]
    head = [_empty(NUM_CLASSES, layers[-1].K), _empty(NUM_CLASSES)]
    with recording_all() as launches:
        _start_step(batch, dtype)
        _update_running_statistics(vectors)
        _update_parameters(filters, [*vectors, *head], dtype, nesterov)
        logits, labels = _empty(batch, NUM_CLASSES, dtype=dtype), _empty(batch, dtype=torch.int64)
        add_to_totals(_empty(4, dtype=torch.float64), _empty(), logits, labels)
    return launches


def _start_step(batch: int, dtype: torch.dtype) -> None:
    """The learning rate and the inputs of the graph; images are rounded on their way into it."""
    _empty().fill_(0.1)
    _empty(batch, 3, 32, 32, dtype=dtype).copy_(_empty(batch, 3, 32, 32))
    labels = _empty(batch, dtype=torch.int64)
    torch.empty_like(labels).copy_(labels)


def _update_running_statistics(averages: list[torch.Tensor]) -> None:
    """Those of all layers, two vectors each, and the counts of their batches."""
    counts = [_empty(dtype=torch.int64) for _ in averages[::2]]
    move_running_stats(averages, [torch.empty_like(t) for t in averages], counts, 0.1)


def _update_parameters(
    filters: list[torch.Tensor], others: list[torch.Tensor], dtype: torch.dtype, nesterov: bool
) -> None:
    """SGD of all parameters; in a lower precision with a copy of every filter."""
    has_copies, lr = dtype != torch.float32, _empty()
    tensors = [
        SGDTensors(p, torch.empty_like(p), torch.empty_like(p), copy, lr, weight_decay=5e-4)
        for p, copy in (
            *((w, torch.empty_like(w, dtype=dtype) if has_copies else None) for w in filters),
            *((p, None) for p in others),
        )
    ]
    scaling = (
        _scale_loss([t.grad for t in tensors if t.grad is not None])
        if dtype == torch.float16
        else {}
    )
    update = SGDUpdate([t.param for t in tensors])
    update(tensors, momentum=0.9, nesterov=nesterov, **scaling)


def _scale_loss(grads: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What torch.amp.GradScaler launches; the optimizer takes the scale out of the gradients.

    The loss times the scale, both ways; whether any gradient is not finite, and the next scale.
    """
    loss, scale, tracker = _empty(), _empty(), _empty(dtype=torch.int32)
    for factor in (loss, torch.empty_like(loss)):
        factor * scale
    # Both are copied to the device of the gradients, though it is theirs.
    inv_scale, found_inf = (
        torch.full((), value, device="meta").to("meta", copy=True) for value in (1.0, 0.0)
    )
    torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inv_scale)
    scaling = {"grad_scale": scale * 1, "found_inf": found_inf + 0}
    torch._amp_update_scale_(scale, tracker, found_inf, 2.0, 0.5, 2000)
    return scaling


@dataclass(frozen=True)
class NamedLaunch:
    """A launch of a network: training or inference, where in the network, how often it is made."""

    phase: str
    layer: str
    launch: AnyLaunch
    count: int


def computes(launch: Launch, shape: ConvShape) -> bool:
    """Whether a launch is of this convolution; what a form leaves fixed is no argument of its."""
    args = {name.removeprefix("SHAPE."): value for name, value in launch.leaves.items()}
    return launch.name.startswith("conv") and all(
        args.get(name, number) == number for name, number in shape.constexprs().items()
    )


def _layer_name(block: NamedBlock, launch: AnyLaunch) -> str:
    """The convolution that a launch computes, as networks.py calls it; else the block."""
    if not isinstance(launch, Launch) or not launch.name.startswith("conv"):
        return block.name
    return next(conv.name for conv in block.convs() if computes(launch, conv.shape))


def network_launches(
    network: str, batch: int, precision: Precision, phase: str
) -> Iterator[NamedLaunch]:
    """Yield every launch of a step of "training", or of a batch of "inference".

    Args:
        network: a key of NETWORKS.
        batch: images.
        precision: of activations and filters.
        phase: "training" or "inference"; the batches of the latter are normalised already, and its
            filters cast and batch norms folded.
    """
    is_training = phase == "training"
    record = record_training if is_training else record_inference
    blocks = network_blocks(network, batch)
    for block in blocks:
        for launch in record(block, precision):
            yield NamedLaunch(phase, _layer_name(block, launch), launch, block.count)
    around = {"head": record_head(blocks[-1].layers[-1], precision, training=is_training)}
    if is_training:
        # The loader does not know in which precision the network computes.
        around["augmentation"] = record_augmentation(batch, PRECISIONS["fp32"])
        around["update"] = record_update(network, batch, precision)
    yield from _named(phase, around)


def _named(phase: str, launches: Mapping[str, list[AnyLaunch]]) -> Iterator[NamedLaunch]:
    for name, of_name in launches.items():
        for launch in of_name:
            yield NamedLaunch(phase, name, launch, 1)


def other_launches(
    network: str, batch: int, precision: Precision, phase: str
) -> Iterator[NamedLaunch]:
    """Yield what other recipes launch instead: other augmentations, plain momentum, hard labels.

    In "inference", what makes a batch of images that are only normalised. Arguments as above.
    """
    fp32 = PRECISIONS["fp32"]
    if phase == "inference":
        yield from _named(phase, {"images": record_augmentation(batch, fp32, NO_AUGMENTATION)})
        return
    last = network_blocks(network, batch)[-1].layers[-1]
    yield from _named(
        phase, {"head": record_head(last, precision, training=True, label_smoothing=0.0)}
    )
    plain = record_update(network, batch, precision, nesterov=False)
    yield from _named(phase, {"update": plain})
    for augmentation in AUGMENTATIONS[1:]:
        made = record_augmentation(batch, fp32, augmentation)
        yield from _named(phase, {"augmentation": made})
