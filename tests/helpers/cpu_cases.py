"""Inputs for the CPU kernels, by shape, and the fixtures of their tests."""

import pytest
import torch

from fastres.kernels import dispatch
from fastres.kernels.conv_types import ConvBN, LayerState
from fastres.kernels.cpu import build as cpu_build

BF16, FP32 = torch.bfloat16, torch.float32

# (N, C, H, W, K, filter, stride): fused ones in bf16 first, by tile and tail, then oneDNN's.
SHAPES = {
    "16 to 16": (3, 16, 6, 32, 16, 3, 1),
    "16 to 16, tail": (2, 16, 5, 19, 16, 3, 1),
    "16 to 16, narrow": (1, 16, 9, 11, 16, 3, 1),
    "16 to 32": (2, 16, 3, 8, 32, 3, 1),
    "32 to 32, odd": (5, 32, 7, 9, 32, 3, 1),
    "64 to 64": (9, 64, 8, 8, 64, 3, 1),
    "64 to 16": (2, 64, 1, 17, 16, 3, 1),
    "stem": (3, 3, 8, 32, 16, 3, 1),
    "stem, odd": (2, 3, 7, 9, 64, 3, 1),
    "map too narrow": (2, 16, 9, 7, 16, 3, 1),
    "channels of no tile": (2, 5, 7, 9, 17, 3, 1),
    "strided": (3, 16, 6, 16, 32, 3, 2),
    "strided, tail": (2, 32, 4, 22, 64, 3, 2),
    "strided, to 16": (2, 64, 2, 32, 16, 3, 2),
    "strided, deep": (5, 128, 4, 16, 256, 3, 2),
    "strided, to more": (2, 64, 2, 18, 128, 3, 2),
    "strided stem": (2, 3, 8, 18, 16, 3, 2),
    "strided, odd": (2, 16, 9, 8, 32, 3, 2),
    "projection": (2, 16, 9, 8, 32, 1, 2),
    "projection, few channels": (2, 5, 8, 7, 9, 1, 2),
    "projection, whole tiles": (3, 16, 6, 32, 32, 1, 2),
    "projection, tail": (2, 32, 4, 22, 64, 1, 2),
    "projection, to 16": (2, 64, 2, 16, 16, 1, 2),
    "projection, deep": (2, 128, 2, 18, 256, 1, 2),
    "1x1": (2, 32, 5, 9, 64, 1, 1),
    "1x1, to 16": (3, 64, 3, 17, 16, 1, 1),
    "1x1, many channels": (2, 48, 5, 9, 96, 1, 2),
}


@pytest.fixture(scope="module")
def has_cpu_kernels():
    """Compile the kernels into the tests' own cache, or skip where that cannot be done."""
    if cpu_build.library() is None:
        pytest.skip(f"no CPU kernels: {cpu_build.unavailable()}")


def pixels(*size, dtype, generator):
    values = torch.randn(size, generator=generator)
    return values.to(dtype).to(memory_format=torch.channels_last)


def state_of(y, mean, rstd, scale_shift):
    """The state of a layer; nothing computes with its variance."""
    return LayerState(y, torch.stack([mean, mean, rstd, *scale_shift]))


class Case:
    """Inputs of all steps of one convolution; `of` gives them in another dtype."""

    def __init__(self, shape, dtype, seed=0):
        n, c, h, w, k, size, stride = shape
        g = torch.Generator().manual_seed(seed)
        filters = pixels(k, c, size, size, dtype=FP32, generator=g) / (c * size * size) ** 0.5
        self.layer = ConvBN(
            filters.to(dtype),
            torch.randn(k, generator=g),
            torch.randn(k, generator=g),
            stride,
            size // 2,
        )
        self.x = pixels(n, c, h, w, dtype=dtype, generator=g)
        self.scale_shift = torch.randn(2, c, generator=g)
        self.mean = torch.randn(c, generator=g)
        p, q = (-(-s // stride) for s in (h, w))
        self.g, self.y = (pixels(n, k, p, q, dtype=dtype, generator=g) for _ in range(2))
        self.coefficients = torch.randn(3, k, generator=g)
        self.shortcut = pixels(n, c, h, w, dtype=dtype, generator=g)
        self.residual = pixels(n, k, p, q, dtype=dtype, generator=g)
        self.out_scale_shift = torch.randn(2, k, generator=g)

    def double(self):
        wide = object.__new__(Case)
        for name, value in vars(self).items():
            if name == "layer":
                value = ConvBN(*(v.double() for v in value[:3]), *value[3:])
            setattr(wide, name, value if name == "layer" else value.double())
        return wide

    def producer(self):
        """The state of a layer whose y is x."""
        return state_of(self.x, self.mean, self.mean.abs() + 0.5, self.scale_shift)


@pytest.fixture
def cpu_route(monkeypatch):
    """Fused modules compute in the CPU kernels, not in Triton's interpreter."""
    monkeypatch.setattr(dispatch, "_triton_backend", lambda: None)
