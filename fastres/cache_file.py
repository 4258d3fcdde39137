"""Files of the user cache: each ends with the SHA-256 of the rest, and gets its name in one step.

A cache is nobody's only copy. So a file that is not what was written is not trusted and not mended:
its reader makes the content again, and says so in one line. Several processes may write the same
file at once; the last one wins, and a reader sees one of them, whole.

The standard library alone: the kernels keep their compiled code here too.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import time
from pathlib import Path

__all__ = [
    "DamagedError",
    "read_cache_file",
    "remove",
    "remove_stale",
    "unfinished",
    "write_cache_file",
]

_DIGITS = 64
_UNFINISHED = ".unfinished-"
_STALE_S = 24 * 3600


class DamagedError(Exception):
    """What lies in the cache is not what was written."""


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def read_cache_file(path: Path) -> bytes:
    """Return what `write_cache_file` was given.

    Raises:
        FileNotFoundError: nothing was written.
        DamagedError: the file is not what was written.
        OSError: the file cannot be read.
    """
    if path.exists() and not path.is_file():
        raise DamagedError(f"{path.name} is no file")  # a FIFO, say, would be waited for
    stored = path.read_bytes()
    content, digest = stored[:-_DIGITS], stored[-_DIGITS:]
    if _digest(content) != digest:
        raise DamagedError(f"{path.name} does not match its SHA-256")
    return content


def write_cache_file(path: Path, content: bytes) -> None:
    """Write `content` and its SHA-256 to `path`, whose folder is made if need be.

    Raises:
        OSError: the file cannot be written; what was there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path.parent)
    temporary = unfinished(path.parent)
    try:
        temporary.write_bytes(content + _digest(content))
        if path.exists() and not path.is_file():
            remove(path)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def unfinished(folder: Path) -> Path:
    """Return a name in `folder` for what is not whole yet; no other process has it."""
    return folder / f"{_UNFINISHED}{secrets.token_hex(8)}"


def remove_stale(folder: Path) -> None:
    """Delete what killed processes left unfinished: what is too old to be of a running one."""
    for left in folder.glob(f"{_UNFINISHED}*"):
        try:
            if time.time() - left.stat().st_mtime > _STALE_S:
                remove(left)
        except OSError:
            continue


def remove(path: Path) -> None:
    """Delete a file or a folder of the cache, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()
