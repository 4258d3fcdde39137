"""Processes that compile beside this one: LLVM and the assembler keep a core each busy."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

__all__ = ["in_processes"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def _enter(environment: Mapping[str, str]) -> None:
    """Begin a process: in this environment, which its server need not have been started in."""
    os.environ.update(environment)
    # What Ctrl-C ends is the parent, which then waits for what has begun.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def in_processes(
    function: Callable[..., Result], items: Sequence[Item], jobs: int, *shared: object
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with `function(item, *shared)`, as they end; items begin in their order.

    Once the caller stops, or a call raises, nothing further is begun.

    Args:
        function: of a module that can be imported by its name.
        items: fit for pickling and hashable, as results are fit for pickling.
        jobs: processes, of which more than items are not started; 1 computes in this one.
        shared: further arguments, the same for all items.
    """
    if jobs == 1 or len(items) <= 1:
        for item in items:
            yield item, function(item, *shared)
        return
    # The server imports torch and triton once; its children are forked from it, so neither a
    # thread nor a CUDA context of this process is copied.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    pool = ProcessPoolExecutor(
        min(jobs, len(items)),
        mp_context=context,
        initializer=_enter,
        initargs=(dict(os.environ),),
    )
    try:
        running = {pool.submit(function, item, *shared): item for item in items}
        for done in as_completed(running):
            yield running[done], done.result()
    finally:
        pool.shutdown(cancel_futures=True)
