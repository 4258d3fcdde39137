"""Compiles kernels in threads before they are launched, so that launching them finds them ready.

A kernel takes seconds to compile and a fraction of a millisecond to run. Triton frees Python's lock
while LLVM and the assembler work, so threads do, and the kernels land in this process's own cache.
A fifth of the time and more is Python's, though, so that any number of threads is about four times
as fast as one. launchers.py builds what starts the kernels.

`compile_ahead` takes recorded launches. `compiling_only` takes whatever would be launched inside a
`with` block, of any network and step:

    with compiling_only(16):
        loss = model(x); loss.backward()    # garbage: no Triton kernel has computed anything
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import triton

from fastres.kernels.gpu.cache_key import settle_cache_key
from fastres.kernels.gpu.launch import Launch
from fastres.kernels.tools.launchers import build_launcher

__all__ = ["compile_ahead", "compiling_only"]


class _InTime(ThreadPoolExecutor):
    """Threads that compile kernels, launchers included, and begin none after the deadline."""

    def __init__(self, num_threads: int, is_late: Callable[[], bool] = lambda: False):
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


class _CompileOnly(triton.AsyncCompileMode):
    """Has every kernel compiled and gives the launcher none, which then starts nothing."""

    def submit(
        self, key: str, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]
    ) -> None:
        """Called by the launcher for a kernel that it does not remember."""
        super().submit(key, compile_fn, finalize_fn)


@contextlib.contextmanager
def compiling_only(num_threads: int) -> Iterator[None]:
    """Compile the kernels launched inside the `with` block side by side, instead of running them.

    The block ends when all are compiled. One that does not compile is left for its launch to
    report; one that this process has compiled before runs; interpreted ones do, too. Everything
    else computes as ever, on memory that the kernels have left as it was.

    Args:
        num_threads: that compile at once.
    """
    with (
        _InTime(num_threads) as workers,
        _CompileOnly(workers, ignore_errors=True),
        # The mode is a context variable, which autograd's own thread for a GPU would not see.
        torch.autograd.set_multithreading_enabled(False),
    ):
        yield
