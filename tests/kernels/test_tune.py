"""The tuner: everything but the time that a GPU takes, with a timer that is told the times."""

import fnmatch
import json
import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.gpu import backend as gpu_backend
from fastres.kernels.gpu import launch_config
from fastres.kernels.gpu.launch import recording
from fastres.kernels.gpu.launch_config import (
    ConvConfig,
    gpu_name,
    heuristic_config,
    load_table,
    tma_config,
)
from fastres.kernels.tools import graph_timer, tune
from fastres.kernels.tools.graph_timer import GraphTimer, Trial
from fastres.kernels.tools.networks import NETWORKS, PRECISIONS, network_convs
from fastres.kernels.tools.tune_workloads import (
    ConvVariant,
    ConvWorkload,
    check_parity,
    conv_workloads,
    make_case,
)
from fastres.kernels.tools.tuner import Tuner, candidates, merge_table
from tests.helpers.interpreter import DEVICE, HAS_GPU, needs_gpu

REPO = Path(__file__).resolve().parents[2]
BF16, FP32 = PRECISIONS["bf16"], PRECISIONS["fp32"]
FIRST, INNER = ConvVariant(False, True, True), ConvVariant(True, False, True)
SMALL = ConvShape(2, 6, 6, 3, 5)
WORKLOAD = ConvWorkload(SMALL, BF16, {FIRST: 1, INNER: 2}, bytes=1)
STEM = ConvWorkload(SMALL, BF16, {ConvVariant(False, False, False): 1}, bytes=1)
TILE = ConvConfig(64, 16, 32, 4, 3)


class Told:
    """A timer that is told the seconds of a trial by its label; it runs each trial once."""

    def __init__(self, seconds=lambda label: 1.0):
        self.seconds = seconds
        self.labels = []

    def __call__(self, trials):
        self.labels += [trial.label for trial in trials]
        for trial in trials:
            trial.run()
        return [self.seconds(trial.label) for trial in trials]


def tuner(timer, **options):
    left_out = []
    made = Tuner(DEVICE, timer, say=left_out.append, **options)
    return made, left_out


def test_the_fastest_route_is_chosen_for_equal_work():
    timer = Told(lambda label: 0.5 ** label.count("route='cudnn'"))
    made, left_out = tuner(timer)
    forward, dgrad, wgrad = made.tune_layer(WORKLOAD, 1)
    assert left_out == []
    assert forward.key == "fprop/bfloat16/n2/h6w6c3k5r3s3u1p1"
    assert [choice.config.route for choice in (forward, dgrad, wgrad)] == ["cudnn"] * 3
    # One layer of one variant, two of the other.
    assert (forward.seconds, forward.heuristic_seconds) == (3 * 0.5, 3)
    assert dgrad.speedup == wgrad.speedup == 4
    # Both gradients at once on all four pairs of routes, in both variants.
    pairs = [label for label in timer.labels if label.count("ConvConfig") == 2]
    assert len(pairs) == len(set(pairs)) == 8
    assert sum("route='cudnn'" in label for label in pairs) == 6


def test_the_fastest_tiles_are_chosen_where_cudnn_is_slow():
    offered = {op: candidates(op, SMALL, torch.bfloat16, limit=3) for op in ("fprop", "wgrad")}
    fast = {op: configs[-1] for op, configs in offered.items()}

    def seconds(label):
        if "cudnn" in label:
            return 9.0
        op = "fprop" if label.startswith("fprop") else "wgrad"
        return 0.5 if str(fast[op]) in label else 1.0

    made, _ = tuner(Told(seconds))
    chosen = {choice.key.partition("/")[0]: choice for choice in made.tune_layer(STEM, 3)}
    assert {op: choice.config for op, choice in chosen.items()} == fast
    assert all(choice.speedup == 2 for choice in chosen.values())


def test_wrong_and_failing_candidates_are_left_out_and_named(monkeypatch):
    right, wrong, failing = candidates("fprop", SMALL, torch.bfloat16, limit=3)
    honest = gpu_backend.conv_fprop

    def broken(*args, config, **options):
        if config == failing:
            raise RuntimeError("out of resource: shared memory\nand more")
        y, stats = honest(*args, config=config, **options)
        return (y * 1.03 if config == wrong else y), stats

    monkeypatch.setattr(gpu_backend, "conv_fprop", broken)
    timer = Told(lambda label: 9.0 if "cudnn" in label or str(right) in label else 0.1)
    made, left_out = tuner(timer)
    forward, _ = made.tune_layer(STEM, 3)
    assert forward.config == right
    assert len(left_out) == 2
    assert f"{wrong}: y is off by" in left_out[0]
    assert left_out[1].endswith("RuntimeError: out of resource: shared memory")
    assert not any(str(config) in " ".join(timer.labels) for config in (wrong, failing))


