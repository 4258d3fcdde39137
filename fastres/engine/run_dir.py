"""The run folder: what a run leaves behind, each file complete at every moment.

A process may be killed between any two steps here, and the folder it leaves is accepted again. From
config.json on, which is written first and only ever replaced, the folder is that of a run: to be
resumed or overwritten. Before it, there is at most litter: files that a killed writer left unnamed.
"""

import csv
import fcntl
import functools
import io
import itertools
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from fastres import strict_json
from fastres.config import Config, from_json
from fastres.data.files import read_bytes
from fastres.engine.checkpoint import replace_file
from fastres.errors import FailureError, UsageError

__all__ = ["RunDir", "default_folder", "litter_of"]

_CONFIG = "config.json"
# In the order in which overwriting removes them: what is left is never more than a run that has
# come less far, and its newest checkpoint goes last.
_RESULTS = (
    "summary.json",
    "curves.png",
    "model.safetensors",
    "best.safetensors",
    "metrics.csv",
    "metrics.jsonl",
    "last.safetensors",
)


def litter_of(*names: str) -> re.Pattern[str]:
    """Match what `replace_file` writes before it renames to one of `names`."""
    return re.compile(rf"({'|'.join(map(re.escape, names))})[a-z0-9_]{{8}}\.part")


_LITTER = litter_of(_CONFIG, *_RESULTS)


