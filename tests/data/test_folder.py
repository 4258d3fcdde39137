"""Image folders: what is read, what is converted and counted, what is refused."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastres.data.dataset import CIFAR10_CLASSES, Dataset
from fastres.data.readers.folder import find_image_folder
from fastres.data.source import load_dataset
from fastres.errors import FailureError, UsageError
from tests.helpers.data_fixtures import image_folder, images


def read(root: Path) -> Dataset:
    found = find_image_folder(root)
    assert found is not None
    return found.read()


def test_pixels_labels_and_order(tmp_path: Path) -> None:
    dataset = read(image_folder(tmp_path / "pets", classes=("dog", "cat")))
    assert dataset.classes == ("cat", "dog")
    assert dataset.train.labels.tolist() == dataset.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    # image_folder draws dogs first, then cats, for training, then for the test.
    expected = [images(1, seed)[0] for seed in (3, 4, 5, 0, 1, 2, 9, 10, 11, 6, 7, 8)]
    np.testing.assert_array_equal(dataset.train.images, expected[:6])
    np.testing.assert_array_equal(dataset.test.images, expected[6:])
    assert dataset.name == "folder-pets"
    assert dataset.notices == ()


@pytest.mark.parametrize(
    ("suffix", "name"),
    [(".jpg", "cifar10-jpeg"), (".png", "cifar10-png"), (".bmp", "folder-copy")],
)
def test_copies_of_cifar10_have_their_own_names(suffix: str, name: str, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "copy", CIFAR10_CLASSES, 1, suffix)
    dataset = read(root)
    assert dataset.name == name
    assert any("not CIFAR-10's" in n for n in dataset.notices) == (name != "folder-copy")


def test_mixed_formats_are_no_copy_of_cifar10(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "copy", CIFAR10_CLASSES, 1, ".jpg")
    Image.fromarray(images(1)[0]).save(root / "train" / "cat" / "more.png")
    assert read(root).name == "folder-copy"


def one_more(root: Path, image: Image.Image, name: str = "9999.png", **options: object) -> Dataset:
    """The folder with one more training image of the last class; it comes last."""
    image.save(root / "train" / "dog" / name, **options)
    return read(root)


GREY = np.arange(1024, dtype=np.uint8).reshape(32, 32)


def test_conversions_are_counted(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    dogs = root / "train" / "dog"
    Image.fromarray(GREY).save(dogs / "a.png")
    Image.fromarray(GREY).save(dogs / "b.bmp")
    Image.fromarray(np.dstack([images(1)[0], GREY])).save(dogs / "c.png")
    Image.fromarray(images(1)[0]).convert("CMYK").save(dogs / "d.jpg")
    Image.fromarray(images(1)[0]).convert("P").save(dogs / "e.gif")
    (notice,) = read(root).notices
    assert notice.startswith("converted to RGB: 5 of 17 images")
    for kind in ("2 grey", "1 with alpha", "1 CMYK", "1 palette"):
        assert kind in notice


def test_grey_and_alpha_pixels(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    last = one_more(root, Image.fromarray(GREY)).train.images[-1]
    np.testing.assert_array_equal(last, np.dstack([GREY] * 3))
    picture = images(1)[0]
    last = one_more(root, Image.fromarray(np.dstack([picture, GREY]))).train.images[-1]
    np.testing.assert_array_equal(last, picture)


def test_sixteen_bits_keep_the_upper_byte(tmp_path: Path) -> None:
    deep = GREY.astype(np.uint16) * 256 + 77
    dataset = one_more(image_folder(tmp_path), Image.fromarray(deep))
    np.testing.assert_array_equal(dataset.train.images[-1], np.dstack([GREY] * 3))
    assert dataset.notices == ("converted to RGB: 1 of 13 images (1 16-bit)",)


def test_other_sizes_are_resized(tmp_path: Path) -> None:
    checks = np.kron(np.indices((32, 32)).sum(0) % 2, np.ones((4, 4)))
    dataset = one_more(image_folder(tmp_path), Image.fromarray((checks * 255).astype(np.uint8)))
    assert "resized to 32x32: 1 of 13 images" in dataset.notices
    sharp = np.indices((32, 32)).sum(0) % 2
    np.testing.assert_array_equal(dataset.train.images[-1][..., 0] > 127, sharp)
    # Twice as fine: without antialiasing this would alias to black or white instead of grey.
    fine = np.indices((128, 128)).sum(0) % 2
    dataset = one_more(tmp_path, Image.fromarray((fine * 255).astype(np.uint8)))
    assert abs(dataset.train.images[-1].astype(int) - 128).max() < 8


def test_exif_orientation(tmp_path: Path) -> None:
    picture = images(1)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned by 90 degrees clockwise
    dataset = one_more(image_folder(tmp_path), Image.fromarray(picture), exif=exif)
    np.testing.assert_array_equal(dataset.train.images[-1], np.rot90(picture, k=-1))


@pytest.mark.parametrize("suffix", [".jfif", ".JPE", ".JPEG"])
def test_other_names_of_jpeg(suffix: str, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "a", suffix=".jpg")
    copy = image_folder(tmp_path / "b", suffix=".jpg")
    for path in copy.rglob("*.jpg"):
        path.rename(path.with_suffix(suffix))
    np.testing.assert_array_equal(read(copy).train.images, read(root).train.images)


LITTER = {
    "hidden": (".DS_Store", "._0000.png", ".ipynb_checkpoints/0000-checkpoint.png"),
    "thumbs.db": ("Thumbs.db", "thumbs.db", "THUMBS.DB"),
    "thumbs.db:encryptable": ("Thumbs.db:encryptable",),
    "desktop.ini": ("Desktop.ini",),
    "@eadir": ("@eaDir/0000.png/SYNOPHOTO_THUMB.jpg",),
    "__macosx": ("__MACOSX/._0000.png",),
    "lost+found": ("lost+found/x",),
    "zone.identifier": ("0000.png:Zone.Identifier",),
    "readme.txt": ("README.txt",),
    "license": ("LICENSE",),
}


@pytest.mark.parametrize("place", ["train", "test/cat"], ids=["split", "class"])
@pytest.mark.parametrize("kind", LITTER)
def test_known_litter_is_passed_over_and_counted(kind: str, place: str, tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    clean = read(root)
    assert clean.notices == ()
    for name in LITTER[kind]:
        path = root / place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    dataset = read(root)
    count = len(LITTER[kind])
    items = f"{count} item" + "s" * (count > 1)
    assert dataset.notices == (f"passed over as no images: {items} ({count} {kind})",)
    assert dataset.fingerprint == clean.fingerprint


def test_litter_of_many_kinds_is_one_short_line(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    for i in range(30):
        (root / "train" / f"labels-{i}.csv").write_text("x")
    (notice,) = read(root).notices
    assert notice.startswith("passed over as no images: 30 items (1 labels-0.csv, ")
    assert len(notice) < 200


def test_litter_found_after_the_first_start_is_told(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "data")
    assert load_dataset("folder", root).notices == ()
    (root / "train" / "README.txt").write_text("x")
    (notice,) = load_dataset("folder", root).notices
    assert "1 readme.txt" in notice


def test_a_class_may_have_the_name_of_a_document(tmp_path: Path) -> None:
    root = image_folder(tmp_path, ("license", "notice"))
    (root / "train" / "license" / "0000.png").rename(root / "train" / "license" / "README.png")
    dataset = read(root)
    assert dataset.classes == ("license", "notice")
    assert (len(dataset.train), dataset.notices) == (6, ())


def test_unreadable_exif_blocks_are_counted(tmp_path: Path) -> None:
    dataset = one_more(image_folder(tmp_path), Image.fromarray(images(1)[0]), exif=b"abc")
    np.testing.assert_array_equal(dataset.train.images[-1], images(1)[0])
    assert dataset.notices == ("EXIF block empty or unreadable, pixels as stored: 1 of 13 images",)


def test_odd_exif_blocks_are_counted_and_not_warned_of(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Pillow warns of a text that lies outside of the block."""
    outside = struct.pack("<4sIHHHII", b"II*\0", 8, 1, 271, 2, 65535, 65535)
    dataset = one_more(image_folder(tmp_path), Image.fromarray(images(1)[0]), exif=outside)
    np.testing.assert_array_equal(dataset.train.images[-1], images(1)[0])
    assert not recwarn.list


