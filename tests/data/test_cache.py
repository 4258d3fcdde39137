"""The decoded cache: fast, shared, verified, and never the reason for a failure."""

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fastres.cache_file import write_cache_file
from fastres.data.cache import cached
from fastres.data.dataset import Dataset, ImageSet
from fastres.data.source import load_dataset
from fastres.errors import FailureError
from fastres.host import cache_folder
from tests.helpers.data_fixtures import image_folder, images, labels


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def dataset(seed: int = 0, notices: tuple[str, ...] = ()) -> Dataset:
    train, test = (ImageSet(images(n, seed), labels(n)) for n in (40, 20))
    classes = tuple("abcdefghij")
    return Dataset.from_sets("mine", classes, train, test, source="a test", notices=notices)


class Builder:
    """A `build` that counts its calls."""

    def __init__(self, seed: int = 0) -> None:
        self.dataset = dataset(seed, notices=("resized 3",))
        self.calls = 0

    def __call__(self) -> Dataset:
        self.calls += 1
        return self.dataset


def expect_equal(a: Dataset, b: Dataset) -> None:
    for split in ("train", "test"):
        np.testing.assert_array_equal(getattr(a, split).images, getattr(b, split).images)
        np.testing.assert_array_equal(getattr(a, split).labels, getattr(b, split).labels)
    for field in ("name", "classes", "mean", "std", "fingerprint", "source"):
        assert getattr(a, field) == getattr(b, field)
        assert type(getattr(a, field)) is type(getattr(b, field))


def test_second_time_is_mapped() -> None:
    build = Builder()
    first, second = cached("one", build), cached("one", build)
    assert build.calls == 1
    expect_equal(first, second)
    assert second.notices == first.notices == ("resized 3",)
    assert isinstance(second.train.images.base, np.memmap)
    assert not second.train.images.flags.writeable


def test_another_signature_is_built_and_shares_the_entry(root: Path) -> None:
    build = Builder()
    cached("one", build)
    cached("two", build)
    assert build.calls == 2
    assert len(list((root / "datasets").iterdir())) == 1
    other = Builder(seed=1)
    expect_equal(cached("three", other), other.dataset)
    assert len(list((root / "datasets").iterdir())) == 2


def test_errors_of_the_build_pass_and_store_nothing(root: Path) -> None:
    def fail() -> Dataset:
        raise FailureError("broken archive")

    with pytest.raises(FailureError, match="broken archive"):
        cached("one", fail)
    assert not root.exists()


def entry_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def header_of(path: Path) -> None:
    """A header where plain numbers are wanted: of 18 bytes that no parser of it gets over."""
    path.write_bytes(b"\x93NUMPY\x01\x00\x08\x00{'a': (\n" + path.read_bytes())


