"""From a name and a folder to a dataset: what is found, what is refused, what stands in."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastres.data import source
from fastres.data.dataset import Dataset, ImageSet, channel_statistics
from fastres.data.readers.cifar import ArchiveFormat
from fastres.data.readers.folder import ImageFolder
from fastres.data.source import load_dataset, split_validation
from fastres.errors import FailureError, FastresError, UsageError
from tests.helpers.data_fixtures import (
    CIFAR10_BINARY,
    CIFAR10_PYTHON,
    CIFAR100_BINARY,
    cifar_members,
    image_folder,
    images,
    labels,
    pack,
    unpack,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FASTRES_OFFLINE", "1")
    monkeypatch.delenv("FASTRES_DATA", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def small_synthetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The synthetic set in a hundredth of its size."""
    draw = source.synthetic_dataset
    monkeypatch.setattr(source, "synthetic_dataset", lambda: draw(100, 20))


@pytest.mark.parametrize("name", ["auto", "cifar10"])
@pytest.mark.parametrize("fmt", [CIFAR10_BINARY, CIFAR10_PYTHON])
def test_archive(name: str, fmt: ArchiveFormat, tmp_path: Path) -> None:
    pack(tmp_path / fmt.archive, cifar_members(fmt))
    assert load_dataset(name, tmp_path).name == "cifar10-custom"


def test_auto_prefers_cifar10_then_cifar100_then_images(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "data")
    assert load_dataset("auto", root).name == "folder-data"
    pack(root / CIFAR100_BINARY.archive, cifar_members(CIFAR100_BINARY))
    assert load_dataset("auto", root).name == "cifar100-custom"
    pack(root / CIFAR10_BINARY.archive, cifar_members(CIFAR10_BINARY))
    assert load_dataset("auto", root).name == "cifar10-custom"
    assert load_dataset("folder", root).name == "folder-data"
    assert load_dataset("cifar100", root).name == "cifar100-custom"


def test_second_start_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder(tmp_path / "data")
    first = load_dataset("auto", root)
    monkeypatch.setattr("fastres.data.readers.folder._decode_split", None)
    assert load_dataset("auto", root).fingerprint == first.fingerprint


def test_changed_folder_is_read_again(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "data")
    first = load_dataset("auto", root)
    (root / "train" / "cat" / "0001.png").unlink()
    second = load_dataset("auto", root)
    assert (len(first.train), len(second.train)) == (6, 5)


def test_unknown_name() -> None:
    with pytest.raises(UsageError, match="auto, cifar10, cifar100, folder, synthetic"):
        load_dataset("cifar11")