def default_folder(config: Config) -> "RunDir":
    """Return a new folder under runs/, named after the model and the time."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return RunDir(Path("runs") / f"{config.model}-{config.recipe}-{stamp}", numbered=True)


class RunDir:
    """A folder that holds one run.

    Args:
        path: need not exist for a new run.
        numbered: claim the first of `path`, `path`-2, `path`-3, ... that does not exist yet, so
            that two runs never meet. Until then the attribute `path` is the first of them.

    A folder of something else that is made of runs derives from it and names its own files.
    """

    what = "run"
    options_file = _CONFIG
    results: tuple[str, ...] = _RESULTS
    litter = _LITTER

    def __init__(self, path: Path, *, numbered: bool = False):
        self.path = path
        self._numbered = numbered

    def file(self, name: str) -> Path:
        """Return the path of a checkpoint.

        "last" is the newest training checkpoint, "best" the weights that did best on the
        validation images, "model" those that the run ended with.
        """
        return self.path / f"{name}.safetensors"

    def result(self) -> Path:
        """Return the weights that the run stands for: best under --val, else the final ones.

        A run that did not finish has its last checkpoint.
        """
        made = (self.file(name) for name in ("best", "model"))
        # One that is there and cannot be followed or read is for its reader to complain of.
        return next((path for path in made if os.path.lexists(path)), self.file("last"))

    def check_free(self, *, overwrite: bool) -> None:
        """Refuse a folder that a new run may not use, before anything slow happens.

        Raises:
            UsageError: when something is there and may not be replaced.
            FailureError: when the folder cannot be read or written.
        """
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise UsageError(f"--out {self.path} is a file, not a folder")
        names = [] if self._numbered else self._names()
        if any(not self.litter.fullmatch(name) for name in names):
            if not (self.options_file in names and self.holds_options()):
                raise UsageError(f"--out {self.path} holds files of something else; choose another")
            if not overwrite:
                raise UsageError(
                    f"{self.path} already holds a {self.what}; continue it with --resume, replace "
                    "it with --overwrite, or choose another --out"
                )
        self._check_writable()

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.path)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise FailureError(f"cannot use {self.path}: {error.strerror}") from None

    def holds_options(self) -> bool:
        """Tell whether the file of options is of a run; other programs have a config.json too."""
        content = self.read_bytes(self.options_file)
        try:
            from_json(content, self.path / self.options_file)
        except UsageError:
            return False
        return True

    def _check_writable(self) -> None:
        """Make a file without a name in the folder, or where the folder will be made."""
        nearest = self.path
        try:
            folders = (self.path, *self.path.absolute().parents)
            nearest = next(folder for folder in folders if os.path.lexists(folder))
            with tempfile.TemporaryFile(dir=nearest):
                pass
        except OSError as error:
            raise FailureError(f"cannot write into {nearest}: {error.strerror or error}") from None

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Make the folder if need be, keep other processes out of it and remove old litter.

        The claim ends with the context or with this process, whatever it has forked.

        Raises:
            UsageError: when another process is training in it.
            FailureError: when the folder cannot be made.
        """
        try:
            self._make()
            handle = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise FailureError(f"cannot use {self.path}: {error.strerror}") from None
        with _closed_in_children(handle):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"another process is training in {self.path}") from None
            except OSError:
                # A network file system without locks: two runs at once are the user's to avoid.
                pass
            else:
                self._remove(name for name in self._names() if self.litter.fullmatch(name))
            yield

    def _make(self) -> None:
        if not self._numbered:
            self.path.mkdir(parents=True, exist_ok=True)
            return
        first = self.path
        first.parent.mkdir(parents=True, exist_ok=True)
        for count in itertools.count(2):
            with suppress(FileExistsError):
                self.path.mkdir()
                return
            self.path = first.with_name(f"{first.name}-{count}")

    def _remove(self, names: Iterable[str]) -> None:
        for path in (self.path / name for name in names):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise FailureError(f"cannot remove {path}: {error.strerror or error}") from None

    def begin(self, options: Mapping[str, Any], *, overwrite: bool) -> None:
        """Give the claimed folder to a new run with these options.

        The files of a run that was there go; all others stay.

        Raises:
            UsageError, FailureError: as `check_free`, or when a file cannot be removed or written.
        """
        self.check_free(overwrite=overwrite)
        self._remove(self.results)
        self.write_json(self.options_file, options)

    def remove(self) -> None:
        """Remove what a run has left, its options last, and the folder where nothing else is in it.

        Raises:
            FailureError: when a file cannot be removed.
        """
        litter = [name for name in self._names() if self.litter.fullmatch(name)]
        self._remove((*litter, *self.results, self.options_file))
        with suppress(OSError):
            self.path.rmdir()

    def has_only_begun(self) -> bool:
        """Tell whether the run was killed before its first checkpoint: nothing is lost from it."""
        written = {"last.safetensors", "metrics.jsonl", "model.safetensors", "summary.json"}
        return written.isdisjoint(self._names())

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write `value` to the file `name`."""
        replace_file(self.path / name, (strict_json.dumps(value, indent=2) + "\n").encode())

    def read_bytes(self, name: str) -> bytes:
        """Return the content of the file `name`.

        Raises:
            UsageError: when there is no such file.
            FailureError: when it cannot be read.
        """
        path = self.path / name
        try:
            return read_bytes(path)
        except FileNotFoundError:
            raise UsageError(f"{self.path} is no {self.what} folder: it has no {name}") from None
        except OSError as error:
            raise FailureError(f"cannot read {path}: {error.strerror or error}") from None

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write one row an epoch as metrics.jsonl and metrics.csv."""
        lines = "".join(strict_json.dumps(row) + "\n" for row in rows)
        replace_file(self.path / "metrics.jsonl", lines.encode())
        self.write_csv("metrics.csv", rows, list(rows[0]) if rows else ["epoch"])

    def write_csv(
        self, name: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]
    ) -> None:
        """Write `rows` to the file `name`, `columns` in their order; what a row lacks is empty."""
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)
        replace_file(self.path / name, table.getvalue().encode())


# Open descriptors whose locks belong to this process and not to those that it forks.
_own_descriptors: set[int] = set()


@contextmanager
def _closed_in_children(descriptor: int) -> Iterator[None]:
    """Close `descriptor` after the context, and in every process forked inside it at once.

    A lock lives as long as a copy of its descriptor, and a loader's workers outlive a killed run.
    """
    _close_after_forks()
    _own_descriptors.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _own_descriptors:
            _own_descriptors.remove(descriptor)
            os.close(descriptor)


@functools.cache
def _close_after_forks() -> None:
    def close() -> None:
        while _own_descriptors:
            os.close(_own_descriptors.pop())

    os.register_at_fork(after_in_child=close)
