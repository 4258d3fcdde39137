"""The tuner: everything but the time that a GPU takes, with a timer that is told the times."""

import fnmatch
import gc
import json
import os
import re
import subprocess
import sys
import tomllib
import weakref
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import get_args
from unittest.mock import MagicMock

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.gpu import backend as gpu_backend
from fastres.kernels.gpu import counters, launch_table
from fastres.kernels.gpu.launch import recording
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.launch_rules import pixel_config, tma_config
from fastres.kernels.gpu.launch_table import Gpu, assume_entries, assume_gpu, gpu_of
from fastres.kernels.gpu.table_file import read_table
from fastres.kernels.reference import backend as reference_backend
from fastres.kernels.tools import graph_timer, tune, tune_workloads
from fastres.kernels.tools.candidates import (
    STARTS,
    GpuLimits,
    Product,
    distance,
    heuristic_start,
    im2col_start,
    neighbourhood,
    product_of,
    start_configs,
    unmeasured_start,
)
from fastres.kernels.tools.error_check import map_tensors
from fastres.kernels.tools.graph_timer import L2, GraphTimer, Trial
from fastres.kernels.tools.launchers import build_launcher
from fastres.kernels.tools.networks import NETWORKS, PRECISIONS, network_convs
from fastres.kernels.tools.peak_rates import PEAK_RATES
from fastres.kernels.tools.table_writer import merge_table
from fastres.kernels.tools.tune_workloads import (
    ConvCase,
    ConvVariant,
    ConvWorkload,
    ParityCheck,
    conv_workloads,
    make_case,
)
from fastres.kernels.tools.tuner import (
    RACE_SIZE,
    TILE_GAIN,
    GpuLostError,
    Tuner,
)
from tests.helpers.interpreter import DEVICE, HAS_GPU, needs_gpu
from tests.helpers.launch_tables import use_table

__all__ = ["use_table"]

REPO = Path(__file__).resolve().parents[2]
BF16, FP32 = PRECISIONS["bf16"], PRECISIONS["fp32"]
FIRST, INNER = ConvVariant(False, True, True), ConvVariant(True, False, True)
GPU = GpuLimits()
SMALL = ConvShape(2, 6, 6, 3, 5)
WORKLOAD = ConvWorkload(SMALL, BF16, {FIRST: 1, INNER: 2}, bytes=1)
STEM = ConvWorkload(SMALL, BF16, {ConvVariant(False, False, False): 1}, bytes=1)
OTHER = ConvWorkload(ConvShape(2, 4, 4, 5, 3), BF16, {INNER: 1}, bytes=1)
TILE = ConvConfig(64, 16, 32, 4, 3)
A, B = Gpu("A", (9, 0)), Gpu("B", (9, 0))
X, Y = (f"{op}/bfloat16/n2/h6w6c3k5r3s3u1p1" for op in ("fprop", "wgrad"))


class Told:
    """A timer that is told the seconds of a trial by its label; it runs each trial once."""

    def __init__(self, seconds=lambda label: 1.0):
        self.seconds = seconds
        self.labels, self.races = [], []

    def __call__(self, trials):
        self.races.append([trial.label for trial in trials])
        self.labels += self.races[-1]
        for trial in trials:
            trial.run()
        return [self.seconds(trial.label) for trial in trials]


def tuner(timer, **options):
    left_out = []
    made = Tuner(DEVICE, timer, say=left_out.append, **options)
    return made, left_out


def run(timer, workloads=(WORKLOAD,), **options):
    """All choices of a run, by key, the last of each; and what was left out."""
    made, left_out = tuner(timer, **options)
    choices = {c.key.partition("/")[0]: c for t in made.run(workloads) for c in t.choices}
    return choices, left_out


def add_form(monkeypatch, form, **knobs):
    """Let every fprop and dgrad (of "fused": every dgrad) begin with such a configuration too.

    Its kernel need not exist: a launch that a form cannot take is computed by another.
    """
    start = ConvConfig(64, 16, 16, 4, 1, form=form, **knobs)
    ops = ("dgrad",) if form == "fused" else ("fprop", "dgrad")
    monkeypatch.setitem(STARTS, form, lambda product: start if product.op in ops else None)
    return start


@pytest.fixture
def instant(monkeypatch):
    """Every candidate is right and runs in no time: for tests of what is tried, and when."""
    monkeypatch.setattr(ParityCheck, "__call__", lambda *_: None)
    monkeypatch.setattr(ConvCase, "run", lambda *_: None)


def products(op, precision=BF16, network="resnet18"):
    return [Product(op, conv.shape, precision) for conv in network_convs(network, 512)]


def test_the_fastest_route_is_chosen_for_equal_work():
    timer = Told(lambda label: 0.5 ** label.count("route='cudnn'"))
    choices, left_out = run(timer, limit=1)
    assert left_out == []
    forward, dgrad, wgrad = (choices[op] for op in ("fprop", "dgrad", "wgrad"))
    assert forward.key == "fprop/bfloat16/n2/h6w6c3k5r3s3u1p1"
    assert [choice.config.route for choice in (forward, dgrad, wgrad)] == ["cudnn"] * 3
    # One layer of one variant, two of the other.
    assert (forward.seconds, forward.baseline_seconds) == (3 * 0.5, 3)
    assert dgrad.speedup == wgrad.speedup == 4
    # Both gradients at once on all four pairs of routes, in both variants.
    pairs = {label for label in timer.labels if label.count("ConvConfig") == 2}
    assert len({label for label in pairs if label.count("route='cudnn'") == 1}) == 4
    assert len({label for label in pairs if label.count("route='cudnn'") == 2}) == 2


def test_the_fastest_tiles_are_chosen_where_cudnn_is_slow():
    start = {op: start_configs(Product(op, SMALL, BF16), GPU)[0] for op in ("fprop", "wgrad")}
    near = {op: neighbourhood(Product(op, SMALL, BF16), start[op], GPU)[:3] for op in start}
    fast = {op: configs[-1] for op, configs in near.items()}

    def seconds(label):
        if "cudnn" in label:
            return 9.0
        return 0.5 if any(str(config) in label for config in fast.values()) else 1.0

    choices, _ = run(Told(seconds), [STEM], limit=3)
    assert {op: choice.config for op, choice in choices.items()} == fast
    assert all(choice.speedup == 2 for choice in choices.values())


