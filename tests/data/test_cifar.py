"""CIFAR archives: every published form, packed and unpacked, and what is wrong with the others."""

import gzip
import io
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastres.data.dataset import Dataset
from fastres.data.readers import archive, cifar
from fastres.data.readers.cifar import ARCHIVE_FORMATS, CIFAR100_CLASSES, ArchiveFormat, find_cifar
from fastres.errors import FailureError
from tests.helpers.data_fixtures import (
    CIFAR10_BINARY,
    CIFAR10_PYTHON,
    CIFAR100_BINARY,
    binary_records,
    cifar_members,
    images,
    labels,
    pack,
    unpack,
)


def read(root: Path, name: str = "cifar10") -> Dataset:
    found = find_cifar(root, name)
    assert found is not None
    return found.read()


def expect_small_copy(dataset: Dataset, fmt: ArchiveFormat, per_file: int = 20) -> None:
    """The pixels and labels that `cifar_members` put into the files, in the order of the files."""
    count = len(fmt.train)
    expected = np.concatenate([images(per_file, seed) for seed in range(count)])
    np.testing.assert_array_equal(dataset.train.images, expected)
    np.testing.assert_array_equal(dataset.test.images, images(per_file, count))
    classes = len(fmt.variant.classes)
    np.testing.assert_array_equal(dataset.train.labels, np.tile(labels(per_file, classes), count))
    assert dataset.classes == fmt.variant.classes
    assert dataset.name == f"{fmt.variant.name}-custom"


@pytest.mark.parametrize("fmt", ARCHIVE_FORMATS, ids=lambda fmt: fmt.stem)
@pytest.mark.parametrize("form", [".tar.gz", ".tgz", ".tar", "unpacked", "the folder itself"])
def test_every_form(fmt: ArchiveFormat, form: str, tmp_path: Path) -> None:
    members = cifar_members(fmt)
    root = tmp_path
    if form == "unpacked":
        unpack(tmp_path / fmt.folder, members)
    elif form == "the folder itself":
        root = unpack(tmp_path / "renamed", members)
    else:
        pack(tmp_path / f"{fmt.stem}{form}", members)
    other = "cifar100" if fmt.variant.name == "cifar10" else "cifar10"
    assert find_cifar(root, other) is None
    expect_small_copy(read(root, fmt.variant.name), fmt)


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_every_protocol(protocol: int, tmp_path: Path) -> None:
    unpack(tmp_path, cifar_members(CIFAR10_PYTHON, protocol=protocol))
    expect_small_copy(read(tmp_path), CIFAR10_PYTHON)


@pytest.mark.parametrize("form", [tuple, np.array, list], ids=lambda form: form.__name__)
def test_labels_of_every_form(form: Callable, tmp_path: Path) -> None:
    """A list of NumPy scalars too: what `list(array)` in somebody's own script leaves."""
    members = cifar_members(CIFAR10_PYTHON)
    for name, content in members.items():
        batch = pickle.loads(content, encoding="bytes")
        batch[b"labels"] = form(np.array(batch[b"labels"]))
        members[name] = pickle.dumps(batch, protocol=2)
    unpack(tmp_path, members)
    expect_small_copy(read(tmp_path), CIFAR10_PYTHON)


def test_usual_subfolder(tmp_path: Path) -> None:
    (tmp_path / "cifar-10").mkdir()
    pack(tmp_path / "cifar-10" / CIFAR10_BINARY.archive, cifar_members(CIFAR10_BINARY))
    expect_small_copy(read(tmp_path), CIFAR10_BINARY)


def test_class_names() -> None:
    assert len(set(CIFAR100_CLASSES)) == 100
    assert sorted(CIFAR100_CLASSES) == list(CIFAR100_CLASSES)


def test_published_checksum_vouches_for_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pack(tmp_path / CIFAR10_BINARY.archive, cifar_members(CIFAR10_BINARY))
    assert any("another MD5" in notice for notice in read(tmp_path).notices)
    mine = replace(CIFAR10_BINARY, md5=archive.md5_of(path))
    monkeypatch.setattr(cifar, "ARCHIVE_FORMATS", (mine,))
    dataset = read(tmp_path)
    assert dataset.name == "cifar10"
    assert not any("MD5" in notice for notice in dataset.notices)


