"""Asynchronous checkpoints: an epoch is trained while the files of the one before are written.

Hashing, serialising and the disk take longer than an epoch of a small network on a GPU. What is to
be written is copied to the host first (`checkpoint.snapshot`), as training goes on to change it.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

__all__ = ["BackgroundWriter"]


class BackgroundWriter:
    """A thread that writes the files of one moment at a time; begun with the first of them."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="fastres-writer")
        self._pending: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Have `write` called in the thread, once what was handed over before is written.

        Raises: what writing that has raised; then `write` is not called.
        """
        self.wait()
        self._pending = self._executor.submit(write)

    def wait(self) -> None:
        """Return once everything is written; raise what writing has raised, once."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """End the thread when everything is written, and raise nothing: ask `wait` for that."""
        if self._pending is not None:
            wait([self._pending])
        self._executor.shutdown()
