"""Another revision, and the recorded rows, against this tree."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.harness.rows import summarize, write_results
from benchmarks.prove import check, compare

ROOT = Path(__file__).resolve().parents[2]
SUITE = """
import fastres
def bench_it(benchmark):
    now = [0.0]
    benchmark._timer = lambda: now[0]
    benchmark.pedantic(lambda: now.__setitem__(0, now[0] + fastres.SECONDS), rounds=3)
"""
PYPROJECT = """
[tool.pytest.ini_options]
python_files = ["bench_*.py"]
python_functions = ["bench_*"]
"""


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A checkout whose fastres takes 1 s in HEAD, and 0.5 s in the changed working tree."""
    folder = tmp_path / "project"
    for name, text in {
        "fastres/__init__.py": "SECONDS = 1.0\n",
        "benchmarks/__init__.py": "",
        "pyproject.toml": PYPROJECT,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(tmp_path, "init", "-q", str(folder))
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "first")
    (folder / "fastres" / "__init__.py").write_text("SECONDS = 0.5\n")
    # The revision knows nothing of the suite: this tree's is lent to it.
    (folder / "benchmarks" / "bench_it.py").write_text(SUITE)
    monkeypatch.setattr(compare, "ROOT", folder)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    # pytest-benchmark measures nothing in a process that believes to be one of xdist's workers.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


def leftovers(project):
    return [
        *project.parent.glob("fastres-compare-*"),
        *git(project, "worktree", "list").split("\n")[1:],
    ]


def test_both_revisions_are_measured_by_one_suite_and_nothing_stays(project, capsys):
    assert compare.main(["HEAD", "--turns", "1"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "bench_it" in line)
    assert "500 ms (500 to 500, n = 3)" in line
    assert "1000 ms (1000 to 1000, n = 3)" in line
    assert line.endswith("2.000 x")
    assert leftovers(project) == []


def test_an_unknown_revision_is_one_sentence(project, capsys):
    assert compare.main(["no-such-revision"]) == 2
    assert "git knows no revision 'no-such-revision'" in capsys.readouterr().err
    assert leftovers(project) == []


def test_a_suite_that_does_not_run_says_why_and_leaves_nothing(project, capsys):
    (project / "benchmarks" / "bench_it.py").write_text("import no_such_module\n")
    assert compare.main(["HEAD", "--turns", "1"]) == 1
    assert "no_such_module" in capsys.readouterr().err
    assert leftovers(project) == []


def test_ctrl_c_removes_the_worktree(project):
    (project / "benchmarks" / "bench_it.py").write_text(
        "import time\n"
        "def bench_it(benchmark):\n"
        "    open('started', 'w').close()\n"
        "    time.sleep(600)\n"
    )
    code = (
        "import sys, pathlib; from benchmarks.prove import compare; "
        f"compare.ROOT = pathlib.Path({str(project)!r}); sys.exit(compare.main(['HEAD']))"
    )
    # A shell without job control has its background jobs ignore Ctrl-C, and they pass that on.
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    # The time that a busy machine takes to start is not what is tested.
    for _ in range(1200):
        if (project / "started").exists():
            break
        time.sleep(0.1)
    assert (project / "started").exists()
    assert len(leftovers(project)) == 2
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert leftovers(project) == []


def test_columns_show_what_one_side_lacks():
    lines = compare.table({"a": [0.5, 1.0, 2.0]}, {"a": [3.0], "b": [1.0]}, "v1")
    assert "1000 ms (500 to 2000, n = 3)" in lines[1]
    assert lines[1].endswith("3.000 x")
    assert "none" in lines[2]


def provenance(cores=2, date="2026-01-01"):
    machine = {"gpu": None, "cpu": "c", "cores": cores, "cpu_vectors": "avx2", "cpu_bf16": None}
    return {"machine": machine, "versions": {"torch": "2.11.0"}, "date": date, "dtype": "fp32"}


def row(metric, unit, *values, provider="eager"):
    return summarize("s", "case", provider, metric, unit, values)


def test_slower_is_outside_of_the_recorded_spread_on_the_slow_side():
    old = [row("time", "ms", 9, 10, 12), row("rate", "images/s", 90, 100, 120)]
    recorded = [(entry, provenance()) for entry in old]
    new = [row("time", "ms", 12), row("rate", "images/s", 90)]
    assert check.judge(new, provenance(), recorded).slower == []
    assert len(check.judge(new, provenance(), recorded).in_spread) == 2
    new = [row("time", "ms", 12.1), row("rate", "images/s", 89.9)]
    assert len(check.judge(new, provenance(), recorded).slower) == 2
    new = [row("time", "ms", 1), row("rate", "images/s", 500)]
    assert check.judge(new, provenance(), recorded).slower == []


def test_only_rows_with_a_spread_of_this_machine_judge():
    slow = [row("time", "ms", 99), row("accuracy", "%", 1)]
    for recorded in (
        [],
        [(row("time", "ms", 1, 2, 3), provenance(cores=4))],
        [(row("time", "ms", 1), provenance())],
        [(row("time", "ms", 1, 2, 3, provider="fused"), provenance())],
    ):
        verdict = check.judge(slow, provenance(), recorded)
        assert (verdict.slower, verdict.unknown) == ([], ["s, case, eager: time"])
    # The newest row counts.
    recorded = [
        (row("time", "ms", 1, 2, 3), provenance()),
        (row("time", "ms", 98, 99, 100), provenance(date="2026-01-02")),
    ]
    assert check.judge(slow, provenance(), recorded).slower == []


def test_the_check_fails_where_something_is_slower(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "run_suite", lambda *_: {})
    fresh = [row("time", "ms", 5.0)]
    monkeypatch.setattr(check, "rows_of_report", lambda _: (fresh, provenance()))
    options = ["--results", str(tmp_path)]
    assert check.main(["--results", str(tmp_path / "nowhere")]) == 2
    assert check.main(options) == 0
    assert "1 of 1 rows were never recorded on 2 cores c" in capsys.readouterr().out
    write_results("x", [row("time", "ms", 1, 2, 3)], provenance(), tmp_path)
    assert check.main(options) == 1
    assert "slower: s, case, eager: time 5 ms (recorded 2, 1 to 3)" in capsys.readouterr().out
