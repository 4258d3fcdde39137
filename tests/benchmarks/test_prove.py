"""The proof in one command: its budget, what it leaves out, what it calls red, and a rehearsal."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.harness.rows import read_results, summarize
from benchmarks.prove import environment, sanitize
from benchmarks.prove import proof as prove
from benchmarks.prove.choose_tests import missing_imports, usable_test_files
from benchmarks.prove.parts import Part, Rehearsal
from benchmarks.prove.stages import STAGES, machine_part
from fastres.config import validate

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = "nothing to run on this machine: no GPU"
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
        (5, False, "no tests ran\n", "left out", "nothing to run here"),
        (5, False, "x\nnothing to run on this machine: no GPU\n", "left out", NO_GPU),
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


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_states_the_budget_that_its_parts_take(name, tmp_path):
    stage = STAGES[name]
    parts = [machine_part(), *stage.parts(tmp_path)]
    assert sum(part.seconds for part in parts) == stage.budget
    files = [part.file_name for part in parts]
    assert len(set(files)) == len(files)
    for part in parts:
        assert part.least <= part.seconds
        for shown in (part, part.rehearsed()):
            assert "{" not in " ".join(shown.arguments(Path("/out"), 100))


def test_a_gpu_is_looked_at_before_it_is_measured():
    names = {name: [part.name for part in stage.parts(None)] for name, stage in STAGES.items()}
    assert list(names) == ["look", "measure", "confirm", "cpu"]
    assert names["look"][:3] == ["compile kernels", "parity resnet20", "parity resnet18"]
    # What is compared is measured with what was chosen.
    assert names["measure"].index("tune") < names["measure"].index("ablation resnet20")
    assert not set(names["cpu"]) & {"tune", "GPU tests", "memcheck"}


def test_the_claims_have_their_denominators_and_all_cases_exist():
    stages = ("look", "measure", "confirm")
    parts = [part for name in stages for part in STAGES[name].parts(None)]
    cases = [word for part in parts for word in part.command if "::" in word]
    for network in ("resnet20", "resnet18"):
        for provider in ("fast", "compile", "peer_compiled", "amp", "eager"):
            assert any(f"[cuda {network}-{provider}]" in case for case in cases)
    # Pytest refuses names that it does not find; on this machine the suites offer those of a CPU.
    code = (
        "import sys, pytest, torch; from benchmarks.harness import ablation; "
        "ablation.here = lambda: torch.device('cuda'); "
        "sys.exit(pytest.main(['--collect-only', '-qq', '-o', 'addopts=', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", code, *cases]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def _parse(module, words):
    """Read a command line as the command itself does."""
    tool = importlib.import_module(module)
    if module == "fastres.train":
        base = tool.TrainOptions.of(tool._base(words)[0])
        validate(tool.parse(tool.TrainOptions, "", "", words, base).to_config())
    elif hasattr(tool, "_parser"):
        tool._parser().parse_args(words)
    else:
        tool._parse(words)


@pytest.mark.parametrize("stage", ["look", "measure", "confirm"])
def test_what_a_gpu_is_told_to_run_is_understood(stage, tmp_path):
    """No rehearsal has these words, and `python -m` on a file without an entry succeeds."""
    for part in STAGES[stage].parts(tmp_path):
        module, *words = part.arguments(tmp_path, part.seconds)
        if module == "pytest":
            continue
        source = Path(importlib.util.find_spec(module).origin).read_text()
        assert source.endswith('if __name__ == "__main__":\n    sys.exit(main())\n'), module
        _parse(module, words)


def test_gpu_tests_come_in_the_order_of_their_worth():
    (tests,) = (part for part in STAGES["confirm"].parts(None) if part.name == "GPU tests")
    files = [word for word in tests.command if word.startswith("tests/")]
    assert files.index("tests/kernels/test_block.py") < files.index("tests/data/test_loaders.py")
    assert "gpu and not slow" in tests.command


def test_a_suite_is_quick_where_its_time_is_short():
    (model,) = (part for part in STAGES["cpu"].parts(None) if part.suite == "model")
    assert "--quick" in model.arguments(Path("out"), 30)
    assert "--quick" not in model.arguments(Path("out"), 300)


def test_a_part_is_rehearsed_by_its_small_form_or_not_at_all(tmp_path):
    whole = Part("a", ("big",), 1, 1, rehearsal=Rehearsal(("small",), is_interpreted=True))
    small = whole.rehearsed()
    assert (small.command, small.is_interpreted) == (("small",), True)
    proof = prove.Proof(tmp_path, budget=60, data_dir=None)
    assert proof._environment(small)["TRITON_INTERPRET"] == "1"
    assert proof._environment(whole) == proof._env
    proof.run([replace(whole, rehearsal=None).rehearsed()])
    assert (proof.outcomes[0].status, proof.outcomes[0].detail) == (
        "left out",
        "needs an NVIDIA GPU",
    )


def test_stages_behind_a_red_one_are_left_out(tmp_path):
    red = Part("red", ("timeit", "-n1", "-r1", "raise ValueError"), 1, 1)
    never = [replace(red, name="second"), replace(red, name="third")]
    proof = prove.Proof(tmp_path, budget=60, data_dir=None)
    prove._run_stages(proof, [[red], never[:1], never[1:]])
    details = {outcome.name: outcome.detail for outcome in proof.outcomes}
    assert proof.failed == ["red"]
    assert details["second"] == details["third"] == "repair what was red first: red"


def test_what_crashed_is_found_in_the_reports(tmp_path):
    states = ("x FAILED", "y begun", "y ok", "z begun", "z LOST", "v not run", "w begun")
    # The smallest crash tells most: what is larger has the same kernels in it.
    lines = [dict(zip(("name", "status"), state.split(" ", 1), strict=True)) for state in states]
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "parity_a.jsonl").write_text(text + '\n{"name": "half')
    assert sanitize.failed_checks(tmp_path) == ["z", "w", "x"]
    assert sanitize.failed_checks(tmp_path / "none") == []


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
    files, notes = usable_test_files(tmp_path / "tests")
    assert [path.name for path in files] == ["test_c.py"]
    assert notes == tuple(f"test_{name}.py left out: no no_such_package here" for name in "ab")


def test_the_machine_check_names_what_is_wrong(tmp_path):
    gpu = {"free_gib": 70.0}
    good = {"missing": ["nvidia.dali"], "versions": {"torch": "2.11.0+cu130"}, "gpu": gpu}
    good |= {"nvidia_smi": True, "missing_to_launch": []}
    assert environment.find_problems(good) == []
    assert environment.find_problems(good | {"gpu": None}) == [
        "there is an NVIDIA driver here and torch finds no usable GPU"
    ]
    assert environment.find_problems(good | {"gpu": None, "nvidia_smi": False}) == []
    assert "older" in environment.find_problems(good | {"versions": {"torch": "2.9.1"}})[0]
    assert environment.find_problems(good | {"missing": ["pytest"]}) == ["pytest is not installed"]
    without = {"missing_to_launch": ["a C compiler", "the headers of Python"]}
    assert environment.find_problems(good | without) == [
        "Triton can start no kernel without a C compiler and the headers of Python"
    ]
    assert environment.find_problems(good | without | {"gpu": None, "nvidia_smi": False}) == []
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
    part = machine_part()
    proof = prove.Proof(tmp_path, budget=60, data_dir=tmp_path)
    assert "FASTRES_LAUNCH_TABLE" not in proof._environment(part)
    (tmp_path / "launch_table.json").write_text('{"schema": 1, "gpus": {}}')
    table = proof._environment(part)["FASTRES_LAUNCH_TABLE"]
    assert proof._environment(part)["FASTRES_DATA"] == str(tmp_path)
    code = "from fastres.kernels.gpu import launch_table; print(launch_table.TABLE_PATH)"
    env = os.environ | {"FASTRES_LAUNCH_TABLE": table}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == table


def _rehearse(out, stage, budget):
    """The whole command, from a clone, on whatever machine this is; no part of it may be red."""
    started = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.prove", "--budget", str(budget), *stage]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert time.monotonic() - started < budget + 5
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((out / "summary.json").read_text())
    outcomes = {part["name"]: part for part in summary["parts"]}
    assert outcomes["machine"]["status"] == "ok"
    assert summary["green"] is True
    assert all(outcomes[name]["detail"] for name in summary["left out"] + summary["cut"])
    for name in outcomes:
        assert name in done.stdout
    recorded = {name for part in summary["parts"] for name in part["rows"]}
    assert recorded == {path.name for path in out.glob("*.csv")}
    for row, provenance in read_results(out):
        assert row.n >= 1
        assert provenance["machine"]
    return summary


def test_look_is_rehearsed_on_a_cpu(tmp_path):
    # Shares are sized for a GPU's machine; slow cores take 10 s of one to import torch.
    summary = _rehearse(tmp_path / "out", ["--stage", "look"], 300)
    planned = [part.rehearsed() for part in STAGES["look"].parts(None)]
    statuses = {part["name"]: part["status"] for part in summary["parts"]}
    assert list(statuses) == ["machine", *(part.name for part in planned)]
    assert statuses["compile kernels"] == "ok"
    assert len(summary["ok"]) >= 3
    # A slow machine is over its budget before the last parts, and may leave checks to resume.
    cut, left_out = set(summary["cut"]), set(summary["left out"])
    needs_gpu = {part.name for part in planned if part.obstacle}
    assert needs_gpu - cut <= left_out <= needs_gpu | {"parity resnet20 resumed"}
    assert set(statuses) == {*summary["ok"], *left_out, *cut}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [[], ["--stage", "measure"], ["--stage", "confirm"]])
def test_a_stage_stays_in_its_budget_and_says_what_it_left_out(tmp_path, stage):
    summary = _rehearse(tmp_path / "out", stage, 120)
    planned = [part.name for part in STAGES[stage[1] if stage else "cpu"].parts(None)]
    assert [part["name"] for part in summary["parts"]] == ["machine", *planned]
