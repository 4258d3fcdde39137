"""Which back end computes on which tensors; see ops.py."""

import functools
import importlib
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from fastres.kernels.block import Backend
from fastres.kernels.cpu import backend as cpu_backend
from fastres.kernels.override import Override
from fastres.kernels.reference import backend as reference_backend

__all__ = ["choose_backend", "force_backend", "is_interpreted", "no_autocast", "runs_on_triton"]

_forced: Override[Backend] = Override()


@functools.cache
def _triton_backend() -> Backend | None:
    """The Triton back end, or None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    return cast(Backend, importlib.import_module("fastres.kernels.gpu.backend"))


@functools.cache
def is_interpreted() -> bool:
    """Whether Triton would interpret its kernels; asked first, as importing it takes a second."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def force_backend(backend: Backend) -> AbstractContextManager[None]:
    """Have `backend` compute whatever is called inside the `with` block, on any tensors."""
    return _forced.set(backend)


def runs_on_triton(x: Tensor) -> bool:
    """Whether Triton kernels compute on x."""
    if _forced.value is not None:
        return _forced.value is _triton_backend()
    # Triton is imported only where its kernels could run.
    if x.dtype == torch.float64 or (x.device.type == "cpu" and not is_interpreted()):
        return False
    backend = _triton_backend()
    return backend is not None and backend.runs_on(x)


def choose_backend(x: Tensor) -> Backend:
    """The back end that computes on x."""
    if _forced.value is not None:
        return _forced.value
    if runs_on_triton(x):
        return cast(Backend, _triton_backend())
    return cpu_backend if cpu_backend.runs_on(x) else reference_backend


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which torch's own convolutions keep the dtype of x, as the fakes promise."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