def test_forms_of_all_layers_come_before_tiles_and_near_tiles_before_far_ones(instant):
    timer = Told()
    made, _ = tuner(timer, limit=RACE_SIZE + 2)
    rounds = [(t.round, t.choices[0].key) for t in made.run([WORKLOAD, OTHER])]
    first, second = (f"fprop/bfloat16/n2/{w.shape.layer_key}" for w in (WORKLOAD, OTHER))
    assert rounds == [("forms", first), ("forms", second), ("tiles", first), ("tiles", second)]
    product = Product("fprop", SMALL, BF16)
    start = start_configs(product, GPU)[0]
    near = neighbourhood(product, start, GPU)[: RACE_SIZE + 2]
    labels = list(dict.fromkeys(label for label in timer.labels if label.startswith("forward")))
    order = [next(i for i, label in enumerate(labels) if f"({config}" in label) for config in near]
    assert order == sorted(order)
    assert order[0] > max(i for i, label in enumerate(labels) if f"({start}" in label)


def test_the_centre_follows_the_fastest_so_far(instant):
    product = Product("fprop", SMALL, BF16)
    start = start_configs(product, GPU)[0]
    near = neighbourhood(product, start, GPU)
    fast, rest = near[RACE_SIZE - 1], near[RACE_SIZE:]
    rest.sort(key=lambda config: distance(config, fast))
    timer = Told(lambda label: 9.0 if "cudnn" in label else 0.5 if str(fast) in label else 1.0)
    run(timer, [STEM], limit=2 * RACE_SIZE)
    labels = "".join(label for label in timer.labels if label.startswith("forward"))
    tried = [config for config in near if str(config) in labels]
    assert set(tried) == {*near[:RACE_SIZE], *rest[:RACE_SIZE]}
    assert rest[:RACE_SIZE] != near[RACE_SIZE : 2 * RACE_SIZE]


def test_the_heuristics_run_in_every_race(instant):
    """So that a speed-up is of two times from the same minute."""
    slow = {op: str(heuristic_start(Product(op, SMALL, BF16))) for op in ("fprop", "wgrad")}
    timer = Told(lambda label: 1.0 if any(text in label for text in slow.values()) else 0.8)
    run(timer, [STEM], limit=RACE_SIZE + 1)
    for op, name in (("fprop", "forward"), ("wgrad", "backward")):
        races = [race for race in timer.races if race[0].startswith(name)]
        assert len(races) >= 4
        assert all(slow[op] in " ".join(race) for race in races)


def test_the_baseline_is_what_the_gpu_would_use_without_being_measured(instant, use_table):
    """An ESTIMATE, say: it is raced, and leads where nothing is faster; its own entry is not."""
    product = Product("fprop", SMALL, BF16)
    guess, own = replace(TILE, num_warps=8), replace(TILE, num_stages=1)
    key = product.key
    use_table(
        (Gpu("sm_90", (9, 0)), "ESTIMATE", {key: asdict(guess)}, None),
        (A, "measured", {key: asdict(own)}, None),
    )
    assert (unmeasured_start(product, A), unmeasured_start(product, B)) == (guess, own)
    timer = Told(lambda label: 0.5 if str(guess) in label else 1.0)
    choices, _ = run(timer, [STEM], limit=1, unmeasured=partial(unmeasured_start, gpu=A))
    assert choices["fprop"].config == guess
    assert choices["fprop"].speedup == 1
    assert choices["fprop"].by_route == {"triton": 0.5, "cudnn": 1.0}
    assert not any(str(own) in label for label in timer.labels)


def test_where_cudnn_leads_by_far_no_tiles_are_tried(instant):
    def tiles_tried(lead):
        timer = Told(lambda label: 1 / lead if "cudnn" in label else 1.0)
        run(timer, [STEM], limit=3)
        return len({label for label in timer.labels if "cudnn" not in label})

    # The start of fprop, and that of wgrad with a dy that is formed or stored.
    assert tiles_tried(TILE_GAIN * 1.1) == 3
    assert tiles_tried(TILE_GAIN / 1.1) == 3 + 2 * 3


def test_a_form_competes_in_both_passes_and_its_knobs_are_turned(instant, monkeypatch):
    start = add_form(monkeypatch, "strip", patch_h=4)
    timer = Told(lambda label: 9.0 if "cudnn" in label else 0.5 ** label.count("form='strip'"))
    choices, left_out = run(timer, limit=2)
    assert left_out == []
    assert [choices[op].config.form for op in ("fprop", "dgrad")] == ["strip", "strip"]
    assert choices["wgrad"].config.form == "im2col"
    assert choices["fprop"].speedup == choices["dgrad"].speedup == 2
    turned = {label for label in timer.labels if "'strip'" in label and str(start) not in label}
    assert turned


@pytest.mark.parametrize("speed", [0.9, 1.1])
def test_both_gradients_in_one_launch_compete_with_two(speed, instant, monkeypatch):
    """The fused form is timed as a whole pass against separate products, cuDNN's too."""
    start = add_form(monkeypatch, "fused", grid_size=264)

    def seconds(label):
        if "form='fused'" in label:
            return speed
        return 1.0 if "route='cudnn'" in label else 1.5

    timer = Told(seconds)
    choices, _ = run(timer, limit=2, gpu=GpuLimits(multiprocessors=1))
    pairs = [label for label in timer.labels if "form='fused'" in label]
    assert pairs
    assert all(label.startswith("backward (ConvConfig") for label in pairs)
    # What is beside the fused entry serves operands that it cannot take.
    assert not any("cudnn" in label for label in pairs)
    is_chosen = speed < 1
    assert (choices["dgrad"].config.form == "fused") == is_chosen
    assert choices["dgrad"].seconds == choices["wgrad"].seconds == 3 * min(speed, 1)
    assert choices["wgrad"].config.route == ("triton" if is_chosen else "cudnn")
    # The winner's knobs are turned, the loser's are not.
    others = {label for label in pairs if str(start) not in label}
    assert bool(others) == is_chosen