def test_published_statistics_vouch_for_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack(tmp_path, cifar_members(CIFAR10_BINARY))
    dataset = read(tmp_path)
    monkeypatch.setattr(cifar, "_TRAIN_COUNT", 100)
    monkeypatch.setattr(cifar, "_TEST_COUNT", 20)
    assert read(tmp_path).name == "cifar10-custom"
    variant = replace(CIFAR10_BINARY.variant, mean=dataset.mean, std=dataset.std)
    monkeypatch.setattr(cifar, "ARCHIVE_FORMATS", (replace(CIFAR10_BINARY, variant=variant),))
    dataset = read(tmp_path)
    assert dataset.name == "cifar10"
    assert dataset.notices == ()


def test_another_number_of_images_is_a_notice(tmp_path: Path) -> None:
    unpack(tmp_path, cifar_members(CIFAR10_BINARY))
    notices = " ".join(read(tmp_path).notices)
    assert "100 images, not 50,000" in notices
    assert "20 images, not 10,000" in notices


def test_published_number_of_images_needs_equal_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "_TRAIN_COUNT", 100)
    members = cifar_members(CIFAR10_BINARY)
    uneven = labels(20)
    uneven[3] = 4
    members["data_batch_2.bin"] = binary_records(images(20), uneven)
    unpack(tmp_path, members)
    with pytest.raises(FailureError, match="holds 9 images of class cat, not 10"):
        read(tmp_path)


def test_signature_follows_the_files(tmp_path: Path) -> None:
    folder = unpack(tmp_path / "cifar-10-batches-bin", cifar_members(CIFAR10_BINARY))
    found = find_cifar(tmp_path, "cifar10")
    assert found is not None
    before = found.signature
    assert found.signature == before
    (folder / "data_batch_3.bin").write_bytes((folder / "data_batch_3.bin").read_bytes())
    assert found.signature != before


def gzip_of(members: dict[str, bytes], folder: Path) -> bytes:
    return pack(folder / "scratch.tar.gz", members).read_bytes()


