"""Signals while a network trains: the first one asks for an end, the same one again kills.

Ctrl-C (SIGINT), SIGTERM and a closed terminal (SIGHUP) are requests to save and stop.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["StopSignal", "Stopped"]

_REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Launchers send a signal to the process and to its group, or pass on what the terminal has sent to
# both: what comes again within this time is the same request.
_REPEAT_SECONDS = 1.0
_ANSWER = b"stopping after this step; once more to stop at once\n"


class Stopped(Exception):
    """The run was interrupted by a signal and has saved a checkpoint."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StopSignal:
    """Remembers the signal that asked for an end.

    Attributes:
        number: of the signal, None while none has come.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._first_seconds: dict[int, float] = {}

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch requests to stop inside the `with` block; the handlers before return after it.

        A signal that was ignored stays ignored: SIGHUP under nohup, SIGINT in a background job. In
        another thread than the main one nothing is caught, since Python has no handlers there.
        """
        handlers = {number: signal.getsignal(number) for number in _REQUESTS}
        if threading.current_thread() is not threading.main_thread():
            handlers.clear()
        # None stands for a handler that was not set from Python and could not be put back.
        caught = {n: h for n, h in handlers.items() if h not in (signal.SIG_IGN, None)}
        for number in caught:
            signal.signal(number, self._remember)
        try:
            yield
        finally:
            for number, handler in caught.items():
                signal.signal(number, handler)

    def _remember(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if now - self._first_seconds.setdefault(number, now) > _REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self.number is not None:
            return
        self.number = number
        if sys.stderr is not None:
            # The handler may interrupt the console in the middle of a line, so it writes past it.
            # Nobody needs to read it: a closed terminal is one of the requests.
            with suppress(OSError):
                os.write(sys.stderr.fileno(), _ANSWER)
