"""The cache of decoded datasets: the second run maps what the first one decoded.

An entry is a folder named by the fingerprint of its content, with four .npy files:

    <cache>/datasets/<fingerprint>/{train,test}_{images,labels}.npy
    <cache>/index/<SHA-256 of a source's signature>.json    -> fingerprint, name, classes, ...

The signature identifies the source from paths, sizes and times; the fingerprint identifies the
content. Two sources with the same content share an entry. Entries are memory-mapped, so processes
share one copy. They are hashed in full before use and compared with the fingerprint.

A broken cache never stops a run. An entry that fails its check is built again, and where the folder
cannot be written the dataset is used without a cache; a notice says so. Entries and index files
are written under a temporary name and renamed, so two processes may write at once.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastres.data.dataset import Dataset, ImageSet, content_fingerprint
from fastres.host import cache_folder

__all__ = ["cached"]

# Increase with any change to the fields of Dataset or to the files of an entry.
_FORMAT = 1
_STALE_S = 24 * 3600
_UNFINISHED = ".unfinished-"


class _DamagedError(Exception):
    """An index file or an entry fails its check."""


def cached(signature: str, build: Callable[[], Dataset]) -> Dataset:
    """The dataset that `build` returns, from the cache if it is there, else built and stored.

    Args:
        signature: of all that `build` depends on: another reader, file, size or time must give
            another signature.
        build: reads and decodes the source; its errors pass through and nothing is stored.

    Returns:
        The dataset; its arrays are memory-mapped when they came from the cache.
    """
    root = cache_folder()
    key = hashlib.sha256(f"{_FORMAT}\n{signature}".encode(errors="surrogateescape")).hexdigest()
    index = root / "index" / f"{key}.json"
    notice = None
    try:
        return _read(root, index)
    except FileNotFoundError:
        pass
    except (_DamagedError, OSError) as error:
        notice = f"the cached copy in {root} was unusable ({error}) and has been built again"
    dataset = build()
    try:
        _write(root, index, dataset)
    except OSError as error:
        reason = error.strerror or error
        notice = f"no cache: {root} cannot be written ({reason}), so every start decodes again"
    if notice is None:
        return dataset
    return dataclasses.replace(dataset, notices=(*dataset.notices, notice))


def _read(root: Path, index: Path) -> Dataset:
    """The verified dataset.

    Raises:
        FileNotFoundError: this source was never stored.
        _DamagedError: the stored copy failed its check and has been removed.
    """
    facts = _read_index(index)
    entry = root / "datasets" / facts["fingerprint"]
    try:
        sets = [
            ImageSet(_map(entry / f"{split}_images.npy"), _map(entry / f"{split}_labels.npy"))
            for split in ("train", "test")
        ]
        train, test = sets
        if content_fingerprint(tuple(facts["classes"]), train, test) != facts["fingerprint"]:
            raise _DamagedError("its content does not match its fingerprint")
    except (_DamagedError, ValueError, EOFError, FileNotFoundError) as error:
        shutil.rmtree(entry, ignore_errors=True)
        raise _DamagedError(error) from error
    facts = {
        key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()
    }
    return Dataset(train=train, test=test, **facts)


def _map(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _read_index(path: Path) -> dict[str, Any]:
    text = path.read_bytes()
    try:
        check, facts = text.decode().split("\n", 1)
        if hashlib.sha256(facts.encode()).hexdigest() != check:
            raise ValueError("checksum mismatch")
        return json.loads(facts)
    except ValueError as error:
        path.unlink(missing_ok=True)
        raise _DamagedError(f"index: {error}") from error


def _write(root: Path, index: Path, dataset: Dataset) -> None:
    datasets = root / "datasets"
    datasets.mkdir(parents=True, exist_ok=True)
    index.parent.mkdir(exist_ok=True)
    _remove_stale(datasets)
    entry = datasets / dataset.fingerprint
    if not entry.exists():
        _write_entry(datasets, entry, dataset)
    facts = {
        field.name: getattr(dataset, field.name)
        for field in dataclasses.fields(dataset)
        if field.name not in ("train", "test")
    }
    text = json.dumps(facts)
    check = hashlib.sha256(text.encode()).hexdigest()
    with tempfile.NamedTemporaryFile(
        "w", dir=index.parent, prefix=_UNFINISHED, delete=False
    ) as file:
        file.write(f"{check}\n{text}")
    os.replace(file.name, index)


def _write_entry(datasets: Path, entry: Path, dataset: Dataset) -> None:
    unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=datasets))
    try:
        for split, images in (("train", dataset.train), ("test", dataset.test)):
            np.save(unfinished / f"{split}_images.npy", images.images)
            np.save(unfinished / f"{split}_labels.npy", images.labels)
        # When two processes write the same entry, the second rename fails, since the target is no
        # empty folder. The first entry stays; its content is the same.
        unfinished.rename(entry)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not entry.exists():
            raise


def _remove_stale(datasets: Path) -> None:
    """Delete unfinished entries of killed processes: those too old for a running one."""
    for left in datasets.glob(f"{_UNFINISHED}*"):
        try:
            if time.time() - left.stat().st_mtime > _STALE_S:
                shutil.rmtree(left, ignore_errors=True)
        except FileNotFoundError:
            continue
