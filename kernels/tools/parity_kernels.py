"""What the parity command checks besides convolutions: every other kernel that a network starts.

Batch norm of every block end, both ways; layers with their batch norm folded in, as inference has
them; head and loss; the update, the running statistics, the sums of an epoch, the augmentation.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.kernels.block import Backend
from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.conv_types import BatchNormGrads, ConvBN, DeferredGrad, LayerState
from fastres.kernels.gpu import backend as gpu_backend
from fastres.kernels.gpu.augment import augment_normalize
from fastres.kernels.gpu.batchnorm_bwd import bn_backward_apply
from fastres.kernels.gpu.batchnorm_fwd import bn_stats
from fastres.kernels.gpu.cross_entropy import smooth_cross_entropy_bwd, smooth_cross_entropy_fwd
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.pool_linear import pool_linear_bwd, pool_linear_fwd
from fastres.kernels.gpu.running_stats import move_running_stats
from fastres.kernels.gpu.sgd import SGDTensors, SGDUpdate
from fastres.kernels.gpu.totals import add_to_totals
from fastres.kernels.reference import backend as reference_backend
from fastres.kernels.reference import head
from fastres.kernels.reference.block import bn_backward_apply_ref
from fastres.kernels.tools.error_check import Tensors, map_tensors
from fastres.kernels.tools.networks import PRECISIONS, NamedBlock, network_blocks, network_convs
from fastres.kernels.tools.parity_check import Check
from fastres.kernels.tools.seeded import Seeded

__all__ = ["kernel_checks"]

NUM_CLASSES = 10
SMOOTHING = 0.1

# Images to choose a batch from.
NUM_IMAGES = 2000

# Of SGD and of the running statistics.
MOMENTUM, WEIGHT_DECAY, MOVED = 0.9, 5e-4, 0.1

Make = Callable[[Seeded], Any]


def kernel_checks(
    network: str, batch: int, precision: str, entries: Mapping[str, ConvConfig]
) -> Iterator[Check]:
    """The checks of a network, batch norm first; those of other networks may have the same names.

    Args:
        network: a key of NETWORKS.
        batch: images.
        precision: a key of PRECISIONS.
        entries: of the launch table, for folded layers.
    """
    check = functools.partial(_check, precision)
    blocks = network_blocks(network, batch)
    for block in blocks:
        yield from _batch_norm_checks(block, check)
    for block in blocks:
        yield from _folded_checks(block, functools.partial(check, entries=entries))
    yield from _head_checks(blocks[-1].layers[-1], check)
    yield from _update_checks(network, batch, functools.partial(check, own_rounding=True))


def _check(
    precision: str,
    name: str,
    make: Make,
    compute: Callable[[Any], Tensors],
    plain: Callable[[Any], Tensors],
    *,
    entries: Mapping[str, ConvConfig] | None = None,
    own_rounding: bool = False,
) -> Check:
    """A check of a kernel that has no forms; "/" in its name is followed by what it is of."""
    kernel, _, of = name.partition("/")
    full = "/".join(filter(None, [kernel, precision, of]))
    dtype = PRECISIONS[precision].dtype
    return Check(
        name=full,
        label="",
        precision=PRECISIONS[precision],
        make=lambda device, seed: make(Seeded(device, dtype, seed)),
        compute=compute,
        plain=plain,
        same_as=full,
        entries=entries or {},
        own_rounding=own_rounding,
    )


class _BlockEnd(NamedTuple):
    """The last batch norm of a block, its shortcut, and the gradient of what leaves it."""

    layer: ConvBN
    state: LayerState
    weight: Tensor
    shortcut: Tensor | None
    projected: LayerState | None
    projected_weight: Tensor | None
    mask: Tensor
    dout: Tensor
    dy: DeferredGrad


def _block_end(block: NamedBlock, seeded: Seeded) -> _BlockEnd:
    last = block.layers[-1]
    size = (last.N, last.K, last.P, last.Q)
    state, weight = seeded.layer_state(*size)
    projected, projected_weight = None, None
    if block.shortcut == "projected":
        projected, projected_weight = seeded.layer_state(*size)
    coefficients = [1 + 0.1 * seeded.normal(last.K), *(0.1 * seeded.normal(2, last.K))]
    # Without a shortcut the mask follows from y.
    out = seeded.to_pixels(seeded.normal(*size).relu())
    return _BlockEnd(
        ConvBN(seeded.pixels(last.K, 1, 1, 1), weight, seeded.normal(last.K)),
        state,
        weight,
        seeded.pixels(*size) if block.shortcut == "input" else None,
        projected,
        projected_weight,
        state.scale_shift if block.shortcut == "none" else out,
        seeded.pixels(*size),
        DeferredGrad(seeded.pixels(*size), state.y, torch.stack(coefficients)),
    )


def _stats_outcome(stats: Tensor) -> dict[str, Tensor]:
    names = ("mean", "unbiased_var", "rstd", "a", "b")
    return dict(zip(names, stats, strict=True))


def _apply(backend: Backend, end: _BlockEnd) -> Tensors:
    shortcut, scale_shift = end.shortcut, None
    if end.projected is not None:
        shortcut, scale_shift = end.projected.y, end.projected.scale_shift
    return {"out": backend.apply(end.state, shortcut, scale_shift, True)}


def _reduce(backend: Backend, end: _BlockEnd) -> Tensors:
    grads, of_shortcut = backend.reduce(
        end.dout, end.state, end.weight, end.mask, end.projected, end.projected_weight
    )
    outcome = {"g": grads.dy.g} | _grads_outcome(grads)
    if of_shortcut is not None:
        named = _grads_outcome(of_shortcut).items()
        outcome |= {f"{name} of the projection": value for name, value in named}
    return outcome


def _grads_outcome(grads: BatchNormGrads) -> dict[str, Tensor]:
    """One by one, since c1 and c2 are far smaller than c0."""
    c0, c1, c2 = grads.dy.coefficients
    return {"dgamma": grads.dgamma, "dbeta": grads.dbeta, "c0": c0, "c1": c1, "c2": c2}


def _batch_norm_checks(block: NamedBlock, check: Callable[..., Check]) -> Iterator[Check]:
    last = block.layers[-1]
    size, make = f"h{last.P}w{last.Q}c{last.K}", functools.partial(_block_end, block)
    of = f"{size}/{block.shortcut}"
    for name, step in (("bn_apply", _apply), ("bn_reduce", _reduce)):
        yield check(
            f"{name}/{of}",
            make,
            functools.partial(step, gpu_backend),
            functools.partial(step, reference_backend),
        )
    yield check(
        f"bn_stats/{size}",
        make,
        lambda end: _stats_outcome(bn_stats(end.state.y, end.layer.batch_norm)),
        lambda end: _stats_outcome(
            reference_backend.measured(end.state.y, end.layer.batch_norm).stats
        ),
    )
    yield check(
        f"bn_backward_apply/{size}",
        make,
        lambda end: {"dy": bn_backward_apply(end.dy)},
        lambda end: {"dy": bn_backward_apply_ref(*end.dy)},
    )


class _Folded(NamedTuple):
    """A layer of inference."""

    x: Tensor
    layer: ConvBN
    scale_shift: Tensor
    residual: Tensor | None


def _folded_checks(block: NamedBlock, check: Callable[..., Check]) -> Iterator[Check]:
    """The layers of a block, the last with the shortcut."""
    *inner, last = block.layers
    layers = [(shape, False, True) for shape in inner]
    layers.append((last, block.shortcut != "none", True))
    if block.projection is not None:
        layers.append((block.projection, False, False))
    for shape, has_residual, relu in layers:
        words = [*(["residual"] if has_residual else []), *(["relu"] if relu else [])]
        yield check(
            f"folded/{shape.layer_key}/{'+'.join(words) or 'plain'}",
            functools.partial(_make_folded, shape, has_residual),
            functools.partial(_fold, gpu_backend, relu),
            functools.partial(_fold, reference_backend, relu),
        )


def _make_folded(shape: ConvShape, has_residual: bool, seeded: Seeded) -> _Folded:
    n, k = shape.N, shape.K
    w = seeded.to_pixels(seeded.normal(k, shape.C, shape.R, shape.S) / shape.RSC**0.5)
    return _Folded(
        seeded.pixels(n, shape.C, shape.H, shape.W),
        ConvBN(w, seeded.normal(k), seeded.normal(k), shape.stride, shape.padding),
        torch.stack([1 + 0.1 * seeded.normal(k), seeded.normal(k)]),
        seeded.pixels(n, k, shape.P, shape.Q) if has_residual else None,
    )


def _fold(backend: Backend, relu: bool, inputs: _Folded) -> Tensors:
    return {"out": backend.conv_folded(*inputs, relu)}


class _Head(NamedTuple):
    """Pool, classifier and loss."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    pooled: Tensor
    logits: Tensor
    labels: Tensor
    dlogits: Tensor
    grad: Tensor
    dloss: Tensor


