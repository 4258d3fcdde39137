"""Fixtures of all tests: no network, no user cache, and the real images where there are any."""

from tests.helpers import interpreter  # noqa: F401, I001 - before anything imports Triton

import fcntl
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastres.data.dataset import Dataset
from fastres.data.source import load_dataset

REPO = Path(__file__).resolve().parents[1]
ARCHIVE = "cifar10-jpeg.tar.xz"


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test run alone, the same in all workers of pytest-xdist."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(autouse=True, scope="session")
def _isolated(shared_dir: Path) -> Iterator[None]:
    """Tests read no data of the user's, write nothing into the user's cache and never download.

    Workers share a cache: what one of them has compiled or decoded, the other finds.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTRES_CACHE", str(shared_dir / "fastres-cache"))
        patch.setenv("FASTRES_OFFLINE", "1")
        patch.delenv("FASTRES_DATA", raising=False)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Draw the same random tensors in a test, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def plain() -> Iterator[None]:
    """Compute the fused ops in plain torch, whatever else is here."""
    from fastres.kernels.dispatch import force_backend
    from fastres.kernels.reference import backend

    with force_backend(backend):
        yield


@pytest.fixture(scope="session")
def jpeg_dir(shared_dir: Path) -> Path:
    """CIFAR-10's 60,000 images as JPEG, unpacked once a test run from $FASTRES_TEST_DATA."""
    folder = Path(os.environ.get("FASTRES_TEST_DATA", REPO.parent / "shared" / "data"))
    archive = folder / ARCHIVE
    if not archive.is_file():
        pytest.skip(f"no {ARCHIVE} in {folder}: set FASTRES_TEST_DATA to the folder that holds it")
    root = shared_dir / "cifar10-jpeg"
    with open(shared_dir / "cifar10-jpeg.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            unfinished = Path(tempfile.mkdtemp(dir=shared_dir))
            _unpack(archive, unfinished)
            unfinished.rename(root)
    return root


@pytest.fixture(scope="session")
def jpeg_data(jpeg_dir: Path, shared_dir: Path) -> Dataset:
    """Those images decoded, once a test run, and kept in the cache that all workers share."""
    with open(shared_dir / "cifar10-jpeg.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return load_dataset("auto", jpeg_dir)


def _unpack(archive: Path, root: Path) -> None:
    """Write the images into a folder for each split and class."""
    made = set()
    # One pass over the stream, and the bytes alone: `extractall` takes several times as long.
    with tarfile.open(archive, "r|xz") as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is not None:
                split, name, image = member.name.split("/")[-3:]
                folder = f"{root}/{split}/{name}"
                if folder not in made:
                    os.makedirs(folder)
                    made.add(folder)
                with open(f"{folder}/{image}", "wb") as file:
                    file.write(content.read())


def pytest_configure() -> None:
    """Let the workers of pytest-xdist share the cores instead of fighting for them."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU begin with what trains there: bfloat16."""
    if torch.cuda.is_available():
        items.sort(key=lambda item: not _is_bfloat16(item))


def _is_bfloat16(item: pytest.Item) -> bool:
    params = getattr(getattr(item, "callspec", None), "params", {})
    return "bf16" in item.nodeid or any(value is torch.bfloat16 for value in params.values())


def pytest_runtest_makereport(call: pytest.CallInfo) -> None:
    """End a worker of pytest-xdist whose GPU failed: a new one takes over what is left.

    After an illegal access every further call in the same process fails.
    """
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    if is_worker and call.excinfo is not None and "CUDA error" in str(call.excinfo.value):
        print(call.excinfo.value, file=sys.__stderr__, flush=True)
        os._exit(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where torch finds no NVIDIA GPU."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
