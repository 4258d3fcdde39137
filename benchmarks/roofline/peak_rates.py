"""What this machine can do at most: copies, matrix products, the convolutions of a network."""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks.harness.timing import Sample, graph_sample, wall_sample
from benchmarks.roofline.step_traffic import TracedConv

__all__ = [
    "CONV_OPS",
    "conv_calls",
    "copy_call",
    "distinct_layers",
    "matmul_call",
    "sample_of",
]

CONV_OPS = ("fprop", "dgrad", "wgrad")

_COPIED_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}


def sample_of(call: Callable[[], object], device: torch.device) -> Sample:
    """Time `call` with warm caches: by a replayed graph on a GPU, by the clock on a CPU."""
    if device.type == "cuda":
        return graph_sample(call, device, cold=False)
    return wall_sample(call, device)


def copy_call(
    device: torch.device, num_bytes: int | None = None
) -> tuple[Callable[[], object], int]:
    """Return a copy and the bytes that it reads and writes.

    Args:
        device: where source and target lie.
        num_bytes: of each; default: far beyond every cache.
    """
    size = num_bytes or _COPIED_BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return functools.partial(target.copy_, source), 2 * size


def matmul_call(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """Return a square matrix product and its operations; float32 is IEEE, without TF32."""
    size = _MATMUL_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return functools.partial(torch.mm, left, right), 2 * size**3


def conv_calls(
    layer: TracedConv,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    memory_format: torch.memory_format,
) -> dict[str, Callable[[], object]]:
    """Return the products of one layer as torch's own operators (oneDNN, cuDNN), without autograd.

    The stem has no dgrad: nobody wants the gradient of the images.
    """

    def operand(*size: int) -> Tensor:
        values = torch.randn(size, device=device).to(dtype)
        return values.contiguous(memory_format=memory_format)

    shape = layer.shape
    x = operand(batch_size, shape.C, shape.H, shape.W)
    dy = operand(batch_size, shape.K, shape.P, shape.Q)
    w = operand(shape.K, shape.C, shape.R, shape.S)
    sizes = ([shape.stride] * 2, [shape.padding] * 2, [1, 1], False, [0, 0], 1)

    def backward(*mask: bool) -> Callable[[], object]:
        operator = torch.ops.aten.convolution_backward
        return functools.partial(operator, dy, x, w, None, *sizes, [*mask, False])

    calls: dict[str, Callable[[], object]] = {
        "fprop": functools.partial(torch.ops.aten.convolution, x, w, None, *sizes),
        "wgrad": backward(False, True),
    }
    if layer.needs_dgrad:
        calls["dgrad"] = backward(True, False)
    return calls


def distinct_layers(layers: Iterable[TracedConv]) -> list[tuple[TracedConv, int]]:
    """Return every layer that differs in shape from those before it, and how many are like it."""
    found: dict[tuple, tuple[TracedConv, int]] = {}
    for layer in layers:
        key = (layer.shape, layer.needs_dgrad)
        first, count = found.get(key, (layer, 0))
        found[key] = (first, count + 1)
    return list(found.values())