@pytest.mark.parametrize("op", ["dgrad", "wgrad"])
def test_a_gradient_that_is_a_little_wrong_is_found(op, monkeypatch):
    assert check_parity(WORKLOAD, op, gpu_backend, DEVICE) is None
    name = f"conv_{op}"
    honest = getattr(gpu_backend, name)

    def broken(*args, **options):
        made = honest(*args, **options)
        if op == "wgrad":
            return made * 1.02
        return made[0], made[1] and made[1]._replace(dgamma=made[1].dgamma * 1.02)

    monkeypatch.setattr(gpu_backend, name, broken)
    wrong = check_parity(WORKLOAD, op, gpu_backend, DEVICE)
    assert wrong.startswith("dw is off" if op == "wgrad" else "dgamma is off")


def test_no_pre_activation_is_near_a_tie():
    case = make_case(ConvShape(4, 16, 16, 8, 8), INNER, torch.bfloat16, DEVICE)
    a, b = (vector.view(1, -1, 1, 1) for vector in case.producer.scale_shift)
    assert (a * case.x.float() + b).abs().min() > 0.02


def test_the_deadline_ends_the_run_and_keeps_what_is_done(monkeypatch):
    now = iter(range(1000))
    made, _ = tuner(Told(), limit=1, deadline=12, clock=lambda: next(now))
    done = list(made.run([STEM] * 50))
    assert 0 < len(done) < 50
    late, _ = tuner(Told(), deadline=0, clock=lambda: 1)
    assert late.tune_layer(STEM, 3) == []
    assert late.timer.labels == []
    monkeypatch.setattr(late, "tune_layer", lambda *_: pytest.fail("a layer after the deadline"))
    assert list(late.run([STEM])) == []


def test_routes_of_all_layers_come_before_tiles(monkeypatch):
    made, _ = tuner(Told(), limit=7)
    asked = []
    monkeypatch.setattr(made, "tune_layer", lambda workload, limit: asked.append((workload, limit)))
    assert list(made.run([WORKLOAD, STEM])) == []
    assert asked == [(WORKLOAD, 1), (STEM, 1), (WORKLOAD, 7), (STEM, 7)]


def test_entries_are_merged_and_other_gpus_stay(tmp_path):
    path = tmp_path / "table.json"
    merge_table(path, "A", {"x": TILE, "y": TILE}, {"date": "1"})
    merge_table(path, "B", {"x": TILE}, {"date": "2"})
    other = ConvConfig(128, 32, 64, 8, 2, route="cudnn")
    merge_table(path, "A", {"x": other}, {"date": "3"})
    assert load_table(path) == {"A": {"x": other, "y": TILE}, "B": {"x": TILE}}
    provenance = json.loads(path.read_text())["provenance"]
    assert provenance == {"A": {"date": "3"}, "B": {"date": "2"}}
    assert path.stat().st_mode & 0o444 == 0o444


def test_a_write_that_fails_leaves_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    merge_table(path, "A", {"x": TILE}, {})
    before = path.read_text()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        merge_table(path, "A", {"y": TILE}, {})
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.json"]


def test_a_malformed_table_is_refused_and_kept(tmp_path):
    path = tmp_path / "table.json"
    path.write_text('{"schema": 7, "gpus": {}}')
    with pytest.raises(ValueError, match="schema must be 2, got 7"):
        merge_table(path, "A", {"x": TILE}, {})
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
    # Forward reads x and writes y in both variants; the gradients read five to seven such tensors.
    one_pass = 2 * stage1.shape.num_x
    assert 2 * blocks * 8 * one_pass < stage1.bytes < 2 * blocks * 11 * one_pass


@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_candidates_are_distinct_and_fit(op, precision):
    dtype, tf32 = PRECISIONS[precision].dtype, PRECISIONS[precision].tf32
    for conv in network_convs("resnet18", 512) + network_convs("resnet20", 512):
        found = candidates(op, conv.shape, dtype, tf32=tf32, shared_bytes=99 * 1024)
        assert found[0] == heuristic_config(op, conv.shape, dtype, tf32=tf32)
        assert 12 <= len(found) == len(set(found)) <= 24, conv
        for config in found[1:]:
            per_stage = config.block_k * (config.block_m + config.block_n)
            assert per_stage * dtype.itemsize * config.num_stages <= 99 * 1024
            assert config.block_m * config.block_n <= 160 * 32 * config.num_warps
        assert len({(c.block_m, c.block_n, c.block_k) for c in found}) > 1


@pytest.mark.parametrize("op", ["fprop", "dgrad"])
def test_candidates_by_tma_are_offered_where_a_gpu_has_it(op):
    for conv in network_convs("resnet18", 512) + network_convs("resnet20", 512):
        shape, dtype = conv.shape, torch.bfloat16
        found = candidates(op, shape, dtype, multiprocessors=78)
        by_tma = [config for config in found if config.loads == "tma"]
        start = tma_config(op, shape, dtype)
        assert (start is None) == (by_tma == [])
        if start is not None:
            assert by_tma[:2] == [start, replace(start, grid_size=78)]
            assert all(config.tma_tile(op, shape) for config in by_tma)
        without = candidates(op, shape, dtype, has_tma=False)
        assert {config.loads for config in without} == {"pointer"}