def test_wrong_and_failing_candidates_are_left_out_and_named(monkeypatch):
    right = start_configs(Product("fprop", SMALL, BF16), GPU)[0]
    wrong, failing, *_ = neighbourhood(Product("fprop", SMALL, BF16), right, GPU)
    honest = gpu_backend.conv_fprop

    def broken(*args, config, **options):
        if config == failing:
            raise RuntimeError("out of resource: shared memory\nand more")
        y, stats = honest(*args, config=config, **options)
        return (y * 1.03 if config == wrong else y), stats

    monkeypatch.setattr(gpu_backend, "conv_fprop", broken)
    timer = Told(lambda label: 9.0 if "cudnn" in label or str(right) in label else 0.1)
    # The device answers: a candidate that fails costs nothing but itself.
    choices, left_out = run(timer, [STEM], limit=2)
    assert choices["fprop"].config == right
    assert len(left_out) == 2
    assert f"{wrong.label}: y is off by" in left_out[0]
    assert left_out[1].endswith("RuntimeError: out of resource: shared memory")
    assert not any(str(config) in " ".join(timer.labels) for config in (wrong, failing))


def test_wrong_heuristics_are_replaced_by_what_is_right(monkeypatch):
    heuristic = heuristic_start(Product("wgrad", SMALL, BF16))
    honest = gpu_backend.conv_wgrad

    def broken(*args, config, **options):
        is_wrong = replace(config, stored=False) == heuristic
        return honest(*args, config=config, **options) * (1.05 if is_wrong else 1)

    monkeypatch.setattr(gpu_backend, "conv_wgrad", broken)
    choices, left_out = run(Told(lambda label: 1 + label.count("cudnn")), limit=1)
    assert choices["wgrad"].config.route == "cudnn"
    assert choices["dgrad"].config.route == "triton"
    assert all("dw is off by" in line for line in left_out)


def test_a_candidate_that_fails_at_full_size_alone_is_left_out(monkeypatch):
    monkeypatch.setattr(tune_workloads, "PARITY_BATCH", SMALL.N)
    shape = replace(SMALL, N=SMALL.N + 1)
    product = Product("fprop", shape, BF16)
    failing = neighbourhood(product, start_configs(product, GPU)[0], GPU)[0]
    honest = gpu_backend.conv_fprop

    def broken(x, *args, config, **options):
        if config == failing and x.shape[0] == shape.N:
            raise RuntimeError("too many tiles")
        return honest(x, *args, config=config, **options)

    monkeypatch.setattr(gpu_backend, "conv_fprop", broken)
    timer = Told()
    _, left_out = run(timer, [replace(STEM, shape=shape)], limit=1)
    assert left_out == [
        f"left out: {product.key} triton {failing.label}: RuntimeError: too many tiles"
    ]
    assert str(failing) not in " ".join(timer.labels)


class Lost(Told):
    """A device that never answers again once a configuration has run.

    late: its run returns, as launches do; then nothing answers.
    """

    def __init__(self, fatal, monkeypatch, late=False):
        super().__init__()
        self.is_lost, self.calls_after = False, 0
        honest = gpu_backend.conv_fprop

        def conv_fprop(*args, config, **options):
            self.calls_after += self.is_lost
            was_lost, self.is_lost = self.is_lost, self.is_lost or config == fatal
            if was_lost or (self.is_lost and not late):
                raise RuntimeError("CUDA error: an illegal memory access was encountered\nhints")
            return honest(*args, config=config, **options)

        monkeypatch.setattr(gpu_backend, "conv_fprop", conv_fprop)

    def synchronize(self):
        if self.is_lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("late", [False, True])
def test_a_lost_gpu_ends_the_run_and_names_the_candidate(late, monkeypatch):
    product = Product("fprop", SMALL, BF16)
    fatal = neighbourhood(product, start_configs(product, GPU)[0], GPU)[1]
    lost = Lost(fatal, monkeypatch, late)
    made, left_out = tuner(lost, synchronize=lost.synchronize, limit=3)
    with pytest.raises(GpuLostError) as raised:
        list(made.run([STEM, OTHER]))
    message = str(raised.value)
    assert f"since it ran {product.key} triton {fatal.label}: RuntimeError: CUDA error" in message
    assert "\n" not in message
    assert lost.calls_after == 0
    assert left_out == []


def test_a_gpu_lost_while_timing_ends_the_run(monkeypatch):
    lost = Lost(None, monkeypatch)

    def fail(trials):
        lost.is_lost = True
        raise RuntimeError("CUDA error: unspecified launch failure")

    made, _ = tuner(fail, synchronize=lost.synchronize)
    with pytest.raises(GpuLostError, match=r"ran one of fprop/.*: unspecified launch failure"):
        list(made.run([STEM]))


def test_what_cannot_be_timed_is_left_out_where_the_gpu_answers():
    def fail(trials):
        raise RuntimeError("out of memory")

    choices, left_out = run(fail, [STEM], limit=1)
    assert choices == {}
    assert left_out[0].startswith("not timed: fprop/")


