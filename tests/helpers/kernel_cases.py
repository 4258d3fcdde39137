"""What the kernel tests share: seeded inputs, shapes by code path, the steps in eager and fp64."""

from typing import NamedTuple

import torch

from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.conv_types import BatchNorm, BatchNormGrads, DeferredGrad, LayerState
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.reference import block as ref
from tests.helpers.interpreter import DEVICE
from tests.helpers.numerics import assert_statistics

# Small tiles, so that small shapes have several of them and tails in every direction.
TILES = ConvConfig(block_m=32, block_n=32, block_k=64, num_warps=4, num_stages=2, split_k=3)

SHAPES = {
    "1x1": ConvShape(2, 7, 9, 5, 17, 1, 1, 1, 0),
    "3x3": ConvShape(2, 7, 9, 17, 33),
    "3x3, stride 2": ConvShape(2, 7, 9, 33, 17, stride=2),
    "3x3, stride 2, even": ConvShape(1, 8, 8, 16, 32, stride=2),
    "3x3, stride 3": ConvShape(1, 8, 7, 5, 17, stride=3),
    "projection": ConvShape(2, 7, 9, 17, 33, 1, 1, 2, 0),
    "stem": ConvShape(2, 9, 7, 3, 16),
    "wide": ConvShape(1, 4, 5, 130, 130, 1, 1, 1, 0),
    "no padding": ConvShape(1, 7, 9, 5, 5, padding=0),
    "more padding than taps reach": ConvShape(1, 4, 3, 5, 5, padding=3),
    "5x5": ConvShape(1, 7, 6, 5, 17, 5, 5, 1, 2),
    "1x3": ConvShape(1, 7, 6, 5, 5, 1, 3, 1, 1),
    "one pixel": ConvShape(1, 1, 1, 5, 5),
}


def channels_last(t: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return t.to(DEVICE, dtype).to(memory_format=torch.channels_last)


class ConvTensors(NamedTuple):
    """Inputs of all three convolutions of one shape, of unit scale."""

    x: torch.Tensor
    w: torch.Tensor
    scale_shift: torch.Tensor
    dy: DeferredGrad
    shortcut: torch.Tensor
    producer: LayerState
    producer_weight: torch.Tensor
    batch_norm: BatchNorm

    def double(self) -> "ConvTensors":
        def widen(value):
            if isinstance(value, torch.Tensor):
                return value.double()
            if isinstance(value, tuple):
                return type(value)(*(widen(v) for v in value))
            return value

        return widen(self)


def make_tensors(shape: ConvShape, dtype: torch.dtype, seed: int = 0) -> ConvTensors:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator)

    def pixels(*size):
        return channels_last(normal(*size), dtype)

    def producer():
        stats = normal(5, c).to(DEVICE)
        stats[2] = stats[2].abs() + 0.5
        return LayerState(pixels(n, c, h, w), stats)

    n, h, w, c, k = shape.N, shape.H, shape.W, shape.C, shape.K
    return ConvTensors(
        x=pixels(n, c, h, w),
        w=channels_last(normal(k, c, shape.R, shape.S) / shape.RSC**0.5, dtype),
        scale_shift=normal(2, c).to(DEVICE),
        dy=DeferredGrad(
            pixels(n, k, shape.P, shape.Q),
            pixels(n, k, shape.P, shape.Q),
            normal(3, k).to(DEVICE),
        ),
        shortcut=pixels(n, c, h, w),
        producer=producer(),
        producer_weight=1 + normal(c).to(DEVICE),
        batch_norm=BatchNorm(1 + normal(k).to(DEVICE), normal(k).to(DEVICE), 1e-3),
    )


def geometry(shape: ConvShape) -> dict[str, int]:
    return {"stride": shape.stride, "padding": shape.padding}


