"""Counters of programs that have come to the end of their kernel: int32 zeros, for last_program.py.

A kernel leaves its counters at zero, so a later launch may use them: one buffer lasts. Two counts
of one launch, or of launches that run at the same time, must not share any.

  launches of a stream     one buffer a stream, given out slice by slice, around and around: they
                           run one after the other, and what one of them takes never overlaps.
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

# What one stream's buffer holds: many times what a launch of a ResNet-18 takes.
BUFFER_SIZE = 2**16

# Counters in 16 bytes. Triton compiles a kernel anew for an address that is no multiple of 16, and
# inside the capture of a CUDA graph it may not: no launch meets another alignment than its warm-up.
ALIGNMENT = 4


class _Slices:
    """A buffer of zeros that is given out slice by slice."""

    def __init__(self, size: int, device: torch.device):
        self.buffer = torch.zeros(size, dtype=torch.int32, device=device)
        self.used = 0

    def take(self, count: int) -> torch.Tensor | None:
        """Return the next `count` counters, or None where fewer are left."""
        first, end = self.used, self.used + count
        if end > len(self.buffer):
            return None
        self.used = first + _whole(count)
        return self.buffer[first:end]


def _whole(count: int) -> int:
    """What `count` counters take up, so that the next ones are aligned too."""
    return -(-count // ALIGNMENT) * ALIGNMENT


_of_stream: dict[tuple[torch.device, int], _Slices] = {}
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
    slices = _Slices(size, device)
    with _own.set(slices):
        yield slices.buffer


def zero_counters(like: torch.Tensor, count: int) -> torch.Tensor:
    """`count` int32 zeros on the device of `like`, for one count of the next launch of this stream.

    A launch may take several; none of them shares a counter with another.
    """
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
    return _next_of_stream(device, torch.cuda.current_stream(device).cuda_stream, count)


def _next_of_stream(device: torch.device, stream: int, count: int) -> torch.Tensor:
    """The next counters of a stream's buffer; from its beginning where they do not fit its end."""
    slices = _of_stream.get((device, stream))
    if slices is None or 2 * _whole(count) > len(slices.buffer):
        slices = _of_stream[device, stream] = _Slices(max(BUFFER_SIZE, 4 * _whole(count)), device)
    counters = slices.take(count)
    if counters is None:
        slices.used = 0
        counters = slices.take(count)
    assert counters is not None
    return counters
