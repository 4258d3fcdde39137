"""The parity command, interpreted: what it finds, what it says, how it ends."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres.kernels.gpu import backend as gpu_backend
from fastres.kernels.gpu import primitives
from fastres.kernels.gpu.launch import recording
from fastres.kernels.gpu.launch_table import assume_entries
from fastres.kernels.tools import parity, parity_check, parity_kernels
from fastres.kernels.tools.candidates import im2col_start, product_of
from fastres.kernels.tools.command_line import NOTHING_TO_RUN
from fastres.kernels.tools.error_check import Deviation, deviations, same_bits
from fastres.kernels.tools.networks import PRECISIONS
from fastres.kernels.tools.parity_check import Check, ParityRun
from fastres.kernels.tools.parity_plan import plan_checks
from fastres.kernels.tools.tune_pdl import StepName, network_step
from fastres.kernels.tools.tune_workloads import conv_workloads
from tests.helpers.interpreter import DEVICE, HAS_GPU, needs_gpu

META = torch.device("meta")
LAYER = "h16w16c32k64r1s1u2p0"
LOST = "CUDA error: an illegal memory access was encountered"

# Of the checks of a batch norm, those before the one that loses the GPU in a test.
BEFORE = (("apply", "/none"), ("reduce", "/none"), ("stats", ""))

interpreted = pytest.mark.skipif(HAS_GPU, reason="expects what a machine without a GPU says")


@pytest.fixture(scope="module")
def planned():
    """The checks of ResNet-20, planned once for all tests that run a few of them."""
    return plan_checks(["resnet20"], 2, 512, ["bf16"], "chosen", DEVICE)


@pytest.fixture
def command(planned, monkeypatch, tmp_path, capsys):
    """Runs the command on some of them; returns exit code, output and the records by name."""

    def run(only, *options):
        path = tmp_path / "records.jsonl"
        named = ["--models", "resnet20", "--only", only, "--json", str(path), *options]
        code = parity.main(named)
        # A process that was killed may have left half a line.
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        records = {r["name"]: r for r in map(json.loads, lines)}
        return code, capsys.readouterr().out, records

    monkeypatch.setattr("fastres.kernels.tools.parity_plan.plan_checks", lambda *_: planned)
    return run


def plant(monkeypatch, fault):
    """Let `fault` have the result of the kernel that stores dy, and how often it was called."""
    honest, calls = parity_kernels.bn_backward_apply, itertools.count(1)
    broken = lambda dy: fault(honest(dy), next(calls))  # noqa: E731
    monkeypatch.setattr(parity_kernels, "bn_backward_apply", broken)


def leave_one_out(dy, _):
    partly = torch.empty_like(dy)
    partly[1:], partly[0, 1:] = dy[1:], dy[0, 1:]
    partly[0, 0, 1:], partly[0, 0, 0, 1:] = dy[0, 0, 1:], dy[0, 0, 0, 1:]
    return partly


def fail(dy, _):
    raise RuntimeError("out of resource\nand more")


@interpreted
def test_a_layer_is_right(command):
    code, out, records = command(LAYER)
    assert code == 0
    names = [f"{op}/bf16/{LAYER}/plain" for op in ("fprop", "dgrad", "wgrad", "folded")]
    assert {name.rpartition("/")[0] for name in records if "folded" not in name} >= set(names[:3])
    assert names[3] in records
    assert all(r["status"] == "ok" and 0 < r["share"] < 1 for r in records.values())
    first, *lines, last = out.splitlines()
    assert first == f"CPU, interpreted: {len(records)} checks, 2 images"
    assert lines[0].startswith(f"1/{len(records)} fprop/bf16/{LAYER}/plain/im2col [triton ")
    assert ": ok 0." in lines[0]
    assert last == f"{len(records)} ok"


@interpreted
def test_a_wrong_product_stands_alone(command, monkeypatch):
    honest = gpu_backend.conv_wgrad
    monkeypatch.setattr(gpu_backend, "conv_wgrad", lambda *a, **o: 1.02 * honest(*a, **o))
    code, out, records = command(LAYER)
    assert code == 1
    assert [name for name, r in records.items() if r["status"] != "ok"] == [
        f"wgrad/bf16/{LAYER}/plain/im2col"
    ]
    assert "1 WRONG" in out
    assert "WRONG" in out.splitlines()[-1]
    assert "dw is off by" in out.splitlines()[-1]


@interpreted
@pytest.mark.parametrize(
    ("fault", "status", "detail"),
    [
        (lambda dy, _: 1.02 * dy, "WRONG", "dy is off by"),
        (leave_one_out, "WRONG", "dy is off by NaN or infinity in 1 of 8192 elements"),
        (lambda dy, n: dy + 1e-3 * (n - 1), "DIFFERS", "not the same bits in 2 runs: dy"),
        (lambda dy, n: n * dy, "DIFFERS", "not the same bits"),
        (fail, "FAILED", "RuntimeError: out of resource"),
    ],
    ids=["factor", "unwritten", "counter", "second run wrong", "exception"],
)
def test_a_fault_is_named(fault, status, detail, command, monkeypatch):
    plant(monkeypatch, fault)
    code, out, records = command("bn_backward_apply/bf16/h8w8c64")
    (record,) = records.values()
    assert (code, record["status"]) == (1, status)
    assert detail in record["detail"]
    assert "\n" not in record["detail"]
    assert out.count(detail) == 2


@interpreted
def test_a_lost_gpu_stops_it_and_is_named(command, monkeypatch):
    """What begins is printed before it begins, and what ended is in the file by then."""
    lost = []

    def synchronize():
        if lost:
            raise RuntimeError(LOST)

    plant(monkeypatch, lambda dy, _: lost.append(dy) or dy)
    run = lambda *_: ParityRun(DEVICE, synchronize=synchronize)  # noqa: E731
    monkeypatch.setattr(parity, "_parity_run", run)
    code, out, records = command("bn_")
    by_status = {}
    for name, record in records.items():
        by_status.setdefault(record["status"], []).append(name)
    assert code == 1
    name = "bn_backward_apply/bf16/h32w32c16"
    assert by_status["LOST"] == [name]
    assert by_status["ok"] == [f"bn_{n}/bf16/h32w32c16{e}" for n, e in BEFORE]
    assert len(by_status["not run"]) == len(records) - 4
    assert out.splitlines()[-1] == (
        "repeat it alone: compute-sanitizer --tool memcheck python -m "
        f'fastres.kernels.tools.parity --only "{name}" --batch 4 '
        "--models resnet20 --dtypes bf16"
    )
    assert (
        f"{name}: LOST: the GPU fails in every call since it ran {name}: RuntimeError: {LOST}"
        in out
    )


@interpreted
def test_what_no_time_is_left_for_is_named(command):
    code, out, records = command("cross_entropy", "--budget", "1e-9")
    assert code == NOTHING_TO_RUN
    assert {r["status"] for r in records.values()} == {"not run"}
    assert "not run, since no time was left: cross_entropy/bf16, cross_entropy_backward" in out
    assert out.splitlines()[-1] == "nothing to run on this machine: no time was left"


@interpreted
def test_an_interrupted_run_keeps_what_it_has(command, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(parity_kernels, "smooth_cross_entropy_bwd", interrupt)
    code, out, records = command("cross_entropy")
    assert code == 130
    assert [record["status"] for record in records.values()] == ["ok", "not run"]
    assert out.splitlines()[-2:] == ["2/2 cross_entropy_backward/bf16: interrupted", "1 ok"]


@interpreted
def test_graphs_alone_prove_nothing_without_a_gpu(command):
    code, out, records = command("tma-rank-4/fprop/bf16/h32w32c16k16r3s3u1p1/prologue/tma/graph")
    assert code == NOTHING_TO_RUN
    assert len(records) == 1
    assert out.splitlines()[-1].startswith("nothing to run on this machine: CUDA graphs are")


@needs_gpu
def test_what_was_unknown_is_right_on_a_gpu(tmp_path, capsys):
    path = tmp_path / "records.jsonl"
    options = ["--models", "resnet20", "--only", "tma-rank-4", "--json", str(path)]
    assert parity.main(options) == 0, capsys.readouterr().out
    assert list(parity.last_states(path).values()) == ["ok"] * 6


@interpreted
def test_without_gpu_and_interpreter_nothing_is_proved(monkeypatch, capsys):
    monkeypatch.setattr(primitives, "INTERPRETED", SimpleNamespace(value=False))
    assert parity.main([]) == NOTHING_TO_RUN == 5
    assert capsys.readouterr().out.startswith("nothing to run on this machine: no NVIDIA GPU")


@interpreted
def test_a_run_goes_on_behind_what_was_begun(command, tmp_path):
    done, killed, left = (f"bn_stats/bf16/{size}" for size in ("h32w32c16", "h16w16c32", "h8w8c64"))
    states = [(done, "begun"), (done, "ok"), (killed, "begun")]
    lines = [json.dumps({"name": name, "status": status}) + "\n" for name, status in states]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(lines) + '{"name": "bn_st')
    code, out, records = command("bn_stats/bf16", "--resume")
    assert code == 1
    assert {name: r["status"] for name, r in records.items()} == {
        done: "ok", killed: "LOST", left: "ok",
    }  # fmt: skip
    assert f"{killed}: LOST: its process ended" in out
    assert f"1/1 {left}" in out
    code, out, _ = command("bn_stats/bf16", "--resume")
    assert (code, out) == (NOTHING_TO_RUN, f"nothing to run: {path} has all of it\n")


@pytest.mark.parametrize(
    "options",
    [
        ["--batch", "0"],
        ["--resume"],
        ["--budget", "nan"],
        ["--threads", "-1"],
        ["--json", "/no/such/file"],
    ],
)
def test_wrong_use(options, capsys):
    assert parity.main(options) == 2
    assert capsys.readouterr().err.startswith(f"error: {options[0]}")


def test_a_name_that_no_check_has_is_wrong_use(command, capsys):
    with pytest.raises(FileNotFoundError):
        command("winograd")
    assert capsys.readouterr().err == "error: no check has winograd in its name\n"


def test_the_unknowns_come_first_and_names_say_what_they_are_of(planned, monkeypatch, capsys):
    monkeypatch.setattr("fastres.kernels.tools.parity_plan.plan_checks", lambda *_: planned)
    assert parity.main(["--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert names == [check.name for check in planned]
    assert len(set(names)) == len(names)
    kinds = [name.partition("/")[0] for name in names]
    assert kinds[:3] == ["pipelined-register-operand"] * 3
    assert kinds[3:9] == ["tma-rank-4"] * 6
    assert {"fprop", "dgrad", "wgrad", "dgrad+wgrad"} <= set(kinds[9:40])
    assert kinds[-1] == "network"
    first = planned[0].run(planned[0].make(META, 0))
    assert {"y", "mean", "scale_shift"} == set(first)


def described(value):
    """An argument as far as it decides which code runs."""
    if isinstance(value, TensorDescriptor):
        return tuple(value.block_shape)
    if isinstance(value, tuple):
        return tuple(map(described, value))
    return value.dtype if isinstance(value, torch.Tensor) else value


def kernels_of(launches):
    return {
        (
            launch.name,
            launch.num_warps,
            launch.num_stages,
            *((name, described(value)) for name, value in sorted(launch.args.items())),
        )
        for launch in launches
    }


def mixed_table(networks, batch):
    """Of every other layer dgrad stores its operands, of the rest wgrad: for both of them."""
    workloads = conv_workloads(networks, [batch], [PRECISIONS["bf16"]])
    table = {}
    for number, workload in enumerate(workloads):
        for place, op in enumerate(("dgrad", "wgrad")):
            product = product_of(op, workload)
            stores = number % 2 == place
            table[product.key] = replace(im2col_start(product), stored=stores)
    return table


@pytest.mark.parametrize(
    ("networks", "table"),
    [(["resnet20", "resnet18"], lambda *_: {}), (["resnet20"], mixed_table)],
    ids=["by rule", "by a table"],
)
def test_every_kernel_of_training_is_checked_alone_with_all_its_constants(networks, table):
    """At the full batch, on meta: counts of tiles and groups included."""
    batch = 512
    with assume_entries(table(networks, batch)):
        checks = plan_checks(networks, batch, batch, ["bf16"], "chosen", DEVICE)
    alone, entries = set(), {}
    for check in checks:
        if check.name.startswith(("block", "network")):
            entries = check.entries
            continue
        with recording() as launches:
            check.run(check.make(META, 0))
        alone |= kernels_of(launches)
    with assume_entries(entries), recording() as launches:
        for network in networks:
            network_step(StepName(network, batch, "bf16"), META).run(gpu_backend)
    of_training = kernels_of(launches)
    assert len(of_training) > 30
    assert {kernel[0] for kernel in of_training - alone} == set()


def test_all_forms_are_starts_and_cudnn():
    checks = plan_checks(["resnet20"], 2, 512, ["bf16"], "all", DEVICE)
    layer = "bf16/h32w32c16k16r3s3u1p1/prologue"
    named = {c.name.rpartition("/")[2] for c in checks if c.name.startswith(f"fprop/{layer}")}
    assert named == {"im2col", "im2col-stored", "tma", "tma-stored", "strip", "pixel", "cudnn"}
    both = [c.name for c in checks if c.name.startswith(f"dgrad+wgrad/{layer}")]
    assert both == [f"dgrad+wgrad/{layer}/fused"]


def make_check(compute, **options):
    """A check whose inputs are eight ones."""
    return Check(
        name="doubled",
        label="",
        precision=PRECISIONS["fp32"],
        make=lambda device, seed: torch.ones(8, device=device),
        compute=compute,
        plain=lambda x: {"y": 2 * x},
        same_as="doubled",
        **options,
    )


@pytest.mark.parametrize("change", [0.0, 1e-6])
def test_replays_of_a_graph_must_give_the_bits_of_the_eager_run(change, monkeypatch):
    """Without a GPU: what stands in for a graph runs the call again at each replay."""
    replays = []

    def capture(call, device):
        def replay():
            replays.append(call())

        return SimpleNamespace(graph=SimpleNamespace(replay=replay))

    monkeypatch.setattr(parity_check, "capture", capture)
    # The second replay differs.
    check = make_check(lambda x: {"y": 2 * x + change * (len(replays) == 1)}, in_graph=True)
    (result,) = ParityRun(DEVICE, has_graphs=True).results([check], lambda _: None)
    assert result.status == ("DIFFERS" if change else "ok")
    assert len(replays) == 2
    if change:
        assert result.detail == "not the same bits in 4 runs: y"


def test_ties_of_relus_count_by_the_median_of_draws():
    """A flipped mask in one draw is no fault; the same error in all is, and so is one NaN."""
    for wrong_draws, status, num_runs in (((1,), "ok", 6), (range(1, 9), "WRONG", 10)):
        runs = itertools.count(2)
        calls = []

        def compute(x, runs=runs, calls=calls, wrong_draws=wrong_draws):
            calls.append(x)
            return {"y": 2 * x + 0.1 * (next(runs) // 2 in wrong_draws)}

        check = make_check(compute, has_relu=True)
        (result,) = ParityRun(DEVICE).results([check], lambda _: None)
        assert (result.status, len(calls)) == (status, num_runs)
    single_nan = parity_check._worst(
        [[Deviation("y", "rms", e, 1.0, "")] for e in (0, torch.inf, 0)]
    )
    assert single_nan[0] == torch.inf


def test_errors_of_a_kind_are_pooled():
    """One that is large by chance is carried by the others, one that is wrong is not."""
    for largest, share in ((1.5, 0.9), (50.0, 12.5)):
        shares = {f"dw of layer {i}": s for i, s in enumerate([0.6] * 15 + [largest])}
        found = [Deviation(what, "rms", s, 1.0, what) for what, s in shares.items()]
        (pooled,) = parity_check._pool(found)
        assert pooled.share == pytest.approx(share, rel=0.25)
        assert pooled.text.endswith("dw of layer 15")


def test_bits_and_shapes_are_compared():
    zeros = torch.zeros(3)
    assert not same_bits(zeros, -zeros)
    assert same_bits(zeros / 0, zeros / 0)
    assert not same_bits(zeros, zeros.half())
    with pytest.raises(ValueError, match=r"y must have shape \(3,\), got \(1,\)"):
        list(deviations({"y": zeros[:1]}, {"y": zeros}, {"y": zeros.double()}, None))
