"""Load a dataset by name: find it in a folder, download it, or draw the synthetic one."""

import dataclasses
import os
from pathlib import Path
from typing import get_args

import numpy as np

from fastres.config import DatasetKind
from fastres.data.cache import cached
from fastres.data.dataset import Dataset, ImageSet
from fastres.data.download import download_cifar
from fastres.data.files import DEAD_LINK, FOLDER, kind_at
from fastres.data.readers.cifar import CifarFiles, find_cifar
from fastres.data.readers.folder import ImageFolder, find_image_folder
from fastres.data.synthetic import SYNTHETIC_VERSION, synthetic_dataset
from fastres.errors import FailureError, UsageError
from fastres.host import cache_folder

__all__ = [
    "DATASET_NAMES",
    "dataset_kind",
    "load_dataset",
    "named_data_folder",
    "split_validation",
]

DATASET_NAMES = ("auto", *get_args(DatasetKind))
_TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "folder": "image folder"}
_WANTED = "a CIFAR archive, or train/<class>/ and test/<class>/ folders"


def load_dataset(
    name: str = "auto", data_dir: str | os.PathLike[str] | None = None, *, download: bool = True
) -> Dataset:
    """Find, decode and cache a dataset.

    `auto` takes what is in the data folder: CIFAR-10, else CIFAR-100, else an image folder. It is
    an error if the user named the folder and it holds none of these. With no folder named, `auto`
    downloads CIFAR-10; where that fails it returns the synthetic dataset, with a notice. `cifar10`
    and `cifar100` are looked for, then downloaded into the data folder; if that fails it is an
    error.

    Args:
        name: one of `DATASET_NAMES`.
        data_dir: where to look; by default $FASTRES_DATA, which counts as named by the user, else
            `data` in the cache folder. Where there is no cache folder, `auto` is synthetic.
        download: whether the network may be used; $FASTRES_OFFLINE=1 forbids it as well.

    Returns:
        The dataset; `dataset.name` says what it is, `dataset.notices` what the user should know.

    Raises:
        UsageError: an unknown name, a missing folder, a folder that holds something else.
        FailureError: the data is broken or unreadable, or could not be downloaded.
    """
    if name not in DATASET_NAMES:
        raise UsageError(f"unknown dataset {name!r}: choose from {', '.join(DATASET_NAMES)}")
    if name == "synthetic":
        return _synthetic()
    try:
        try:
            root, named = _data_folder(data_dir)
        except FailureError as error:
            return _synthetic_instead(name, error)
        return _load(name, root, named, download)
    except OSError as error:
        where = error.filename or "the data"
        raise FailureError(f"cannot read {where}: {error.strerror or error}") from error


def dataset_kind(name: str) -> DatasetKind:
    """Return what to ask `load_dataset` for, to get again what records call `name`.

    `auto` may find something else another time; `cifar10-jpeg`, say, is a folder, and
    `cifar10-custom` an archive of other images than the original's.
    """
    kinds: dict[str, DatasetKind] = {kind: kind for kind in get_args(DatasetKind)}
    return kinds.get(name.removesuffix("-custom"), "folder")


def _load(name: str, root: Path, named: bool, download: bool) -> Dataset:
    found = _find(name, root)
    if found is not None:
        return cached(found.signature, found.read)
    if name == "folder":
        raise UsageError(
            f"{root} is not an image folder: it needs train/<class>/ and test/<class>/"
            + ("" if named else "; name yours with --data-dir")
        )
    if named:
        _refuse_other_content(name, root)
    return _fetch(name, root, download)


def named_data_folder(data_dir: str | os.PathLike[str] | None) -> str | None:
    """The absolute data folder that the user has named, by argument or $FASTRES_DATA, or None."""
    chosen = data_dir or os.environ.get("FASTRES_DATA")
    return os.path.abspath(os.path.expanduser(chosen)) if chosen else None


