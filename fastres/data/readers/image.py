"""Decode one image file to 32x32 RGB pixels.

Grey, palette, alpha, CMYK and 16-bit images are converted to RGB; alpha is dropped, as in
torchvision's ImageFolder. Images are turned as their EXIF orientation says; where the EXIF block
cannot be read, the pixels stay as they are stored. Other sizes are resized to 32x32 with Pillow's
antialiased bicubic filter, without keeping the aspect ratio.

Limits: an image of more than `MAX_PIXELS` pixels is refused before it is decoded, since a small
file may unpack to gigabytes.
"""

import struct
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from fastres.data.dataset import IMAGE_SHAPE
from fastres.data.files import open_file
from fastres.errors import FailureError

__all__ = ["IMAGE_SUFFIXES", "MAX_PIXELS", "decode_image", "pillow_for_decoding", "to_pixels"]

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm",
    ".pgm",
)  # fmt: skip
# 8,192 x 8,192: more than cameras take, and at most 268 MB in Pillow's four bytes a pixel.
MAX_PIXELS = 1 << 26
# Only these formats, so that Pillow does not try its less tested readers on a user's file; named by
# their readers, since Pillow looks for a missing one once and, where that fails, never again.
_FORMATS = tuple(
    reader.format
    for reader in (
        JpegImagePlugin.JpegImageFile,
        PngImagePlugin.PngImageFile,
        WebPImagePlugin.WebPImageFile,
        BmpImagePlugin.BmpImageFile,
        GifImagePlugin.GifImageFile,
        TiffImagePlugin.TiffImageFile,
        PpmImagePlugin.PpmImageFile,
    )
)
_SIZE = IMAGE_SHAPE[:2]
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
# What shows an image upright, by its EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SHORT = 3  # the type of the orientation in an EXIF block
_pillow_limit = threading.Lock()


@contextmanager
def pillow_for_decoding() -> Iterator[None]:
    """Leave sizes to `decode_image`: Pillow's own limit, of the whole process, only warns at first.

    Nor does it warn of each odd EXIF block, which `decode_image` counts. One thread at a time is
    inside, so that each puts back what the user had set.
    """
    with _pillow_limit, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def decode_image(path: str | Path, seen: Counter[str]) -> np.ndarray:
    """The image as (32, 32, 3) uint8 RGB, upright.

    Args:
        path: a regular file in one of the formats above.
        seen: counts `format <name>`, `mode <what was converted>`, `resized`, `unreadable EXIF`.

    Raises:
        FailureError: naming the file, when it cannot be read, is no image, is damaged, has
            floating-point pixels or more than `MAX_PIXELS`.
    """
    try:
        with open_file(path) as file, Image.open(file, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise FailureError(
                    f"{path} has {width:,} x {height:,} pixels, more than the limit of "
                    f"{MAX_PIXELS:,}: make it smaller, for it becomes 32 x 32"
                )
            image.load()
            kind = "JPEG" if image.format == "MPO" else image.format  # MPO: a JPEG with previews
            seen[f"format {kind}"] += 1
            return to_pixels(image, seen)
    except FailureError:
        raise
    except Image.UnidentifiedImageError as error:
        raise FailureError(f"{path} is not an image in a format that is read here") from error
    except Exception as error:  # a broken file makes Pillow raise errors of any type
        raise FailureError(f"{path} cannot be decoded: {error}") from error


def to_pixels(image: Image.Image, seen: Counter[str]) -> np.ndarray:
    """A decoded image of any size and mode as (32, 32, 3) uint8 RGB, upright.

    Args:
        image: its pixels are loaded.
        seen: counts as for `decode_image`, but for the format.

    Raises:
        ValueError: it has floating-point pixels.
    """
    upright = _upright(image, seen)
    rgb = upright if upright.mode == "RGB" else _to_rgb(upright, seen)
    if rgb.size != _SIZE:
        seen["resized"] += 1
        rgb = rgb.resize(_SIZE, Image.Resampling.BICUBIC)
    return np.asarray(rgb)


def _upright(image: Image.Image, seen: Counter[str]) -> Image.Image:
    """Turn the image; unlike `ImageOps.exif_transpose`, without writing its EXIF block anew."""
    block = image.info.get("exif", b"")
    try:
        orientation = _exif_orientation(block)
        if orientation is None:  # TIFF, XMP and text chunks have it elsewhere
            exif = image.getexif()
            orientation = exif.get(ExifTags.Base.Orientation)
            if block and not exif:
                seen["unreadable EXIF"] += 1
        turn = _TURNS.get(orientation or 1)
    except Exception:  # a broken block makes Pillow raise errors of any type
        seen["unreadable EXIF"] += 1
        return image
    return image if turn is None else image.transpose(turn)


def _exif_orientation(block: bytes) -> int | None:
    """The orientation in the first directory of an EXIF block, whatever the other tags are like.

    Pillow stops at the first tag whose value lies outside the block.

    Raises:
        struct.error: the block ends before the tag was found.
    """
    block = block.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        return None
    (start,) = struct.unpack_from(f"{order}I", block, 4)
    (num_tags,) = struct.unpack_from(f"{order}H", block, start)
    for offset in range(start + 2, start + 2 + 12 * num_tags, 12):
        tag, kind, count, value = struct.unpack_from(f"{order}HHIH", block, offset)
        if (tag, kind, count) == (ExifTags.Base.Orientation, _SHORT, 1):
            return value
    return None


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