def test_a_lost_gpu_ends_the_command_with_1_and_keeps_what_was_written(
    tmp_path, monkeypatch, capsys
):
    product = Product("fprop", SMALL, BF16)
    fatal = neighbourhood(product, start_configs(product, GPU)[0], GPU)[1]
    lost = Lost(fatal, monkeypatch)
    made, _ = tuner(lost, synchronize=lost.synchronize, limit=3)
    monkeypatch.setattr(tune, "_tuner", lambda *_: made)
    monkeypatch.setattr(tune, "_obstacle", lambda options: None)
    monkeypatch.setattr(tune, "_workloads", lambda options: [STEM, OTHER])
    monkeypatch.setattr(tune, "_provenance", lambda options, device: {"l2": options.l2})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    path = tmp_path / "table.json"
    with assume_gpu(Gpu("A GPU", (9, 0))):
        assert tune.main(["--out", str(path)]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: the GPU fails in every call since it ran fprop/")
    assert err.count("\n") == 1
    assert "forms of 2, tiles of 0 of 2 layers" in out
    # Both layers had been through the first round.
    table = read_table(path)
    assert len(table.gpus["A GPU"].entries) == 2 + 3
    assert json.loads(path.read_text())["gpus"]["A GPU"]["provenance"] == {"l2": "both"}
    # A new table begins as the one in use.
    assert table.architectures == launch_table.load_table().architectures != {}


@pytest.mark.parametrize("name", ["dgrad", "wgrad"])
def test_a_gradient_that_is_a_little_wrong_is_found(name, monkeypatch):
    check = ParityCheck(WORKLOAD, DEVICE)
    assert check("backward", gpu_backend) is None
    honest = getattr(gpu_backend, f"conv_{name}")

    def broken(*args, **options):
        made = honest(*args, **options)
        if name == "wgrad":
            return made * 1.02
        return made[0], made[1] and made[1]._replace(dgamma=made[1].dgamma * 1.02)

    monkeypatch.setattr(gpu_backend, f"conv_{name}", broken)
    wrong = check("backward", gpu_backend)
    assert wrong.startswith("dw is off" if name == "wgrad" else "dgamma is off")


def test_truth_and_plain_torch_are_computed_once_for_all_candidates(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    for name in ("conv_bn", "conv_backward"):
        honest = getattr(reference_backend, name)

        def counted(x, *args, honest=honest, name=name, **options):
            calls.append(name)
            # cuDNN would time its algorithms for a call or two.
            assert not torch.backends.cudnn.benchmark
            return honest(x, *args, **options)

        monkeypatch.setattr(reference_backend, name, counted)
    workload = replace(OTHER, variants={FIRST: 1, INNER: 1})
    _, left_out = run(Told(), [workload], limit=1)
    assert left_out == []
    assert torch.backends.cudnn.benchmark
    # In each of two variants, in bf16 and in fp64.
    assert sorted(calls) == ["conv_backward"] * 4 + ["conv_bn"] * 4


def test_no_pre_activation_is_near_a_tie():
    case = make_case(ConvShape(4, 16, 16, 8, 8), INNER, torch.bfloat16, DEVICE)
    a, b = (vector.view(1, -1, 1, 1) for vector in case.producer.scale_shift)
    assert (a * case.x.float() + b).abs().min() > 0.02


class Clock:
    """Time that stands still but for the checks of candidates, each of ten seconds."""

    def __init__(self, monkeypatch):
        self.now, self.checks = 0.0, 0
        honest = ParityCheck.__call__

        def check(*args):
            self.now += 10
            self.checks += 1
            return honest(*args)

        monkeypatch.setattr(ParityCheck, "__call__", check)

    def __call__(self):
        return self.now


@pytest.mark.parametrize("budget", [5, 35, 75, 115])
def test_the_budget_is_looked_at_before_each_candidate_and_what_is_timed_is_kept(
    budget, instant, monkeypatch
):
    clock = Clock(monkeypatch)
    made, _ = tuner(Told(), limit=20, deadline=budget, clock=clock)
    done = list(made.run([STEM, OTHER, STEM]))
    assert clock.checks == -(-budget // 10)
    # The layer that was cut off has what was timed of it.
    assert done[-1].choices
    late, _ = tuner(Told(), deadline=0, clock=lambda: 1)
    assert list(late.run([STEM])) == []


def test_entries_are_merged_and_other_gpus_stay(tmp_path):
    path = tmp_path / "table.json"
    merge_table(path, A, {X: TILE, Y: TILE}, {"date": "1"})
    merge_table(path, B, {X: TILE}, {"date": "2"})
    other = ConvConfig(128, 32, 64, 8, 2, route="cudnn")
    merge_table(path, Gpu("sm_90", (9, 0)), {X: other}, {"date": "0"}, basis="ESTIMATE")
    merge_table(path, A, {X: other}, {"date": "3"})
    table = read_table(path)
    assert {name: of.entries for name, of in table.gpus.items()} == {
        "A": {X: other, Y: TILE},
        "B": {X: TILE},
    }
    assert {name: of.entries for name, of in table.architectures.items()} == {"sm_90": {X: other}}
    assert table.gpus["A"].capability == (9, 0)
    written = json.loads(path.read_text())
    provenance = {name: of["provenance"] for name, of in written["gpus"].items()}
    assert provenance == {"A": {"date": "3"}, "B": {"date": "2"}}
    bases = {
        name: {entry["basis"] for entry in of["entries"].values()}
        for kind in ("gpus", "architectures")
        for name, of in written[kind].items()
    }
    assert bases == {"A": {"measured"}, "B": {"measured"}, "sm_90": {"ESTIMATE"}}
    assert path.stat().st_mode & 0o444 == 0o444


def test_a_write_that_fails_leaves_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    merge_table(path, A, {X: TILE}, {})
    before = path.read_text()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        merge_table(path, A, {Y: TILE}, {})
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.json"]


def test_a_malformed_table_is_refused_and_kept(tmp_path):
    path = tmp_path / "table.json"
    path.write_text('{"schema": 7, "gpus": {}}')
    with pytest.raises(ValueError, match="schema must be 4, got 7"):
        merge_table(path, A, {X: TILE}, {})
    assert path.read_text() == '{"schema": 7, "gpus": {}}'


@pytest.mark.parametrize("network", NETWORKS)
def test_every_layer_of_a_network_is_listed_in_all_its_variants(network):
    workloads, convs = conv_workloads([network], [512], [BF16]), network_convs(network, 512)
    assert {workload.shape: sum(workload.variants.values()) for workload in workloads} == {
        conv.shape: conv.num_layers for conv in convs
    }
    moved = [workload.bytes for workload in workloads]
    assert moved == sorted(moved, reverse=True)
    stage1 = next(workload for workload in workloads if workload.shape == convs[1].shape)
    assert stage1 == workloads[0]
    blocks = sum(stage1.variants.values()) // 2
    assert stage1.variants == {FIRST: blocks, INNER: blocks}
    # Forward reads x and writes y in both variants; the gradients read five to seven such tensors,
    # and of 16 channels, where they share a launch, three or four.
    one_pass = 2 * stage1.shape.num_x
    fewest = 6 if network == "resnet20" else 8
    assert 2 * blocks * fewest * one_pass < stage1.bytes < 2 * blocks * 11 * one_pass


@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_tiles_are_distinct_fit_and_are_sorted_by_distance(op, precision):
    gpu = GpuLimits(shared_bytes=99 * 1024, has_tma=False)
    itemsize = PRECISIONS[precision].dtype.itemsize
    for network in NETWORKS:
        for product in products(op, PRECISIONS[precision], network):
            start, stored = start_configs(product, gpu)
            found = neighbourhood(product, start, gpu)
            assert start == im2col_start(product)
            assert stored == replace(start, stored=True)
            assert start not in found
            assert len(found) == len(set(found)) >= 12, product
            distances = [distance(config, start) for config in found]
            assert distances == sorted(distances)
            for config in found:
                per_stage = config.block_k * (config.block_m + config.block_n)
                assert per_stage * itemsize * config.num_stages <= 99 * 1024
                assert config.block_m * config.block_n <= 160 * 32 * config.num_warps
            assert len({(c.block_m, c.block_n, c.block_k) for c in found[:24]}) > 1
            if op == "wgrad":
                near = {config.split_k / start.split_k for config in found[:24]}
                assert near >= {2, 4, 8}, product


@pytest.mark.parametrize("op", ["fprop", "dgrad"])
def test_candidates_by_tma_are_offered_where_a_gpu_has_it(op):
    gpu = GpuLimits(multiprocessors=78)
    for product in products(op) + products(op, network="resnet20"):
        start = tma_config(op, product.shape, torch.bfloat16)
        by_tma = [config for config in start_configs(product, gpu) if config.form == "tma"]
        assert by_tma == ([] if start is None else [start, replace(start, stored=True)])
        assert all(c.form != "tma" for c in start_configs(product, GpuLimits(has_tma=False)))
        if start is None:
            continue
        found = neighbourhood(product, start, gpu)
        assert all(config.tma_tile(op, product.shape) for config in found)
        columns = -(-product.shape.gemm(op).n // start.block_n)
        tiles = -(-product.shape.gemm(op).m // start.block_m) * columns
        # Whole multiples: all tiles of a program have the same filters.
        sizes = [size // columns * columns for size in (78, 156, 312) if size < tiles]
        assert {replace(start, grid_size=size) for size in sizes} <= set(found[: len(sizes) + 8])


def knob_values(configs):
    names = ("block_m", "block_n", "block_k", "patch_h", "patch_w", "ahead", "num_warps")
    names += ("num_stages", "grid_size", "split_k")
    return {name: {getattr(config, name) for config in configs} for name in names}


STAGE1 = ConvShape(512, 32, 32, 16, 16)


@pytest.mark.parametrize(
    ("form", "op", "ahead"),
    [
        ("strip", "fprop", {0, 2, 3, 4, 6}),
        ("strip", "dgrad", {0, 2, 3, 4, 6}),
        ("strip", "wgrad", {0, 2, 3, 4, 6}),
        ("fused", "dgrad", {0, 2, 3, 4, 6}),
    ],
)
def test_the_knobs_of_strips_are_all_turned(form, op, ahead):
    start = ConvConfig(64, 16, 16, 4, 1, split_k=33 if op == "wgrad" else 1, form=form, patch_h=4)
    programs = {0, 132, 264, 528}
    if form == "fused":
        start, programs = replace(start, grid_size=264), programs - {0}
    found = neighbourhood(Product(op, STAGE1, BF16), start, GpuLimits(multiprocessors=132))
    assert len(found) == len(set(found))
    assert {c.form for c in found} == {form}
    assert knob_values(found) == {
        "block_m": {32, 64, 128},
        "block_n": {16},
        "block_k": {16},
        "patch_h": {2, 4},
        "patch_w": {2},
        "ahead": ahead,
        "num_warps": {4, 8},
        "num_stages": {1, 2, 3},
        "grid_size": {0} if op == "wgrad" else programs,
        "split_k": {16, 33, 66, 132, 264} if op == "wgrad" else {1},
    }
    # Each knob is turned alone before two are turned together.
    alone = [config for config in found if distance(config, start) == 1]
    assert found[: len(alone)] == alone
    assert len(alone) >= 9
    assert len(alone) < 24


def shape_of(size, c, k=None, window=(3, 3, 1, 1), n=512):
    return ConvShape(n, size, size, c, k or c, *window)


# Of one program a tile: the window has 16 places, and of a strided dgrad 4 or 1.
@pytest.mark.parametrize(
    ("op", "shape", "ahead"),
    [
        ("fprop", shape_of(16, 32), {0, 1, 2, 4, 8, 15}),
        ("dgrad", shape_of(16, 32), {0, 1, 2, 4, 8, 15}),
        ("dgrad", shape_of(32, 16, 32, (3, 3, 2, 1)), {0, 1, 2, 3}),
        ("dgrad", shape_of(32, 16, 32, (1, 1, 2, 0)), {0}),
    ],
)
def test_of_pixels_only_the_knobs_that_the_kernel_reads_are_turned(op, shape, ahead):
    start = pixel_config(op, shape, torch.bfloat16)
    values = knob_values([start, *neighbourhood(Product(op, shape, BF16), start, GPU)])
    turned = {name: found for name, found in values.items() if len(found) > 1}
    expected = {"block_m": {32, 64, 128}, "num_warps": {4, 8}, "ahead": ahead}
    assert turned == {name: found for name, found in expected.items() if len(found) > 1}


@pytest.mark.parametrize(
    ("shape", "patch"), [(shape_of(8, 64), (1, 8)), (shape_of(32, 64), (2, 2))]
)
def test_every_knob_of_a_pixel_wgrad_is_turned_around_the_patch_of_the_rules(shape, patch):
    start = pixel_config("wgrad", shape, torch.bfloat16)
    assert (start.patch_h, start.patch_w) == patch
    found = neighbourhood(Product("wgrad", shape, BF16), start, GPU)
    near = found[:24]
    # Each knob alone, all others those of the rules.
    alone = knob_values([config for config in near if distance(config, start) == 1])
    num_tiles = shape.N * (shape.H // patch[0]) * (shape.W // patch[1]) // start.block_m
    splits = {min(start.split_k * times // 2, num_tiles) for times in (1, 2, 4, 8, 16)}
    assert alone["split_k"] == splits
    assert len(alone["ahead"]) >= 3
    assert len(alone["block_m"]) >= 2
    assert alone["num_warps"] == {4, 8}
    assert alone["num_stages"] == {1, 2, 3}
    assert len(alone["block_n"]) >= 2
    assert len(alone["patch_h"]) * len(alone["patch_w"]) >= 2
    assert {(c.patch_h, c.patch_w) for c in found} == {(1, 2), (1, 4), (1, 8), (2, 2), (2, 4)}
    assert {c.block_n for c in found} == {16, 32, 64}


def test_parts_are_no_more_than_tiles_of_the_patches_at_hand():
    shape = shape_of(8, 64, n=8)
    start = pixel_config("wgrad", shape, torch.bfloat16)
    # 8 images of 8 patches of one row, or of 16 of two rows by two columns.
    tiles = {(1, 8): 64, (2, 2): 128}
    for config in neighbourhood(Product("wgrad", shape, BF16), start, GPU):
        patches = tiles.get((config.patch_h, config.patch_w))
        assert patches is None or config.split_k <= -(-patches // config.block_m)


def test_patches_that_cannot_fit_the_registers_are_left_out():
    wide = ConvShape(512, 8, 8, 64, 64)
    start = ConvConfig(64, 64, 64, 4, 1, form="pixel")
    found = neighbourhood(Product("fprop", wide, BF16), start, GPU)
    # Sums of 128 patches of 2x2 outputs and 64 channels are 256 numbers a thread of four warps.
    assert not any((c.block_m, c.num_warps) == (128, 4) for c in found)
    assert any((c.block_m, c.num_warps) == (128, 8) for c in found)
    assert any((c.block_m, c.num_warps, c.ahead) == (32, 4, 8) for c in found)


def test_programs_are_fewer_than_tiles():
    start = ConvConfig(64, 16, 16, 4, 1, form="strip", patch_h=4)
    shape = shape_of(16, 16, n=32)
    found = neighbourhood(Product("fprop", shape, BF16), start, GpuLimits(multiprocessors=8))
    # There are 32 * 32 patches of 4x2.
    assert max(c.grid_size for c in found if (c.block_m, c.patch_h) == (64, 4)) == 8
    assert max(c.grid_size for c in found if (c.block_m, c.patch_h) == (32, 2)) == 32


DIFFERENT_LAUNCHES = {
    "stage 1": shape_of(32, 16),
    "stage 2": shape_of(16, 32),
    "stage 3": shape_of(8, 64),
    "ResNet-18": shape_of(32, 64),
    "few images": shape_of(8, 16, n=3),
    "odd": ConvShape(40, 7, 9, 32, 32),
    "stem": shape_of(32, 3, 16),
    "strided": shape_of(32, 16, 32, (3, 3, 2, 1)),
    "projection": shape_of(16, 32, 64, (1, 1, 2, 0)),
    "wide": shape_of(4, 512, n=64),
}


def case_on_meta(shape):
    """A case of one image, then of them all without numbers."""
    one = make_case(replace(shape, N=1), INNER, torch.bfloat16, torch.device("cpu"))

    def of_all(t):
        is_batch = t.dim() == 4 and t.shape[0] == 1
        size = (shape.N, *t.shape[1:]) if is_batch else t.shape
        layout = torch.channels_last if t.dim() == 4 else torch.contiguous_format
        return torch.empty(size, dtype=t.dtype, device="meta", memory_format=layout)

    return map_tensors(one, of_all)


def described(value):
    """An argument as far as it decides which code runs on which tiles."""
    if isinstance(value, TensorDescriptor):
        return tuple(value.block_shape)
    if isinstance(value, tuple):
        return tuple(map(described, value))
    return None if isinstance(value, torch.Tensor) else value


def launch_of(case, product, config):
    """What a pass of a layer launches with one configuration of a product, on meta tensors."""
    ops = ["fprop"] if product.op == "fprop" else ["dgrad", "wgrad"]
    entries = {p.key: im2col_start(p) for p in (product._replace(op=op) for op in ops)}
    with recording() as launches, assume_entries(entries | {product.key: config}):
        case.run("forward" if product.op == "fprop" else "backward", gpu_backend)
    return tuple(
        (
            launch.name,
            launch.grid,
            launch.num_warps,
            launch.num_stages,
            *((name, described(value)) for name, value in sorted(launch.args.items())),
        )
        for launch in launches
    )


@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("name", DIFFERENT_LAUNCHES)
def test_no_two_candidates_are_the_same_launch(name, op):
    """Of starts and the neighbours of each: kernel, grid, compile-time arguments, warps, stages."""
    shape = DIFFERENT_LAUNCHES[name]
    product, gpu = Product(op, shape, BF16), GpuLimits(multiprocessors=5)
    case = case_on_meta(shape)
    starts = start_configs(product, gpu)
    found = {config: launch_of(case, product, config) for config in starts}
    assert len(set(found.values())) == len(starts)
    for config, launches in found.items():
        kernel = {"im2col": f"conv_{op}_kernel", "fused": "conv_backward"}.get(config.form)
        assert any((kernel or config.form) in name for name, *_ in launches)
    for start in starts:
        # What is stored is another kernel's, and the tiles are the same.
        near = [] if start.stored else neighbourhood(product, start, gpu)
        some = [*near[:96], *near[96 :: max(len(near) // 100, 1)]]
        launches = [launch_of(case, product, config) for config in (start, *some)]
        twice = [
            c.label for c, made in zip(some, launches[1:], strict=True) if launches.count(made) > 1
        ]
        assert twice == []


@pytest.mark.parametrize(
    ("op", "c"), [("fprop", 256), ("dgrad", 256), ("wgrad", 256), ("dgrad", 64)]
)
def test_an_operand_is_formed_or_stored_in_round_one_and_stays_so_in_round_two(op, c):
    product = Product(op, shape_of(8, c), BF16)
    starts = start_configs(product, GPU)
    for form in {config.form for config in starts}:
        stored = {config.stored for config in starts if config.form == form}
        assert stored == ({False, True} if form in ("im2col", "tma") else {False})
    for start in starts:
        found = neighbourhood(product, start, GPU)
        assert {config.stored for config in found} == {start.stored}
    # Nothing could be stored for an fprop without a prologue.
    assert not any(c.stored for c in start_configs(product._replace(has_prologue=False), GPU))


def test_what_the_rules_store_is_raced_formed_and_stored_and_on_cudnn(instant):
    """A wide layer, whose rules store operands: round two keeps what the fastest does."""
    workload = ConvWorkload(shape_of(8, 128), BF16, {INNER: 1}, bytes=1)
    assert heuristic_start(product_of("fprop", workload)).stored
    for fast, other in (("stored=True", "stored=False"), ("stored=False", "stored=True")):
        timer = Told(lambda label, fast=fast: 0.5 if fast in label and "cudnn" not in label else 1)
        choices, _ = run(timer, [workload], limit=3)
        labels = [label for label in timer.labels if label.startswith("forward")]
        assert any("cudnn" in label for label in labels)
        tried = list(dict.fromkeys(label for label in labels if "cudnn" not in label))
        # Starts by pointers and by TMA, each in both ways, then three neighbours.
        assert sum(fast in label for label in tried) == 2 + 3
        assert sum(other in label for label in tried) == 2
        assert choices["fprop"].config.stored == (fast == "stored=True")


def test_a_stem_has_nothing_to_store():
    image = product_of("fprop", STEM)
    assert not any(config.stored for config in start_configs(image, GPU))
    assert any(config.stored for config in start_configs(product_of("wgrad", STEM), GPU))
    assert any(config.stored for config in start_configs(product_of("fprop", WORKLOAD), GPU))


def test_a_winner_by_tma_is_chosen_kept_and_served(instant, tmp_path, monkeypatch):
    shape = ConvShape(2, 8, 8, 8, 16)
    workload = ConvWorkload(shape, BF16, {INNER: 1}, bytes=1)
    names = ("form='tma'", "grid_size=1")
    timer = Told(lambda label: 9.0 if "cudnn" in label else 0.5 ** sum(map(label.count, names)))
    made, left_out = tuner(timer, limit=1, gpu=GpuLimits(multiprocessors=1))
    *_, last = made.run([workload])
    assert left_out == []
    forward, dgrad, wgrad = (choice.config for choice in last.choices)
    assert (forward.form, forward.grid_size) == (dgrad.form, dgrad.grid_size) == ("tma", 1)
    assert wgrad.form == "im2col"
    path = tmp_path / "table.json"
    merge_table(path, A, {choice.key: choice.config for choice in last.choices}, {})
    monkeypatch.setattr(launch_table, "TABLE_PATH", path)
    launch_table.forget_table()
    case = make_case(shape, INNER, torch.bfloat16, DEVICE)
    with assume_gpu(A), recording() as launches:
        case.forward(gpu_backend)
        case.backward(gpu_backend)
    launch_table.forget_table()
    assert [launch.name for launch in launches if "tma" in launch.name] == [
        "conv_fprop_tma_kernel",
        "conv_dgrad_tma_kernel",
    ]


def test_dry_run_lists_candidates(capsys):
    assert tune.main(["--dry-run", "--models", "resnet20", "--candidates", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("fprop/bfloat16/n512/h32w32c16k16r3s3u1p1: ")
    assert lines[1].startswith("  im2col: 128x16x32 w4 s4 k1; nearest 2 of ")
    assert lines[2].startswith("    64x16x32 w4 s4 k1")
    assert re.match(r"\d+ starts of 8 layers, and cudnn .* up to 2 neighbours", lines[-1])
    assert "dgrad/bfloat16/n512/h32w32c3k16r3s3u1p1" not in "".join(lines)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--models", "vgg"], "choose from"),
        (["--dtypes", "int8"], "choose from"),
        (["--batches", "0", "--dry-run"], "--batches must be at least 1, got 0"),
        (["--batches", "8", f"{10**17}", "--dry-run"], "--batches must be at most 67108864, got 1"),
        (["--budget", "0"], "--budget must be above 0 seconds, got 0"),
        (["--budget", "nan"], "--budget must be above 0 seconds, got nan"),
        (["--l2", "warm"], "choose from"),
        (["--candidates", "0"], "--candidates must be at least 1, got 0"),
        (["--out", "nowhere/table.json"], "--out: there is no folder nowhere"),
    ],
)
def test_wrong_use_is_one_sentence(argv, message, capsys):
    try:
        code = tune.main(argv)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.skipif(HAS_GPU, reason="here is a GPU to be measured")
def test_without_a_gpu_one_sentence_says_so(capsys):
    assert tune.main([]) == 2
    assert capsys.readouterr().err.startswith("error: no NVIDIA GPU is here")


def test_help_is_cheap():
    code = "import sys; from fastres.kernels.tools import tune; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
    assert tuple(NETWORKS) == tune.NETWORKS
    assert tuple(PRECISIONS) == tune.DTYPES
    assert tuple(PEAK_RATES) == tune.ARCHITECTURES


def test_the_table_ships_with_the_package():
    setuptools = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setuptools["package-data"]["fastres.kernels.gpu"]
    committed = REPO / "kernels" / "gpu" / "launch_table.json"
    assert any(fnmatch.fnmatch(committed.name, pattern) for pattern in patterns)


@needs_gpu
@pytest.mark.slow
def test_tuning_this_gpu_writes_a_table_that_training_reads(tmp_path, monkeypatch, capsys):
    workloads = [ConvWorkload(ConvShape(8, 8, 8, 16, 16), BF16, {FIRST: 1, INNER: 1}, bytes=1)]
    monkeypatch.setattr(tune, "_workloads", lambda options: workloads)
    path = tmp_path / "table.json"
    argv = ["--out", str(path), "--candidates", "3", "--models", "resnet20", "--batches", "8"]
    assert tune.main(argv) == 0
    table = read_table(path).gpus[gpu_of(torch.device("cuda", 0)).name].entries
    assert {key.partition("/")[0] for key in table} == {"fprop", "dgrad", "wgrad"}
    assert ", unmeasured " in capsys.readouterr().out


@needs_gpu
@pytest.mark.parametrize("l2", get_args(L2))
def test_the_graph_timer_tells_a_long_call_from_a_short_one(l2):
    small, large = (torch.zeros(n, device="cuda") for n in (1 << 20, 1 << 28))
    trials = [
        Trial("small", lambda: small.add_(1)),
        Trial("large", lambda: large.add_(1)),
    ]
    short, long = GraphTimer(torch.device("cuda", 0), l2=l2)(trials)
    assert 0 < short < long / 10
    # 2 GiB there and back: no GPU of today is faster than 20 TB/s.
    assert long > 2**31 / 20e12


@pytest.mark.parametrize(
    ("l2", "states", "times"),
    [
        ("cold", [True], [3.0, 6.0]),
        ("hot", [False], [1.0, 2.0]),
        ("both", [True, False], [2.0, 4.0]),
    ],
)
def test_the_graph_timer_takes_medians_of_turns(l2, states, times, monkeypatch):
    """Without a GPU: a sampler that counts stands for the one that captures and replays.

    A call takes three times as long with a cold L2, and its first replay nine seconds.
    """
    turns = []

    class Counting:
        def __init__(self, device, *, cold):
            self.cold = cold

        def sample(self, call):
            seconds = iter([9.0, *[call() * (3 if self.cold else 1)] * 20])

            def replay():
                turns.append((call(), self.cold))
                return next(seconds)

            return replay

    monkeypatch.setattr(graph_timer, "GraphSampler", Counting)
    timer = GraphTimer(torch.device("cuda", 0), l2=l2)
    assert timer([Trial("a", lambda: 1.0), Trial("b", lambda: 2.0)]) == times
    one_round = [(call, cold) for call in (1.0, 2.0) for cold in states]
    assert turns == one_round * (len(turns) // len(one_round))
    assert len(turns) >= 10 * len(one_round)
    monkeypatch.setattr(graph_timer, "_SECONDS_A_TRIAL", -1.0)
    del turns[:]
    timer([Trial("a", lambda: 1.0)])
    assert len(turns) == graph_timer._LEAST_ROUNDS * len(states)


def stand_in_for_cuda(events):
    """A torch.cuda that does nothing, in which a capture notes whose counters it has."""

    @contextmanager
    def graph(*_, **__):
        events.append("own counters" if counters._own.value else "counters of a stream")
        yield

    cuda = MagicMock(graph=graph)
    cuda.get_device_properties.return_value.L2_cache_size = 64
    cuda.Event.return_value.elapsed_time.return_value = 24.0
    return cuda


@pytest.mark.parametrize(("cold", "num_calls"), [(True, 1), (False, 8)])
def test_captured_launches_draw_tickets_from_a_buffer_that_lives_with_the_graph(
    cold, num_calls, monkeypatch
):
    """So that no memset is timed that a training step has not; without a GPU, by a stand-in."""
    events, buffers = [], []
    monkeypatch.setattr(torch, "cuda", stand_in_for_cuda(events))
    sampler = graph_timer.GraphSampler(torch.device("cpu"), cold=cold)

    def call():
        drawn = counters.zero_counters(torch.empty(0), 3)
        if counters._own.value:
            events.append(drawn.storage_offset())
            buffers.append(weakref.ref(drawn._base))

    seconds = sampler.sample(call)
    # Three counters, and one that keeps the next ones aligned.
    assert events == ["own counters", *(4 * i for i in range(num_calls))]
    assert counters._own.value is None
    gc.collect()
    assert all(buffer() is not None for buffer in buffers)
    assert seconds() == pytest.approx(24e-3 / num_calls)
    del seconds
    gc.collect()
    assert not any(buffer() for buffer in buffers)


def test_the_default_of_the_l2_is_both():
    assert tune._parser().parse_args([]).l2 == "both"
    assert set(get_args(L2)) == {"cold", "hot", "both"}


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class StandIn:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver.set_active(StandIn())
import torch
from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.tools.candidates import Product
from fastres.kernels.tools.compile_ahead import compile_ahead
from fastres.kernels.tools.networks import PRECISIONS
from fastres.kernels.tools.tune_workloads import ConvVariant, ConvWorkload, make_case
from fastres.kernels.tools.tuner import Tuner

compiled = []
triton.knobs.runtime.jit_post_compile_hook = lambda **of: compiled.append(of["repr"])
meta = torch.device("meta")
variant = ConvVariant(True, False, True)
workload = ConvWorkload(ConvShape(8, 8, 8, 16, 16), PRECISIONS["bf16"], {variant: 1}, 1)
tuner = Tuner(torch.device("cpu"), None)
contest, _ = tuner._contests(workload)
options = [(ConvConfig(64, 16, 16, 4, stages),) for stages in (1, 2)]
launches = tuner._launches(contest, options)
compile_ahead(launches, 2, lambda: True)
print(len(compiled), "too late")
for launch in launches:
    launch.kernel.device_caches.clear()
compile_ahead(launches, 2)
names = sorted(text.partition("[")[0] for text in compiled)
print(names.count("_conv_fprop_kernel"), "of", len(names), "compiled")
number = len(compiled)
for launch in launches:
    launch.kernel.run(
        grid=launch.grid,
        warmup=True,
        **launch.options,
        **launch.args,
    )
print(len(compiled) - number, "compiled again")
"""


def test_what_the_first_round_starts_is_known_before_it():
    """With all its constants, so that it can be compiled by others; here everything is right."""

    def described(launches):
        plain = (bool, int, float, str)
        return {
            (launch.name, *launch.options.items(), *(
                (name, value) for name, value in launch.leaves.items() if isinstance(value, plain)
            ))
            for launch in launches
        }  # fmt: skip

    made, left_out = tuner(Told())
    ahead = described(made.launches_of_forms(WORKLOAD))
    with recording() as launches:
        next(made.run([WORKLOAD]))
    assert left_out == []
    assert len(described(launches)) > 5
    assert described(launches) <= ahead


def test_kernels_of_a_race_are_compiled_before_it(tmp_path):
    """Without a GPU, by a driver that stands for one; each kernel once, none after the deadline."""
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=REPO, env=env, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["0 too late", "2 of 2 compiled", "0 compiled again"], (
        done.stderr
    )


def test_launchers_are_built_where_triton_has_one_for_each_signature(monkeypatch):
    """Without a GPU: a driver module like Triton 3.6's, with the driver's library and without."""
    from triton.backends.nvidia import driver

    built = []
    compiled = SimpleNamespace(src="source", metadata="metadata")
    monkeypatch.setattr(driver, "PyCUtensorMap", None)
    monkeypatch.setattr(driver, "CudaUtils", lambda: built.append("utilities"))
    monkeypatch.setattr(driver, "CudaLauncher", lambda *of: built.append(of))
    monkeypatch.setattr(driver, "library_dirs", list)
    monkeypatch.delattr(driver, "make_launcher", raising=False)
    assert not build_launcher(compiled)
    assert built == []
    monkeypatch.setattr(driver, "make_launcher", None, raising=False)
    assert build_launcher(compiled)
    assert built == ["utilities", ("source", "metadata")]
    monkeypatch.setattr(driver, "library_dirs", MagicMock(side_effect=AssertionError("no libcuda")))
    assert not build_launcher(compiled)
    assert len(built) == 2
