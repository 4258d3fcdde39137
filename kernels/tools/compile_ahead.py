"""Compiles recorded launches in threads, so that running them later finds their kernels ready.

A candidate takes seconds to compile and milliseconds to time. Triton frees Python's lock while LLVM
and the assembler work, so threads do, and the kernels land in this process's own cache. A fifth of
the time and more is Python's, though, so that any number of threads is about four times as fast as
one. launchers.py builds what starts the kernels.
"""

import contextlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import triton

from fastres.kernels.gpu.cache_key import settle_cache_key
from fastres.kernels.gpu.launch import Launch
from fastres.kernels.tools.launchers import build_launcher

__all__ = ["compile_ahead"]


class _InTime(ThreadPoolExecutor):
    """Threads that compile kernels, launchers included, and begin none after the deadline."""

    def __init__(self, num_threads: int, is_late: Callable[[], bool]):
        super().__init__(num_threads)
        self._is_late = is_late

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue a call that compiles; begun too late, it raises TimeoutError."""

        def call() -> Any:
            if self._is_late():
                raise TimeoutError("the deadline has passed")
            kernel = fn(*args, **kwargs)
            with contextlib.suppress(Exception):  # Its launch meets it again.
                build_launcher(kernel)
            return kernel

        return super().submit(call)


def compile_ahead(
    launches: Iterable[Launch], num_threads: int, is_late: Callable[[], bool] = lambda: False
) -> None:
    """Compile what the launches start, once each; returns when all is compiled.

    A kernel that does not compile is left for its launch to report. Interpreted ones need nothing.

    Args:
        launches: recorded, on meta tensors or real ones: addresses count as multiples of 16.
        num_threads: that compile at once.
        is_late: no kernel is begun once it says so.
    """
    with (
        _InTime(num_threads, is_late) as workers,
        triton.AsyncCompileMode(workers, ignore_errors=True),
    ):
        for launch in launches:
            if not isinstance(launch.kernel, triton.JITFunction):
                continue
            settle_cache_key(launch.kernel)
            with contextlib.suppress(Exception):
                launch.kernel.run(
                    grid=launch.grid,
                    warmup=True,
                    **launch.options,
                    **launch.args,
                )
