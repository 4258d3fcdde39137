"""Read image folders: train/<class>/* and test/<class>/*, images of any size.

    root/train/<class>/<image>    classes are the folder names, sorted
    root/test/<class>/<image>     the same classes

Where there is no test/, a val/ or valid/ folder is the test set. It never chooses a checkpoint: a
validation split, if wanted, is cut from the training images.

Links are followed. What file systems, file managers and archivers leave behind is passed over, and
so are hidden files, readmes and licences; of what lies beside the class folders, all that is no
image. A notice counts it. Any other file in a class folder is an error: it may be an image in a
format that is not read here, or a list of labels other than the folder names.

`image.py` decodes the images; notices count what it converted and resized.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL

from fastres.data.dataset import CIFAR10_CLASSES, IMAGE_SHAPE, Dataset, ImageSet, plural
from fastres.data.files import DEAD_LINK, FILE, FOLDER, kind_at
from fastres.data.progress import progress_bar
from fastres.data.readers.image import IMAGE_SUFFIXES, decode_image, pillow_for_decoding
from fastres.errors import FailureError, UsageError

__all__ = [
    "TEST_NAMES",
    "ClassFolders",
    "ImageFolder",
    "find_class_folders",
    "find_image_folder",
]

TEST_NAMES = ("test", "val", "valid")
# Of Windows, macOS, Synology and Linux, in lower case.
_LITTER = frozenset({
    "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "picasa.ini", "$recycle.bin",
    "system volume information", "__macosx", "icon\r", "@eadir", "#recycle", "#snapshot",
    "lost+found",
})  # fmt: skip
_DOCUMENTS = frozenset({
    "readme", "license", "licence", "copying", "notice", "authors", "citation", "changelog",
})  # fmt: skip
_KINDS_NAMED = 8
_CHUNK = 100
# Pillow holds the GIL while it decodes: threads only hide the wait for a slow disk.
_THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class _Split:
    """The files of one split: `paths[i]` belongs to class `labels[i]`."""

    paths: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class ImageFolder:
    """An image folder whose files are listed but not yet decoded.

    Args:
        root: the folder that holds the splits.
        test_name: `test`, `val` or `valid`.
        classes: the class folders, sorted.
        train: the training files, by class, then by name.
        test: the test files, likewise.
        passed_over: how many files and folders are no images, by kind.
        signature: a text that changes when a file is added, removed, renamed or written to.
    """

    root: Path
    test_name: str
    classes: tuple[str, ...]
    train: _Split
    test: _Split
    passed_over: Counter[str]
    signature: str

    def read(self) -> Dataset:
        """Decode every image.

        Raises:
            FailureError: naming the first file that is not a readable image.
        """
        seen: Counter[str] = Counter()
        with pillow_for_decoding():
            train = _decode_split(self.train, "training", seen)
            test = _decode_split(self.test, "test", seen)
        name = self._record_name(seen)
        return Dataset.from_sets(
            name,
            self.classes,
            train,
            test,
            source=f"image folder {self.root}",
            notices=tuple(self._notices(name, seen)),
        )

    def _record_name(self, seen: Counter[str]) -> str:
        """The dataset's name; re-encoded copies of CIFAR-10 get names of their own."""
        count = len(self.train.paths) + len(self.test.paths)
        if self.classes == CIFAR10_CLASSES:
            for kind in ("JPEG", "PNG"):
                if seen[f"format {kind}"] == count:
                    return f"cifar10-{kind.lower()}"
        return f"folder-{self.root.name}"

    def _notices(self, name: str, seen: Counter[str]) -> Iterator[str]:
        counts = (len(self.train.paths), len(self.test.paths))
        count = sum(counts)
        if self.test_name != "test":
            yield (
                f"{self.root / self.test_name} serves as the test set: it never chooses a "
                "checkpoint; --val cuts a validation split from the training images"
            )
        if name.startswith("cifar10-") and counts != (50_000, 10_000):
            yield (
                f"{name} holds {counts[0]:,} training and {counts[1]:,} test images here, "
                "not CIFAR-10's 50,000 and 10,000"
            )
        yield from _what_was_done(count, seen, self.passed_over)