def _make_head(last: ConvShape, seeded: Seeded) -> _Head:
    n, c = last.N, last.K
    return _Head(
        seeded.pixels(n, c, last.P, last.Q),
        seeded.normal(NUM_CLASSES, c) / c**0.5,
        seeded.normal(NUM_CLASSES),
        seeded.normal(n, c),
        seeded.normal(n, NUM_CLASSES).to(seeded.dtype),
        seeded.integers(NUM_CLASSES, n),
        seeded.normal(n, NUM_CLASSES).to(seeded.dtype),
        seeded.normal(n, NUM_CLASSES),
        seeded.normal(1)[0],
    )


def _head_checks(last: ConvShape, check: Callable[..., Check]) -> Iterator[Check]:
    make, size = functools.partial(_make_head, last), (last.P, last.Q)
    of = f"h{last.P}w{last.Q}c{last.K}"

    def named(names: tuple[str, ...], values: Any) -> Tensors:
        return dict(zip(names, values, strict=True))

    forward, backward, loss = ("logits", "pooled"), ("dx", "dw", "dbias"), ("loss", "grad")
    yield check(
        f"pool_linear/{of}",
        make,
        lambda t: named(forward, pool_linear_fwd(t.x, t.weight, t.bias)),
        lambda t: named(forward, head.pool_linear_ref(t.x, t.weight, t.bias)),
    )
    yield check(
        f"pool_linear_backward/{of}",
        make,
        lambda t: named(backward, pool_linear_bwd(t.dlogits, t.pooled, t.weight, size)),
        lambda t: named(
            backward, head.pool_linear_backward_ref(t.dlogits, t.pooled, t.weight, size)
        ),
    )
    yield check(
        "cross_entropy",
        make,
        lambda t: named(loss, smooth_cross_entropy_fwd(t.logits, t.labels, SMOOTHING)),
        lambda t: named(loss, head.smooth_cross_entropy_ref(t.logits, t.labels, SMOOTHING)),
    )
    yield check(
        "cross_entropy_backward",
        make,
        lambda t: {"dlogits": smooth_cross_entropy_bwd(t.dloss, t.grad, t.logits.dtype)},
        lambda t: {
            "dlogits": head.smooth_cross_entropy_backward_ref(t.dloss, t.grad, t.logits.dtype)
        },
    )


