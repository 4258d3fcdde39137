"""Which steps compute a chain on which tensors, and a chain from the flat arguments of an op."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastres.kernels.block import Chain, Shortcut
from fastres.kernels.cpu import backend as cpu_backend
from fastres.kernels.reference import backend as reference_backend
from fastres.kernels.reference.block import ConvBN

__all__ = [
    "choose_backend",
    "is_interpreted",
    "make_chain",
    "no_autocast",
    "pixels",
    "runs_on_triton",
]


@functools.cache
def _triton_backend() -> ModuleType | None:
    """The Triton steps, or None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("fastres.kernels.gpu.backend")


@functools.cache
def is_interpreted() -> bool:
    """Whether Triton would interpret its kernels; asked first, as importing it takes a second."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def runs_on_triton(x: Tensor) -> bool:
    """Whether Triton kernels compute on x; see fused.py."""
    if x.dtype == torch.float64 or (x.device.type == "cpu" and not is_interpreted()):
        return False
    steps = _triton_backend()
    return steps is not None and steps.runs_on(x.device)


def choose_backend(x: Tensor) -> Any:
    """The steps that run on x, a module with the functions of `chain.Backend`; see fused.py."""
    if runs_on_triton(x):
        return _triton_backend()
    return cpu_backend if cpu_backend.runs_on(x) else reference_backend


def make_chain(
    params: Sequence[Tensor],
    geometry: Sequence[int],
    shortcut: str,
    relu: bool,
    eps: Sequence[float] | None = None,
) -> Chain:
    """Put the flat arguments of an op together again; filters become channels_last."""
    layers = [
        ConvBN(
            params[3 * i].contiguous(memory_format=torch.channels_last),
            params[3 * i + 1].contiguous(),
            params[3 * i + 2].contiguous(),
            geometry[2 * i],
            geometry[2 * i + 1],
            eps[i] if eps is not None else 0.0,
        )
        for i in range(len(params) // 3)
    ]
    kind: Shortcut = shortcut  # type: ignore[assignment]
    if kind == "projected":
        return Chain(layers[:-1], layers[-1], kind, relu)
    return Chain(layers, None, kind, relu)


def pixels(t: Tensor) -> Tensor:
    """T with unit channel stride, as the kernels read it; gaps between pixels may stay."""
    return t if t.stride(1) == 1 else t.contiguous(memory_format=torch.channels_last)


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which torch's own convolutions keep the dtype of x, as the fakes promise."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
