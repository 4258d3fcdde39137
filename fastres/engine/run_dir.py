"""The run folder: what a run leaves behind, each file complete at every moment."""

import csv
import fcntl
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from fastres.config import Config
from fastres.engine.checkpoint import replace_file
from fastres.errors import FailureError, UsageError

__all__ = ["RunDir", "default_folder"]

_FILES = (
    "config.json",
    "metrics.jsonl",
    "metrics.csv",
    "summary.json",
    "curves.png",
    "last.safetensors",
    "best.safetensors",
    "model.safetensors",
)


def default_folder(config: Config) -> Path:
    """Name a folder under runs/ after the model and the time."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{config.model}-{config.recipe}-{stamp}"
    folder, count = Path("runs") / name, 1
    while folder.exists():
        count += 1
        folder = Path("runs") / f"{name}-{count}"
    return folder


class RunDir:
    """A folder that holds one run.

    Args:
        path: need not exist for a new run.
    """

    def __init__(self, path: Path):
        self.path = path

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
        return next((path for path in made if path.exists()), self.file("last"))

    def check_free(self, *, overwrite: bool) -> None:
        """Refuse a folder that a new run may not use, before anything slow happens.

        Raises:
            UsageError: when something is there and may not be replaced.
            FailureError: when the folder cannot be read or written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--out {self.path} is a file, not a folder")
        try:
            used = self.path.exists() and any(self.path.iterdir())
        except OSError as error:
            raise FailureError(f"cannot use {self.path}: {error.strerror}") from None
        if used and not (self.path / "config.json").exists():
            raise UsageError(f"--out {self.path} holds files of something else; choose another")
        if used and not overwrite:
            raise UsageError(
                f"{self.path} already holds a run; continue it with --resume, replace it with "
                "--overwrite, or choose another --out"
            )
        nearest = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise FailureError(f"cannot write into {nearest}: it is read-only")

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Make the folder if need be and keep other processes out of it.

        Raises:
            UsageError: when another process is training in it.
            FailureError: when the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise FailureError(f"cannot use {self.path}: {error.strerror}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UsageError(f"another process is training in {self.path}") from None
        except OSError:
            pass  # A network file system without locks: two runs at once are the user's to avoid.
        try:
            yield
        finally:
            os.close(handle)

    def clear(self) -> None:
        """Remove the files of a run that was there; all others stay.

        Raises:
            FailureError: when one cannot be removed.
        """
        try:
            for name in _FILES:
                (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise FailureError(f"cannot use {self.path}: {error.strerror}") from None

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write `value` to the file `name`."""
        replace_file(self.path / name, (json.dumps(value, indent=2) + "\n").encode())

    def read_bytes(self, name: str) -> bytes:
        """Return the content of the file `name`.

        Raises:
            UsageError: when there is no such file.
        """
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise UsageError(f"{self.path} is no run folder: {name}: {error.strerror}") from None

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write one row an epoch as metrics.jsonl and metrics.csv."""
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        replace_file(self.path / "metrics.jsonl", lines.encode())
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, fieldnames=list(rows[0]) if rows else ["epoch"])
        writer.writeheader()
        writer.writerows(rows)
        replace_file(self.path / "metrics.csv", table.getvalue().encode())