def _data_folder(data_dir: str | os.PathLike[str] | None) -> tuple[Path, bool]:
    """The folder to look in, and whether the user named it; a named one must exist."""
    chosen = named_data_folder(data_dir)
    if chosen is None:
        return cache_folder() / "data", False
    root = Path(chosen)
    origin = "" if data_dir else " (from FASTRES_DATA)"
    kind = kind_at(root)
    if kind is None:
        raise UsageError(f"the data folder {root}{origin} does not exist")
    if kind == DEAD_LINK:
        raise UsageError(f"the data folder {root}{origin} is a link to a missing folder")
    if kind != FOLDER:
        raise UsageError(f"{root}{origin} is {kind}: name the folder that holds the data")
    return root, True


def _find(name: str, root: Path) -> CifarFiles | ImageFolder | None:
    kinds = ("cifar10", "cifar100", "folder") if name == "auto" else (name,)
    if kind_at(root) != FOLDER:
        return None
    for kind in kinds:
        found = find_image_folder(root) if kind == "folder" else find_cifar(root, kind)
        if found is not None:
            return found
    return None


def _refuse_other_content(name: str, root: Path) -> None:
    """Raise UsageError where a folder that the user named is not one to download into."""
    if name == "auto":
        raise UsageError(
            f"{root} holds no dataset, looked for {_WANTED}; "
            "--dataset cifar10 downloads into it, --dataset synthetic needs no data"
        )
    for other in ("cifar10", "cifar100", "folder"):
        if other != name and _find(other, root) is not None:
            raise UsageError(
                f"{root} holds {_TITLES[other]} data, not {_TITLES[name]}: use --dataset {other}"
            )


def _fetch(name: str, root: Path, download: bool) -> Dataset:
    wanted = "cifar10" if name == "auto" else name
    try:
        if not download:
            raise FailureError(f"there is no {_TITLES[wanted]} in {root}")
        download_cifar(wanted, root)
    except FailureError as error:
        return _synthetic_instead(name, error)
    found = find_cifar(root, wanted)
    assert found is not None  # the download ended with the archive in place
    return cached(found.signature, found.read)


def _synthetic_instead(name: str, error: FailureError) -> Dataset:
    """The synthetic dataset where `auto` finds nothing else; other names raise `error`."""
    if name != "auto":
        raise error
    dataset = _synthetic()
    return dataclasses.replace(dataset, notices=(f"SYNTHETIC DATA: {error}", *dataset.notices))


def _synthetic() -> Dataset:
    return cached(f"synthetic {SYNTHETIC_VERSION}", synthetic_dataset)


def split_validation(train: ImageSet, count: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split `count` validation images off the training set, in proportion over the classes.

    The choice depends on the seed and the labels alone: each image has a 64-bit number, drawn from
    the Philox counter at its index, and the images with the smallest numbers of their class are
    taken. Classes share `count` in proportion to their size, by largest remainder.

    Args:
        train: the images to split.
        count: validation images, 0 < count < len(train).
        seed: 0 <= seed < 2**64.

    Returns:
        (train, val): both in the order of the original set, copied.

    Raises:
        UsageError: when `count` leaves one of the two empty.
    """
    if not 0 < count < len(train):
        raise UsageError(
            f"a validation split of {count:,} cannot be cut from {len(train):,} training images"
        )
    sizes = np.bincount(train.labels)
    taken, remainders = np.divmod(sizes * count, len(train))
    largest = np.argsort(-remainders, kind="stable")
    taken[largest[: count - int(taken.sum())]] += 1
    numbers = np.random.Philox(key=seed).random_raw(len(train))
    in_val = np.zeros(len(train), dtype=bool)
    for label, number in enumerate(taken):
        members = np.flatnonzero(train.labels == label)
        in_val[members[np.argsort(numbers[members], kind="stable")[:number]]] = True
    return _subset(train, ~in_val), _subset(train, in_val)


def _subset(images: ImageSet, rows: np.ndarray) -> ImageSet:
    return ImageSet(images.images[rows], images.labels[rows])
