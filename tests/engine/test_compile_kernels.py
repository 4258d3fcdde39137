"""Before its first step a run has its kernels compiled side by side, whatever its network is.

As a program, this file prepares a run in a process where Triton would compile for a GPU that a
driver stands in for. The compiler is replaced: what it is asked for and what is launched is counted
and nothing else happens.
"""

import json
import threading
from contextlib import ExitStack, contextmanager

import pytest
import torch

from fastres.config import Config
from fastres.engine.evaluation import compile_evaluation, evaluate
from fastres.engine.runtime import Runtime
from fastres.engine.step import TrainStep
from fastres.fusion.fuse import fuse
from fastres.kernels.gpu.launch_table import Gpu
from fastres.model.resnet import create_model
from tests.helpers.compiling import run_compiling

BATCH, EVAL_BATCH, NUM_IMAGES = 8, 6, 13
TIMEOUT = 60
FAILS = "_sgd_kernel"
# Of two sizes of images, and of a network that no launch table names.
CONFIG = Config(
    fast=True, model="resnet11", width=0.25, batch_size=BATCH, eval_batch_size=EVAL_BATCH,
    low_res_share=0.5, low_res=24,
)  # fmt: skip


@pytest.fixture(scope="module")
def report():
    return run_compiling(__file__)


def test_preparing_compiles_and_launches_nothing(report):
    assert len(report["prepared"]["compiled"]) > 30
    assert report["prepared"]["launched"] == []
    assert report["changed"] == []


def test_two_are_compiled_at_once(report):
    assert report["side by side"]


def test_backward_is_not_left_to_a_thread_of_autograd(report):
    """On a GPU it would be, and no context variable of ours is seen there."""
    assert report["multithreaded"] == [False]


def test_the_steps_compile_nothing_but_what_failed(report):
    """As the first launch has it compiled again, and what it raises is for people to see."""
    assert report["trained"]["compiled"] == [FAILS]
    assert len(report["trained"]["launched"]) > 60


def test_an_evaluation_compiles_nothing(report):
    """With a last batch of its own size."""
    assert len(report["evaluation prepared"]["compiled"]) > 5
    assert report["evaluated"]["compiled"] == []
    assert len(report["evaluated"]["launched"]) > 10


@pytest.mark.gpu
def test_a_gpu_finds_its_kernels_compiled(monkeypatch):
    import triton

    asked = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_cache_hook", lambda **given: asked.append(given["repr"])
    )
    runtime = Runtime(
        torch.device("cuda"),
        torch.bfloat16,
        channels_last=True,
        route="fused",
        fused_optimizer=True,
    )
    step, batch = new_step(runtime)
    step.prepare(*batch)
    assert len(asked) > 30
    asked.clear()
    step(0, *batch)
    step(step.total_steps - 1, *batch)
    assert asked == []


class Compiler:
    """Counts what is compiled and launched; a first compilation of FAILS fails."""

    def __init__(self):
        self.compiled, self.launched, self.failed = [], [], False
        self._two = threading.Barrier(2)
        self.side_by_side = None

    def compile(self, src, **_):
        name = src.fn.__name__
        if self.side_by_side is None:
            try:
                self._two.wait(TIMEOUT)
                self.side_by_side = True
            except threading.BrokenBarrierError:
                self.side_by_side = False
        self.compiled.append(name)
        if name == FAILS and not self.failed:
            self.failed = True
            raise RuntimeError("no such instruction")
        return Kernel(name, self.launched)

    def report(self):
        """What was counted since the last report."""
        found = {"compiled": [*self.compiled], "launched": [*self.launched]}
        self.compiled.clear()
        self.launched.clear()
        return found


class Kernel:
    """What the launcher asks of a compiled kernel."""

    function = packed_metadata = None

    def __init__(self, name, launched):
        self._name, self._launched = name, launched

    def launch_metadata(self, *_):
        return None

    def run(self, *_):
        self._launched.append(self._name)


class Zeros:
    """A loader of black images."""

    def serve(self, epoch):
        for size in (EVAL_BATCH, EVAL_BATCH, NUM_IMAGES - 2 * EVAL_BATCH):
            yield torch.zeros(size, 3, 32, 32), torch.zeros(size, dtype=torch.int64)


def new_step(runtime):
    """A step, and a batch for it."""
    model = fuse(create_model(CONFIG.model, width=CONFIG.width), verbose=False)
    runtime.place(model)
    step = TrainStep(model.train(), CONFIG, runtime, total_steps=4)
    images = torch.zeros(BATCH, 3, 32, 32, device=runtime.device)
    return step, (images, torch.zeros(BATCH, dtype=torch.int64, device=runtime.device))


@contextmanager
def counted(multithreaded):
    """Compile and launch nothing; add to a set whether autograd has threads where it launches."""
    import triton

    from fastres import host
    from fastres.kernels.dispatch import force_backend
    from fastres.kernels.gpu import backend, launch
    from fastres.kernels.gpu.launch_table import assume_gpu
    from fastres.kernels.tools.stand_in_driver import standing_in

    compiler = Compiler()

    def note(_device):
        multithreaded.add(torch._C._is_multithreading_enabled())
        return False

    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(launch, "_check_not_on_cpu", lambda kernel, device: None)
        patch.setattr(launch, "uses_pdl", note)
        patch.setattr(host, "usable_cores", lambda: 2)
        patch.setattr(triton.compiler, "compile", compiler.compile)
        for context in (force_backend(backend), standing_in(90), assume_gpu(Gpu("x", (9, 0)))):
            stack.enter_context(context)
        yield compiler


def main():
    multithreaded = set()
    runtime = Runtime(
        torch.device("cpu"), torch.bfloat16, channels_last=True, route="fused", fused_optimizer=True
    )
    with counted(multithreaded) as compiler:
        step, batch = new_step(runtime)
        before = {name: value.clone() for name, value in step.model.state_dict().items()}
        step.prepare(*batch)
        report = {"prepared": compiler.report(), "multithreaded": [*multithreaded]}
        report["changed"] = [
            name for name, value in step.model.state_dict().items() if not value.equal(before[name])
        ]
        step(0, *batch)
        step(step.total_steps - 1, *batch)
        report["trained"] = compiler.report()
        compile_evaluation(step.model, NUM_IMAGES, CONFIG, runtime)
        report["evaluation prepared"] = compiler.report()
        evaluate(step.model, Zeros(), runtime)
        report["evaluated"] = compiler.report()
    return report | {"side by side": compiler.side_by_side}


if __name__ == "__main__":
    print(json.dumps(main()))