BROKEN_ARCHIVES = {
    "web page": (lambda data: b"\n<!DOCTYPE html><html>503</html>", "web page"),
    "empty": (lambda data: b"", "is empty"),
    "something else": (lambda data: b"PK\x03\x04" + data, "not a .tar.gz"),
    "cut in half": (lambda data: data[: len(data) // 2], "truncated or damaged"),
    "without its last byte": (lambda data: data[:-1], "truncated or damaged"),
    "one flipped byte": (
        lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
        "truncated or damaged",
    ),
    "wrong checksum at the end": (
        lambda data: data[:-8] + bytes(4) + data[-4:],
        "truncated or damaged",
    ),
}


@pytest.mark.parametrize("case", BROKEN_ARCHIVES)
def test_broken_archive(case: str, tmp_path: Path) -> None:
    damage, reason = BROKEN_ARCHIVES[case]
    path = tmp_path / CIFAR10_BINARY.archive
    path.write_bytes(damage(gzip_of(cifar_members(CIFAR10_BINARY), tmp_path)))
    with pytest.raises(FailureError, match=reason) as caught:
        read(tmp_path)
    assert str(path) in str(caught.value)


def test_checksum_behind_a_long_tail(tmp_path: Path) -> None:
    """Tar pads its end with zeros; the checksum of the whole is looked at all the same."""
    members = {"test_batch.bin": b"x" * 300}
    plain = gzip.decompress(gzip_of(members, tmp_path)) + bytes(5 << 20)
    path = tmp_path / "padded.tar.gz"
    path.write_bytes(gzip.compress(plain))
    assert archive.read_members(path, ["test_batch.bin"])[0] == members
    path.write_bytes(path.read_bytes()[:-8] + b"none" + path.read_bytes()[-4:])
    with pytest.raises(FailureError, match="truncated or damaged"):
        archive.read_members(path, ["test_batch.bin"])


def test_every_truncation_of_a_small_archive(tmp_path: Path) -> None:
    data = gzip_of({"test_batch.bin": b"x" * 300}, tmp_path)
    path = tmp_path / "cut.tar.gz"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(FailureError):
            archive.read_members(path, ["test_batch.bin"])


def test_member_missing(tmp_path: Path) -> None:
    members = cifar_members(CIFAR10_BINARY)
    del members["data_batch_4.bin"]
    pack(tmp_path / CIFAR10_BINARY.archive, members)
    with pytest.raises(FailureError, match=r"holds no data_batch_4\.bin"):
        read(tmp_path)


def test_file_missing(tmp_path: Path) -> None:
    members = cifar_members(CIFAR10_BINARY)
    del members["data_batch_4.bin"]
    unpack(tmp_path, members)
    with pytest.raises(FailureError, match=r"data_batch_4\.bin is missing"):
        read(tmp_path)


def test_cifar100_under_the_name_of_cifar10(tmp_path: Path) -> None:
    pack(tmp_path / CIFAR10_BINARY.archive, cifar_members(CIFAR100_BINARY))
    with pytest.raises(FailureError, match=r"belongs in cifar-100-binary.*--dataset cifar100"):
        read(tmp_path)


@pytest.mark.parametrize("fmt", ARCHIVE_FORMATS, ids=lambda fmt: fmt.stem)
def test_one_file_of_the_other_dataset(fmt: ArchiveFormat, tmp_path: Path) -> None:
    other = next(
        x for x in ARCHIVE_FORMATS if x.pickled == fmt.pickled and x.variant != fmt.variant
    )
    wrong = cifar_members(other)[other.test]
    unpack(tmp_path, cifar_members(fmt) | {fmt.test: wrong})
    title = other.variant.title
    with pytest.raises(FailureError, match=f"{fmt.test} in .* holds {title}, not"):
        read(tmp_path, fmt.variant.name)


BROKEN_FILES = {
    "truncated": (lambda data: data[:-1], "truncated"),
    "empty": (lambda data: b"", "is empty"),
    "label 10": (lambda data: b"\x0a" + data[1:], "label 10, outside .* not CIFAR-10"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_broken_file(case: str, tmp_path: Path) -> None:
    damage, reason = BROKEN_FILES[case]
    members = cifar_members(CIFAR10_BINARY)
    unpack(tmp_path, members | {"test_batch.bin": damage(members["test_batch.bin"])})
    with pytest.raises(FailureError, match=reason):
        read(tmp_path)


def test_links_in_an_archive_are_ignored(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(cifar_members(CIFAR10_BINARY)["test_batch.bin"])
    path = tmp_path / CIFAR10_BINARY.archive
    with tarfile.open(path, "w:gz") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo("test_batch.bin")
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
    assert archive.read_members(path, ["test_batch.bin"]) == ({}, set())


def test_names_that_climb_out_write_nothing(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    pack(root / CIFAR10_BINARY.archive, cifar_members(CIFAR10_BINARY), folder="../../outside")
    before = sorted(tmp_path.rglob("*"))
    read(root)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_twice(tmp_path: Path) -> None:
    path = tmp_path / CIFAR10_BINARY.archive
    with tarfile.open(path, "w:gz") as tar:
        for folder in ("a", "b"):
            info = tarfile.TarInfo(f"{folder}/test_batch.bin")
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(FailureError, match="twice"):
        archive.read_members(path, ["test_batch.bin"])


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_UNPACKED_BYTES", 1 << 20)
    path = tmp_path / CIFAR10_BINARY.archive
    info = tarfile.TarInfo("bomb")
    info.size = 8 << 20
    path.write_bytes(gzip.compress(info.tobuf() + bytes(info.size)))
    assert path.stat().st_size < 20_000
    with pytest.raises(FailureError, match="unpacks to more than"):
        archive.read_members(path, ["test_batch.bin"])
