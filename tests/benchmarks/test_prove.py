"""The proof in one command: its budget, what it leaves out, what it calls red, and a rehearsal."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.harness.rows import read_results, summarize
from benchmarks.prove import environment, parts
from benchmarks.prove import proof as prove
from benchmarks.prove.parts import Part, missing_imports, plan_parts

ROOT = Path(__file__).resolve().parents[2]
PROVENANCE = {
    "machine": {"gpu": None, "cpu": "c", "cores": 2, "cpu_vectors": "avx2", "cpu_bf16": None},
    "versions": {"torch": "2.11.0"},
    "commit": "abc",
    "date": "2026-01-01",
    "command": "x",
    "dtype": "fp32",
}


@pytest.mark.parametrize(
    ("code", "cut", "log", "status", "detail"),
    [
        (0, False, "hello\n\n", "ok", "hello"),
        (0, False, "t.py::a PASSED [50%]\nt.py::b[x y] PASSED [100%]\n", "ok", "2 passed"),
        (1, False, "t.py::a PASSED\nt.py::b FAILED\n", "failed", "1 failed, 1 passed"),
        (0, False, "t.py::a SKIPPED\nt.py::b SKIPPED\n", "left out", "2 skipped"),
        (0, False, "t.py::a SKIPPED\nt.py::b PASSED\n", "ok", "1 passed, 1 skipped"),
        (2, True, "t.py::a PASSED\n", "cut", "its time was over; 1 passed"),
        (2, True, "t.py::a FAILED\n", "failed", "1 failed"),
        (-9, True, "", "cut", "its time was over"),
        (1, False, "Traceback\nValueError: x\n", "failed", "exit code 1: ValueError: x"),
        (0, False, "t.py::a ERROR\n", "failed", "1 error"),
        (
            0,
            False,
            "[gw0] [ 50%] PASSED t.py::a \n[gw1] [100%] PASSED t.py::b[x y] \n",
            "ok",
            "2 passed",
        ),
        (1, False, "[gw11] [  5%] FAILED t.py::a \nFAILED t.py::a - x\n", "failed", "1 failed"),
        (5, False, "no tests ran\n", "left out", "nothing to run on this machine"),
    ],
)
def test_a_part_is_judged_by_its_tests_and_its_exit_code(code, cut, log, status, detail):
    assert prove.judge(code, cut, log) == (status, detail)


def test_parts_are_limited_left_out_and_recorded(tmp_path, capsys):
    proof = prove.Proof(tmp_path, budget=26, data_dir=None)
    started = time.monotonic()
    parts = [
        Part("sleeps", ("timeit", "-n1", "-r1", "import time; time.sleep(60)"), 1, 1),
        Part("fails", ("timeit", "-n1", "-r1", "raise ValueError('broken')"), 1, 1),
        Part("needs", ("timeit",), 1, 1, needs=("no_such_module",)),
        Part("late", ("timeit",), 1, 100),
    ]
    proof.run(parts)
    assert time.monotonic() - started < 26
    status = {outcome.name: outcome.status for outcome in proof.outcomes}
    assert status == {"sleeps": "cut", "fails": "failed", "needs": "left out", "late": "left out"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["green"] is False
    assert (summary["cut"], summary["failed"]) == (["sleeps"], ["fails"])
    assert "ValueError: broken" in proof.outcomes[1].detail
    assert "no_such_module is not installed" in proof.outcomes[2].detail
    assert "it needs 100 s" in proof.outcomes[3].detail
    assert "sleep" in (tmp_path / "sleeps.log").read_text()
    assert "late: " in capsys.readouterr().out


def test_a_part_that_is_cut_keeps_the_rows_that_it_wrote(tmp_path):
    row = summarize("s", "c", "p", "time", "ms", [1.0])
    code = (
        "import pathlib, time; from benchmarks.harness.rows import *; "
        f"write_results('s', [{row!r}], {PROVENANCE!r}, pathlib.Path({str(tmp_path)!r})); "
        "time.sleep(60)"
    )
    proof = prove.Proof(tmp_path, budget=13, data_dir=None)
    proof.run([Part("writes", ("timeit", "-n1", "-r1", f"exec({code!r})"), 1, 1)])
    (outcome,) = proof.outcomes
    assert outcome.status == "cut"
    assert outcome.rows == ["s_c-2-cores_fp32_torch2.11.0_2026-01-01.csv"]
    assert [found for found, _ in read_results(tmp_path)] == [row]


def test_a_report_becomes_rows_and_an_old_one_does_not(tmp_path):
    proof = prove.Proof(tmp_path, budget=60, data_dir=None)
    info = {"suite": "step", "case": "c", "provider": "p", "dtype": "fp32", "clock": "wall"}
    benchmark = {"extra_info": info, "stats": {"data": [1.0, 2.0]}}
    report = {"benchmarks": [benchmark], "provenance": PROVENANCE, "datetime": "2026-01-02"}
    (tmp_path / "bench_ops.json").write_text(json.dumps(report))
    part = Part("ops", ("timeit", "-n1", "-r1", "pass"), 1, 1, suite="ops")
    proof.run([part])
    # What a run before this one had left there is no result of this one.
    assert proof.outcomes[0].rows == []
    assert "no report, so no rows" in proof.outcomes[0].notes
    statement = f"open({str(tmp_path / 'bench_ops.json')!r}, 'w').write({json.dumps(report)!r})"
    proof.run([replace(part, command=("timeit", "-n1", "-r1", statement))])
    assert len(proof.outcomes[1].rows) == 1
    assert [row.metric for row, _ in read_results(tmp_path)] == ["time"]


def test_who_ignores_the_end_of_its_time_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(prove, "_GRACE_S", 0.5)
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print('child', child.pid, flush=True); time.sleep(60)"
    )
    with (tmp_path / "log").open("w") as stream:
        command = [sys.executable, "-c", code]
        _, cut = prove._run_limited(command, stream, dict(os.environ), 3)
    assert cut
    pid = int((tmp_path / "log").read_text().split()[1])
    for _ in range(50):
        status = Path(f"/proc/{pid}/status")
        if not status.exists() or "\nState:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    pytest.fail("the child still runs")


def test_a_budget_is_shared_by_weight_and_what_is_left_over_moves_on(tmp_path):
    proof = prove.Proof(tmp_path, budget=106, data_dir=None)
    parts = [Part("a", (), 3, 1), Part("b", (), 1, 50)]
    assert proof._limit(parts) == pytest.approx(75, abs=1)
    assert proof._limit(parts[1:]) == pytest.approx(100, abs=1)


def test_the_plan_on_a_gpu_starts_with_parity_and_tuning():
    parts = plan_parts(on_gpu=True)
    names = [part.name for part in parts]
    assert names[:2] == ["parity on the GPU", "tune"]
    assert {"ops", "model", "loaders", "train"} < set(names)
    first = parts[0]
    assert "gpu and not slow" in first.command
    assert "tests/kernels/test_block.py" in first.command
    tests = [word for word in first.command if word.startswith("tests/")]
    assert tests.index("tests/kernels/test_block.py") < tests.index("tests/data/test_loaders.py")


def test_the_plan_on_a_cpu_has_no_gpu_parts():
    parts = plan_parts(on_gpu=False)
    assert all("gpu and not slow" not in part.command for part in parts)
    assert all("tune" not in part.name for part in parts)
    assert [part.suite for part in parts if part.suite] == ["model", "ops", "loaders", "train"]
    for part in parts:
        assert "{" not in " ".join(part.arguments(Path("/out"), 100))


def test_short_suites_are_quick():
    (model,) = (part for part in plan_parts(on_gpu=False) if part.suite == "model")
    assert "--quick" in model.arguments(Path("out"), 30)
    assert "--quick" not in model.arguments(Path("out"), 300)


def test_tests_that_lack_a_package_are_left_out_with_a_line(tmp_path):
    kernels, helpers = tmp_path / "tests" / "kernels", tmp_path / "tests" / "helpers"
    kernels.mkdir(parents=True)
    helpers.mkdir()
    (helpers / "cases.py").write_text("import no_such_package.part\n")
    (kernels / "test_a.py").write_text("from tests.helpers.cases import x\n")
    (kernels / "test_b.py").write_text("from tests.helpers import cases\n")
    (kernels / "test_c.py").write_text("import torch, fastres\ndef f():\n    import z\n")
    for name, missing in (("a", {"no_such_package"}), ("b", {"no_such_package"}), ("c", set())):
        assert missing_imports(kernels / f"test_{name}.py", tmp_path) == missing
    files, notes = parts._test_files(tmp_path / "tests")
    assert [path.name for path in files] == ["test_c.py"]
    assert notes == tuple(f"test_{name}.py left out: no no_such_package here" for name in "ab")


def test_the_machine_check_names_what_is_wrong(tmp_path):
    gpu = {"free_gib": 70.0}
    good = {"missing": ["nvidia.dali"], "versions": {"torch": "2.11.0+cu130"}, "gpu": gpu}
    good["nvidia_smi"] = True
    assert environment.find_problems(good) == []
    assert environment.find_problems(good | {"gpu": None}) == [
        "there is an NVIDIA driver here and torch finds no usable GPU"
    ]
    assert environment.find_problems(good | {"gpu": None, "nvidia_smi": False}) == []
    assert "older" in environment.find_problems(good | {"versions": {"torch": "2.9.1"}})[0]
    assert environment.find_problems(good | {"missing": ["pytest"]}) == ["pytest is not installed"]
    assert "1.0 GiB" in environment.find_problems(good | {"gpu": {"free_gib": 1.0}})[0]
    assert environment.is_installed("torch")
    assert not environment.is_installed("no_such_package.part")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "5"], "--budget must be at least 10 s"),
        (["--data-dir", "/no/such/folder"], "is no folder"),
    ],
)
def test_bad_use_is_one_sentence(tmp_path, capsys, options, message):
    assert prove.main(["--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err


def test_the_tuned_table_is_used_by_the_parts_behind_it(tmp_path):
    proof = prove.Proof(tmp_path, budget=60, data_dir=tmp_path)
    assert "FASTRES_LAUNCH_TABLE" not in proof._environment()
    (tmp_path / "launch_table.json").write_text('{"schema": 1, "gpus": {}}')
    table = proof._environment()["FASTRES_LAUNCH_TABLE"]
    assert proof._environment()["FASTRES_DATA"] == str(tmp_path)
    code = "from fastres.kernels.gpu import launch_table; print(launch_table.TABLE_PATH)"
    env = os.environ | {"FASTRES_LAUNCH_TABLE": table}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == table


def test_a_rehearsal_stays_in_its_budget_and_says_what_it_left_out(tmp_path):
    """The whole command, from a clone, on whatever machine this is; no part of it may be red."""
    out = tmp_path / "out"
    started = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.prove", "--budget", "60", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert time.monotonic() - started < 62
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((out / "summary.json").read_text())
    outcomes = {part["name"]: part for part in summary["parts"]}
    assert outcomes["machine"]["status"] == "ok"
    assert summary["green"] is True
    machine = json.loads((out / "machine.json").read_text())
    planned = {part.name for part in plan_parts(on_gpu=machine["gpu"] is not None)}
    assert set(outcomes) == planned | {"machine"}
    assert all(outcomes[name]["detail"] for name in summary["left out"] + summary["cut"])
    for name in outcomes:
        assert name in done.stdout
    recorded = {name for part in summary["parts"] for name in part["rows"]}
    assert recorded == {path.name for path in out.glob("*.csv")}
    for row, provenance in read_results(out):
        assert row.n >= 1
        assert provenance["machine"]
