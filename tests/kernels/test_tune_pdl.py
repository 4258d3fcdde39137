"""The tuner's last choice, programmatic dependent launch: all but the time that a GPU takes."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastres.kernels.gpu import backend as gpu_backend
from fastres.kernels.gpu import launch_table
from fastres.kernels.gpu.launch import recording
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.launch_table import Gpu, assume_gpu, forget_table, gpu_of, uses_pdl
from fastres.kernels.gpu.table_file import read_table
from fastres.kernels.reference import backend as reference_backend
from fastres.kernels.tools import networks, tune, tune_pdl
from fastres.kernels.tools.candidates import GpuLimits
from fastres.kernels.tools.network_launches import record_training
from fastres.kernels.tools.networks import NETWORKS, PRECISIONS, network_blocks
from fastres.kernels.tools.table_writer import merge_table
from fastres.kernels.tools.tune_pdl import (
    MIN_SPEEDUP,
    NetworkStep,
    PdlChoice,
    StepName,
    choose_pdl,
    network_step,
)
from fastres.kernels.tools.tuner import GpuLostError, Tuner
from tests.helpers.interpreter import DEVICE, needs_gpu

BF16 = PRECISIONS["bf16"]
SMALL, LARGE = StepName("resnet20", 2, "bf16"), StepName("resnet18", 2, "bf16")
TILE = ConvConfig(64, 16, 32, 4, 3)
X, Y = (f"{op}/bfloat16/n2/h6w6c3k5r3s3u1p1" for op in ("fprop", "wgrad"))


@pytest.fixture
def runs(monkeypatch):
    """Steps that do nothing but tell how they were run, and how large their numbers are."""
    seen = SimpleNamespace(switches=[], entries=[], deterministic=[], change=0.0)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    forced, assumed = launch_table._forced_pdl, launch_table._assumed_entries

    def run(step, backend):
        seen.switches.append(forced.value)
        seen.entries.append(assumed.value.entries)
        seen.deterministic.append(torch.backends.cudnn.deterministic)
        return [torch.tensor([1.0 + seen.change * bool(forced.value), torch.nan])]

    monkeypatch.setattr(NetworkStep, "run", run)
    monkeypatch.setattr(tune_pdl, "network_step", lambda *_: NetworkStep(BF16, (), None, None))
    return seen


def choose(seconds, names=(SMALL, LARGE), entries=None, **options):
    """The choice of a tuner whose timer is told the seconds; what it said, what it timed."""
    said, timed = [], []

    def timer(trials):
        for trial in trials:
            trial.run()
        timed.append([trial.label for trial in trials])
        return [seconds(trial.label) for trial in trials]

    made = Tuner(DEVICE, None, say=said.append, **options)
    return choose_pdl(made, names, entries or {}, timer), said, timed


def with_it_times(speedup):
    """Seconds where programmatic dependent launch makes a step faster so many times."""
    return lambda label: 1 / speedup if label.endswith("True") else 1.0


@pytest.mark.parametrize(
    ("speedup", "enabled"),
    [(1.5, True), (MIN_SPEEDUP + 1e-3, True), (MIN_SPEEDUP - 1e-3, False), (0.9, False)],
)
def test_it_is_on_where_whole_steps_are_faster(speedup, enabled, runs):
    entries = {X: TILE}
    choice, said, timed = choose(with_it_times(speedup), entries=entries)
    assert choice.enabled is enabled
    assert choice.seconds == dict.fromkeys((SMALL, LARGE), (1 / speedup, 1.0))
    assert said == []
    assert [len(race) for race in timed] == [2, 2]
    # Of each step, both ways in the check and both in the race, with the entries of the table.
    assert runs.switches == [False, True, True, False] * 2
    assert all(found == entries for found in runs.entries)
    assert runs.deterministic == [True, True, False, False] * 2


def test_every_network_counts_alike(runs):
    def seconds(label):
        times = {"resnet20": (0.8, 1.0), "resnet18": (11.0, 10.0)}
        return next(t for name, t in times.items() if name in label)[label.endswith("False")]

    assert choose(seconds)[0].enabled is True
    assert choose(seconds, [LARGE])[0].enabled is False


def test_what_changes_results_is_off_and_not_timed(runs):
    runs.change = 1e-6
    choice, said, timed = choose(with_it_times(2.0))
    assert choice == PdlChoice(False, {})
    assert said == [
        "left out: programmatic dependent launch, resnet20, 2 images, bf16: it changes results",
    ]
    assert timed == []
    assert torch.backends.cudnn.deterministic is False


def test_a_gpu_that_has_none_is_left_as_it_is(runs):
    choice, said, timed = choose(with_it_times(2.0), gpu=GpuLimits(has_pdl=False))
    assert choice is None
    assert said == ["programmatic dependent launch: this GPU has none"]
    assert timed == []
    assert runs.switches == []


@pytest.mark.parametrize("num_timed", [0, 1])
def test_the_budget_is_looked_at_before_each_step(num_timed, runs):
    """One step in time decides; none leaves the table as it is."""
    clock = SimpleNamespace(now=0)

    def seconds(label):
        clock.now += 1
        return with_it_times(2.0)(label)

    choice, said, timed = choose(seconds, deadline=2 * num_timed, clock=lambda: clock.now)
    assert len(timed) == num_timed
    assert (choice is not None and choice.enabled) == bool(num_timed)
    step = (SMALL, LARGE)[num_timed]
    assert said == [f"not timed: programmatic dependent launch, {step}: no time is left"]


def test_a_step_that_fails_is_named_and_another_decides(runs):
    def seconds(label):
        if "resnet20" in label:
            raise RuntimeError("out of memory\nand more")
        return with_it_times(2.0)(label)

    choice, said, _ = choose(seconds)
    assert choice == PdlChoice(True, {LARGE: (0.5, 1.0)})
    assert said == [
        f"not timed: programmatic dependent launch, {SMALL}: RuntimeError: out of memory"
    ]
    assert choose(seconds, [SMALL])[0] is None


def test_a_lost_gpu_ends_the_run(runs):
    lost = []

    def seconds(label):
        lost.append(label)
        raise RuntimeError("CUDA error: unspecified launch failure")

    def synchronize():
        if lost:
            raise RuntimeError("CUDA error: unspecified launch failure")

    with pytest.raises(GpuLostError, match="programmatic dependent launch, resnet20"):
        choose(seconds, synchronize=synchronize)
    assert len(lost) == 1


@pytest.mark.parametrize("network", NETWORKS)
def test_a_step_launches_what_the_blocks_of_training_launch(network):
    name = StepName(network, 4, "bf16")
    with recording() as launches:
        network_step(name, torch.device("meta")).run(gpu_backend)
    listed = Counter()
    for block in network_blocks(network, 4):
        for launch in record_training(block, BF16):
            listed[launch.name, launch.traffic] += block.count
    assert listed
    for launch in launches:
        listed[launch.name, launch.traffic] -= 1
    # What torch launches is in the list too.
    left = {name for (name, _), count in listed.items() if count}
    assert not {name for name in left if name.endswith("_kernel")}


def test_both_ways_are_compiled(monkeypatch):
    launches = tune_pdl._launches(SMALL)
    assert Counter(launch.options["launch_pdl"] for launch in launches) == {
        True: len(launches) / 2,
        False: len(launches) / 2,
    }
    assert len({launch.name for launch in launches}) > 5


def test_the_numbers_of_a_step_are_those_of_the_reference(monkeypatch):
    """Of a narrower net, in fp32 by the two back ends: outputs and gradients by their norms."""
    monkeypatch.setitem(networks.NETWORKS, "tiny", ((4, 8), 1))
    step = network_step(StepName("tiny", 1, "fp32"), DEVICE)
    got, wanted = (step.run(backend) for backend in (gpu_backend, reference_backend))
    # Output, then filters, weight and bias of the stem, two layers, and two with a projection.
    assert len(got) == 1 + 3 * (1 + 2 + 3)
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()
    assert all(t.isfinite().all() for t in got)


def test_the_table_keeps_the_choice_and_all_else(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    one, other = Gpu("A", (9, 0)), Gpu("B", (9, 0))
    merge_table(path, one, {X: TILE}, {}, pdl=True)
    merge_table(path, other, {}, {}, pdl=False)
    assert {name: of.pdl for name, of in read_table(path).gpus.items()} == {"A": True, "B": False}
    merge_table(path, one, {Y: TILE}, {})
    merge_table(path, one, {}, {}, pdl=False)
    # Nothing that was read before stands in the way of what is written.
    gpus = read_table(path).gpus
    assert {name: of.pdl for name, of in gpus.items()} == {"A": False, "B": False}
    assert gpus["A"].entries == {X: TILE, Y: TILE}


@pytest.mark.parametrize(("has_pdl", "speedup"), [(True, 2.0), (True, 0.5), (False, 2.0)])
def test_the_command_writes_the_choice_last_and_leaves_time_for_it(
    has_pdl, speedup, runs, tmp_path, monkeypatch, capsys
):
    deadlines = []

    class Rounds(Tuner):
        def run(self, workloads):
            deadlines.append(self.deadline)
            yield SimpleNamespace(round="forms", choices=[])

        def is_late(self):
            deadlines.append(self.deadline)
            return False

    made = Rounds(DEVICE, None, gpu=GpuLimits(has_pdl=has_pdl))
    monkeypatch.setattr(tune, "_tuner", lambda *_: made)
    monkeypatch.setattr(tune, "_step_timer", lambda device: lambda trials: [0.5, 0.5 * speedup])
    monkeypatch.setattr(tune, "_obstacle", lambda options: None)
    monkeypatch.setattr(tune, "_workloads", lambda options: [])
    monkeypatch.setattr(tune, "_provenance", lambda options, device: {})
    monkeypatch.setattr(tune.time, "monotonic", lambda: 1000.0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    path, gpu = tmp_path / "table.json", Gpu("A GPU", (9, 0))
    merge_table(path, gpu, {X: TILE}, {})
    guess = replace(TILE, num_stages=1)
    arch = Gpu("sm_90", (9, 0))
    merge_table(path, arch, {X: guess, Y: guess}, {}, basis="ESTIMATE")
    argv = ["--out", str(path), "--budget", "70", "--batches", "2", "4", "--models", "resnet20"]
    with assume_gpu(gpu):
        assert tune.main(argv) == 0
    out = capsys.readouterr().out
    section = read_table(path).gpus["A GPU"]
    assert section.entries == {X: TILE}
    if not has_pdl:
        assert section.pdl is None
        assert "programmatic dependent launch: this GPU has none" in out
        assert deadlines == [1070.0]
        return
    assert section.pdl is (speedup > 1)
    # Steps are launched as training would launch them.
    assert runs.entries[0] == {X: TILE, Y: guess}
    for batch in (2, 4):
        assert (
            f"resnet20, {batch} images, bf16: 500000.0 us with programmatic dependent launch, "
            f"{5e5 * speedup:.1f} us without, {speedup:.3f} times" in out
        )
    assert f"programmatic dependent launch: {'on' if speedup > 1 else 'off'}\n" in out
    assert deadlines == [1060.0, 1070.0, 1070.0]


@needs_gpu
@pytest.mark.slow
def test_this_gpu_is_asked(tmp_path, monkeypatch):
    """Both ways compute the same bits, and kernels start as the table says."""
    device = torch.device("cuda", torch.cuda.current_device())
    said = []
    has_pdl = torch.cuda.get_device_capability(device) >= (9, 0)
    made = Tuner(device, None, gpu=GpuLimits(has_pdl=has_pdl), say=said.append)
    choice = choose_pdl(made, [StepName("resnet20", 64, "bf16")], {}, tune._step_timer(device))
    assert (choice is not None) == has_pdl
    assert has_pdl or said
    if choice is None:
        return
    assert said == []
    (times,) = choice.seconds.values()
    assert all(0 < seconds < 1 for seconds in times)
    path = tmp_path / "table.json"
    merge_table(path, gpu_of(device), {}, {}, pdl=True)
    monkeypatch.setattr(launch_table, "TABLE_PATH", path)
    forget_table()
    assert uses_pdl(device)
    forget_table()
