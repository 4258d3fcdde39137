"""Which kernels the fused modules would run on this machine, said in words."""

import importlib.util

import torch

from fastres.kernels.cpu import build as cpu_build
from fastres.kernels.dispatch import is_interpreted
from fastres.kernels.gpu import launch_table

__all__ = ["cpu_kernels_missing", "fused_kernels"]


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
