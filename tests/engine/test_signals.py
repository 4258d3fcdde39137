"""Signals to a run and to everything around it: what was trained is saved, and nobody is left."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time

import pytest

from fastres import cli, train
from fastres.data.loaders import dali_missing
from fastres.engine import checkpoint
from fastres.engine.signals import StopSignal
from tests.helpers.tiny_run import ENDLESS, ROOT, TINY, is_running, start, wait_for_epoch

REQUESTS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
ANSWER = "stopping after this step; once more to stop at once\n"


def trained_steps(out):
    return checkpoint.read(out / "last.safetensors")[1]["progress"]["step"]


@pytest.mark.parametrize(
    ("loader", "number"),
    [
        (["torch", "--workers", "2"], signal.SIGTERM),
        (["torch", "--workers", "2"], signal.SIGHUP),
        (["dali"], signal.SIGTERM),
    ],
    ids=["torch, SIGTERM", "torch, SIGHUP", "dali, SIGTERM"],
)
def test_a_signal_to_the_process_group_saves(loader, number, tmp_path):
    """As from a batch system: the loader's workers get it too, and have to go on until then."""
    if loader == ["dali"] and dali_missing():
        pytest.skip(dali_missing())
    out = tmp_path / "run"
    command = ["-m", "fastres.train", *ENDLESS, "--loader", *loader, "--out", out]
    with start(command, start_new_session=True) as child:
        wait_for_epoch(child.stdout)
        os.killpg(child.pid, number)
        assert child.stderr.read() == ANSWER
        assert child.stdout.read().splitlines()[-1].startswith(f"stopped by {number.name}; go on")
    assert child.returncode == 128 + number
    assert trained_steps(out) >= 10


def test_a_closed_terminal_saves(tmp_path):
    """Its SIGHUP comes when nothing can be written to it any more."""
    out = tmp_path / "run"
    terminal, end = pty.openpty()
    with start(
        ["-m", "fastres.train", *ENDLESS, "--out", out],
        **{"stdin": end, "stdout": end, "stderr": end, "start_new_session": True},
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    ) as child:
        os.close(end)
        with open(terminal) as lines:
            wait_for_epoch(lines)
    assert child.returncode == 128 + signal.SIGHUP
    assert trained_steps(out) >= 10


@pytest.mark.parametrize("number", REQUESTS)
def test_a_signal_that_was_ignored_stays_ignored(number):
    """SIGHUP under nohup, SIGINT in a job that a script starts in the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        stop = StopSignal()
        with stop.caught():
            signal.raise_signal(number)
        assert stop.number is None
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_what_comes_twice_at_once_is_one_request(capfd):
    """`timeout` signals its child and then the child's group; torchrun passes on Ctrl-C."""
    before = [signal.getsignal(number) for number in REQUESTS]
    stop = StopSignal()
    with stop.caught():
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
    assert stop.number == signal.SIGTERM
    assert [signal.getsignal(number) for number in REQUESTS] == before


def test_the_same_again_later_stops_at_once():
    code = (
        "import signal\nfrom fastres.engine import signals\nsignals._REPEAT_SECONDS = 0\n"
        "with signals.StopSignal().caught():\n"
        "    signal.raise_signal(signal.SIGTERM)\n    print('asked')\n"
        "    signal.raise_signal(signal.SIGTERM)\n    print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-uc", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "asked\n", ANSWER)


def test_a_request_that_nobody_hears_of_is_one_too(monkeypatch):
    """The answer goes to a pipe that was closed."""
    ours, theirs = os.pipe()
    os.close(ours)
    with open(theirs, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        stop = StopSignal()
        with stop.caught():
            signal.raise_signal(signal.SIGHUP)
    assert stop.number == signal.SIGHUP


def test_an_interrupt_that_a_library_swallows_is_one(capsys):
    """As numpy does while it is imported, and torch goes on without it until something fails."""

    def start_up():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("cannot load module more than once per process") from None

    before = signal.getsignal(signal.SIGINT)
    assert cli.guarded(start_up, debug=False) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_training_in_a_thread_catches_no_signals(tmp_path, capsys):
    out, codes = tmp_path / "run", []
    arguments = [*TINY, "--epochs", "0.2", "--out", str(out)]
    thread = threading.Thread(target=lambda: codes.append(train.main(arguments)))
    thread.start()
    thread.join()
    assert codes == [0], capsys.readouterr().err
    assert (out / "summary.json").exists()


LOADER = """
import os, sys, time
import fastres
from tests.helpers.tiny_run import children
loader = fastres.make_loader("synthetic", split="test", batch_size=100, loader="torch", workers=2)
batches = iter(loader)
next(batches)
print(*children(os.getpid()), flush=True)
"""


LATE_WORKERS = """
import multiprocessing, os, time
from fastres.data.loaders.worker_signals import obey_trainer
from tests.helpers.tiny_run import children

def work(trainer):
    while os.getppid() == trainer:
        time.sleep(0.01)
    obey_trainer(0)
    time.sleep(600)

for _ in range(2):
    multiprocessing.get_context("fork").Process(target=work, args=(os.getpid(),)).start()
print(*children(os.getpid()), flush=True)
"""


@pytest.mark.parametrize("code", [LOADER, LATE_WORKERS], ids=["at work", "starting"])
def test_workers_end_with_a_killed_trainer(code):
    """At work, or so early that they find themselves without a trainer."""
    with start(["-c", code + "time.sleep(600)"]) as trainer:
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(workers) == 2
        trainer.kill()
    for _ in range(300):
        if not any(map(is_running, workers)):
            return
        time.sleep(0.1)
    raise AssertionError(f"the workers {workers} outlived their trainer by half a minute")


def test_a_trainer_that_leaves_its_workers_behind_ends():
    """Python ends processes that are left over by SIGTERM and waits for them."""
    with start(["-c", LOADER]) as trainer:
        assert trainer.communicate(timeout=60)[1] == ""
    assert trainer.returncode == 0
