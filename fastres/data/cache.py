"""The cache of decoded datasets: the second run maps what the first one decoded.

An entry is a folder named by the fingerprint of its content, with four files of plain numbers:

    <cache>/datasets/<fingerprint>/{train,test}_{images,labels}.bin
    <cache>/index/<SHA-256 of a source's signature>.json    -> fingerprint, name, classes, ...

The signature identifies the source from paths, sizes and times; the fingerprint identifies the
content. Two sources with the same content share an entry. Entries are memory-mapped, so processes
share one copy. They are hashed in full before use and compared with the fingerprint. The files have
no headers, so there is no byte of an entry that the hash does not cover.

A broken cache never stops a run. An entry that fails its check is built again, and where the folder
cannot be written the dataset is used without a cache; a notice says so. Entries and index files
are written under a temporary name and renamed, so two processes may write at once.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastres import strict_json
from fastres.cache_file import (
    DamagedError,
    read_cache_file,
    remove,
    remove_stale,
    unfinished,
    write_cache_file,
)
from fastres.data.dataset import IMAGE_SHAPE, Dataset, ImageSet, content_fingerprint
from fastres.errors import FailureError
from fastres.host import cache_folder

__all__ = ["cached"]

# Increase with any change to the fields of Dataset or to the files of an entry.
_FORMAT = 2
_SPLITS = ("train", "test")
_LABEL = np.dtype("<i8")


def cached(signature: str, build: Callable[[], Dataset]) -> Dataset:
    """The dataset that `build` returns, from the cache if it is there, else built and stored.

    Args:
        signature: of all that `build` depends on: another reader, file, size or time must give
            another signature.
        build: reads and decodes the source; its errors pass through and nothing is stored.

    Returns:
        The dataset; its arrays are memory-mapped when they came from the cache.
    """
    try:
        root = cache_folder()
    except FailureError as error:
        return _with_notice(build(), f"no cache: {error}; every start decodes again")
    key = hashlib.sha256(f"{_FORMAT}\n{signature}".encode(errors="surrogateescape")).hexdigest()
    index = root / "index" / f"{key}.json"
    notice = None
    try:
        return _read(root, index)
    except FileNotFoundError:
        pass
    # Whatever is wrong with a cache, the source is there to be read again.
    except Exception as error:
        notice = f"the cached copy in {root} was unusable ({error}) and has been built again"
    dataset = build()
    try:
        _write(root, index, dataset)
    except OSError as error:
        reason = error.strerror or error
        notice = f"no cache: {root} cannot be written ({reason}), so every start decodes again"
    return _with_notice(dataset, notice) if notice else dataset


def _with_notice(dataset: Dataset, notice: str) -> Dataset:
    return dataclasses.replace(dataset, notices=(*dataset.notices, notice))


def _read(root: Path, index: Path) -> Dataset:
    """The verified dataset.

    Raises:
        FileNotFoundError: this source was never stored.
        Exception: what is stored cannot be used; such an entry has been removed.
    """
    facts = _facts(json.loads(read_cache_file(index)))
    if not re.fullmatch("[0-9a-f]{64}", facts["fingerprint"]):
        raise DamagedError("its index names no fingerprint")
    entry = root / "datasets" / facts["fingerprint"]
    try:
        if not all(path.is_file() for path in entry.iterdir()):
            raise DamagedError("it holds what is no file")
        train, test = (_map(entry, split) for split in _SPLITS)
        if content_fingerprint(facts["classes"], train, test) != facts["fingerprint"]:
            raise DamagedError("its content does not match its fingerprint")
    except Exception as error:
        remove(entry)
        raise DamagedError(error) from error
    return Dataset(train=train, test=test, **facts)


def _facts(stored: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Dataset, of which JSON has made lists where they were tuples."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in stored.items()}


def _map(entry: Path, split: str) -> ImageSet:
    images, labels = (
        np.memmap(entry / f"{split}_{what}.bin", dtype, mode="r")
        for what, dtype in (("images", np.uint8), ("labels", _LABEL))
    )
    return ImageSet(images.reshape(-1, *IMAGE_SHAPE), labels.astype(np.int64, copy=False))


def _write(root: Path, index: Path, dataset: Dataset) -> None:
    datasets = root / "datasets"
    datasets.mkdir(parents=True, exist_ok=True)
    remove_stale(datasets)
    entry = datasets / dataset.fingerprint
    if not (entry / "test_labels.bin").exists():
        _write_entry(entry, dataset)
    facts = {
        field.name: getattr(dataset, field.name)
        for field in dataclasses.fields(dataset)
        if field.name not in _SPLITS
    }
    write_cache_file(index, strict_json.dumps(facts).encode())


def _write_entry(entry: Path, dataset: Dataset) -> None:
    folder = unfinished(entry.parent)
    try:
        folder.mkdir()
        for split, images in (("train", dataset.train), ("test", dataset.test)):
            labels = np.ascontiguousarray(images.labels, dtype=_LABEL)
            (folder / f"{split}_images.bin").write_bytes(images.images.data)
            (folder / f"{split}_labels.bin").write_bytes(labels.data)
        # What has the name and is no entry, or one of another format, is in the way.
        if not (entry / "test_labels.bin").exists():
            remove(entry)
        # When two processes write the same entry, the second rename fails, since the target is no
        # empty folder. The first entry stays; its content is the same.
        folder.rename(entry)
    except OSError:
        remove(folder)
        if not entry.exists():
            raise