def test_a_winner_by_tma_is_chosen_kept_and_served(tmp_path, monkeypatch):
    shape = ConvShape(2, 8, 8, 8, 16)
    workload = ConvWorkload(shape, BF16, {INNER: 1}, bytes=1)
    timer = Told(lambda label: 9.0 if "cudnn" in label else 0.5 ** label.count("grid_size=7"))
    made, left_out = tuner(timer)
    made.limit, made.multiprocessors = 16, 7
    choices = made.tune_layer(workload, made.limit)
    assert left_out == []
    forward, dgrad, wgrad = (choice.config for choice in choices)
    assert (forward.loads, forward.grid_size) == (dgrad.loads, dgrad.grid_size) == ("tma", 7)
    assert wgrad.loads == "pointer"
    path = tmp_path / "table.json"
    merge_table(path, "test", {choice.key: choice.config for choice in choices}, {})
    monkeypatch.setattr(launch_config, "load_table", lambda: load_table(path))
    monkeypatch.setattr(launch_config, "gpu_name", lambda device: "test")
    case = make_case(shape, INNER, torch.bfloat16, DEVICE)
    with recording() as launches:
        case.forward(gpu_backend)
        case.backward(gpu_backend)
    assert [launch.name for launch in launches if "tma" in launch.name] == [
        "conv_fprop_tma_kernel",
        "conv_dgrad_tma_kernel",
    ]


def test_dry_run_lists_candidates(capsys):
    assert tune.main(["--dry-run", "--models", "resnet20", "--candidates", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("fprop/bfloat16/n512/h32w32c16k16r3s3u1p1: ")
    assert lines[-1].startswith("46 candidates of 8 layers")
    assert "dgrad/bfloat16/n512/h32w32c3k16r3s3u1p1" not in "".join(lines)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--models", "vgg"], "choose from"),
        (["--dtypes", "int8"], "choose from"),
        (["--batches", "0", "--dry-run"], "--batches must be at least 1, got 0"),
        (["--budget", "0"], "--budget must be above 0 seconds, got 0"),
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


def test_the_table_ships_with_the_package():
    setuptools = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setuptools["package-data"]["fastres.kernels.gpu"]
    committed = REPO / "kernels" / "gpu" / "launch_table.json"
    assert any(fnmatch.fnmatch(committed.name, pattern) for pattern in patterns)


@needs_gpu
def test_tuning_this_gpu_writes_a_table_that_training_reads(tmp_path, monkeypatch, capsys):
    workloads = [ConvWorkload(ConvShape(8, 8, 8, 16, 16), BF16, {FIRST: 1, INNER: 1}, bytes=1)]
    monkeypatch.setattr(tune, "_workloads", lambda options: workloads)
    path = tmp_path / "table.json"
    assert tune.main(["--out", str(path), "--candidates", "3"]) == 0
    table = load_table(path)[gpu_name(torch.device("cuda", 0))]
    assert {key.partition("/")[0] for key in table} == {"fprop", "dgrad", "wgrad"}
    assert "heuristics" in capsys.readouterr().out
    assert json.loads(path.read_text())["schema"] == launch_config.TABLE_SCHEMA


@needs_gpu
@pytest.mark.parametrize("cold", [True, False])
def test_the_graph_timer_tells_a_long_call_from_a_short_one(cold):
    small, large = (torch.zeros(n, device="cuda") for n in (1 << 20, 1 << 28))
    trials = [
        Trial("small", lambda: small.add_(1)),
        Trial("large", lambda: large.add_(1)),
    ]
    short, long = GraphTimer(torch.device("cuda", 0), cold=cold)(trials)
    assert 0 < short < long / 10
    # 2 GiB there and back: no GPU of today is faster than 20 TB/s.
    assert long > 2**31 / 20e12


@pytest.mark.parametrize("cold", [True, False])
def test_the_graph_timer_takes_medians_of_turns(cold, monkeypatch):
    """Without a GPU: a sampler that counts stands for the one that captures and replays."""
    turns = []

    class Counting:
        def __init__(self, device, *, cold):
            self.cold = cold

        def sample(self, call):
            seconds = iter([9.0, *[call()] * 20])

            def replay():
                turns.append((call(), self.cold))
                return next(seconds)

            return replay

    monkeypatch.setattr(graph_timer, "GraphSampler", Counting)
    timer = GraphTimer(torch.device("cuda", 0), cold=cold)
    assert timer([Trial("a", lambda: 1.0), Trial("b", lambda: 2.0)]) == [1.0, 2.0]
    assert turns == [(1.0, cold), (2.0, cold)] * (len(turns) // 2)
    assert len(turns) >= 20
