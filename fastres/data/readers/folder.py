"""Read image folders: train/<class>/* and test/<class>/*, images of any size.

    root/train/<class>/<image>    classes are the folder names, sorted
    root/test/<class>/<image>     the same classes

Where there is no test/, a val/ or valid/ folder is the test set. It never chooses a checkpoint: a
validation split, if wanted, is cut from the training images.

Hidden files are ignored and links are followed. Grey, palette, alpha, CMYK and 16-bit images are
converted to RGB; alpha is dropped, as in torchvision's ImageFolder. Images are turned as their EXIF
orientation says. Other sizes are resized to 32x32 with Pillow's antialiased bicubic filter, without
keeping the aspect ratio. Notices count the converted and the resized images.
"""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps

from fastres.data.dataset import CIFAR10_CLASSES, IMAGE_SHAPE, Dataset, ImageSet, plural
from fastres.data.progress import progress_bar
from fastres.errors import FailureError, UsageError

__all__ = ["ImageFolder", "find_image_folder"]

_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
)  # fmt: skip
# Only these formats, so that Pillow does not try its less tested readers on a user's file.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_TEST_NAMES = ("test", "val", "valid")
_IGNORED_FILES = frozenset({"Thumbs.db", "desktop.ini"})
_SIZE = IMAGE_SHAPE[:2]
_CHUNK = 100
# Pillow holds the GIL while it decodes: threads only hide the wait for a slow disk.
_THREADS = min(4, os.cpu_count() or 1)
_MODE_WORDS = {
    "1": "black-and-white",
    "L": "grey",
    "LA": "grey with alpha",
    "P": "palette",
    "PA": "palette with alpha",
    "RGBA": "with alpha",
    "RGBX": "4-channel",
    "CMYK": "CMYK",
}


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
        signature: a text that changes when a file is added, removed, renamed or written to.
    """

    root: Path
    test_name: str
    classes: tuple[str, ...]
    train: _Split
    test: _Split
    signature: str

    def read(self) -> Dataset:
        """Decode every image.

        Raises:
            FailureError: naming the first file that is not a readable image.
        """
        seen: Counter[str] = Counter()
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
        converted = {
            key.removeprefix("mode "): number
            for key, number in sorted(seen.items())
            if key.startswith("mode ")
        }
        if converted:
            kinds = ", ".join(f"{number:,} {kind}" for kind, number in converted.items())
            total = sum(converted.values())
            yield f"converted to RGB: {total:,} of {plural(count, 'image')} ({kinds})"
        if resized := seen["resized"]:
            yield f"resized to 32x32: {resized:,} of {plural(count, 'image')}"


def find_image_folder(root: Path) -> ImageFolder | None:
    """List the image folder at `root`; None when it has neither train/ nor test/.

    Raises:
        UsageError: a split is missing.
        FailureError: a class folder is empty or missing in one split, or a file is not an image.
    """
    root = root.resolve()
    test_name = next((name for name in _TEST_NAMES if (root / name).is_dir()), None)
    if not (root / "train").is_dir():
        if test_name != "test":
            return None
        raise UsageError(f"{root} has a test/ folder but no train/ folder beside it")
    if test_name is None:
        raise UsageError(f"{root} has a train/ folder but no test/ (or val/) folder beside it")
    facts = [f"folder\nPillow {PIL.__version__}"]  # another decoder may give other pixels
    listed = {name: _list_split(root / name, facts) for name in ("train", test_name)}
    classes = tuple(listed["train"])
    _check_same_classes(root, classes, tuple(listed[test_name]), test_name)
    train, test = (
        _Split(
            tuple(path for paths in split.values() for path in paths),
            tuple(label for label, paths in enumerate(split.values()) for _ in paths),
        )
        for split in listed.values()
    )
    return ImageFolder(root, test_name, classes, train, test, signature="\n".join(facts))


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


def _list_split(split: Path, facts: list[str]) -> dict[str, list[str]]:
    """Class name -> sorted paths of its images; `facts` collects the lines of the signature."""
    classes = {}
    for entry in _visible(split):
        if entry.is_dir():
            classes[entry.name] = _list_class(entry.path, facts)
        elif entry.name.lower().endswith(_SUFFIXES):
            raise FailureError(f"{entry.path} lies outside the class folders of {split}")
    if not classes:
        raise FailureError(f"{split} holds no class folder")
    return classes


def _list_class(folder: str, facts: list[str]) -> list[str]:
    paths = []
    facts.append(folder)
    for entry in _visible(folder):
        if not entry.is_file() or not entry.name.lower().endswith(_SUFFIXES):
            if entry.is_symlink() and not os.path.exists(entry.path):
                raise FailureError(f"{entry.path} is a link to a missing file")
            kind = "a folder inside a class folder" if entry.is_dir() else "not an image"
            raise FailureError(f"{entry.path} is {kind}: only {', '.join(_SUFFIXES)} may lie there")
        status = entry.stat()
        paths.append(entry.path)
        facts.append(f"{entry.name}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}")
    if not paths:
        raise FailureError(f"the class folder {folder} is empty")
    return paths


def _visible(folder: str | Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        kept = [e for e in entries if not e.name.startswith(".") and e.name not in _IGNORED_FILES]
    return sorted(kept, key=lambda entry: entry.name)


def _decode_split(split: _Split, title: str, seen: Counter[str]) -> ImageSet:
    images = np.empty((len(split.paths), *IMAGE_SHAPE), dtype=np.uint8)

    def decode_chunk(start: int) -> Counter[str]:
        found: Counter[str] = Counter()
        for i in range(start, min(start + _CHUNK, len(images))):
            images[i] = _decode(split.paths[i], found)
        return found

    with progress_bar() as bar, ThreadPoolExecutor(_THREADS) as pool:
        task = bar.add_task(f"decoding {title} images", total=len(images))
        for found in pool.map(decode_chunk, range(0, len(images), _CHUNK)):
            seen.update(found)
            bar.advance(task, _CHUNK)
    return ImageSet(images, np.array(split.labels, dtype=np.int64))


def _decode(path: str, seen: Counter[str]) -> np.ndarray:
    """The image as (32, 32, 3) uint8 RGB; `seen` counts its format and conversions."""
    try:
        with open(path, "rb") as file, Image.open(file, formats=_FORMATS) as image:
            image.load()
            kind = "JPEG" if image.format == "MPO" else image.format  # MPO: a JPEG with previews
            seen[f"format {kind}"] += 1
            ImageOps.exif_transpose(image, in_place=True)
            rgb = image if image.mode == "RGB" else _to_rgb(image, seen)
            if rgb.size != _SIZE:
                seen["resized"] += 1
                rgb = rgb.resize(_SIZE, Image.Resampling.BICUBIC)
            return np.asarray(rgb)
    except Image.UnidentifiedImageError as error:
        raise FailureError(f"{path} is not an image in a format that is read here") from error
    except Exception as error:  # a broken file makes Pillow raise errors of any type
        raise FailureError(f"{path} cannot be decoded: {error}") from error


def _to_rgb(image: Image.Image, seen: Counter[str]) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit values at 255; the upper byte is the 8-bit value.
        seen["mode 16-bit"] += 1
        upper = np.clip(np.asarray(image), 0, 65535).astype(np.uint16) >> 8
        return Image.fromarray(upper.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    seen[f"mode {_MODE_WORDS.get(image.mode, image.mode)}"] += 1
    return image.convert("RGB")
