"""One image file: orientation is best effort, and a bomb is refused before it is unpacked."""

import io
import struct
import threading
import warnings
import zlib
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastres.data.readers import image as image_reader
from fastres.data.readers.image import MAX_PIXELS, decode_image, pillow_for_decoding
from fastres.errors import FailureError
from tests.helpers.data_fixtures import images

PICTURE = images(1)[0]
FORMATS = {"PNG": {}, "JPEG": {}, "WEBP": {"lossless": True}}
# Where a camera puts the pixels, by orientation: Exif 2.32, tag 0x0112.
UPRIGHT = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
    8: np.rot90,
}


def encoded(name: str, exif: bytes = b"") -> bytes:
    """PICTURE as a file, with a verbatim EXIF block."""
    file = io.BytesIO()
    options = dict(FORMATS[name], **({"exif": b"Exif\0\0" + exif} if exif else {}))
    Image.fromarray(PICTURE).save(file, name, **options)
    return file.getvalue()


def block(*entries: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """A TIFF directory of (tag, type, count, four bytes of value or offset)."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        directory += struct.pack(f"{order}HHI", tag, kind, count) + value
    return head + struct.pack(f"{order}I", 8) + directory + struct.pack(f"{order}I", 0)


def orientation(value: int, order: str = "<") -> tuple[int, int, int, bytes]:
    return 0x0112, 3, 1, struct.pack(f"{order}HH", value, 0)


def decoded(content: bytes, folder: Path) -> tuple[np.ndarray, Counter[str]]:
    path, seen = folder / "image", Counter[str]()
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about the damage
        return decode_image(path, seen), seen


@pytest.fixture(params=FORMATS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@cache
def plain(kind: str) -> np.ndarray:
    """What Pillow makes of the file without any EXIF block."""
    return np.asarray(Image.open(io.BytesIO(encoded(kind))).convert("RGB"))


@pytest.mark.parametrize("value", [*UPRIGHT, 0, 9, 65535])
@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation(kind: str, value: int, order: str, tmp_path: Path) -> None:
    image, seen = decoded(encoded(kind, block(orientation(value, order), order=order)), tmp_path)
    np.testing.assert_array_equal(image, UPRIGHT.get(value, UPRIGHT[1])(plain(kind)))
    assert seen["unreadable EXIF"] == 0


def test_bytes_that_are_no_exif_block(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    blocks = [b"abc", b"II*\0", b"MM\0*\0\0", *(rng.bytes(1 + i % 120) for i in range(400))]
    for exif in blocks:
        image, seen = decoded(encoded(kind, exif), tmp_path)
        np.testing.assert_array_equal(image, plain(kind))
        assert seen["unreadable EXIF"] == 1


def test_orientation_among_damaged_tags(kind: str, tmp_path: Path) -> None:
    """Tags of every type, count and offset, sensible or not, do not hide the orientation."""
    rng = np.random.default_rng(1)
    for _ in range(400):
        value = int(rng.integers(1, 9))
        others = [
            (
                int(rng.integers(0x0113, 1 << 16)),
                int(rng.integers(0, 20)),
                int(rng.choice([0, 1, 2, 3, 4, 100, 1 << 16])),
                rng.bytes(4),
            )
            for _ in range(rng.integers(1, 6))
        ]
        entries = [orientation(value), *others]
        rng.shuffle(entries)
        image, _ = decoded(encoded(kind, block(*entries)), tmp_path)
        np.testing.assert_array_equal(image, UPRIGHT[value](plain(kind)))


def test_orientation_beside_a_date_of_the_wrong_type(kind: str, tmp_path: Path) -> None:
    date = (0x0132, 11, 1, struct.pack("<f", 2020.0))
    image, _ = decoded(encoded(kind, block(orientation(6), date)), tmp_path)
    np.testing.assert_array_equal(image, np.rot90(plain(kind), -1))


def test_a_cut_block_is_used_as_far_as_it_goes(kind: str, tmp_path: Path) -> None:
    """Ten bytes into its first entry, a block has the orientation; no cut is ever fatal."""
    whole = block(orientation(3), (0x011A, 5, 1, struct.pack("<I", 26)))
    for length in range(1, len(whole)):
        image, _ = decoded(encoded(kind, whole[:length]), tmp_path)
        turned = UPRIGHT[3](plain(kind)) if length >= 8 + 2 + 10 else plain(kind)
        np.testing.assert_array_equal(image, turned)


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size, and whose pixels nobody should begin to unpack."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)


@pytest.mark.parametrize("size", [(8193, 8192), (13_300, 13_300), (1 << 20, 1 << 10), (1 << 30, 1)])
def test_too_many_pixels(size: tuple[int, int], tmp_path: Path) -> None:
    """Above Pillow's limits for its warning and for its error, and below them."""
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(*size))
    with pillow_for_decoding(), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FailureError) as caught:
            decode_image(path, Counter())
    wanted = f"{path} has {size[0]:,} x {size[1]:,} pixels, more than the limit of {MAX_PIXELS:,}"
    assert str(caught.value).startswith(wanted)
    assert "\n" not in str(caught.value)


def test_at_the_pixel_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_reader, "MAX_PIXELS", 1024)
    assert decoded(encoded("PNG"), tmp_path)[0].shape == (32, 32, 3)
    monkeypatch.setattr(image_reader, "MAX_PIXELS", 1023)
    with pytest.raises(FailureError, match="32 x 32 pixels, more than the limit of 1,023"):
        decoded(encoded("PNG"), tmp_path)


def test_pillows_limit_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when two threads decode at once."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12_345)
    entered, leave = threading.Event(), threading.Event()

    def decode() -> None:
        with pillow_for_decoding():
            entered.set()
            leave.wait(30)

    first, second = threading.Thread(target=decode), threading.Thread(target=decode)
    first.start()
    entered.wait(30)
    second.start()
    leave.set()
    first.join(30)
    second.join(30)
    assert Image.MAX_IMAGE_PIXELS == 12_345
