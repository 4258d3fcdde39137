"""Worker processes that die, raise or stall: one sentence that says what to do, and no hang."""

import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import fastres
from fastres.data.dataset import Dataset, ImageSet
from fastres.data.loaders import dataloader, worker_failure
from fastres.data.loaders.worker_failure import WorkerError
from fastres.errors import sentence_for
from fastres.train import main

ADVICE = "enlarge /dev/shm, use smaller batches, or --workers 0, which needs none"
REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data() -> Dataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (400, 32, 32, 3), dtype=np.uint8)
    images = ImageSet(images, rng.integers(0, 2, 400))
    return Dataset.from_sets("noise", ("a", "b"), images, images, source="a test")


@pytest.fixture(autouse=True)
def _no_worker_is_left():
    yield
    limit = time.monotonic() + 30
    while multiprocessing.active_children():
        gc.collect()  # the traceback of an error may still hold a pass
        assert time.monotonic() < limit
        time.sleep(0.05)


def loader(data: Dataset, batch_size: int = 8):
    return fastres.make_loader(data, loader="torch", workers=2, batch_size=batch_size)


def one_sentence(error: BaseException) -> str:
    message = str(error)
    assert "\n" not in message
    assert message.startswith("the worker processes of the torch loader failed: ")
    assert message.endswith(ADVICE)
    return message


def serve_all(data: Dataset) -> str:
    with pytest.raises(WorkerError) as caught:
        list(loader(data))
    return one_sentence(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("unable to allocate shared memory(shm): No space left on device (28)"),
        OSError(28, "No space left on device"),
        RuntimeError("unable to mmap 64 bytes from file </torch_1>: Cannot allocate memory (12)"),
    ],
)
def test_no_room_for_the_batches(
    error: Exception, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: torch.Tensor) -> None:
        raise error

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    assert (str(error) or type(error).__name__) in serve_all(data)


def end_at_the_third_batch(monkeypatch: pytest.MonkeyPatch, end: Callable[[], object]) -> None:
    """Call `end` in each worker when it is asked for its third batch."""
    augment, asked = dataloader.augment, []

    def augment_or_end(*args):
        asked.append(args)
        if len(asked) == 3:
            end()
        return augment(*args)

    monkeypatch.setattr(dataloader, "augment", augment_or_end)


def fail() -> None:
    raise ValueError("two lines\nof a worker.")


