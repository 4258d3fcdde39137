"""Plans made ahead in a thread: by whom, what happens when it fails, and who waits for it."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fastres.data.augmentation import TensorPlan
from fastres.data.dataset import ImageSet
from fastres.data.loaders import base
from fastres.data.loaders.base import BatchSpec
from fastres.data.loaders.resident import ResidentLoader
from fastres.data.plan import Augmentation

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def batches(*, training=True):
    """Two batches of four black images, of ten where all are served."""
    images = ImageSet(np.zeros((10, 32, 32, 3), np.uint8), np.arange(10))
    grey = (0.5, 0.5, 0.5)
    return BatchSpec(images, grey, grey, 4, 7, Augmentation(), training)


@pytest.fixture
def planned(monkeypatch):
    """(epoch, whether in the main thread) of every plan that is made, and where to plant a fault.

    `planned.fail` is called with the epoch before a plan is made.
    """

    class Planned(list):
        fail = staticmethod(lambda epoch: None)

    made, plan_epoch = Planned(), base.plan_epoch

    def watched(*args, epoch, **options):
        made.append((epoch, threading.current_thread() is threading.main_thread()))
        made.fail(epoch)
        return plan_epoch(*args, epoch=epoch, **options)

    monkeypatch.setattr(base, "plan_epoch", watched)
    return made


def serve(loader, *starts):
    """Serve whole passes, each from an epoch and a batch, and wait for what is made ahead."""
    for epoch, start_batch in starts:
        labels = torch.cat([labels for _, labels in loader.serve(epoch, start_batch)])
        # The label of an image is its index.
        wanted = loader.spec.plan(epoch).index[4 * start_batch :]
        assert labels.tolist() == wanted.tolist()
        loader._plans._ahead.join()


def test_an_epoch_is_planned_while_the_one_before_is_served(planned):
    served = ResidentLoader(batches(), CPU)
    epochs = [torch.cat([labels for _, labels in served]).tolist() for _ in range(2)]
    served._plans.take(2)
    assert planned == [(0, True), (1, False), (2, False)]
    assert epochs == [batches().plan(epoch).index.tolist() for epoch in range(2)]


def test_any_epoch_may_be_asked_for_and_none_is_planned_for_a_glance(planned):
    served = ResidentLoader(batches(), CPU)
    next(served.serve(3))
    assert planned == [(3, True)]
    planned.clear()
    # Every pass asks once more, to compare: the second (n, True) of each.
    serve(served, (0, 0), (1, 0), (5, 1), (5, 0), (6, 0))
    ahead = [epoch for epoch, in_main in planned if not in_main]
    assert ahead == [1, 2, 6, 7]
    assert [epoch for epoch, in_main in planned if in_main] == [0, 0, 1, 5, 5, 5, 5, 6]


def test_an_evaluation_is_planned_for_the_next_one(planned):
    served = ResidentLoader(batches(training=False), CPU)
    serve(served, (0, 0), (0, 0))
    assert sorted(planned) == [(0, False)] * 2 + [(0, True)] * 3


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_fails_in_the_thread_fails_where_the_plan_is_asked_for(planned, monkeypatch):
    served = ResidentLoader(batches(), CPU)
    planned.fail = lambda epoch: 1 / (epoch != 1)
    list(served)
    with pytest.raises(ZeroDivisionError):
        list(served.serve(1))
    assert planned == [(0, True), (1, False), (1, True)]
    planned.fail = lambda epoch: None
    serve(served, (1, 0), (2, 0))

    def start(thread):
        raise RuntimeError("can't start new thread")

    planned.clear()
    monkeypatch.setattr(threading.Thread, "start", start)
    serve(served, (4, 0))
    assert planned == [(4, True), (4, True)]


_STUCK = """
import os, sys, threading, time
from fastres.data.loaders import base
from fastres.data.loaders.plan_ahead import PlanAhead
from tests.data.test_plan_ahead import batches

plan_epoch = base.plan_epoch

def stuck(*args, **options):
    if threading.current_thread() is not threading.main_thread():
        time.sleep(600)
    return plan_epoch(*args, **options)

base.plan_epoch = stuck
plans = PlanAhead(batches())
plans.prepare_after(0)
child = os.fork()
if not child:
    os._exit(len(plans.take(1)))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 8
"""


def test_neither_an_exit_nor_a_forked_process_waits_for_the_thread():
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _STUCK]
    subprocess.run(command, cwd=ROOT, check=True, timeout=30)


def test_a_plan_goes_to_a_gpu_from_pinned_memory_and_without_what_is_unused(monkeypatch):
    calls = []

    def pin(tensor):
        calls.append("pinned")
        return tensor

    def to(tensor, *args, **options):
        calls.append((str(tensor.dtype), args, options))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    cuda = torch.device("cuda")
    plan = TensorPlan(batches().plan(0), cuda)
    assert plan.cutout is None
    copied = [(f"torch.{dtype}", (cuda,), {"non_blocking": True}) for dtype in ("int64", "bool")]
    assert calls == ["pinned", copied[0], "pinned", copied[0], "pinned", copied[1]]


@pytest.mark.gpu
def test_an_epoch_starts_without_waiting_for_the_gpu():
    served = ResidentLoader(batches(), torch.device("cuda"))
    next(served.serve(0))
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)
    list(served.serve(1))
    assert not torch.cuda.current_stream().query()
