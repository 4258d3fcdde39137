"""A worker process that dies, raises or stalls: the run ends with one sentence.

A death is noticed by torch's handler of SIGCHLD, which raises in whatever the main thread does, and
by torch's look at the workers after a wait. All else shows as a wait without end.
"""

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from fastres.data.loaders.worker_signals import signals_held
from fastres.errors import FailureError, is_out_of_memory

__all__ = ["WAIT_SECONDS", "WorkerError", "batches_from_workers", "explained"]

T = TypeVar("T")

# The time without a batch is counted in waits, so that a run which was suspended goes on.
WAIT_SECONDS = 15
_MAX_WAITS = 8
# What torch says of memory that is shared, where all other memory is the machine's.
_SHARED_MEMORY = re.compile(r"shared memory|\bshm\b|/torch_")


class WorkerError(FailureError, RuntimeError):
    """A worker process failed; a RuntimeError too, as torch raises it."""

    def __init__(self, reason: str):
        super().__init__(
            f"the worker processes of the torch loader failed: {reason}; batches pass through "
            "shared memory, so enlarge /dev/shm, use smaller batches, or --workers 0, which needs "
            "none"
        )


class _NoBatchError(WorkerError):
    """torch waited as long as the DataLoader's timeout."""


def batches_from_workers(loader: DataLoader) -> Iterator[Any]:
    """One pass over a DataLoader with worker processes and a timeout of `WAIT_SECONDS`.

    Raises:
        WorkerError: a worker could not be started, died, raised an exception, or no batch came.
    """
    before: Any = loader._iterator  # that of the pass before, with its workers
    if before is None:
        with signals_held():
            batches = explained(lambda: iter(loader))
    else:
        batches = _begin_again(loader, before)
    _explain_deaths()
    while (batch := _next_batch(batches)) is not None:
        yield batch


def _begin_again(loader: DataLoader, batches: Any) -> Any:
    """Begin another pass, for which torch waits once for all workers to say that they are ready."""
    batches._timeout = _MAX_WAITS * WAIT_SECONDS
    try:
        return explained(lambda: iter(loader))
    except WorkerError as error:
        _end_workers(batches)
        if isinstance(error, _NoBatchError):
            raise _stalled() from error
        raise
    finally:
        batches._timeout = WAIT_SECONDS


def _stalled() -> WorkerError:
    return WorkerError(f"no batch came for {_MAX_WAITS * WAIT_SECONDS} s")


def _next_batch(batches: Any) -> Any:
    try:
        for _ in range(_MAX_WAITS):
            try:
                return explained(lambda: next(batches, None))
            except _NoBatchError:
                continue
        raise _stalled()
    except Exception:
        _end_workers(batches)
        raise


def explained(wait: Callable[[], T]) -> T:
    """Return what `wait` returns.

    Raises:
        RuntimeError, MemoryError: too little memory, as it was raised.
        WorkerError: `wait` raised anything else; a `_NoBatchError` where torch waited long enough.
    """
    try:
        return wait()
    except Exception as error:
        if str(error).startswith("DataLoader timed out"):
            raise _NoBatchError(f"no batch came for {WAIT_SECONDS} s") from error
        if is_out_of_memory(error) and not _SHARED_MEMORY.search(str(error)):
            raise
        # Raised by the handler of SIGCHLD, it says more than the error that torch makes of it.
        for known in (error, error.__cause__):
            if isinstance(known, WorkerError):
                raise known from error
        # An exception of a worker comes with the worker's traceback, which ends in its message.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise WorkerError(lines[-1].rstrip(".")) from error


class _DeathHandler:
    """A handler of SIGCHLD that raises torch's errors as ours."""

    def __init__(self, torch_handler: Callable[[int, Any], Any]):
        self.torch_handler = torch_handler

    def __call__(self, number: int, frame: Any) -> None:
        try:
            self.torch_handler(number, frame)
        except RuntimeError as error:
            raise WorkerError(str(error).rstrip(". ")) from error


def _explain_deaths() -> None:
    """Put a `_DeathHandler` in the place of the handler that torch sets with the first workers."""
    handler = signal.getsignal(signal.SIGCHLD)
    if isinstance(handler, _DeathHandler) or not callable(handler):
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, _DeathHandler(handler))


def _end_workers(batches: Any) -> None:
    """Kill the workers: a stopped one would not end when the program does, and be waited for."""
    with _deaths_unreported():
        for worker in batches._workers:
            worker.kill()
        batches._shutdown_workers()


@contextmanager
def _deaths_unreported() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets no other thread set a handler
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) or signal.SIG_DFL
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)
