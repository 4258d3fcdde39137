"""The suites: what they time is checked first, times arrive unchanged, budgets hold, peers run."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import conftest
from benchmarks.harness import ablation, error_bound, timing
from benchmarks.harness.rows import read_results, write_results
from benchmarks.harness.scheduler import Measured, Prepared, Scheduler
from benchmarks.harness.step_check import check_step
from benchmarks.harness.worker_pool import Worker, WorkerPool
from benchmarks.peers import common, compiled, eager_amp, eager_fp32
from benchmarks.report import collect
from benchmarks.suites import ablation_cases, bench_ops, op_cases
from fastres import create_model, host
from fastres.engine.runtime import Runtime, _choose_route
from fastres.kernels import dispatch
from tests.helpers.data_fixtures import image_folder
from tests.helpers.interpreter import DEVICE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def plain(monkeypatch):
    """Compute the fused ops without Triton's interpreter, as a benchmark on a CPU does."""
    monkeypatch.setattr(dispatch, "_triton_backend", lambda: None)


def small(name: str) -> op_cases.OpCase:
    cases = op_cases.all_cases({"resnet20": 2, "resnet18": 1, "resnet50": 1})
    return next(case for case in cases if case.name == name)


def test_a_quick_suite_ends_and_becomes_rows(tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/suites/bench_ops.py", "--quick"]
    command += ["-k", "conv_bn_folded", "--budget", "40", f"--benchmark-json={report}"]
    env = os.environ | {"TRITON_INTERPRET": "0"}
    # pytest-benchmark measures nothing in a process that believes to be one of xdist's workers.
    env.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    content = json.loads(report.read_text())
    rows, provenance = collect.rows_of_report(content, tmp_path)
    folder = tmp_path / "results"
    folder.mkdir()
    write_results("bench_ops", rows, provenance, folder)
    assert [row for row, _ in read_results(folder)] == rows
    assert {"eager", "channels_last", "fused"} <= {row.provider for row in rows}
    assert {row.metric for row in rows} == {"time", "bandwidth", "arithmetic", "peak_memory"}
    for benchmark in content["benchmarks"]:
        times = benchmark["stats"]["data"]
        assert len(times) >= 3
        assert all(1e-6 < seconds < 60 for seconds in times)
        info = benchmark["extra_info"]
        (row,) = (r for r in rows if (r.provider, r.metric) == (info["provider"], "time"))
        assert row.median == pytest.approx(1e3 * benchmark["stats"]["median"], rel=1e-5)
    assert provenance["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert "--quick" in provenance["command"]


def test_recorded_times_pass_through_the_clock_unchanged():
    clock, seen = timing.Replay(), []
    clock.load([0.25, 1e-6, 3.0])
    for _ in range(3):
        started = clock.now()
        clock.advance()
        seen.append(clock.now() - started)
    assert seen == pytest.approx([0.25, 1e-6, 3.0], rel=1e-9)


def test_providers_take_turns_in_a_rotating_order():
    calls = []

    def provider(name, seconds):
        return lambda: calls.append(name) or seconds

    samples = {"a": provider("a", 1.0), "b": provider("b", 2.0), "c": provider("c", 3.0)}
    times = timing.interleave(samples, 60, max_rounds=4)
    assert times == {"a": [1.0] * 4, "b": [2.0] * 4, "c": [3.0] * 4}
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    # Who takes part in every third turn is measured over the whole time, least often thrice.
    calls.clear()
    times = timing.interleave(samples, 0, every={"b": 3})
    assert "".join(calls) == "abc" + "ca" + "ca" + "abc" + "ca" + "ca" + "abc"
    assert {name: len(rounds) for name, rounds in times.items()} == {"a": 7, "b": 3, "c": 7}


@pytest.mark.parametrize(
    ("seconds", "limit_s", "rounds"), [(0.5, 60, range(4, 11)), (0, 60, [3]), (0, 0.01, [1])]
)
def test_rounds_end_when_the_seconds_are_spent(seconds, limit_s, rounds):
    def slow():
        time.sleep(0.05)
        return 0.05

    times = timing.interleave({"slow": slow}, seconds, max_rounds=60, limit_s=limit_s)
    assert len(times["slow"]) in rounds


def test_peak_memory_is_what_a_call_holds_at_once():
    x = torch.randn(2**18, device=DEVICE)

    def call():
        y = x * x
        z = y + x
        del y
        return z * z

    call()
    # y and z, then z and the result: 1 MiB each, and scalars on their way to the operators.
    assert timing.peak_bytes(call, DEVICE) == pytest.approx(2 * x.nbytes, rel=0.01)


def test_a_provider_that_fails_leaves_the_others_their_times():
    def prepare(name):
        if name == "wrong":
            raise AssertionError("off by 1")
        if name == "missing":
            raise ablation.Unavailable("no GPU")
        if name == "dies":
            return Prepared(lambda: 1 / 0)
        return Prepared(lambda: 2.0, {"images": 4}, finish=lambda: {"resident_bytes": 8})

    providers = ["wrong", "missing", "dies", "right"]
    results = Scheduler(60, {"group": (1.0, providers)}).measure("group", prepare)
    assert isinstance(results["wrong"], AssertionError)
    assert isinstance(results["missing"], ablation.Unavailable)
    assert isinstance(results["dies"], ZeroDivisionError)
    assert isinstance(results["right"], Measured)
    assert results["right"].info == {"images": 4, "resident_bytes": 8}
    assert results["right"].median == 2.0


def test_a_group_beyond_the_budget_is_left_out_with_its_reason():
    # A tenth of what it wants is the least that a group begins with.
    scheduler = Scheduler(0.15, {"first": (1.0, ["a"]), "second": (1.0, ["a"])})
    left_out = scheduler.measure("first", lambda name: Prepared(lambda: 1.0))["a"]
    assert isinstance(left_out, ablation.Unavailable)
    assert "no time left" in str(left_out)


def test_a_group_over_its_share_has_its_pair_and_leaves_out_the_rest(monkeypatch):
    monkeypatch.setattr("benchmarks.harness.scheduler._ONCE_S", 0.05)

    def slow():
        time.sleep(0.1)
        return 0.1

    def prepare(name):
        slow()
        return Prepared(slow)

    results = Scheduler(0.02, {"group": (0.1, ["a", "b", "c"])}).measure("group", prepare)
    assert [type(result) for result in results.values()] == [
        ablation.Unavailable,
        Measured,
        Measured,
    ]
    assert len(results["a"].seconds) == 1


def test_groups_share_the_budget_and_get_no_more_than_they_want(monkeypatch):
    shares = []
    monkeypatch.setattr(
        "benchmarks.harness.scheduler._measure_group",
        lambda providers, prepare, share: (shares.append(share), False),
    )
    groups = {"a": (10.0, ["x"]), "b": (30.0, ["x"])}
    for scheduler in (
        Scheduler(20, groups),
        Scheduler(1000, groups),
        Scheduler(400, groups, fill_budget=True),
    ):
        scheduler.measure("a", None)
    assert shares == pytest.approx([5, 10, 100], rel=0.01)


def test_an_interrupted_group_has_the_times_of_those_that_were_ready():
    def prepare(name):
        if name == "compiles":
            raise KeyboardInterrupt
        return Prepared(lambda: 1.0)

    groups = {"group": (1.0, ["a", "compiles", "b"]), "next": (1.0, ["a"])}
    scheduler = Scheduler(60, groups)
    results = scheduler.measure("group", prepare)
    assert isinstance(results["a"], Measured)
    assert "interrupted" in str(results["compiles"])
    assert "no time left" in str(results["b"])
    # Nothing else is begun: whoever interrupted waits for the report.
    assert "no time left" in str(scheduler.measure("next", prepare)["a"])


@pytest.mark.parametrize("at_once", [False, True])
def test_workers_get_ready_one_by_one_or_side_by_side(at_once, monkeypatch):
    told = []

    class Told(Worker):
        def __init__(self, name, *_):
            self.name, self._is_told = name, False

        def _ask(self, line):
            told.append((self.name, line))

        def _hear(self):
            return {"loss": 1.0}

        def kill(self):
            pass

    monkeypatch.setattr("benchmarks.harness.worker_pool.Worker", Told)
    pool = WorkerPool(lambda name: (name, []), 1, at_once=at_once)
    with pool.started(["a", "b"]):
        before = list(told)
        for name in "ab":
            assert pool.worker(name).hello == {"loss": 1.0}
    assert before == ([("a", "start"), ("b", "start")] if at_once else [])
    assert told == [("a", "start"), ("b", "start")]


def test_what_was_started_for_a_group_is_ended_after_it():
    log = []

    @contextmanager
    def started(providers):
        log.append(providers)
        yield
        log.append("ended")

    scheduler = Scheduler(60, {"group": (1.0, ["a", "b"])})
    scheduler.measure("group", lambda name: Prepared(lambda: log.append(name) or 1.0), started)
    assert log[0] == ["a", "b"]
    assert log[-1] == "ended"
    assert log.count("a") > 3


def test_the_bound_refuses_what_is_further_off_than_eager():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(1000, generator=generator, dtype=torch.float64)
    noise = torch.randn(1000, generator=generator, dtype=torch.float64)
    eager = truth + 1e-3 * noise
    error_bound.check("as good", [truth - 1e-3 * noise], [eager], [truth], torch.float32)
    for bad in (truth + 2e-3 * noise, truth * float("nan")):
        with pytest.raises(AssertionError, match="is off by"):
            error_bound.check("worse", [bad], [eager], [truth], torch.float32)


def test_the_bytes_of_a_basic_block_are_the_25_passes_of_the_design():
    case = small("residual_block resnet20 stage1")
    tensor, filters = case.layers[0].num_x, case.layers[0].num_w
    counts = op_cases.count_bytes(case, torch.float32)
    assert counts["forward"] == 4 * (7 * tensor + 2 * filters)
    assert counts["backward"] == 4 * (18 * tensor + 4 * filters)
    assert counts["both"] == counts["forward"] + counts["backward"]
    assert case.flops("both") == 3 * 2 * case.layers[0].flops


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    "name",
    [
        "conv_bn_relu resnet20 stage2_down",
        "residual_block resnet20 stage2_down",
        "residual_block resnet20 stage1",
        "residual_block resnet50 stage1",
        "conv_bn_folded resnet20 stem",
    ],
)
def test_both_ways_through_a_case_compute_the_same(name):
    case = small(name)
    results = []
    for op in (op_cases.eager, op_cases.fused_op):
        inputs = op_cases.make_inputs(case, torch.float64, DEVICE, nhwc=True)
        results.append(bench_ops._results(op, case, inputs))
    assert len(results[0]) == (1 if "folded" in name else 1 + len(inputs.learned()))
    for eager, own in zip(*results, strict=True):
        torch.testing.assert_close(own, eager, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("plain")
def test_a_wrong_op_is_not_timed(monkeypatch):
    case = small("conv_bn_relu resnet20 stage3")
    right = op_cases.fused_op
    bench_ops._check.cache_clear()
    bench_ops._check("fused", case)
    bench_ops._check.cache_clear()
    monkeypatch.setattr(op_cases, "fused_op", lambda case, inputs: 1.1 * right(case, inputs))
    with pytest.raises(AssertionError, match="fused is off by"):
        bench_ops._check("fused", case)
    bench_ops._check.cache_clear()


@pytest.mark.usefixtures("plain")
def test_a_wrong_step_is_not_timed():
    built = ablation.build("channels_last", "resnet8", 8, DEVICE)
    case = ("channels_last", "resnet8", 8, built.runtime)
    off = check_step(*case, built.loss, built.model.parameters())
    assert 0 <= off.error <= off.allowed
    with pytest.raises(AssertionError, match="first loss"):
        check_step(*case, built.loss + 0.1, built.model.parameters())
    with pytest.raises(AssertionError, match="moved no parameter"):
        check_step(*case, built.loss, create_model("resnet8", 10, seed=0).parameters())
    with torch.no_grad():
        built.model.conv1.weight += 1e-2
    with pytest.raises(AssertionError, match="is off by"):
        check_step(*case, built.loss, built.model.parameters())


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    "configuration",
    [
        name
        for name in ablation.CONFIGURATIONS
        if name not in ("compile", "graph") and ablation.why_not(name, DEVICE) is None
    ],
)
def test_every_rung_trains_what_its_name_says(configuration):
    if (
        configuration in ("amp", "fused")
        and DEVICE.type == "cpu"
        and host.bf16_instructions() is None
    ):
        with pytest.raises(ablation.Unavailable, match="bfloat16"):
            ablation.build(configuration, "resnet8", 8, DEVICE)
        return
    built = ablation.build(configuration, "resnet8", 8, DEVICE)
    built.train()
    assert built.runtime.channels_last == (configuration != "eager")
    if not configuration.startswith("fast"):
        is_low = built.runtime.dtype != torch.float32
        assert is_low == (configuration in ("amp", "fused"))
    is_fused = type(built.model).__name__ == "FusedResNet"
    assert is_fused or configuration not in ("fused",)
    assert not is_fused or configuration in ("fused", "fast", "fast_uncompiled")


def test_what_a_machine_lacks_is_said():
    cpu = torch.device("cpu")
    with pytest.raises(ablation.Unavailable, match="CUDA graphs need an NVIDIA GPU"):
        ablation.make_config("graph", cpu)
    with pytest.raises(ablation.Unavailable, match="on a CPU --fast compiles nothing"):
        ablation.make_config("fast_uncompiled", cpu)


def test_fast_uncompiled_is_fast_without_the_compiler(monkeypatch):
    monkeypatch.setattr("fastres.engine.machine.cxx_compiler", lambda: "g++")
    monkeypatch.setattr("fastres.engine.runtime.fused_kernels", lambda device: "Triton kernels")
    cuda = torch.device("cuda")
    configs = [ablation.make_config(name, cuda) for name in ("fast", "fast_uncompiled")]
    assert configs[0] == configs[1].replace(compile="auto")
    runtimes = [Runtime(device=cuda, dtype=torch.bfloat16) for _ in configs]
    for config, runtime in zip(configs, runtimes, strict=True):
        _choose_route(config, runtime)
    assert [(found.route, found.compiled) for found in runtimes] == [
        ("fused", True),
        ("fused", False),
    ]


def test_on_a_gpu_the_compiler_is_the_first_rival_and_trains_as_often():
    ladders = {case.name: case for case in ablation_cases.CASES}
    orders = {
        device: conftest._in_order(
            list(ladders[f"{device} resnet20"].providers), torch.device(device)
        )
        for device in ("cpu", "cuda")
    }
    rivals = ["fast", "compile", "peer_compiled", "peer_amp", "amp", "eager", "peer_fp32"]
    assert orders["cuda"][:7] == rivals
    assert sorted(orders["cuda"][7:]) == ["channels_last", "fast_uncompiled", "fused", "graph"]
    # Alone it needs no compiler, and what a compiler takes must not leave it without time.
    without = conftest._in_order(["compile", "amp", "fast_uncompiled"], torch.device("cuda"))
    assert without == ["fast_uncompiled", "compile", "amp"]
    assert orders["cpu"][:5] == ["peer_fp32", "fast", "eager", "amp", "peer_amp"]
    assert {"fast", "compile", "peer_compiled"} <= set(ablation_cases.OFTEN["cuda"])
    assert {ladders[f"cuda {net}"].batch_size for net in ("resnet20", "resnet18")} == {512}


@pytest.mark.parametrize("peer", [eager_fp32, eager_amp, compiled])
def test_peers_train_on_a_handful_of_images(peer, capsys, monkeypatch):
    compiled_models = []
    # Compiling takes half a minute; what is compiled is the matter of torch's tests.
    monkeypatch.setattr(
        torch, "compile", lambda model, mode: compiled_models.append(model) or model
    )
    words = ["--model", "resnet8", "--batch-size", "20", "--limit", "60", "--workers", "0"]
    assert peer.main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images_per_second"] > 0
    assert result["test_images"] == 60
    assert 0 <= result["test_accuracy"] <= 100
    assert len(compiled_models) == (peer is compiled)


def test_peers_read_image_files_as_torchvision_does(tmp_path):
    root = image_folder(tmp_path, per_class=2)
    data = common.load_data(str(root))
    assert data.num_classes == 2
    image, label = data.test[0]
    picture = Image.open(root / "test" / "cat" / "0000.png")
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (common.MEAN, common.STD))
    torch.testing.assert_close(image, (pixels - mean) / std)
    assert label == 0
    # An epoch of two of the four images: what a round takes, and no more to prefetch.
    loader = common.make_train_loader(data.train, 1, 0, num_samples=2)
    assert [tuple(images.shape) for images, _ in loader] == [(1, 3, 32, 32)] * 2


def test_a_peer_and_a_rung_start_alike_and_serve_rounds():
    words = ["--model", "resnet8", "--batch-size", "16", "--rounds", "2", "--device", "cpu"]
    modules = {
        "peer": ("benchmarks.peers.eager_fp32", [*words, "--workers", "0"]),
        "configuration": (
            "benchmarks.suites.ablation_worker",
            [*words, "--configuration", "channels_last"],
        ),
        "wrong": ("benchmarks.suites.ablation_worker", [*words, "--configuration", "graph"]),
    }
    pool = WorkerPool(modules.__getitem__, 2)
    with pool.started(list(modules)):
        with pytest.raises(RuntimeError, match="CUDA graphs need an NVIDIA GPU"):
            pool.worker("wrong")
        peer, configuration = pool.worker("peer"), pool.worker("configuration")
        assert peer.hello["loss"] == pytest.approx(configuration.hello["loss"], rel=1e-4)
        assert configuration.hello["dtype"] == "fp32"
        for worker in (peer, configuration):
            assert 0 < worker.sample() < 60
            assert worker.close()["resident_bytes"] > 2**26