def _update_checks(network: str, batch: int, check: Callable[..., Check]) -> Iterator[Check]:
    """What moves all parameters and averages at once, and what stands around the network."""
    layers = [s for _, s, count in network_convs(network, batch) for _ in range(count)]
    yield check(
        f"sgd/{network}", functools.partial(_make_update, layers), _sgd_step, _plain_sgd_step
    )
    yield check(
        f"running_stats/{network}",
        functools.partial(_make_averages, layers),
        _move_averages,
        _plain_move_averages,
    )
    yield check("totals", functools.partial(_make_totals, batch), _add_totals, _plain_totals)
    yield check("augment", functools.partial(_make_images, batch), _augment, _plain_augment)


def _make_update(layers: list[ConvShape], seeded: Seeded) -> list[SGDTensors]:
    half = seeded.dtype != torch.float32
    fp32 = Seeded(seeded.device, torch.float32)
    filters = [fp32.pixels(s.K, s.C, s.R, s.S) for s in layers]
    others = [fp32.normal(s.K) for s in layers for _ in ("weight", "bias")]
    others += [fp32.normal(NUM_CLASSES, layers[-1].K), fp32.normal(NUM_CLASSES)]

    def like(p: Tensor) -> Tensor:
        return torch.empty_like(p).copy_(fp32.normal(*p.shape))

    def copy_of(p: Tensor) -> Tensor | None:
        return torch.zeros_like(p, dtype=seeded.dtype) if half and p.dim() == 4 else None

    lr, higher = (torch.full((), rate, device=seeded.device) for rate in (0.1, 0.4))
    return [
        SGDTensors(p, like(p), like(p), copy_of(p), rate, WEIGHT_DECAY)
        for params, rate in ((filters, lr), (others, higher))
        for p in params
    ]


def _update_outcome(tensors: list[SGDTensors]) -> Tensors:
    """All parameters in one tensor, all buffers, all copies."""
    kinds = {"params": "param", "buffers": "momentum_buffer", "copies": "copy"}
    lists = {
        name: [getattr(t, field).flatten() for t in tensors if getattr(t, field) is not None]
        for name, field in kinds.items()
    }
    return {name: torch.cat(values) for name, values in lists.items() if values}


def _sgd_step(inputs: list[SGDTensors]) -> Tensors:
    tensors = map_tensors(inputs, Tensor.clone)
    SGDUpdate([t.param for t in tensors])(tensors, momentum=MOMENTUM, nesterov=True)
    return _update_outcome(tensors)


