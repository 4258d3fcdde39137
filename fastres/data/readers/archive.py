"""Read files out of an untrusted .tar.gz without unpacking it to disk.

Only regular files are read. Links, devices and sparse files are skipped and folder names are
ignored, so no entry can refer to a path outside the archive. The decompressed bytes are counted: a
decompression bomb is refused at `MAX_UNPACKED_BYTES`.
"""

import gzip
import hashlib
import os
import tarfile
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import BinaryIO, cast

from fastres.data.files import open_file
from fastres.data.progress import progress_bar
from fastres.errors import FailureError

__all__ = ["GZIP_MAGIC", "MAX_UNPACKED_BYTES", "looks_like_a_web_page", "md5_of", "read_members"]

# The largest archive read here, CIFAR-100's python version, unpacks to 187 MB.
MAX_UNPACKED_BYTES = 512 << 20
GZIP_MAGIC = b"\x1f\x8b"
_BUFFER_BYTES = 1 << 20


def md5_of(path: Path) -> str:
    """The MD5 of a file as 32 hex digits, the checksum that the authors of CIFAR published."""
    with open_file(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def looks_like_a_web_page(head: bytes) -> bool:
    """Whether a file that begins like this is HTML or XML, as error pages are."""
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")


def read_members(path: Path, wanted: Collection[str]) -> tuple[dict[str, bytes], set[str]]:
    """Read the wanted files of an archive in one pass.

    Args:
        path: a .tar.gz or .tar file.
        wanted: file names, without folders.

    Returns:
        The content of the wanted files that are there, by name, and the names of all regular files.

    Raises:
        FailureError: the archive cannot be read, is empty, a web page, not an archive, truncated,
            damaged, larger than `MAX_UNPACKED_BYTES`, or holds one of the names twice.
    """
    found: dict[str, bytes] = {}
    names: set[str] = set()
    with open_file(path) as raw, progress_bar(in_bytes=True) as bar:
        task = bar.add_task(f"reading {path.name}", total=os.fstat(raw.fileno()).st_size)
        stream = _Bounded(
            _open_stream(raw, path), path, lambda: bar.update(task, completed=raw.tell())
        )
        try:
            source = cast(BinaryIO, stream)
            with tarfile.open(fileobj=source, mode="r|", bufsize=_BUFFER_BYTES) as tar:
                for member in tar:
                    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse:
                        continue
                    name = member.name.rsplit("/", 1)[-1]
                    names.add(name)
                    if name not in wanted:
                        continue
                    if name in found:
                        raise FailureError(f"{path} holds {name} twice")
                    content = tar.extractfile(member)
                    assert content is not None  # regular files always have content
                    found[name] = content.read()
            # The checksum of gzip stands at the end of the stream, after the last file.
            while stream.read(_BUFFER_BYTES):
                pass
        except (EOFError, tarfile.TarError, zlib.error, gzip.BadGzipFile) as error:
            raise FailureError(
                f"{path} is truncated or damaged ({error}): download it again"
            ) from error
    return found, names


def _open_stream(raw: BinaryIO, path: Path) -> BinaryIO:
    head = raw.read(512)
    raw.seek(0)
    if head.startswith(GZIP_MAGIC):
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if head[257:262] == b"ustar":
        return raw
    if looks_like_a_web_page(head):
        raise FailureError(
            f"{path} is a web page saved under an archive's name: delete it and download it again"
        )
    reason = "not a .tar.gz archive" if head else "empty"
    raise FailureError(f"{path} is {reason}: delete it and download it again")


class _Bounded:
    """A readable stream that refuses a decompression bomb and reports after every read."""

    def __init__(self, stream: BinaryIO, path: Path, report: Callable[[], object]) -> None:
        self._stream = stream
        self._path = path
        self._report = report
        self._left = MAX_UNPACKED_BYTES

    def read(self, count: int) -> bytes:
        data = self._stream.read(count)
        self._report()
        self._left -= len(data)
        if self._left < 0:
            raise FailureError(
                f"{self._path} unpacks to more than {MAX_UNPACKED_BYTES >> 20} MiB: "
                "no CIFAR archive does"
            )
        return data