def test_links_and_unicode(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "Bilder für alle", ("кот", "犬"))
    (root / "train" / "犬" / "link.png").symlink_to(root / "test" / "犬" / "0000.png")
    dataset = read(root)
    assert dataset.classes == ("кот", "犬")
    assert dataset.name == "folder-Bilder für alle"
    np.testing.assert_array_equal(dataset.train.images[-1], dataset.test.images[3])


@pytest.mark.parametrize("name", ["val", "valid"])
def test_val_serves_as_the_test_set(name: str, tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    (root / "test").rename(root / name)
    (notice,) = read(root).notices
    assert f"{root / name} serves as the test set" in notice


def test_test_goes_before_val(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    (root / "val" / "neither").mkdir(parents=True)
    assert read(root).notices == ()


def test_no_image_folder(tmp_path: Path) -> None:
    assert find_image_folder(tmp_path) is None


@pytest.mark.parametrize("split", ["train", "test"])
def test_missing_split(split: str, tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    (root / split).rename(root / "elsewhere")
    with pytest.raises(UsageError, match=f"no {split}/"):
        find_image_folder(root)


def test_empty_class(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    (root / "test" / "emu").mkdir()
    with pytest.raises(FailureError, match=r"test/emu is empty"):
        find_image_folder(root)


def test_class_in_one_split_only(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    (root / "test" / "dog").rename(root / "test" / "wolf")
    with pytest.raises(FailureError, match=r"class 'dog' is in .*train but not in .*test"):
        find_image_folder(root)


def test_one_class(tmp_path: Path) -> None:
    with pytest.raises(FailureError, match="at least two class folders"):
        find_image_folder(image_folder(tmp_path, classes=("cat",)))


def test_no_class(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    with pytest.raises(FailureError, match="no class folder"):
        find_image_folder(tmp_path)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("train/cat/notes.txt", "not an image"),
        ("train/cat/labels.csv", "not an image"),
        ("train/cat/metadata.jsonl", "not an image"),
        ("train/cat/0.heic", "not an image"),
        ("train/cat/0.png.part", "not an image"),
        ("train/cat/more/0.png", "a folder inside a class folder"),
        ("train/0.png", "outside the class folders"),
    ],
)
def test_stray_file(path: str, reason: str, tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    (root / path).parent.mkdir(exist_ok=True)
    (root / path).write_bytes(b"x")
    with pytest.raises(FailureError, match=reason):
        find_image_folder(root)


def test_broken_link(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    (root / "train" / "cat" / "x.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(FailureError, match=r"x\.png is a link to a missing file"):
        find_image_folder(root)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".bmp", ".webp", ".tif", ".ppm"])
def test_corrupt_image(suffix: str, tmp_path: Path) -> None:
    root = image_folder(tmp_path, suffix=suffix)
    assert len(read(root).train) == 6
    victim = root / "test" / "dog" / f"0001{suffix}"
    whole = victim.read_bytes()
    for content in (b"", b"<html>", whole[: len(whole) // 3]):
        victim.write_bytes(content)
        with pytest.raises(FailureError, match=f"0001{suffix}") as caught:
            read(root)
        assert "\n" not in str(caught.value)


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FailureError, match="no agreed range"):
        one_more(image_folder(tmp_path), Image.fromarray(np.ones((32, 32), "f4")), "x.tif")


def test_signature_follows_the_files(tmp_path: Path) -> None:
    root = image_folder(tmp_path)

    def signature() -> str:
        found = find_image_folder(root)
        assert found is not None
        return found.signature

    seen = {signature(), signature()}
    assert len(seen) == 1
    image = root / "train" / "cat" / "0001.png"
    status = image.stat()
    data = bytearray(image.read_bytes())
    data[-1] ^= 1
    image.write_bytes(data)
    # Putting the old time back does not hide the change.
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    seen.add(signature())
    image.rename(image.with_name("0009.png"))
    seen.add(signature())
    (root / "test" / "cat" / "0001.png").unlink()
    seen.add(signature())
    assert len(seen) == 4


def test_real_images(jpeg_dir: Path) -> None:
    """The listing of all 60,000; a tenth of the test set decoded, against Pillow's own answer."""
    found = find_image_folder(jpeg_dir)
    assert found is not None
    assert found.classes == CIFAR10_CLASSES
    assert (len(found.train.paths), len(found.test.paths)) == (50_000, 10_000)
    assert np.bincount(found.train.labels).tolist() == [5_000] * 10
