"""What torch itself launches, recorded among the launches of this project's kernels.

    with recording_all() as launches:
        dx = torch.ops.aten.convolution_backward(...)    # on meta tensors
    launches[0].name, launches[0].traffic.bytes

Every operator of torch that would start a kernel on a GPU counts, those that make a view or
allocate do not. Bytes are those of its tensors, each read or written once. Arithmetic is counted
for convolutions, of which cuDNN may start more than one kernel; all else waits for memory. A call
on lists of tensors is as many launches as torch makes of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastres.kernels.gpu.launch import Launch, Traffic, num_bytes, recording

__all__ = ["AnyLaunch", "TorchLaunch", "recording_all"]

# Tensors of one launch by the number of lists, see MultiTensorApply.cuh of torch.
_TENSORS_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}

# Operators that allocate, or give a view though their schema does not say so.
_STARTS_NOTHING = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
}

# Operators whose first tensor gives a shape, or is overwritten without being read.
_IGNORES_FIRST = {"fill_", "zero_", "copy_", "ones_like", "zeros_like", "full_like", "new_zeros"}


@dataclass(frozen=True)
class TorchLaunch:
    """One launch of torch's own.

    name: of the operator, with the output for a convolution's backward. is_convolution: whether it
    is one of cuDNN.
    """

    name: str
    traffic: Traffic
    is_convolution: bool = False


AnyLaunch = Launch | TorchLaunch


@contextmanager
def recording_all() -> Iterator[list[AnyLaunch]]:
    """Collect launches as `recording` does, and those of torch among them, in order."""
    with recording() as launches:
        all_launches = cast(list[AnyLaunch], launches)
        with _TorchRecorder(all_launches):
            yield all_launches


class _TorchRecorder(TorchDispatchMode):
    """Turns every operator that starts a kernel into launches; it computes on meta tensors."""

    # A fused net is to call its ops, and not to fall back to plain modules.
    sees_fused_ops = True

    def __init__(self, launches: list[AnyLaunch]):
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # These change tensors in place and nothing else; the meta device has no form of them.
        result = None if func.__name__.startswith("_fused_") else func(*args, **kwargs)
        if func.namespace == "aten":
            self.launches += _launches_of(func, args, kwargs, result)
        if result is not None and func.__name__.startswith("convolution_backward"):
            result = [_as_cudnn_returns(grad, args[2]) for grad in result]
        elif func.__name__.startswith("convolution"):
            result = _as_cudnn_returns(result, args[1])
        return result


def _as_cudnn_returns(t: Tensor | None, w: Tensor) -> Tensor | None:
    """A result in the layout of the filters, which cuDNN gives it; meta knows NCHW alone."""
    if t is None or not w.is_contiguous(memory_format=torch.channels_last):
        return t
    return t.contiguous(memory_format=torch.channels_last)


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of an argument or a result, those in lists too."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _launches_of(
    func: Any, args: tuple, kwargs: dict[str, Any], result: Any
) -> Iterator[TorchLaunch]:
    """The launches of one call of an operator."""
    name = func.__name__.partition(".")[0]
    if name == "convolution":
        yield _convolution("convolution", args[:2], result, result, args[1])
        return
    if name == "convolution_backward":
        dy, x, w = args[:3]
        dx, dw, _ = result
        if dx is not None:
            yield _convolution("convolution_backward dx", (dy, w), dx, dy, w)
        if dw is not None:
            yield _convolution("convolution_backward dw", (dy, x), dw, dy, w)
        return
    given = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
    # An optimizer writes its gradients only where it also takes the loss scale out of them.
    written = [
        tensor
        for argument in func._schema.arguments
        if argument.is_write and argument.name != "grads"
        for tensor in _tensors(given.get(argument.name))
    ]
    aliases = [found.alias_info for found in func._schema.returns if found.alias_info is not None]
    is_view = any(not alias.is_write for alias in aliases)
    made = [] if written else _tensors(result)
    if is_view or name in _STARTS_NOTHING or not num_bytes(*written, *made):
        return
    values = list(given.values())[name in _IGNORES_FIRST :]
    reads = num_bytes(*(tensor for value in values for tensor in _tensors(value)))
    writes = num_bytes(*written, *made)
    count = _num_launches(name, given)
    for i in range(count):
        yield TorchLaunch(name, Traffic((reads + i) // count, (writes + i) // count))


def _num_launches(name: str, given: dict[str, Any]) -> int:
    """Launches of one call: one, but for a call that works on lists of tensors."""
    if not name.startswith(("_foreach_", "_fused_", "_amp_foreach_")):
        return 1
    lists = [len(value) for value in given.values() if isinstance(value, list) and _tensors(value)]
    return -(-max(lists) // _TENSORS_A_LAUNCH[len(lists)])


def _convolution(name: str, reads: tuple, out: Tensor, y: Tensor, w: Tensor) -> TorchLaunch:
    """A product of a convolution: each element of y meets the weights of one filter."""
    traffic = Traffic(num_bytes(*reads), num_bytes(out), 2 * y.numel() * w[0].numel())
    return TorchLaunch(name, traffic, is_convolution=True)
