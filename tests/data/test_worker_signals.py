"""Worker processes of the torch loader under the signals that a run gets."""

import os
import signal
import subprocess

import pytest
import torch

import fastres
from fastres.data.loaders.worker_signals import signals_held
from tests.helpers.tiny_run import children


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_workers_outlive_the_signals_that_stop_a_run(number):
    served = {}
    for name, workers in (("resident", None), ("torch", 2)):
        before = set(children(os.getpid()))
        loader = fastres.make_loader(
            "synthetic", split="test", batch_size=400, loader=name, workers=workers
        )
        served[name] = []
        for images, _ in loader:
            served[name].append(images)
            started = set(children(os.getpid())) - before
            assert len(started) == (workers or 0)
            # From somebody else: a worker obeys the process that started it.
            if started:
                subprocess.run(["kill", f"-{number}", *map(str, started)], check=True)
    assert torch.equal(torch.cat(served["torch"]), torch.cat(served["resident"]))


def test_a_worker_starts_with_its_signals_held():
    """Between its fork and the first thing that it does itself there is no other moment."""
    with signals_held():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
