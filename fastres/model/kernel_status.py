"""Which kernels the fused modules would run on this machine, said in words."""

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from fastres.kernels.conv_shape import output_length
from fastres.kernels.conv_types import ConvBN
from fastres.kernels.cpu import build as cpu_build
from fastres.kernels.cpu.backend import fuses_conv
from fastres.kernels.dispatch import is_interpreted
from fastres.kernels.gpu import launch_table

__all__ = ["cpu_kernels_missing", "fused_kernels", "why_slower_than_inductor"]


def cpu_kernels_missing() -> str | None:
    """Say why the fused CPU kernels would not be the fast route here, or return None.

    The first call on a machine compiles them, which takes some seconds.
    """
    if is_interpreted():
        return "TRITON_INTERPRET is set, and Triton's interpreter would take their place"
    if cpu_build.unavailable() is not None:
        return cpu_build.unavailable()
    return None if cpu_build.has_fused_conv() else "the processor has no AVX-512 bf16 instructions"


def fused_kernels(device: torch.device) -> str:
    """Name what the fused modules compute with on `device`."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "plain torch: no Triton here"
        gpu = launch_table.gpu_of(device)
        assert gpu is not None
        return f"Triton kernels, {launch_table.origin(gpu)}"
    if is_interpreted():
        return "Triton kernels in the interpreter, because TRITON_INTERPRET is set"
    if cpu_build.unavailable() is not None:
        return f"plain torch: {cpu_build.unavailable()}"
    if cpu_kernels_missing() is not None:
        return f"CPU kernels around oneDNN's convolutions: {cpu_kernels_missing()}"
    return "CPU kernels: bf16 convolutions with batch norm, ReLU and shortcut in one pass"


def why_slower_than_inductor(x: Tensor, layers: Sequence[tuple[Tensor, int, int]]) -> str | None:
    """Say why torch.compile's own code is the faster one for layers in a row, or return None.

    On a CPU that is measured, see docs/your-own-network.md: fused convolutions win, and batch-norm
    kernels around oneDNN's convolutions do not.

    Args:
        x: (N, C, H, W) in the dtype of the computation; it may be without numbers.
        layers: filters (K, C, R, S), stride and padding of each.
    """
    if x.dtype == torch.float64 or x.device.type not in ("cpu", "cuda"):
        return f"no kernels for {x.dtype} on {x.device.type}"
    if x.device.type == "cuda":
        return "no Triton here" if importlib.util.find_spec("triton") is None else None
    if is_interpreted():
        return None
    if cpu_build.unavailable() is not None:
        return cpu_build.unavailable()
    if x.dtype != torch.bfloat16:
        return "inductor is faster on a CPU, except in bfloat16"
    height, width = x.shape[2:]
    for w, stride, padding in layers:
        if not fuses_conv(height, width, ConvBN(w, w, w, stride, padding)):
            return "inductor is faster on a CPU where no fused convolution has the shape"
        height = output_length(height, w.shape[2], stride, padding)
        width = output_length(width, w.shape[3], stride, padding)
    return None
