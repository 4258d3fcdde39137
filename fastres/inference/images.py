"""Image files to pixels as in training, a batch at a time: what prediction streams from.

Files are decoded ahead of the network, in a thread, by at most `AHEAD` batches. One thread: of
small images most is Python's work, and two or four decode no more (3,300 images a second on one
core of two, Xeon 2.5 GHz).
"""

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastres.data.dataset import IMAGE_SHAPE
from fastres.data.files import DEAD_LINK, FOLDER, kind_at
from fastres.data.readers.image import (
    IMAGE_SUFFIXES,
    decode_image,
    pillow_for_decoding,
    to_pixels,
)
from fastres.errors import FailureError, UsageError

__all__ = ["AHEAD", "DecodedBatch", "decoded_batches", "list_images", "pixels_of"]

AHEAD = 2


@dataclass(frozen=True, eq=False)
class DecodedBatch:
    """Some of the files that were asked for, in their order.

    Attributes:
        paths: of those that could be decoded.
        pixels: (B, 32, 32, 3) uint8, RGB.
        failures: a sentence for each of the others.
    """

    paths: tuple[Path, ...]
    pixels: np.ndarray
    failures: tuple[str, ...]


def list_images(names: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return the image files that `names` stand for, those of a folder and below it sorted.

    In a folder hidden files, files whose suffix is none of an image, and links to folders are
    passed over. A file that is named itself is taken whatever it is called.

    Raises:
        UsageError: for a name that leads nowhere, and a folder without any image.
        FailureError: for a folder that cannot be read.
    """
    found: list[Path] = []
    for name in names:
        if not os.fspath(name):
            raise UsageError("the name of an image or folder is empty")
        path = Path(name)
        kind = kind_at(path)
        if kind is None or kind == DEAD_LINK:
            raise UsageError(f"there is no image or folder at {path}")
        if kind != FOLDER:
            found.append(path)
            continue
        inside = list(_walk(path))
        if not inside:
            raise UsageError(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        found += inside
    return found


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                yield Path(folder, name)


def _refuse(error: OSError) -> None:
    raise FailureError(f"cannot read {error.filename}: {error.strerror}") from error


def decoded_batches(paths: Sequence[Path], batch_size: int) -> Iterator[DecodedBatch]:
    """Decode files ahead of who walks the batches, each resized to 32x32 as in training.

    A file that is no readable image is told of in its batch, and stops no other.
    """
    with ThreadPoolExecutor(1) as pool:
        pending: deque[Future[DecodedBatch]] = deque()
        try:
            for start in range(0, len(paths), batch_size):
                pending.append(pool.submit(_decode, paths[start : start + batch_size]))
                if len(pending) > AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _decode(paths: Sequence[Path]) -> DecodedBatch:
    seen: Counter[str] = Counter()
    pixels = np.empty((len(paths), *IMAGE_SHAPE), dtype=np.uint8)
    good: list[Path] = []
    failures = []
    with pillow_for_decoding():
        for path in paths:
            try:
                pixels[len(good)] = decode_image(path, seen)
            except FailureError as error:
                failures.append(str(error))
            else:
                good.append(path)
    return DecodedBatch(tuple(good), pixels[: len(good)], tuple(failures))


def pixels_of(image: object) -> np.ndarray:
    """Return one image, a PIL image or an array, as (32, 32, 3) uint8 pixels, RGB.

    Args:
        image: a PIL image of any size and mode, which is turned and converted as a file of it is;
            or a (H, W, 3) or (H, W) uint8 array.

    Raises:
        UsageError: for anything else.
        FailureError: for a PIL image that cannot be decoded or has floating-point pixels.
    """
    if isinstance(image, np.ndarray):
        shape = image.shape
        if image.dtype != np.uint8 or len(shape) < 2 or shape[2:] not in ((), (3,)) or 0 in shape:
            raise UsageError(
                f"an array must be uint8 (H, W, 3) or (H, W), not {image.dtype} {shape}"
            )
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise UsageError(f"an image must be a path, a PIL image or an array, got {type(image)}")
    try:
        image.load()
        return to_pixels(image, Counter())
    except Exception as error:  # a broken file makes Pillow raise errors of any type
        raise FailureError(f"an image cannot be decoded: {error}") from error