DAMAGES = {
    "a header": header_of,
    "all bytes zero": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a record less": lambda path: path.write_bytes(path.read_bytes()[:-3072]),
    "a folder": lambda path: [path.unlink(), path.mkdir()],
    "a fifo": lambda path: [path.unlink(), os.mkfifo(path)],
    "a loop": lambda path: [path.unlink(), path.symlink_to(path)],
    "first byte flipped": lambda path: flip(path, 0),
    "middle byte flipped": lambda path: flip(path, path.stat().st_size // 2),
    "last byte flipped": lambda path: flip(path, -1),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(b"x" + path.read_bytes()),
}


@pytest.mark.parametrize("file", range(5))
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entry_is_built_again(file: int, damage: str, root: Path) -> None:
    build = Builder()
    cached("one", build)
    victim = entry_files(root)[file]
    DAMAGES[damage](victim)
    again = cached("one", build)
    assert build.calls == 2
    expect_equal(again, build.dataset)
    assert "was unusable" in again.notices[-1]
    third = cached("one", build)
    assert build.calls == 2
    assert third.notices == ("resized 3",)
    expect_equal(third, build.dataset)


@pytest.mark.parametrize("file", range(5))
def test_removed_file_is_built_again(file: int, root: Path) -> None:
    build = Builder()
    cached("one", build)
    entry_files(root)[file].unlink()
    for _ in range(2):
        expect_equal(cached("one", build), build.dataset)
    assert build.calls == 2


def test_removed_entry_is_built_again(root: Path) -> None:
    build = Builder()
    cached("one", build)
    shutil.rmtree(root / "datasets")
    for _ in range(2):
        expect_equal(cached("one", build), build.dataset)
    assert build.calls == 2


def test_objects_in_an_entry_are_never_loaded(root: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "marker"),)

    build = Builder()
    cached("one", build)
    victim = next(path for path in entry_files(root) if path.name == "train_labels.bin")
    with victim.open("wb") as file:
        np.save(file, np.array([Bomb()], dtype=object), allow_pickle=True)
    expect_equal(cached("one", build), build.dataset)
    assert build.calls == 2
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_folder_that_cannot_be_written(
    reason: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(reason, os.strerror(reason))

    build = Builder()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        answer = cached("one", build)
    expect_equal(answer, build.dataset)
    assert answer.notices == (
        "resized 3",
        f"no cache: {root} cannot be written ({os.strerror(reason)}), so every start decodes again",
    )
    assert entry_files(root) == []
    assert list((root / "datasets").iterdir()) == []
    cached("one", build)
    cached("one", build)
    assert build.calls == 2


def test_cache_folder_in_the_way_of_a_file(root: Path) -> None:
    root.write_text("a file where the cache should be")
    build = Builder()
    answer = cached("one", build)
    expect_equal(answer, build.dataset)
    assert "cannot be written" in answer.notices[-1]


def test_what_a_killed_process_left_is_removed_when_old(root: Path) -> None:
    cached("one", Builder())
    left = root / "datasets" / ".unfinished-x"
    shutil.copytree(next((root / "datasets").iterdir()), left)
    cached("two", Builder(seed=1))
    assert left.exists()
    yesterday = time.time() - 25 * 3600
    os.utime(left, (yesterday, yesterday))
    cached("three", Builder(seed=2))
    assert not left.exists()


def test_the_other_process_was_faster(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entry appears while this process is still writing its own copy of it."""
    build = Builder()
    cached("one", build)
    (entry,) = (root / "datasets").iterdir()
    entry.rename(tmp_path / "theirs")
    write = Path.write_bytes

    def write_last(path: Path, content: bytes) -> None:
        write(path, content)
        if path.name == "test_labels.bin":
            shutil.copytree(tmp_path / "theirs", entry)

    monkeypatch.setattr(Path, "write_bytes", write_last)
    assert cached("two", build).notices == ("resized 3",)
    assert list((root / "datasets").iterdir()) == [entry]


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.data.test_cache import Builder, cached, expect_equal
for round in range(30):
    build = Builder(seed=round)
    expect_equal(cached(f"round {round}", build), build.dataset)
"""


def test_two_processes_at_once(root: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(Path(__file__).resolve().parents[2])]
    writers = [subprocess.Popen(command) for _ in range(2)]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    assert len(list((root / "datasets").iterdir())) == 30
    for number in range(30):
        build = Builder(seed=number)
        expect_equal(cached(f"round {number}", build), build.dataset)
        assert build.calls == 0


@pytest.mark.parametrize(
    "facts", [b"[]", b"{}", b"7", b'{"fingerprint": 1}', b'{"fingerprint": ".."}', b"[" * 10**5]
)
def test_an_index_with_a_right_hash_and_other_content(facts: bytes, root: Path) -> None:
    build = Builder()
    cached("one", build)
    (index,) = (root / "index").iterdir()
    write_cache_file(index, facts)
    for _ in range(2):
        expect_equal(cached("one", build), build.dataset)
    assert build.calls == 2


def test_an_entry_that_is_a_file_is_replaced(root: Path) -> None:
    build = Builder()
    cached("one", build)
    (entry,) = (root / "datasets").iterdir()
    shutil.rmtree(entry)
    entry.write_text("in the way")
    for _ in range(2):
        expect_equal(cached("one", build), build.dataset)
    assert build.calls == 2


def test_a_run_needs_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """HOME unset and a user without a passwd entry, as in many containers."""
    image_folder(tmp_path / "mine")
    without_a_home(monkeypatch)
    data = load_dataset("auto", tmp_path / "mine")
    assert data.name == "folder-mine"
    assert data.notices == (
        "no cache: this user has no home folder: name a cache folder with FASTRES_CACHE; "
        "every start decodes again",
    )
    assert load_dataset("auto").name == "synthetic"
    with pytest.raises(FailureError, match="no home folder"):
        load_dataset("cifar10")


def test_a_training_run_needs_no_home_folder(tmp_path: Path) -> None:
    """The whole command, with everything that it imports."""
    image_folder(tmp_path / "mine", per_class=10)
    words = ["--data-dir", str(tmp_path / "mine"), "--out", str(tmp_path / "run"), "--fast"]
    words += ["--model", "resnet8", "--width", "0.25", "--shortcut", "A", "--no-whiten"]
    words += ["--batch-size", "10", "--epochs", "1", "--threads", "1", "--amp", "bf16"]
    code = f"""
import os, pwd, sys
def nobody(_): raise KeyError("no such user")
pwd.getpwuid = nobody
from fastres import evaluate, train
assert train.main({words!r}) == 0
assert evaluate.main([{str(tmp_path / "run")!r}]) == 0
"""
    kept = {k: v for k, v in os.environ.items() if k not in ("HOME", *CACHE_VARIABLES)}
    kept["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no cache: this user has no home folder" in done.stdout
    assert "Traceback" not in done.stderr


CACHE_VARIABLES = "FASTRES_CACHE", "XDG_CACHE_HOME"


def without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: int) -> None:
        raise KeyError("no such user")

    for name in ("HOME", *CACHE_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("FASTRES_CACHE", "~/mine")
    assert cache_folder() == Path("/home/someone/mine")
    monkeypatch.delenv("FASTRES_CACHE")
    assert cache_folder() == Path("/xdg/fastres")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/someone/.cache/fastres")


@pytest.mark.parametrize("relative", ["", "cache", "./x", "~/.cache"])
def test_a_relative_xdg_folder_does_not_count(
    relative: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTRES_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", relative)
    assert cache_folder() == Path("/home/someone/.cache/fastres")


@pytest.mark.parametrize("named", [None, "~/cache", "~no-such-user/cache"])
def test_without_a_home_folder(named: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user that a container knows by number alone."""
    without_a_home(monkeypatch)
    if named:
        monkeypatch.setenv("FASTRES_CACHE", named)
    with pytest.raises(FailureError, match="FASTRES_CACHE"):
        cache_folder()


def test_a_home_that_is_no_path_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_home(monkeypatch)
    monkeypatch.setenv("HOME", "home")
    with pytest.raises(FailureError, match="no home folder"):
        cache_folder()
