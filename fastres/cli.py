"""What the commands share: options from a dataclass, one sentence for an error, exit codes."""

import io
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from fastres.errors import FastresError

__all__ = ["guarded", "parse", "value_of"]

T = TypeVar("T")


def parse(options: type[T], prog: str, description: str, argv: Sequence[str], default: T) -> T:
    """Read `argv` into the dataclass `options`; wrong use ends the process with exit code 2."""
    return tyro.cli(
        options,
        prog=prog,
        description=description,
        args=list(argv),
        default=default,
        config=(tyro.conf.OmitArgPrefixes,),
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


def guarded(command: Callable[[], int], *, debug: bool) -> int:
    """Run `command`; print a FastresError as one sentence and return its exit code.

    With `debug` its traceback is printed too, and what the package logs. An interrupt returns 130.
    """
    if debug:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("fastres").setLevel(logging.DEBUG)
    # A path may hold what the terminal's encoding lacks; printing it is no reason to fail.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return command()
    except FastresError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        # The operating system's refusals are the user's to mend: a full disk, a folder of others.
        if debug:
            traceback.print_exc()
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