@dataclass(frozen=True)
class ClassFolders:
    """A set of images alone: root/<class>/*, listed but not yet decoded.

    Args:
        classes: the class folders, sorted.
        files: by class, then by name.
        passed_over: how many files and folders are no images, by kind.
    """

    classes: tuple[str, ...]
    files: _Split
    passed_over: Counter[str]

    def read(self, seen: Counter[str]) -> ImageSet:
        """Decode every image; `seen` counts as for `decode_image`.

        Raises:
            FailureError: naming the first file that is not a readable image.
        """
        with pillow_for_decoding():
            return _decode_split(self.files, "test", seen)

    def notices(self, seen: Counter[str]) -> Iterator[str]:
        """Yield one-line messages for the user: what was passed over, converted, resized."""
        return _what_was_done(len(self.files.paths), seen, self.passed_over)


def _what_was_done(count: int, seen: Mapping[str, int], passed_over: Counter[str]) -> Iterator[str]:
    """Say what was passed over beside `count` images, and what became of those."""
    if passed_over:
        names = [f"{number:,} {kind}" for kind, number in passed_over.most_common()]
        if len(names) > _KINDS_NAMED:
            names[_KINDS_NAMED:] = ["..."]
        items = plural(passed_over.total(), "item")
        yield f"passed over as no images: {items} ({', '.join(names)})"
    converted = {
        key.removeprefix("mode "): number
        for key, number in sorted(seen.items())
        if key.startswith("mode ")
    }
    if converted:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in converted.items())
        total = sum(converted.values())
        yield f"converted to RGB: {total:,} of {plural(count, 'image')} ({kinds})"
    if resized := seen.get("resized"):
        yield f"resized to 32x32: {resized:,} of {plural(count, 'image')}"
    if unreadable := seen.get("unreadable EXIF"):
        yield (
            f"EXIF block empty or unreadable, pixels as stored: {unreadable:,} of "
            f"{plural(count, 'image')}"
        )


def find_class_folders(root: Path) -> ClassFolders | None:
    """List the images in root/<class>/*; None where no folder in `root` holds an image.

    Raises:
        FailureError: a class folder is empty; a file is not an image.
    """
    root = root.resolve()
    folders = (entry.path for entry in _entries(root, Counter()) if entry.is_dir())
    if not any(_holds_image(folder) for folder in folders):
        return None
    passed_over: Counter[str] = Counter()
    listed = _list_split(root, [], passed_over)
    return ClassFolders(tuple(listed), _split_of(listed), passed_over)


def _holds_image(folder: str) -> bool:
    entries = _entries(folder, Counter())
    return any(entry.name.lower().endswith(IMAGE_SUFFIXES) for entry in entries)


def _split_of(listed: Mapping[str, Sequence[str]]) -> _Split:
    return _Split(
        tuple(path for paths in listed.values() for path in paths),
        tuple(label for label, paths in enumerate(listed.values()) for _ in paths),
    )


def find_image_folder(root: Path) -> ImageFolder | None:
    """List the image folder at `root`; None when it has neither train/ nor test/.

    Raises:
        UsageError: a split is missing.
        FailureError: a split is a link to a missing folder; a class folder is empty or missing in
            one split; a file is not an image.
    """
    root = root.resolve()
    for name in ("train", *TEST_NAMES):
        if kind_at(root / name) == DEAD_LINK:
            raise FailureError(f"{root / name} is a link to a missing folder")
    test_name = next((name for name in TEST_NAMES if kind_at(root / name) == FOLDER), None)
    if kind_at(root / "train") != FOLDER:
        if test_name != "test":
            return None
        raise UsageError(f"{root} has a test/ folder but no train/ folder beside it")
    if test_name is None:
        raise UsageError(f"{root} has a train/ folder but no test/ (or val/) folder beside it")
    facts = [f"folder\nPillow {PIL.__version__}"]  # another decoder may give other pixels
    passed_over: Counter[str] = Counter()
    listed = {name: _list_split(root / name, facts, passed_over) for name in ("train", test_name)}
    facts += [f"passed over\0{kind}\0{number}" for kind, number in passed_over.items()]
    classes = tuple(listed["train"])
    _check_same_classes(root, classes, tuple(listed[test_name]), test_name)
    train, test = (_split_of(split) for split in listed.values())
    return ImageFolder(root, test_name, classes, train, test, passed_over, "\n".join(facts))


