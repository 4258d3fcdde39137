"""Counters of programs that have come to the end of their kernel: int32 zeros, for last_program.py.

A kernel leaves its counters at zero, so the next launch may use them: one buffer lasts. It must not
be shared by launches that run at the same time.

  launches of a stream     one buffer a stream: they run one after the other.
  a CUDA graph's launches  memory of their own, since a graph is replayed on any stream, beside any
                           other. Zeros allocated during capture are memory of the graph, at the
                           price of a memset in it for each; inside `own_counters` it is none.
  CPU tensors              zeros, which cost nothing worth saving.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastres.kernels.override import Override

__all__ = ["own_counters", "zero_counters"]

# What one stream's buffer holds at least; the largest launch of a ResNet-18 takes fewer.
BUFFER_SIZE = 2**14

_of_stream: dict[tuple[torch.device, int], torch.Tensor] = {}


class _Slices:
    """A buffer of zeros that is given out slice by slice."""

    def __init__(self, buffer: torch.Tensor):
        self.buffer = buffer
        self.used = 0

    def take(self, count: int) -> torch.Tensor | None:
        """Return the next `count` counters, or None where fewer are left."""
        first, self.used = self.used, self.used + count
        return self.buffer[first : self.used] if self.used <= len(self.buffer) else None


_own: Override[_Slices] = Override()


@contextmanager
def own_counters(device: torch.device, size: int = 2**18) -> Iterator[torch.Tensor]:
    """Give every launch inside the `with` block counters that no other launch has.

    For the capture of a CUDA graph: enter before it begins, and keep the yielded buffer for as long
    as the graph. Launches that find it used up get zeros of their own.

    Args:
        device: of the launches.
        size: counters in the buffer.
    """
    buffer = torch.zeros(size, dtype=torch.int32, device=device)
    with _own.set(_Slices(buffer)):
        yield buffer


def zero_counters(like: torch.Tensor, count: int) -> torch.Tensor:
    """At least `count` int32 zeros on the device of `like`, for the next launch of this stream."""
    device = like.device
    slices = _own.value
    if slices is not None and slices.buffer.device == device:
        counters = slices.take(count)
        if counters is not None:
            return counters
    if device.type == "meta":
        return torch.empty(count, dtype=torch.int32, device=device)
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    buffer = _of_stream.get(key)
    if buffer is None or len(buffer) < count:
        buffer = torch.zeros(max(count, BUFFER_SIZE), dtype=torch.int32, device=device)
        _of_stream[key] = buffer
    return buffer