def test_a_worker_raises(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    end_at_the_third_batch(monkeypatch, fail)
    assert "of a worker" in serve_all(data)


@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGKILL, "Killed"), (signal.SIGBUS, "Bus error"), (signal.SIGSEGV, "Segmentation")],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_worker_is_killed(
    number: signal.Signals, said: str, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_at_the_third_batch(monkeypatch, lambda: os.kill(os.getpid(), number))
    assert f"killed by signal: {said}" in serve_all(data)


def test_a_worker_exits(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    end_at_the_third_batch(monkeypatch, lambda: os._exit(3))
    assert "exited unexpectedly with exit code 3" in serve_all(data)


def test_a_worker_stops(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither waited for while training nor when the program ends."""
    monkeypatch.setattr(dataloader, "WAIT_SECONDS", 1)
    monkeypatch.setattr(worker_failure, "WAIT_SECONDS", 1)
    monkeypatch.setattr(worker_failure, "_MAX_WAITS", 2)
    end_at_the_third_batch(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    assert "no batch came for 2 s" in serve_all(data)


def test_a_worker_stops_between_two_passes(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataloader, "WAIT_SECONDS", 1)
    monkeypatch.setattr(worker_failure, "WAIT_SECONDS", 1)
    monkeypatch.setattr(worker_failure, "_MAX_WAITS", 2)
    served = loader(data)
    assert len(list(served)) == 50
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGSTOP)
    with pytest.raises(WorkerError) as caught:
        list(served)
    assert "no batch came for 2 s" in one_sentence(caught.value)


def test_a_wait_that_ends_in_time_changes_nothing(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataloader, "WAIT_SECONDS", 0.2)
    end_at_the_third_batch(monkeypatch, lambda: time.sleep(0.7))
    slow = list(loader(data))
    alone = fastres.make_loader(data, loader="torch", workers=0, batch_size=8)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(slow, alone, strict=True))


def test_a_worker_dies_during_a_step(data: Dataset) -> None:
    """The handler of SIGCHLD raises at once, wherever the main thread is."""

    def wait_for_the_end() -> None:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(30)

    batches = iter(loader(data))
    next(batches)
    with pytest.raises(WorkerError) as caught:
        wait_for_the_end()
    assert "killed by signal: Killed" in one_sentence(caught.value)
    batches.close()


def test_a_worker_dies_beside_another_thread(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python has no signal handlers there."""
    monkeypatch.setattr(dataloader, "WAIT_SECONDS", 1)
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    end_at_the_third_batch(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    messages = []
    thread = threading.Thread(target=lambda: messages.append(serve_all(data)))
    try:
        thread.start()
        thread.join(60)
    finally:
        signal.signal(signal.SIGCHLD, handler)
    assert "exited unexpectedly" in messages[0]


def test_too_little_memory_that_is_not_shared(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a worker: the advice is that for the machine's memory, and none of it stays taken."""

    def refuse() -> None:
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )

    end_at_the_third_batch(monkeypatch, refuse)
    with pytest.raises(RuntimeError) as caught:
        list(loader(data))
    assert multiprocessing.active_children() == []
    sentence = sentence_for(caught.value)
    assert sentence is not None
    assert sentence.startswith("out of memory")
    assert "/dev/shm" not in sentence


def test_a_worker_that_is_late_between_two_passes(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As within a pass: a run that was suspended goes on."""
    monkeypatch.setattr(dataloader, "WAIT_SECONDS", 1)
    monkeypatch.setattr(worker_failure, "WAIT_SECONDS", 1)
    served = loader(data)
    wanted = [labels for _, labels in served]
    pid = multiprocessing.active_children()[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(2.5, lambda: os.kill(pid, signal.SIGCONT))
    timer.start()
    again = [labels for _, labels in served]
    timer.join()
    assert len(again) == len(wanted)
    served.close()


def test_workers_that_cannot_start(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    assert "Resource temporarily unavailable" in serve_all(data)


def test_the_training_command_loses_a_worker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill() -> None:
        limit = time.monotonic() + 60
        while not (children := multiprocessing.active_children()):
            assert time.monotonic() < limit
            time.sleep(0.05)
        os.kill(children[0].pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    options = "--dataset synthetic --model resnet8 --limit-train 256 --epochs 1000 --device cpu"
    options += f" --loader torch --workers 2 --out {tmp_path / 'run'}"
    code = main(options.split())
    thread.join(60)
    error = capsys.readouterr().err
    assert code == 1
    assert "Traceback" not in error
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: the worker processes of the torch loader failed: ")
    assert last.endswith(ADVICE)


def small_shm(size: str) -> list[str]:
    """A command prefix that gives its command a small /dev/shm, where this user may do that."""
    unshare = shutil.which("unshare")
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    for rights in (["-m"], ["-m", "-r"]):
        prefix = [str(unshare), *rights, "sh", "-c", mount, "sh"]
        if unshare and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
            return prefix
    pytest.skip("needs the right to mount a tmpfs in a namespace of its own")


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ("64k", "workers=1, batch_size=8"),
        ("1m", "workers=2, batch_size=256"),
        ("64m", "workers=8, batch_size=1000, split='test'"),
    ],
)
def test_a_small_shared_memory(size: str, options: str) -> None:
    code = f"""
import sys
from fastres import cli, make_loader
from fastres.data.synthetic import synthetic_dataset
import time
def run():
    loader = make_loader(synthetic_dataset(10_000, 10_000), loader="torch", {options})
    first = iter(loader)
    next(first)
    time.sleep(2)
    return len(list(first)) and 0
sys.exit(cli.guarded(run, debug=False))
"""
    done = subprocess.run(
        [*small_shm(size), sys.executable, "-c", code],
        cwd=REPO, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done
    assert done.stderr.startswith("error: the worker processes of the torch loader failed: ")
    assert done.stderr.endswith(f"{ADVICE}\n")
    assert done.stderr.count("\n") == 1
