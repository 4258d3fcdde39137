"""Ctrl-C and SIGTERM while a network trains: the first one asks for an end, a second one kills."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["StopSignal", "Stopped"]


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

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch SIGINT and SIGTERM inside the `with` block; the handlers before return after it."""
        trainer_process = os.getpid()

        def remember(number: int, _frame: object) -> None:
            # Ctrl-C reaches the loader's workers too, which inherit this; they end with the loader.
            if os.getpid() != trainer_process:
                return
            self.number = number
            signal.signal(number, signal.SIG_DFL)
            # The handler may interrupt the console in the middle of a line, so it writes past it.
            os.write(2, b"stopping after this step; once more to stop at once\n")

        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, remember)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