def fprop(t: ConvTensors, shape: ConvShape, prologue: bool) -> torch.Tensor:
    x = ref.bn_apply_ref(t.x, t.scale_shift) if prologue else t.x
    return ref.conv_ref(x, t.w, **geometry(shape))


def compute_dy(t: ConvTensors, deferred: bool) -> torch.Tensor:
    return ref.bn_backward_apply_ref(*t.dy) if deferred else t.dy.g


def dgrad(t: ConvTensors, shape: ConvShape, deferred: bool, shortcut: bool) -> torch.Tensor:
    dy = compute_dy(t, deferred)
    dx = ref.conv_dgrad_ref(dy, t.w, (shape.H, shape.W), **geometry(shape))
    return dx + t.shortcut if shortcut else dx


def pre_activation(t: ConvTensors) -> torch.Tensor:
    """The z of the producer's batch norm, whose sign is the ReLU's mask."""
    a, b = t.producer.scale_shift
    return t.producer.y.to(a.dtype) * a.view(1, -1, 1, 1) + b.view(1, -1, 1, 1)


def wgrad(t: ConvTensors, shape: ConvShape, prologue: bool, deferred: bool) -> torch.Tensor:
    x = ref.bn_apply_ref(t.x, t.scale_shift) if prologue else t.x
    return ref.conv_wgrad_ref(x, compute_dy(t, deferred), (shape.R, shape.S), **geometry(shape))


def check_stats(stats: torch.Tensor, y: torch.Tensor, batch_norm: BatchNorm) -> None:
    """`LayerState.stats` against fp64 statistics of y as stored."""
    k = y.shape[1]
    rows = y.double().permute(0, 2, 3, 1).reshape(-1, k)
    mean, size, var = rows.mean(0), rows.abs().mean(0), rows.var(0, unbiased=False)
    assert_statistics("mean", stats[0], mean, size)
    assert_statistics("unbiased variance", stats[1], rows.var(0), rows.var(0) + size.square())
    # What follows is right for the mean and variance found, to a few roundings.
    found = stats[1].double() * (len(rows) - 1) / len(rows)
    state = LayerState(y, stats)
    rstd = (found + batch_norm.eps).rsqrt()
    torch.testing.assert_close(state.rstd.double(), rstd, rtol=1e-6, atol=0)
    assert ((found - var).abs() <= 1e-3 * (var + size.square())).all()
    fold = ref.bn_fold_ref(state.mean, state.rstd, *batch_norm[:2])
    torch.testing.assert_close(state.scale_shift, fold, rtol=1e-6, atol=1e-6)


def check_producer_grads(grads: BatchNormGrads, g: torch.Tensor, t: ConvTensors) -> None:
    """Gradients of the producer's batch norm against fp64 sums of g as stored."""
    assert grads.dy.g is g
    assert grads.dy.y is t.producer.y
    y, stats = t.producer.y.double(), t.producer.stats.double()
    producer, weight = LayerState(y, stats), t.producer_weight.double()
    sums = ref.bn_backward_sums_ref(g.double(), y, producer.mean)
    centred = (y - producer.mean.view(1, -1, 1, 1)).abs()
    size_g, size_gy = ref.bn_backward_sums_ref(g.double().abs(), centred, 0 * producer.mean)
    count = g.numel() // g.shape[1]
    dgamma, dbeta, coefficients = ref.bn_backward_coefficients_ref(
        *sums, producer.mean, producer.rstd, weight, count
    )
    assert_statistics("dbeta", grads.dbeta, dbeta, size_g)
    assert_statistics("dgamma", grads.dgamma, dgamma, size_gy * producer.rstd)
    sizes = ref.bn_backward_coefficients_ref(
        size_g, size_gy, producer.mean.abs(), producer.rstd, weight.abs(), count
    )[2].abs()
    # c2 is a difference of two such products.
    sizes[2] += 2 * (sizes[1] * producer.mean.abs())
    assert_statistics("c0, c1, c2", grads.dy.coefficients, coefficients, sizes)
