"""stdout and stderr of a command, whose reader may leave: `... | head`, a closed terminal.

Printing is no reason to end a command. What nobody can read is dropped without a word; what a full
disk did not take is named at the end.
"""

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

__all__ = ["reader_may_leave"]


class _LossyFile(io.FileIO):
    """Writes to an open file descriptor, and drops what it does not take.

    Attributes:
        loss: the first reason why something was dropped, None where nothing was or where the
            reader had left.
    """

    def __init__(self, descriptor: int):
        super().__init__(descriptor, "w", closefd=False)
        self.loss: OSError | None = None
        self._on_terminal = os.isatty(descriptor)

    def write(self, data: Any) -> int:
        """Write `data`, or part of it, and return how many bytes are done with."""
        try:
            while (written := super().write(data)) is None:
                # Another process has made the descriptor non-blocking, for all who share it.
                select.select([], [self], [])
        except OSError as error:
            reader_left = self._on_terminal or error.errno in (errno.EPIPE, errno.ECONNRESET)
            if not reader_left:
                self.loss = self.loss or error
            return memoryview(data).nbytes
        return written


def _lossy(stream: TextIO | None) -> tuple[TextIO, _LossyFile | None]:
    """Return a stream to the same place that never fails, and its file.

    Only the interpreter's own streams are replaced: others belong to a caller, who sees to them. It
    has none where a descriptor was closed before the start, which libraries do not expect.
    """
    if stream is None:
        return open(os.devnull, "w"), None
    if not isinstance(stream, io.TextIOWrapper):
        return stream, None
    # A path may hold what the terminal's encoding lacks; printing it is no reason to fail.
    stream.reconfigure(errors="backslashreplace")
    if stream not in (sys.__stdout__, sys.__stderr__):
        return stream, None
    with suppress(OSError):
        stream.flush()
    file = _LossyFile(stream.fileno())
    text = io.TextIOWrapper(
        io.BufferedWriter(file),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering or stream.write_through,
    )
    return text, file


@contextmanager
def reader_may_leave(*, result_is_printed: bool = True) -> Iterator[None]:
    """Let nothing that is printed inside the context fail; also a decorator.

    Args:
        result_is_printed: what stdout could not take was what the command is for, and its loss a
            failure: exit code 1.

    Raises:
        SystemExit: at the end, for a result that was lost for another reason than a reader's leave.
    """
    before = sys.stdout, sys.stderr
    (sys.stdout, out), (sys.stderr, _) = map(_lossy, before)
    try:
        yield
    finally:
        sys.stdout.flush()
        if out is not None and out.loss is not None:
            print(f"error: cannot write to stdout: {out.loss.strerror}", file=sys.stderr)
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
    if out is not None and out.loss is not None and result_is_printed:
        raise SystemExit(1)
