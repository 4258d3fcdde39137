"""Triton's cache, filled ahead: with the keys that launches ask for, by a command that says so.

As a program, this file compares two things in a process where Triton compiles: what the tool plans
on meta tensors, and what real steps launch, with the addresses of CPU tensors. Of each launch the
key is taken, and nothing is started.
"""

import json
import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastres.kernels.gpu.launch_table import Gpu
from fastres.kernels.tools import warm, warm_kernels
from fastres.kernels.tools.networks import PRECISIONS, precision_set
from fastres.kernels.tools.warm_kernels import Outcome, PlannedKernel, Workload
from fastres.recipes import RECIPES, from_recipe
from tests.helpers.compiling import run_compiling
from tests.helpers.launch_tables import H100, H200, use_table

__all__ = ["use_table"]

ARCH = "sm_90"
BATCH = 16
INFINITY = float("inf")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_compiling(__file__, TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))


@pytest.mark.parametrize("steps", ["resnet20", "resnet18 pdl"])
def test_launches_ask_for_what_was_compiled(report, steps):
    """In training with every recipe and in evaluation; and for all of it."""
    compared = report[steps]
    assert compared["launched"] > 60
    assert compared["missing"] == 0
    assert compared["unused"] == []


def test_a_pointer_that_is_not_aligned_is_another_kernel(report):
    """So the comparison above sees addresses, which meta tensors have none of."""
    assert report["misaligned"]["missing"] == 2


def test_what_a_process_launched_before_changes_no_key(report):
    """Triton 3.6 would have it so."""
    assert report["same in any order"]


def test_kernels_are_compiled_once_in_time_and_failures_named(report):
    first, again, late, wrong = report["filled"]
    assert first == 2 * [["compiled", ""]]
    assert again == 2 * [["cached", ""]]
    assert late == [["left", ""]]
    assert wrong == [["failed", "AssertionError: num_warps must be a power of 2"]]


