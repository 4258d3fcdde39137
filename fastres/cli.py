"""What the commands share: options from a dataclass, one sentence for an error, exit codes."""

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from fastres.errors import FastresError, sentence_for
from fastres.output import reader_may_leave
from fastres.strict_json import dumps

__all__ = ["guarded", "parse", "tell_launcher", "value_of"]

T = TypeVar("T")


def parse(
    options: type[T], prog: str, description: str, argv: Sequence[str], default: T | None = None
) -> T:
    """Read `argv` into the dataclass `options`; wrong use ends the process with exit code 2.

    Args:
        options: the dataclass.
        prog: the command, for `--help`.
        description: what it does, for `--help`.
        argv: the words behind it.
        default: the values of options that are not given; None takes those of the dataclass, and
            asks for what has none.
    """
    # Here, since an interrupt before `guarded` is Python's to report, with a traceback.
    import tyro

    # tyro tells "no default" from None by an argument that is not there.
    given: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(
        options,
        prog=prog,
        description=description,
        args=list(argv),
        config=(tyro.conf.OmitArgPrefixes,),
        **given,
    )


def value_of(option: str, argv: Sequence[str]) -> str | None:
    """Return the last value given to `option` before the real parse, or None.

    Recipe and config file decide the defaults that the parser shows, so they are looked up first.
    """
    value = None
    for position, argument in enumerate(argv):
        if argument == option and position + 1 < len(argv):
            value = argv[position + 1]
        elif argument.startswith(option + "="):
            value = argument.partition("=")[2]
    return value


def guarded(command: Callable[[], int], *, debug: bool, result_is_printed: bool = True) -> int:
    """Run `command`; print what a user can mend as one sentence and return its exit code.

    An interrupt returns 130. A reader of stdout or stderr may leave: see output.py.

    Args:
        command: returns an exit code.
        debug: print the traceback of an error too, and what the package logs.
        result_is_printed: fail where stdout could not be written.
    """
    with reader_may_leave(result_is_printed=result_is_printed), _noting_interrupts() as interrupts:
        if debug:
            logging.basicConfig(format="%(name)s: %(message)s")
            logging.getLogger("fastres").setLevel(logging.DEBUG)
        try:
            return command()
        except (Exception, KeyboardInterrupt) as error:
            if interrupts or isinstance(error, KeyboardInterrupt):
                print("interrupted", file=sys.stderr)
                return 130
            sentence = sentence_for(error)
            if sentence is None:
                raise
            # Names in it may be a stranger's, and must not write lines or colours of their own.
            sentence = "".join(c if c.isprintable() else repr(c)[1:-1] for c in sentence)
            if debug:
                traceback.print_exc()
            if not tell_launcher(f"error: {sentence}"):
                print(f"error: {sentence}", file=sys.stderr)
            return error.exit_code if isinstance(error, FastresError) else 1


@contextmanager
def _noting_interrupts() -> Iterator[list[int]]:
    """Raise KeyboardInterrupt on Ctrl-C as Python does, and keep a list of those raised.

    While a library is imported, it may be swallowed there, and an odd error follows.
    """
    received: list[int] = []

    def interrupt(number: int, _frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield received
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def tell_launcher(sentence: str) -> bool:
    """Have torchrun end its report on a failed run with `sentence`.

    The report names a reason for every process, the first one last, and comes after whatever the
    processes printed. Returns whether it stands for what this process would print itself.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return False
    reason = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
    try:
        with open(file, "w") as stream:
            stream.write(dumps({"message": {"message": sentence, "extraInfo": reason}}))
    except OSError:
        return False
    return True
