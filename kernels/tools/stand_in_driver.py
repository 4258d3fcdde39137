"""A driver that stands in for a GPU, so that Triton's launcher compiles what a launch would.

Triton asks its driver which GPU it launches on. Inside `standing_in(90)` the answer is one of
compute capability 9.0, there or not, and `kernel.run(..., warmup=True)` specializes, builds and
caches a kernel as a launch on it would; nothing can be run.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

__all__ = ["standing_in"]


class _StandIn:
    """What compiling asks of a driver."""

    def __init__(self, compute_capability: int, device: int):
        self.compute_capability, self.device = compute_capability, device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.compute_capability, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def standing_in(compute_capability: int, *, remembers: bool = True) -> Iterator[None]:
    """Have Triton compile for this compute capability, e.g. 90, inside the `with` block.

    remembers: whether the launcher may know what it compiled in such blocks before.
    """
    # The launcher keeps what it compiled by device: each kind of GPU is another.
    device = compute_capability if remembers else -compute_capability
    # Asking for the active driver would look for a GPU, and fail where there is none.
    before = driver._active
    driver.set_active(_StandIn(compute_capability, device))
    try:
        yield
    finally:
        driver._active = before
