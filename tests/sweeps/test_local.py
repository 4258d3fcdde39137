"""The queue of this machine, and how many runs at once it tries."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from fastres.config import Config
from fastres.engine.signals import Stopped
from fastres.errors import FailureError
from fastres.sweeps import job as jobs
from fastres.sweeps import local
from fastres.sweeps.local import Trial, best_trial, measure_parallel, run_queue, try_processes

TINY = Config(
    model="resnet8",
    width=0.25,
    shortcut="A",
    dataset="synthetic",
    limit_train=60,
    batch_size=10,
    epochs=1,
    threads=1,
)

# The queue


class StubJob:
    """Some Python in the place of a run."""

    def __init__(self, code="pass", *, done=False):
        self.code, self.done, self.process = code, done, None

    def is_done(self):
        return self.done

    def start(self, slot):
        self.slot = slot
        self.process = subprocess.Popen([sys.executable, "-I", "-c", self.code])
        return self.process

    def is_running(self):
        return self.process is not None and self.process.poll() is None


def queue(stubs, at_once):
    codes = {}
    run_queue(stubs, at_once, lambda job, code: codes.update({job: code}))
    return [codes.get(stub) for stub in stubs]


def test_no_more_than_that_many_run_at_once_and_each_has_a_slot(monkeypatch):
    stubs = [StubJob("import time; time.sleep(0.3)") for _ in range(4)]
    seen = []

    def start(self, slot, real=StubJob.start):
        others = {stub.slot for stub in stubs if stub.is_running()}
        assert slot not in others
        seen.append(len(others) + 1)
        return real(self, slot)

    monkeypatch.setattr(StubJob, "start", start)
    assert queue(stubs, 2) == [0] * 4
    assert max(seen) == 2
    assert {stub.slot for stub in stubs} == {0, 1}


def test_jobs_that_fail_stop_no_other_and_done_ones_do_not_start():
    kill = "import os, signal; os.kill(os.getpid(), signal.{})"
    stubs = [
        StubJob("raise SystemExit(3)"),
        StubJob(kill.format("SIGKILL")),
        # By somebody else than the sweep, which has to say so.
        StubJob(kill.format("SIGTERM")),
        StubJob(done=True),
        StubJob(),
    ]
    assert queue(stubs, 2) == [3, -signal.SIGKILL, -signal.SIGTERM, None, 0]
    assert stubs[3].process is None


SAVES = "import signal, sys, time; signal.signal(15, lambda *a: sys.exit(143)); time.sleep(60)"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_has_all_jobs_save_and_starts_no_other(number):
    stubs = [StubJob(SAVES), StubJob(SAVES), StubJob()]
    threading.Timer(1.5, os.kill, (os.getpid(), number)).start()
    ended = []
    with pytest.raises(Stopped) as stopped:
        run_queue(stubs, 2, lambda job, code: ended.append(job))
    assert stopped.value.exit_code == 128 + number
    assert ended == []
    assert all(stub.process.returncode in jobs.STOPPED for stub in stubs[:2])
    assert stubs[2].process is None


def test_an_error_leaves_no_process_behind():
    def full_disk(job, code):
        raise FailureError("no space left")

    stubs = [StubJob(SAVES), StubJob()]
    with pytest.raises(FailureError, match="no space"):
        run_queue(stubs, 2, full_disk)
    assert not stubs[0].is_running()


# Environment


def test_processes_take_the_gpus_in_turns(monkeypatch):
    def gpus(count, named=None):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if named is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        environments = [jobs.process_environment(None, slot) for slot in (0, 1, 2, None)]
        return [environment.get("CUDA_VISIBLE_DEVICES") for environment in environments]

    assert gpus(0) == [None] * 4
    assert gpus(1) == [None] * 4
    assert gpus(2) == ["0", "1", "0", None]
    assert gpus(2, "4,7") == ["4", "7", "4", "4,7"]


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(local.host, "usable_cores", lambda: 8)
    assert [local.threads_of(count) for count in (1, 2, 3, 8, 20)] == [None, 4, 2, 1, 1]
    assert jobs.process_environment(4, None)["OMP_NUM_THREADS"] == "4"


# How many at once


def trial(processes, rate, host_bytes=2**20, gpu_share=0.0):
    return Trial(processes, rate, host_bytes, gpu_share)


def test_the_fewest_processes_that_nothing_beats_by_much_are_taken():
    assert best_trial([trial(1, 100), trial(2, 103)]).processes == 1
    assert best_trial([trial(1, 100), trial(2, 180), trial(4, 182)]).processes == 2
    assert best_trial([trial(1, 100), trial(2, 90)]).processes == 1


@pytest.fixture
def tried(monkeypatch):
    """Try what a dictionary says, and return the counts that were tried and the lines."""

    def measure(found, most=64):
        def try_one(config, count, seconds):
            if found[count] is None:
                raise FailureError("out of memory")
            return found[count]

        monkeypatch.setattr(local, "try_processes", try_one)
        lines = []
        trials = measure_parallel(TINY, most, lines.append)
        return [one.processes for one in trials], lines

    return measure


def test_counts_double_while_that_gains(tried):
    rates = {1: 100, 2: 180, 4: 184, 8: 400}
    trials = {count: trial(count, rate) for count, rate in rates.items()}
    counts, lines = tried(trials)
    assert counts == [1, 2, 4]
    assert lines[1] == "    2: 180 images/s together, 0.0 GiB each"
    assert tried(trials, most=1)[0] == [1]
    assert tried(trials | {3: trial(3, 300)}, most=3)[0] == [1, 2, 3]


def test_memory_ends_the_trials(tried, monkeypatch):
    monkeypatch.setattr(local, "_free_bytes", lambda: 10 * 2**30)
    monkeypatch.setattr(local, "visible_gpus", lambda: ["0"])
    assert tried({1: trial(1, 100, 5 * 2**30)})[0] == [1]
    small = {1: trial(1, 100, 3 * 2**30), 2: trial(2, 200, 3 * 2**30)}
    assert tried(small)[0] == [1, 2]
    assert tried({1: trial(1, 100, gpu_share=0.5)})[0] == [1]
    # The second one takes the second GPU.
    monkeypatch.setattr(local, "visible_gpus", lambda: ["0", "1"])
    two = {1: trial(1, 100, gpu_share=0.5), 2: trial(2, 200, gpu_share=0.5)}
    assert tried(two)[0] == [1, 2]


def test_too_many_processes_are_told_of_and_a_run_that_cannot_train_fails(tried):
    counts, lines = tried({1: trial(1, 100), 2: None})
    assert counts == [1]
    assert lines[-1] == "    2: out of memory"
    with pytest.raises(FailureError, match="out of memory"):
        tried({1: None})


def test_a_trial_of_two_processes():
    found = try_processes(TINY, 2, 0.5)
    assert found.processes == 2
    assert found.images_per_second > 0
    assert found.host_bytes > 50 * 2**20
    assert (found.gpu_share > 0) == torch.cuda.is_available()


def test_a_trial_that_fails_ends_the_one_that_waits_for_it(monkeypatch):
    started = []

    def spoil(threads, slot):
        started.append(time.monotonic())
        return os.environ | ({"PYTHONHOME": "/nothing"} if slot == 1 else {})

    monkeypatch.setattr(local, "process_environment", spoil)
    with pytest.raises(FailureError, match="failed with exit code 1"):
        try_processes(TINY, 2, 0.5)
    assert time.monotonic() - started[0] < 60


def test_a_trial_says_why_it_fails():
    with pytest.raises(FailureError, match=r"exit code 2: error: .*4000"):
        try_processes(TINY.replace(batch_size=4000), 1, 0.5)