@pytest.mark.slow
def test_launches_of_every_precision_ask_for_what_was_compiled():
    """Of both networks at training batch, and at one that 16 does not divide."""
    for name, compared in run_compiling(__file__, WHOLE="1").items():
        assert compared["missing"] == 0, name
        assert compared["unused"] == [], name


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Run the command on kernels that are not compiled, with these outcomes."""
    monkeypatch.setattr(warm, "why_not_compile", lambda: None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    asked = SimpleNamespace()

    def run(*argv, outcomes=()):
        def fill_cache(planned, jobs, deadline):
            asked.jobs, asked.deadline = jobs, deadline
            for i, outcome in enumerate(outcomes):
                if outcome is KeyboardInterrupt:
                    raise outcome
                build = SimpleNamespace(kernel=f"_kernel{i}", key=f"key{i}")
                yield PlannedKernel(build, asked.workloads[0], "stem", True, (False, i)), outcome

        def plan_kernels(arch, workloads, pdl):
            asked.arch, asked.workloads, asked.pdl = arch, workloads, pdl
            return []

        monkeypatch.setattr(warm_kernels, "plan_kernels", plan_kernels)
        monkeypatch.setattr(warm_kernels, "fill_cache", fill_cache)
        return warm.main(argv), asked

    return run


def test_the_command_says_what_became_of_the_kernels(command, tmp_path, capsys):
    (tmp_path / "entry").write_bytes(bytes(300_000))
    out = tmp_path / "out" / "report.json"
    out.parent.mkdir()
    outcomes = [
        Outcome("cached"),
        Outcome("compiled", 2.5),
        Outcome("left"),
        Outcome("failed", 1.0, "RuntimeError: too many registers"),
    ]
    argv = ["--arch", "sm_90", "--batches", "512", "1000", "--budget", "60", "--pdl", "both"]
    code, asked = command(*argv, "--jobs", "3", "--json", str(out), "-v", outcomes=outcomes)
    assert code == 1
    assert (asked.arch, asked.pdl, asked.jobs) == ("sm_90", "both", 3)
    assert len(asked.workloads) == 8
    assert Workload("resnet18", "inference", "bf16", 1000) in asked.workloads
    printed, errors = capsys.readouterr()
    where = "resnet20 stem training bf16 batch 512 pdl"
    assert printed.startswith(f"cached 0.0 s: kernel0 of {where}\ncompiled 2.5 s: kernel1 of ")
    assert "1 compiled, 1 cached before, 1 failed, 1 left; " in printed
    assert f"{tmp_path} holds 0.3 MB\n1 kernels were not begun in 60 s" in printed
    assert errors == f"failed: kernel3 of {where}: RuntimeError: too many registers\n"
    written = json.loads(out.read_text())
    assert [kernel["state"] for kernel in written["kernels"]] == [o.state for o in outcomes]
    assert (written["arch"], written["cache_bytes"]) == ("sm_90", 300_000)


def test_codes_of_success_and_of_an_interruption(command, tmp_path):
    folder = tmp_path / "cache"
    code, asked = command("--arch", "sm_100", "--cache", str(folder), outcomes=[Outcome("left")])
    assert (code, asked.deadline, asked.pdl) == (0, INFINITY, "table")
    assert os.environ["TRITON_CACHE_DIR"] == str(folder)
    assert command("--arch", "sm_90", outcomes=[KeyboardInterrupt])[0] == 130


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no NVIDIA GPU is here: name an architecture with --arch"),
        (["--arch", "sm_75"], "--arch must be sm_80 or later"),
        (["--arch", "hopper"], "--arch must be sm_80 or later"),
        (["--arch", "sm_90", "--batches", "0"], "--batches must be at least 1, got 0"),
        (["--arch", "sm_90", "--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--arch", "sm_90", "--budget", "nan"], "--budget must be above 0 seconds, got nan"),
        (["--arch", "sm_90", "--json", "/no/such/file"], "--json: there is no folder /no/such"),
    ],
)
def test_wrong_use_is_refused_in_one_sentence(command, argv, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command(*argv)[0] == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1


def test_the_table_decides_what_is_planned(use_table, monkeypatch):
    """The GPU here where it is meant; else those of the architecture that were measured, or any."""
    monkeypatch.setattr(warm_kernels, "arch_here", lambda: None)
    use_table((H200, "measured", {}, True))
    assert warm_kernels.gpus_of("sm_90") == [H200]
    assert warm_kernels.gpus_of("sm_120") == [Gpu("sm_120", (12, 0))]
    a100 = Gpu("NVIDIA A100", (8, 0))
    choices = {
        (gpu.name, pdl): warm_kernels._pdl_choices(gpu, pdl)
        for gpu in (H200, a100)
        for pdl in ("table", "off", "both")
    }
    assert choices[H200.name, "table"] == (True,)
    # A card that was not measured does as the other of its capability.
    assert warm_kernels._pdl_choices(H100, "table") == (True,)
    assert choices[H200.name, "off"] == (False,)
    assert choices[H200.name, "both"] == (False, True)
    assert {choices[a100.name, pdl] for pdl in ("table", "off", "both")} == {(False,)}


def real_keys(network, dtype, batch, *, pdl, recipes, spoil=lambda images: images):
    """Keys that launches of training, with these recipes, and of evaluation ask for."""
    from fastres.kernels.dispatch import force_backend
    from fastres.kernels.gpu import backend, launch
    from fastres.kernels.gpu.launch_table import assume_gpu
    from fastres.kernels.reference import block as ref
    from fastres.kernels.tools.cache_keys import collecting_keys
    from fastres.kernels.tools.stand_in_driver import standing_in

    patch = pytest.MonkeyPatch()
    patch.setattr(launch, "_check_not_on_cpu", lambda kernel, device: None)
    patch.setattr(launch, "uses_pdl", lambda device: pdl)
    # What cuDNN would compute asks for no key, and takes a CPU long.
    patch.setattr(ref, "conv_wgrad_ref", empty_filter_gradient)
    with ExitStack() as stack, collecting_keys() as keys:
        for context in (
            patch.context(),
            force_backend(backend),
            standing_in(90, remembers=False),
            assume_gpu(warm_kernels.gpus_of(ARCH)[0]),
            precision_set(PRECISIONS[dtype]),
        ):
            stack.enter_context(context)
        # And cutout, which only some networks have from a recipe.
        configs = [from_recipe(recipe, network) for recipe in recipes]
        for config in (*configs, from_recipe("standard", network).replace(cutout=16)):
            config = config.replace(batch_size=batch, shortcut="B")
            train_and_evaluate(config, PRECISIONS[dtype].dtype, spoil)
    patch.undo()
    return set(keys)


def empty_filter_gradient(x, dy, filter_size, **_):
    return x.new_empty(dy.shape[1], x.shape[1], *filter_size)


def train_and_evaluate(config, dtype, spoil):
    """Two steps, of images as the loader makes them and as a graph takes them; one evaluation."""
    from fastres.data.dataset import ImageSet
    from fastres.data.loaders import BatchSpec, build_loader, resident
    from fastres.data.plan import NO_AUGMENTATION, Augmentation
    from fastres.engine.evaluation import evaluate
    from fastres.engine.runtime import Runtime
    from fastres.engine.step import TrainStep
    from fastres.fusion.fuse import fuse
    from fastres.kernels.gpu.augment import augment_normalize
    from fastres.model.resnet import create_model

    device = torch.device("cpu")
    runtime = Runtime(device, dtype, channels_last=True, route="fused", fused_optimizer=True)
    model = fuse(create_model(config.model), verbose=False)
    runtime.place(model)
    step = TrainStep(model.train(), config, runtime, total_steps=10)
    images = ImageSet(
        np.zeros((config.batch_size, 32, 32, 3), np.uint8), np.zeros(config.batch_size, np.int64)
    )
    augmentation = Augmentation(config.crop_padding, config.flip, config.cutout)
    spec = BatchSpec(images, (0.5,) * 3, (0.5,) * 3, config.batch_size, 0, augmentation, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resident, "_find_kernel", lambda device: augment_normalize)
        training = build_loader("resident", spec, device)
        evaluation = build_loader(
            "resident", replace(spec, augmentation=NO_AUGMENTATION, training=False), device
        )
    for batch, labels in training.serve(0):
        step(0, batch, labels)
        step(1, spoil(batch.to(step.input_dtype)), labels)
    evaluate(model, evaluation, runtime)


def misaligned(images):
    """The same images, not at a multiple of 16 bytes."""
    n, c, h, w = images.shape
    memory = torch.empty(images.numel() + 1, dtype=images.dtype)[1:]
    return memory.view(n, h, w, c).permute(0, 3, 1, 2).copy_(images)


def planned_kernels(network, dtype, batch=BATCH, pdl="off"):
    workloads = [Workload(network, phase, dtype, batch) for phase in warm.PHASES]
    return warm_kernels.plan_kernels(ARCH, workloads, pdl)


def compare_keys(
    network, dtype, batch=BATCH, *, pdl=False, recipes=RECIPES, spoil=lambda images: images
):
    """What launches ask for and is not planned, and what is planned for no launch."""
    kernels = planned_kernels(network, dtype, batch, "on" if pdl else "off")
    planned = {kernel.build.key: kernel.build.kernel for kernel in kernels}
    real = real_keys(network, dtype, batch, pdl=pdl, recipes=recipes, spoil=spoil)
    missing = len(real - planned.keys())
    return {"launched": len(real), "missing": missing, "unused": [*{*planned} - real]}


def have_one_key_in_any_order(kernels):
    """Whether it matters to the keys which kernel a process launches first."""
    from triton.runtime.jit import JITCallable

    from fastres.kernels.tools.cache_keys import collecting_keys

    found = []
    for builds in (kernels, kernels[::-1]):
        for module in [m for name, m in sys.modules.items() if name.startswith("fastres.kernels")]:
            for value in vars(module).values():
                if isinstance(value, JITCallable):
                    value.hash, value.used_global_vals = None, {}
        with collecting_keys() as keys:
            for kernel in builds:
                kernel.build.run_launcher(remembers=False)
        found.append({*keys})
    return found[0] == found[1]


def fill_a_cache(kernels):
    """Compile two kernels in processes, then again, too late, and in a way that cannot be."""
    two, later = kernels[-2:], kernels[-3:-2]
    wrong = replace(later[0].build, key="00" * 32, options={"num_warps": 3})
    no_such = replace(later[0], build=wrong)
    return [
        [
            [outcome.state, outcome.error]
            for _, outcome in warm_kernels.fill_cache(chosen, jobs, deadline)
        ]
        for chosen, jobs, deadline in (
            (two, 2, INFINITY),
            (two, 2, 0.0),
            (later, 2, 0.0),
            ([no_such], 1, INFINITY),
        )
    ]


def compare_whole():
    return {
        f"{network} {dtype} {batch}": compare_keys(network, dtype, batch)
        for network, batch in (("resnet20", 512), ("resnet20", 6), ("resnet18", 24))
        for dtype in PRECISIONS
    }


def main():
    report = {
        "resnet20": compare_keys("resnet20", "bf16"),
        "resnet18 pdl": compare_keys("resnet18", "bf16", pdl=True),
        "misaligned": compare_keys("resnet20", "bf16", recipes=["standard"], spoil=misaligned),
    }
    kernels = planned_kernels("resnet20", "bf16")
    report["same in any order"] = have_one_key_in_any_order(kernels)
    report["filled"] = fill_a_cache(kernels)
    return report


if __name__ == "__main__":
    print(json.dumps(compare_whole() if os.environ.get("WHOLE") else main()))