@pytest.mark.parametrize("name", ["auto", "cifar10", "cifar100", "folder"])
def test_missing_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_dataset(name, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", [5000 * "a", "~no-such-user/data"])
def test_impossible_folder(name: str) -> None:
    with pytest.raises(FastresError, match=r"does not exist|File name too long"):
        load_dataset("auto", name)


def test_file_instead_of_a_folder(tmp_path: Path) -> None:
    path = pack(tmp_path / CIFAR10_BINARY.archive, cifar_members(CIFAR10_BINARY))
    with pytest.raises(UsageError, match="is a file: name the folder"):
        load_dataset("cifar10", path)


def test_a_named_folder_without_data_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never the synthetic set; naming it through the environment counts."""
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match=f"{empty} holds no dataset"):
        load_dataset("auto", empty)
    monkeypatch.setenv("FASTRES_DATA", str(empty))
    with pytest.raises(UsageError, match=f"{empty} holds no dataset"):
        load_dataset("auto")
    monkeypatch.setenv("FASTRES_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"\(from FASTRES_DATA\) does not exist"):
        load_dataset("auto")


def test_environment_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRES_DATA", str(image_folder(tmp_path / "mine")))
    assert load_dataset().name == "folder-mine"
    other = image_folder(tmp_path / "other")
    assert load_dataset("auto", other).name == "folder-other"


def test_broken_data_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / CIFAR10_BINARY.archive).write_bytes(b"<html>")
    with pytest.raises(FailureError, match="web page"):
        load_dataset("auto", tmp_path)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path / CIFAR10_BINARY.archive, cifar_members(CIFAR10_BINARY))

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("fastres.data.readers.cifar.md5_of", refuse)
    with pytest.raises(FailureError, match=f"cannot read {path}: Permission denied"):
        load_dataset("auto", tmp_path)


@pytest.mark.usefixtures("small_synthetic")
def test_auto_with_nothing_is_loudly_synthetic(cache: Path) -> None:
    for _ in range(2):
        dataset = load_dataset()
        assert dataset.name == "synthetic"
        (notice,) = dataset.notices
        assert notice.startswith("SYNTHETIC DATA: CIFAR-10 could not be downloaded (")
        assert "FASTRES_OFFLINE" in notice
        assert notice.endswith(f"into {cache / 'data'} or name its folder with --data-dir")
        assert "\n" not in notice
        assert "://" not in notice
    assert load_dataset("synthetic").notices == ()
    assert "there is no CIFAR-10 in" in load_dataset(download=False).notices[0]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_with_nothing_fails(name: str, cache: Path) -> None:
    with pytest.raises(FailureError, match="FASTRES_OFFLINE") as caught:
        load_dataset(name)
    assert f"{cache / 'data'} or name its folder with --data-dir" in str(caught.value)
    with pytest.raises(FailureError, match="there is no CIFAR-10"):
        load_dataset(name, download=False)


def test_folder_with_nothing_fails(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name yours with --data-dir"):
        load_dataset("folder")
    with pytest.raises(UsageError, match="is not an image folder"):
        load_dataset("folder", tmp_path)


def test_wrong_content_is_not_downloaded_over(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds image folder data.*--dataset folder"):
        load_dataset("cifar10", image_folder(tmp_path / "a"))
    unpack(tmp_path / "b" / CIFAR100_BINARY.folder, cifar_members(CIFAR100_BINARY))
    with pytest.raises(UsageError, match="CIFAR-100 data, not CIFAR-10: use --dataset cifar100"):
        load_dataset("cifar10", tmp_path / "b")


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("name", ["auto", "cifar10"])
def test_download(
    named: bool, name: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into the default folder for `auto`; into the named one only where CIFAR was asked for."""
    asked = []

    def fetch(wanted: str, folder: Path) -> Path:
        asked.append((wanted, folder))
        folder.mkdir(parents=True, exist_ok=True)
        return pack(folder / CIFAR10_BINARY.archive, cifar_members(CIFAR10_BINARY))

    monkeypatch.setattr(source, "download_cifar", fetch)
    if named and name == "auto":
        with pytest.raises(UsageError):
            load_dataset(name, tmp_path)
        assert asked == []
        return
    data_dir = tmp_path if named else None
    for _ in range(2):
        assert load_dataset(name, data_dir).name == "cifar10-custom"
    assert asked == [("cifar10", tmp_path if named else cache / "data")]


def test_real_images_are_decoded_once(
    jpeg_dir: Path, jpeg_data: Dataset, shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All 60,000; who asks again has them from the cache."""
    dataset = jpeg_data
    assert dataset.name == "cifar10-jpeg"
    assert (len(dataset.train), len(dataset.test)) == (50_000, 10_000)
    assert np.bincount(dataset.test.labels).tolist() == [1_000] * 10
    # A lossy copy: within half a grey level of CIFAR-10's mean, a little less contrast.
    np.testing.assert_allclose(dataset.mean, (0.4914, 0.4822, 0.4465), atol=0.002)
    np.testing.assert_allclose(dataset.std, (0.2470, 0.2435, 0.2616), atol=0.004)
    assert dataset.notices == ()

    monkeypatch.setenv("FASTRES_CACHE", str(shared_dir / "fastres-cache"))

    def decode_again(*_: object) -> Dataset:
        raise AssertionError

    monkeypatch.setattr(ImageFolder, "read", decode_again)
    again = load_dataset("auto", jpeg_dir)
    assert again.fingerprint == dataset.fingerprint
    assert isinstance(again.train.images.base, np.memmap)


def test_no_torch() -> None:
    """Data is read by processes that never compute."""
    code = "import sys, fastres.data.source; sys.exit('torch' in sys.modules)"
    repo = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=repo, env=os.environ).returncode == 0


def image_set(count: int, classes: int = 10) -> ImageSet:
    return ImageSet(images(count), labels(count, classes))


def test_statistics_are_exact() -> None:
    pictures = images(50)
    mean, std = channel_statistics(pictures)
    scaled = pictures.astype(np.float64).reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, scaled.mean(0), atol=5.1e-5)
    np.testing.assert_allclose(std, scaled.std(0), atol=5.1e-5)
    assert channel_statistics(np.full((3, 32, 32, 3), 51, np.uint8)) == ((0.2,) * 3, (0.0039,) * 3)
    halves = np.zeros((2, 32, 32, 3), np.uint8)
    halves[1] = 255
    assert channel_statistics(halves) == ((0.5,) * 3, (0.5,) * 3)


def test_fingerprint_sees_every_part() -> None:
    train, test = image_set(20), image_set(10)

    def of(train: ImageSet, test: ImageSet, classes: str = "abcdefghij") -> str:
        return Dataset.from_sets("x", tuple(classes), train, test, source="x").fingerprint

    pixel = train.images.copy()
    pixel[-1, -1, -1, -1] ^= 1
    label = train.labels.copy()
    label[-1] = 0
    seen = {
        of(train, test),
        of(ImageSet(pixel, train.labels), test),
        of(ImageSet(train.images, label), test),
        of(test, train),
        of(train, test, "abcdefghik"),
    }
    assert len(seen) == 5
    assert of(image_set(20), image_set(10)) in seen


def test_image_set_checks() -> None:
    good = images(4)
    for pictures, classes in (
        (good.astype("i4"), labels(4)),
        (good[:, :16], labels(4)),
        (good.transpose(0, 2, 1, 3), labels(4)),
        (good, labels(4).astype("i4")),
        (good, labels(5)),
    ):
        with pytest.raises(ValueError, match="must be"):
            ImageSet(pictures, classes)
    with pytest.raises(ValueError, match="read-only"):
        ImageSet(good, labels(4)).images[0] = 0


def test_labels_must_name_a_class() -> None:
    with pytest.raises(FailureError, match=r"label 9, outside 0\.\.8"):
        Dataset.from_sets("x", tuple("abcdefghi"), image_set(10), image_set(10), source="x")
    with pytest.raises(FailureError, match="holds no image"):
        Dataset.from_sets("x", tuple("abcdefghij"), image_set(10), image_set(0), source="x")


def test_validation_split() -> None:
    train = image_set(1_000)
    rest, val = split_validation(train, 100, seed=7)
    assert np.bincount(val.labels).tolist() == [10] * 10
    assert np.bincount(rest.labels).tolist() == [90] * 10
    # Together they are the training set, each in its order.
    keys = {image.tobytes(): i for i, image in enumerate(train.images)}
    rows, val_rows = ([keys[i.tobytes()] for i in part.images] for part in (rest, val))
    assert sorted(rows) == rows
    assert sorted(val_rows) == val_rows
    assert sorted(rows + val_rows) == list(range(1_000))
    np.testing.assert_array_equal(train.labels[val_rows], val.labels)
    # The same images on every machine and with every NumPy.
    assert val_rows[:8] == [8, 16, 29, 34, 37, 48, 66, 71]
    again = split_validation(train, 100, seed=7)[1]
    np.testing.assert_array_equal(again.images, val.images)
    other = split_validation(train, 100, seed=8)[1]
    assert (other.images != val.images).any()


def test_uneven_validation_split() -> None:
    train = ImageSet(images(100), np.repeat([0, 1, 2], [70, 20, 10]).astype(np.int64))
    rest, val = split_validation(train, 15, seed=0)
    assert len(rest) == 85
    assert len(val) == 15
    assert abs(np.bincount(val.labels) - [10.5, 3, 1.5]).max() <= 0.5


@pytest.mark.parametrize("count", [0, -1, 10, 11])
def test_impossible_validation_split(count: int) -> None:
    with pytest.raises(UsageError, match="cannot be cut from 10 training images"):
        split_validation(image_set(10), count, seed=0)
