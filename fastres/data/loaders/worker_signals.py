"""Signals in a loader's worker processes: they obey the process that trains, and nobody else.

A signal that asks a run to stop often reaches its workers too: Ctrl-C and a closed terminal go to
the process group, batch systems and `systemctl stop` signal every process of a job. A worker that
died of it would fail the step in which the training process wants to save.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

__all__ = ["obey_trainer", "signals_held"]

_HELD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOOK_SECONDS = 0.5


@contextmanager
def signals_held() -> Iterator[None]:
    """Put off signals for the time of the context; processes that are forked inside inherit that.

    So there is no moment between the fork and `obey_trainer` in which one could end a worker.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_trainer(_worker: int) -> None:
    """Make this worker end on a SIGTERM of the training process, and when that process ends."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    threading.Thread(target=_wait_for_end, args=(trainer,), daemon=True).start()


def _wait_for_end(trainer: BaseProcess) -> None:
    """End the process, whatever its main thread does: it may wait for a batch nobody asks for.

    A trainer may have ended before this began, so that the parent is another one already; the pipe
    that `is_alive` looks at tells. It alone would not do: processes forked later hold its end open.
    """
    parent = os.getppid()
    while True:
        received = signal.sigtimedwait(_HELD, _LOOK_SECONDS)
        ordered = received is not None and received.si_pid == trainer.pid
        if ordered or os.getppid() != parent or not trainer.is_alive():
            os._exit(0)