def _check_same_classes(
    root: Path, train: tuple[str, ...], test: tuple[str, ...], test_name: str
) -> None:
    for here, there, missing in (
        ("train", test_name, set(train) - set(test)),
        (test_name, "train", set(test) - set(train)),
    ):
        if missing:
            raise FailureError(
                f"class {min(missing)!r} is in {root / here} but not in {root / there}: "
                "both splits need the same class folders"
            )
    if len(train) < 2:
        raise FailureError(f"{root / 'train'} needs at least two class folders, not {len(train)}")


def _list_split(split: Path, facts: list[str], passed_over: Counter[str]) -> dict[str, list[str]]:
    """Class name -> sorted paths of its images.

    Args:
        split: the folder of the class folders.
        facts: collects the lines of the signature.
        passed_over: counts what is no image, by kind.
    """
    classes = {}
    for entry in _entries(split, passed_over):
        if entry.is_dir():
            classes[entry.name] = _list_class(entry.path, facts, passed_over)
        elif entry.name.lower().endswith(IMAGE_SUFFIXES):
            raise FailureError(f"{entry.path} lies outside the class folders of {split}")
        elif (kind := kind_at(entry.path)) != FILE:
            raise FailureError(f"{entry.path} is {kind}, not a class folder")
        else:
            passed_over[entry.name.lower()] += 1
    if not classes:
        raise FailureError(f"{split} holds no class folder")
    return classes


def _list_class(folder: str, facts: list[str], passed_over: Counter[str]) -> list[str]:
    paths = []
    facts.append(folder)
    for entry in _entries(folder, passed_over):
        if not entry.is_file() or not entry.name.lower().endswith(IMAGE_SUFFIXES):
            raise FailureError(_why_no_image(entry.path))
        status = entry.stat()
        paths.append(entry.path)
        facts.append(f"{entry.name}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}")
    if not paths:
        raise FailureError(f"the class folder {folder} is empty")
    return paths


def _why_no_image(path: str) -> str:
    kind = kind_at(path)
    if kind == DEAD_LINK:
        return f"{path} is {kind}"
    if kind == FOLDER:
        kind = "a folder inside a class folder"
    if kind == FILE:
        kind = "not an image"
    return f"{path} is {kind}: only {', '.join(IMAGE_SUFFIXES)} may lie there"


def _entries(folder: str | Path, passed_over: Counter[str]) -> Iterator[os.DirEntry[str]]:
    """What lies in a folder, by name; known litter is counted instead."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        litter = _litter(entry)
        if litter is None:
            yield entry
        else:
            passed_over[litter] += 1


def _litter(entry: os.DirEntry[str]) -> str | None:
    """The kind of known litter that an entry is, else None."""
    name = entry.name.lower()
    if name.startswith("."):
        return "hidden"
    if name.endswith(":zone.identifier"):  # where Windows noted that a file was downloaded
        return "zone.identifier"
    is_document = name.split(".")[0] in _DOCUMENTS and not name.endswith(IMAGE_SUFFIXES)
    # Behind a colon stands what Windows keeps beside a file.
    if name.partition(":")[0] in _LITTER or (is_document and entry.is_file()):
        return name.strip()
    return None


def _decode_split(split: _Split, title: str, seen: Counter[str]) -> ImageSet:
    images = np.empty((len(split.paths), *IMAGE_SHAPE), dtype=np.uint8)

    def decode_chunk(start: int) -> Counter[str]:
        found: Counter[str] = Counter()
        for i in range(start, min(start + _CHUNK, len(images))):
            images[i] = decode_image(split.paths[i], found)
        return found

    with progress_bar() as bar, ThreadPoolExecutor(_THREADS) as pool:
        task = bar.add_task(f"decoding {title} images", total=len(images))
        for found in pool.map(decode_chunk, range(0, len(images), _CHUNK)):
            seen.update(found)
            bar.advance(task, _CHUNK)
    return ImageSet(images, np.array(split.labels, dtype=np.int64))
