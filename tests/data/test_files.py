"""What stands where a data file should: one sentence for each kind, and the system's own reason."""

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastres.data import download
from fastres.data.download import Remote, download_cifar
from fastres.data.files import kind_at
from fastres.data.readers import archive
from fastres.data.source import load_dataset
from fastres.errors import FailureError, FastresError
from tests.helpers.data_fixtures import (
    CIFAR10_BINARY,
    CIFAR10_PYTHON,
    cifar_members,
    image_folder,
    pack,
    unpack,
)


def _make_socket(path: Path) -> None:
    where = os.getcwd()
    os.chdir(path.parent)  # the address of a socket is at most 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(where)


ODD = {
    "a folder": Path.mkdir,
    "a FIFO": os.mkfifo,
    "a socket": _make_socket,
    "a character device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a missing file": lambda path: path.symlink_to(path.parent / "nowhere"),
}


@pytest.fixture(params=ODD)
def odd(request: pytest.FixtureRequest) -> str:
    return request.param


def refused(name: str, root: Path) -> str:
    with pytest.raises(FastresError) as caught:
        load_dataset(name, root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["auto", "cifar10"])
@pytest.mark.parametrize("archive_name", ["cifar-10-binary.tar.gz", "cifar-10-python.tar"])
def test_in_place_of_an_archive(odd: str, name: str, archive_name: str, tmp_path: Path) -> None:
    path = tmp_path / archive_name
    ODD[odd](path)
    assert refused(name, tmp_path) == f"{path} is {odd}, not a file"


def test_in_place_of_an_archive_in_the_users_cache(
    odd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither downloaded over nor replaced by the synthetic set."""
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path))
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / CIFAR10_BINARY.archive
    ODD[odd](path)
    with pytest.raises(FailureError, match=f"{path} is {odd}, not a file"):
        load_dataset()


@pytest.mark.parametrize("fmt", [CIFAR10_BINARY, CIFAR10_PYTHON])
def test_in_place_of_a_batch(odd: str, fmt, tmp_path: Path) -> None:
    path = unpack(tmp_path / fmt.folder, cifar_members(fmt)) / fmt.members[2]
    path.unlink()
    ODD[odd](path)
    assert refused("cifar10", tmp_path) == f"{path} is {odd}, not a file"


def test_in_place_of_an_image(odd: str, tmp_path: Path) -> None:
    path = image_folder(tmp_path) / "train" / "cat" / "0001.png"
    path.unlink()
    ODD[odd](path)
    said = "a folder inside a class folder" if odd == "a folder" else odd
    assert refused("folder", tmp_path).startswith(f"{path} is {said}")


def test_in_place_of_a_class_folder(odd: str, tmp_path: Path) -> None:
    image_folder(tmp_path)
    for split in ("train", "test"):
        path = tmp_path / split / "emu"
        ODD[odd](path)
    wanted = "is empty" if odd == "a folder" else f"is {odd}, not a class folder"
    assert wanted in refused("folder", tmp_path)


def test_in_place_of_the_data_folder(odd: str, tmp_path: Path) -> None:
    path = tmp_path / "data"
    ODD[odd](path)
    wanted = "holds no dataset" if odd == "a folder" else odd.replace("missing file", "missing")
    assert wanted in refused("auto", path)


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_dead_link_in_place_of_a_split(name: str, tmp_path: Path) -> None:
    path = image_folder(tmp_path) / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "nowhere")
    assert refused("folder", tmp_path) == f"{path} is a link to a missing folder"


def test_in_place_of_an_unfinished_download(
    odd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "offline", lambda: False)
    path = tmp_path / f"{CIFAR10_BINARY.archive}.part"
    ODD[odd](path)
    source = Remote("http://127.0.0.1:9/none", CIFAR10_BINARY.archive, 10, "")
    with pytest.raises(FailureError, match=f"cannot write to {tmp_path}: {path} is {odd}"):
        download_cifar("cifar10", tmp_path, [source])
    assert kind_at(path) == odd


@pytest.fixture
def locked() -> Iterator[Path]:
    """A folder below open ones, while this process has no more rights than any user."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        was_root = os.geteuid() == 0
        if was_root:
            os.chown(root, 65534, 65534)
            os.seteuid(65534)
        try:
            yield root
        finally:
            if was_root:
                os.seteuid(0)


@pytest.mark.parametrize(
    "path", [".", "train", "train/cat", "train/cat/0001.png", "test/dog/0002.png"]
)
def test_no_permission_for_part_of_an_image_folder(path: str, locked: Path) -> None:
    victim = image_folder(locked / "data") / path
    victim.chmod(0)
    message = refused("folder", locked / "data")
    assert message.startswith(f"cannot read {victim}")
    assert message.endswith(": Permission denied")


@pytest.mark.parametrize("name", ["auto", "cifar10"])
def test_no_permission_for_an_archive(name: str, locked: Path) -> None:
    path = pack(locked / CIFAR10_BINARY.archive, cifar_members(CIFAR10_BINARY))
    path.chmod(0)
    assert refused(name, locked) == f"cannot read {path}: Permission denied"


def test_no_permission_for_a_batch(locked: Path) -> None:
    folder = unpack(locked / CIFAR10_BINARY.folder, cifar_members(CIFAR10_BINARY))
    path = folder / CIFAR10_BINARY.test
    path.chmod(0)
    assert refused("cifar10", locked) == f"cannot read {path}: Permission denied"
    folder.chmod(0)
    message = refused("cifar10", locked)
    assert message.startswith(f"cannot read {folder}")
    assert message.endswith(": Permission denied")


def test_no_permission_for_the_parent_of_the_data_folder(locked: Path) -> None:
    image_folder(locked / "closed" / "data")
    (locked / "closed").chmod(0)
    message = refused("auto", locked / "closed" / "data")
    assert message == f"cannot read {locked / 'closed' / 'data'}: Permission denied"


def test_a_circle_of_links(tmp_path: Path) -> None:
    path = tmp_path / CIFAR10_BINARY.archive
    path.symlink_to(path)
    message = refused("cifar10", tmp_path)
    assert message == f"cannot read {path}: Too many levels of symbolic links"


def test_a_read_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a failing disk, where the system's error names no file."""
    path = pack(tmp_path / CIFAR10_BINARY.archive, cifar_members(CIFAR10_BINARY))

    def fail(**_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(archive.tarfile, "open", fail)
    with pytest.raises(FailureError, match=f"cannot read {path}: Input/output error"):
        archive.read_members(path, CIFAR10_BINARY.members)
