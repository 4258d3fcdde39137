"""Images to evaluate on: the test set of a dataset, or a test set alone.

Other test sets than a network's own come as class folders without a training set beside them, or,
as CIFAR-10.1 (Recht et al. 2018, https://github.com/modestyachts/CIFAR-10.1), as a pair of arrays
`*_data.npy` and `*_labels.npy`.
"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastres.data import source
from fastres.data.dataset import IMAGE_SHAPE, Dataset, ImageSet
from fastres.data.files import DEAD_LINK, FOLDER, kind_at, open_file
from fastres.data.readers.cifar import find_cifar
from fastres.data.readers.folder import TEST_NAMES, find_class_folders
from fastres.errors import FailureError

__all__ = ["EvaluationSet", "load_evaluation_set"]

_DATA, _LABELS = "_data.npy", "_labels.npy"


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Labelled images.

    Attributes:
        images: in the order of their files.
        classes: the names of the labels; None where the data has numbers alone.
        name: as records call it.
        source: where it came from, for people.
        fingerprint: of the whole dataset; None for a test set alone.
        notices: one-line messages for the user.
    """

    images: ImageSet
    classes: tuple[str, ...] | None
    name: str
    source: str
    fingerprint: str | None = None
    notices: tuple[str, ...] = ()

    @classmethod
    def of(cls, data: Dataset) -> "EvaluationSet":
        """Take the test set of a dataset."""
        return cls(data.test, data.classes, data.name, data.source, data.fingerprint, data.notices)


def load_evaluation_set(
    kind: str,
    data_dir: str | os.PathLike[str] | None,
    *,
    download: bool = True,
    may_be_alone: bool = True,
) -> EvaluationSet:
    """Load the images to evaluate on.

    Args:
        kind: for `load_dataset`.
        data_dir: where to look, as `load_dataset` does; or a folder of class folders, or of
            `<name>_data.npy` (N, 32, 32, 3) uint8 and `<name>_labels.npy` (N,) integers.
        download: whether the network may be used.
        may_be_alone: whether `data_dir`, where it has no dataset, is looked through for a test set
            alone; $FASTRES_DATA never is.

    Raises:
        UsageError, FailureError: as `load_dataset`; for arrays of another shape; for several pairs.
    """
    named = source.named_data_folder(data_dir)
    if data_dir and named is not None and may_be_alone:
        try:
            alone = _test_set_alone(Path(named))
        except OSError as error:
            where = error.filename or named
            raise FailureError(f"cannot read {where}: {error.strerror or error}") from error
        if alone is not None:
            return alone
    return EvaluationSet.of(source.load_dataset(kind, data_dir, download=download))


def _test_set_alone(root: Path) -> EvaluationSet | None:
    if kind_at(root) != FOLDER or kind_at(root / "train") in (FOLDER, DEAD_LINK):
        return None
    if any(find_cifar(root, name) for name in ("cifar10", "cifar100")):
        return None
    if (arrays := _find_arrays(root)) is not None:
        return arrays
    folder = next((root / name for name in TEST_NAMES if kind_at(root / name) == FOLDER), root)
    found = find_class_folders(folder)
    if found is None:
        return None
    seen: Counter[str] = Counter()
    images = found.read(seen)
    return EvaluationSet(
        images,
        found.classes,
        f"folder-{root.resolve().name}",
        f"class folders in {folder}, without a training set",
        notices=tuple(found.notices(seen)),
    )


def _find_arrays(folder: Path) -> EvaluationSet | None:
    present = set(os.listdir(folder))
    stems = sorted(name.removesuffix(_DATA) for name in present if name.endswith(_DATA))
    stems = [stem for stem in stems if stem + _LABELS in present]
    if not stems:
        return None
    if len(stems) > 1:
        raise FailureError(
            f"{folder} holds several test sets ({', '.join(stems)}): put one into its own folder"
        )
    data, labels = folder / (stems[0] + _DATA), folder / (stems[0] + _LABELS)
    images, numbers = _array(data), _array(labels)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != IMAGE_SHAPE:
        raise FailureError(
            f"{data} must be uint8 (N, 32, 32, 3), not {images.dtype} {images.shape}"
        )
    if numbers.shape != (len(images),) or numbers.dtype.kind not in "iu" or not len(images):
        raise FailureError(
            f"{labels} must be {len(images):,} whole numbers, at least one, "
            f"not {numbers.dtype} {numbers.shape}"
        )
    return EvaluationSet(
        ImageSet(np.ascontiguousarray(images), numbers.astype(np.int64)),
        None,
        stems[0],
        f"arrays {data}",
    )


def _array(path: Path) -> np.ndarray:
    with open_file(path) as file:
        try:
            return np.lib.format.read_array(file, allow_pickle=False)
        except Exception as error:  # a broken header makes numpy raise errors of any type
            raise FailureError(f"{path} is no readable array: {error}") from error
