"""What stands under a data file's name, and opening it: regular files only, errors with a reason.

`Path.is_file` and its kin answer no for a file that may not be looked at, and opening a FIFO waits
for ever. Here a file is absent only if the system says so; any other refusal is passed on.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from fastres.errors import FailureError

__all__ = ["DEAD_LINK", "FILE", "FOLDER", "kind_at", "kind_of", "open_file", "read_bytes"]

FILE, FOLDER, DEAD_LINK = "a file", "a folder", "a link to a missing file"
_KINDS = {
    stat.S_IFREG: FILE,
    stat.S_IFDIR: FOLDER,
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def kind_of(status: os.stat_result) -> str:
    """What the status is of, in words: `FILE`, `FOLDER`, "a FIFO", ..."""
    return _KINDS.get(stat.S_IFMT(status.st_mode), "a special file")


def kind_at(path: str | Path) -> str | None:
    """What `path` leads to, in words; `DEAD_LINK`, or None where nothing has that name.

    Raises:
        OSError: the system does not say what is there: no permission, a circle of links.
    """
    try:
        return kind_of(os.stat(path))
    except (NotADirectoryError, ValueError):  # the latter: no system has such a name
        return None
    except FileNotFoundError:
        return DEAD_LINK if os.path.islink(path) else None


@contextmanager
def open_file(path: str | Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading; inside the `with` block an error of the system is explained.

    Raises:
        FailureError: the file cannot be opened or read, with the system's reason; or it is a
            folder, a FIFO, a device or a link to a missing file.
    """
    try:
        kind = kind_at(path)
        if kind not in (FILE, None):
            raise FailureError(f"{path} is {kind}, not a file")
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        if error.errno is None:  # from Pillow or gzip, about the content
            raise
        raise FailureError(f"cannot read {path}: {error.strerror}") from error


def read_bytes(path: str | Path) -> bytes:
    """Return the content of a file that a run or its user wrote.

    Raises:
        OSError: the file is missing or cannot be read.
        FailureError: it is a FIFO, a socket or a device, which may have no end.
    """
    kind = kind_at(path)
    if kind not in (FILE, FOLDER, DEAD_LINK, None):
        raise FailureError(f"cannot read {path}: it is {kind}")
    return Path(path).read_bytes()
