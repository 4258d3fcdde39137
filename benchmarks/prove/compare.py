"""Measure this tree and another revision one suite: `python -m benchmarks.prove.compare REV`.

REV is checked out into a worktree in a temporary folder, which is removed at the end. The suites
of this tree measure both, turn by turn: a shared machine is faster in one minute than in the next.
Options that are not known here go to pytest, for example

    python -m benchmarks.prove.compare HEAD~3 benchmarks/suites/bench_ops.py --quick -k resnet20
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from benchmarks.harness.records import BenchmarkReport
from fastres.cli import guarded
from fastres.errors import FailureError, UsageError

__all__ = ["main", "run_suite", "table", "worktree"]

ROOT = Path(__file__).resolve().parents[2]
Times = dict[str, list[float]]


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """Check `revision` out into a temporary folder for the time of the context.

    Raises:
        UsageError: when git does not know the revision, or this is no git checkout.
    """
    try:
        commit = _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    except (OSError, subprocess.CalledProcessError):
        raise UsageError(f"git knows no revision {revision!r} here") from None
    folder = Path(tempfile.mkdtemp(prefix="fastres-compare-"))
    tree = folder / "tree"
    try:
        _git("worktree", "add", "--detach", "--force", str(tree), commit)
        yield tree
    finally:
        subprocess.run(
            ["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)],
            capture_output=True,
        )
        shutil.rmtree(folder, ignore_errors=True)
        _git("worktree", "prune")


def _lend_suites(tree: Path) -> None:
    """Put this tree's benchmarks in place of those of `tree`: both are measured by one suite."""
    shutil.rmtree(tree / "benchmarks", ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "results")
    shutil.copytree(ROOT / "benchmarks", tree / "benchmarks", ignore=ignored)


def _check_import(tree: Path, env: dict[str, str]) -> None:
    """Make sure that a process started in `tree` measures the fastres of `tree`."""
    code = "import fastres; print(fastres.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=env, capture_output=True, text=True
    )
    if found.returncode or tree.resolve() not in Path(found.stdout.strip()).resolve().parents:
        raise FailureError(f"fastres in {tree} cannot be imported: {found.stderr.strip()[-300:]}")


def run_suite(tree: Path, arguments: Sequence[str]) -> BenchmarkReport:
    """Run pytest on the suites of `tree` and return pytest-benchmark's report.

    Raises:
        FailureError: when there is no report, with the end of what pytest said.
    """
    env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    _check_import(tree, env)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", *arguments, f"--benchmark-json={path}"]
        command += ["-p", "no:cacheprovider"]
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
        text = path.read_text() if path.exists() else ""
    if not text:
        said = (done.stdout + done.stderr).strip().splitlines()[-15:]
        raise FailureError("\n".join([f"pytest ended with {done.returncode}:", *said]))
    if done.returncode:
        last = (done.stdout.strip().splitlines() or [""])[-1]
        print(f"note: pytest ended with {done.returncode} in {tree}: {last}", file=sys.stderr)
    return json.loads(text)


def _add_times(times: Times, report: BenchmarkReport) -> None:
    for benchmark in report["benchmarks"]:
        times[benchmark["fullname"]] += benchmark["stats"]["data"]


def _cell(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none"
    middle, low, high = (1e3 * v for v in (median(seconds), min(seconds), max(seconds)))
    return f"{middle:.4g} ms ({low:.4g} to {high:.4g}, n = {len(seconds)})"


def table(here: Times, there: Times, revision: str) -> list[str]:
    """Lay both out, a line a benchmark: times here, times there, and how many times faster here."""
    rows = [("benchmark", "this tree", revision, "speed-up")]
    for name in sorted({*here, *there}):
        mine, theirs = here.get(name, []), there.get(name, [])
        ratio = f"{median(theirs) / median(mine):.3f} x" if mine and theirs else ""
        rows.append((name, _cell(mine), _cell(theirs), ratio))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prove.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("revision", help="anything that git understands: a tag, HEAD~3, a branch")
    parser.add_argument("--turns", type=int, default=3, help="runs of the suite on either side")
    options, suite = parser.parse_known_args(argv)
    if options.turns < 1:
        raise UsageError(f"--turns must be at least 1, got {options.turns}")
    if not any(argument.startswith("benchmarks") for argument in suite):
        suite = ["benchmarks/", *suite]
    here: Times = defaultdict(list)
    there: Times = defaultdict(list)
    with worktree(options.revision) as tree:
        _lend_suites(tree)
        for turn in range(options.turns):
            sides = [(ROOT, here), (tree, there)]
            for folder, times in sides if turn % 2 == 0 else reversed(sides):
                name = "this tree" if folder is ROOT else options.revision
                print(f"turn {turn + 1} of {options.turns}: {name}", file=sys.stderr, flush=True)
                _add_times(times, run_suite(folder, suite))
    print("\n".join(table(here, there, options.revision)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # A terminated comparison removes its worktree too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return guarded(lambda: _run(arguments), debug=False)


if __name__ == "__main__":
    sys.exit(main())