def _plain_sgd_step(inputs: list[SGDTensors]) -> Tensors:
    moved = []
    for t in inputs:
        assert t.grad is not None
        assert t.momentum_buffer is not None
        g = t.grad + t.weight_decay * t.param
        buffer = MOMENTUM * t.momentum_buffer + g
        param = t.param - t.lr * (g + MOMENTUM * buffer)
        copy = None if t.copy is None else param.to(t.copy.dtype)
        moved.append(SGDTensors(param, None, buffer, copy, t.lr, t.weight_decay))
    return _update_outcome(moved)


class _Averages(NamedTuple):
    averages: list[Tensor]
    values: list[Tensor]
    counts: list[Tensor]


def _make_averages(layers: list[ConvShape], seeded: Seeded) -> _Averages:
    sizes = [s.K for s in layers for _ in ("mean", "var")]
    zeros = [torch.zeros((), dtype=torch.int64, device=seeded.device) for _ in layers]
    return _Averages([seeded.normal(k) for k in sizes], [seeded.normal(k) for k in sizes], zeros)


def _averages_outcome(averages: list[Tensor], counts: list[Tensor]) -> Tensors:
    return {"averages": torch.cat(averages), "counts": torch.stack(counts).double()}


def _move_averages(inputs: _Averages) -> Tensors:
    averages, values, counts = map_tensors(inputs, Tensor.clone)
    if not move_running_stats(averages, values, counts, MOVED):
        raise ValueError("the kernel of running statistics refuses those of the network")
    return _averages_outcome(averages, counts)


def _plain_move_averages(inputs: _Averages) -> Tensors:
    pairs = zip(inputs.averages, inputs.values, strict=True)
    moved = [average + MOVED * (value - average) for average, value in pairs]
    return _averages_outcome(moved, [count + 1 for count in inputs.counts])


class _Totals(NamedTuple):
    totals: Tensor
    loss: Tensor
    logits: Tensor
    labels: Tensor


def _make_totals(batch: int, seeded: Seeded) -> _Totals:
    return _Totals(
        torch.arange(4, dtype=torch.float64, device=seeded.device),
        seeded.normal(1)[0],
        seeded.normal(batch, NUM_CLASSES).to(seeded.dtype),
        seeded.integers(NUM_CLASSES, batch),
    )


def _add_totals(inputs: _Totals) -> Tensors:
    totals, loss, logits, labels = map_tensors(inputs, Tensor.clone)
    add_to_totals(totals, loss, logits, labels)
    return {"totals": totals}


def _plain_totals(inputs: _Totals) -> Tensors:
    totals, loss, logits, labels = inputs
    right = (logits.argmax(1) == labels).sum()
    one, n = torch.ones_like(totals[0]), len(labels)
    added = [n * loss.double(), right.double(), n * one, (~loss.isfinite()).double()]
    return {"totals": totals + torch.stack(added)}


class _Images(NamedTuple):
    images: Tensor
    chosen: Tensor
    mean: Tensor
    scale: Tensor
    crop: Tensor
    flip: Tensor
    cutout: Tensor
    colour: Tensor


PADDING = 4


def _make_images(batch: int, seeded: Seeded) -> _Images:
    corner = seeded.integers(24, batch, 2)
    return _Images(
        seeded.integers(256, NUM_IMAGES, 32, 32, 3, dtype=torch.uint8),
        seeded.integers(NUM_IMAGES, batch),
        125 + seeded.normal(3),
        (1 + 0.1 * seeded.normal(3)) / 60,
        seeded.integers(2 * PADDING + 1, batch, 2),
        seeded.integers(2, batch) > 0,
        torch.cat([corner, corner + 8], 1),
        seeded.integers(256, 3, dtype=torch.uint8),
    )


def _augment(t: _Images) -> Tensors:
    images, chosen, mean, scale, crop, flip, cutout, colour = t
    # In fp32: the loader does not know in which precision the network computes.
    out = augment_normalize(
        images,
        chosen,
        mean,
        scale,
        crop=crop,
        padding=PADDING,
        flip=flip,
        cutout=cutout,
        colour=colour,
    )
    return {"out": out}


def _plain_augment(t: _Images) -> Tensors:
    place = torch.arange(32, device=t.images.device)
    padded = F.pad(t.images, (0, 0, PADDING, PADDING, PADDING, PADDING))
    rows = t.crop[:, :1] + place
    columns = t.crop[:, 1:] + torch.where(t.flip[:, None], 31 - place, place)
    pixels = padded[t.chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
    in_rows = (place >= t.cutout[:, :1]) & (place < t.cutout[:, 2:3])
    in_columns = (place >= t.cutout[:, 1:2]) & (place < t.cutout[:, 3:])
    inside = in_rows[:, :, None, None] & in_columns[:, None, :, None]
    value = (torch.where(inside, t.colour, pixels) - t.mean) * t.scale
    return {"out": value.permute(0, 3, 1, 2)}
