"""All evidence in one command: `python -m benchmarks.prove --budget 540 --out DIR [--data-dir D]`.

Checks the machine, tests parity, tunes the launch table on a GPU, then measures operators, steps,
loaders, start-up and time to accuracy, the most valuable first. Every part is a process of its own
with its share of the remaining time; it writes its rows into DIR the moment it ends. When the
budget is spent, what is left is named and left out.

Exit codes: 0 nothing was red, 1 something was, 2 bad use, 130 interrupted.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.rows import write_results
from benchmarks.prove.environment import is_installed
from benchmarks.prove.parts import ROOT, Part, plan_parts
from benchmarks.report.collect import rows_of_report
from fastres import strict_json
from fastres.output import reader_may_leave

__all__ = ["Outcome", "judge", "main"]

# A part that was told to stop has this long to write down what it has.
_GRACE_S = 6.0
_WORDS = "(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
# Of pytest alone, and of the workers of pytest-xdist.
_TEST_LINES = (
    re.compile(rf"^\S+::\S.* {_WORDS}\b", re.MULTILINE),
    re.compile(rf"^\[gw\d+\] \[ *\d+%\] {_WORDS} \S+::", re.MULTILINE),
)
_NOTHING_COLLECTED = 5


@dataclass
class Outcome:
    """How a part ended: "ok", "cut" (its time was over), "failed" or "left out"."""

    name: str
    status: str
    detail: str
    seconds: float = 0.0
    limit: float = 0.0
    rows: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def judge(code: int, cut: bool, log: str) -> tuple[str, str]:
    """Return status and detail of a part from its exit code, whether it was cut, and its output."""
    counts = Counter(word for line in _TEST_LINES for word in line.findall(log))
    said = ", ".join(f"{number} {word.lower()}" for word, number in sorted(counts.items()))
    last = next((line for line in reversed(log.splitlines()) if line.strip()), "")
    if counts["FAILED"] or counts["ERROR"]:
        return "failed", said
    if cut:
        return "cut", "; ".join(filter(None, ["its time was over", said]))
    if code == _NOTHING_COLLECTED:
        return "left out", "nothing to run on this machine"
    if code:
        return "failed", f"exit code {code}: {last[:160]}"
    if set(counts) == {"SKIPPED"}:
        return "left out", said
    return "ok", said or last[:160]


class Proof:
    """Runs parts inside a budget and keeps the record.

    Args:
        out: folder for rows, logs and summary.
        budget: seconds for everything.
        data_dir: images, or None for the synthetic set.
    """

    def __init__(self, out: Path, budget: float, data_dir: Path | None):
        self.out, self.budget = out, budget
        self._started = time.monotonic()
        self.outcomes: list[Outcome] = []
        self._env = {**os.environ, "PYTHONUNBUFFERED": "1", "FASTRES_OFFLINE": "1"}
        if data_dir is not None:
            self._env["FASTRES_DATA"] = str(data_dir.resolve())
        self._left: list[Part] = []

    @property
    def remaining(self) -> float:
        """Seconds until the budget is spent."""
        return self.budget - (time.monotonic() - self._started)

    def run(self, parts: Sequence[Part]) -> None:
        """Run `parts` in order; what does not fit any more is left out."""
        for number, part in enumerate(parts):
            self._left = list(parts[number:])
            print(f"{part.name}: {max(0, self.remaining):.0f} s left", flush=True)
            outcome = self._why_not(part) or self._run(part, self._limit(parts[number:]))
            outcome.notes += part.notes
            self.add(outcome)
        self._left = []

    def add(self, outcome: Outcome) -> None:
        """Take an outcome into the record, and write the record."""
        self.outcomes.append(outcome)
        print(f"  {outcome.status}: {outcome.detail}", flush=True)
        for note in outcome.notes:
            print(f"  {note}", flush=True)
        self.write_summary()

    def leave_out(self, why: str) -> None:
        """Record that the parts which have not run yet never will."""
        for part in self._left:
            self.outcomes.append(Outcome(part.name, "left out", why))
        self.write_summary()

    def _limit(self, parts: Sequence[Part]) -> float:
        """Seconds for the first of `parts`, so that the others keep theirs."""
        free = self.remaining - _GRACE_S
        return max(parts[0].least, free * parts[0].weight / sum(part.weight for part in parts))

    def _why_not(self, part: Part) -> Outcome | None:
        missing = [name for name in part.needs if not is_installed(name)]
        if missing:
            return Outcome(part.name, "left out", f"{', '.join(missing)} is not installed")
        left = max(0.0, self.remaining - _GRACE_S)
        if left < part.least:
            why = f"the budget has {left:.0f} s left for it; it needs {part.least:g} s"
            return Outcome(part.name, "left out", why)
        return None

    def _run(self, part: Part, limit: float) -> Outcome:
        log = self.out / f"{part.name.replace(' ', '_').replace(',', '')}.log"
        command = [sys.executable, "-m", *part.arguments(self.out, limit)]
        before = set(self.out.glob("*.csv"))
        if part.suite:
            self._report_of(part.suite).unlink(missing_ok=True)
        started = time.monotonic()
        with log.open("w") as stream:
            stream.write(f"+ {' '.join(command)}\n")
            stream.flush()
            code, cut = _run_limited(command, stream, self._environment(), limit)
        seconds = round(time.monotonic() - started, 1)
        status, detail = judge(code, cut, log.read_text(errors="replace"))
        outcome = Outcome(part.name, status, detail, seconds, round(limit, 1))
        if part.suite:
            self._collect(part.suite, outcome)
        outcome.rows = sorted(path.name for path in set(self.out.glob("*.csv")) - before)
        outcome.notes += [f"rows: {name}" for name in outcome.rows]
        return outcome

    def _environment(self) -> dict[str, str]:
        """The environment of a part: after tuning, the tuned launch table."""
        table = self.out / "launch_table.json"
        tuned = {"FASTRES_LAUNCH_TABLE": str(table.resolve())} if table.exists() else {}
        return self._env | tuned

    def _report_of(self, suite: str) -> Path:
        """Where pytest-benchmark puts what a suite measured."""
        return self.out / f"bench_{suite}.json"

    def _collect(self, suite: str, outcome: Outcome) -> None:
        """Turn the report of a suite into rows; a test that failed has left nothing in it."""
        try:
            content = json.loads(self._report_of(suite).read_text())
        except (OSError, ValueError):
            outcome.notes.append("no report, so no rows")
            return
        rows, provenance = rows_of_report(content, self.out)
        if rows:
            write_results(f"bench_{suite}", rows, provenance, self.out)

    def write_summary(self) -> None:
        """Write summary.json anew."""
        by_status = {
            status: [outcome.name for outcome in self.outcomes if outcome.status == status]
            for status in ("ok", "cut", "failed", "left out")
        }
        summary: dict[str, Any] = {
            "green": not by_status["failed"],
            "budget": self.budget,
            "seconds": round(self.budget - self.remaining, 1),
            **by_status,
            "parts": [asdict(outcome) for outcome in self.outcomes],
        }
        (self.out / "summary.json").write_text(strict_json.dumps(summary, indent=2) + "\n")

    def table(self) -> str:
        """Return the outcomes as lines of plain text."""
        lines = [f"{'part':<30} {'status':<9} {'seconds':>8}  detail"]
        lines += [f"{o.name:<30} {o.status:<9} {o.seconds:8.1f}  {o.detail}" for o in self.outcomes]
        return "\n".join(lines)


def _run_limited(
    command: Sequence[str], stream: Any, env: dict[str, str], limit: float
) -> tuple[int, bool]:
    """Run a command for at most `limit` seconds; return its exit code and whether it was cut.

    An interrupt lets pytest write the report of what has finished; who ignores it is killed, with
    all that it started.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=stream,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    cut = False
    try:
        process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        cut = True
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_GRACE_S)
    finally:
        # What it started, such as the workers of a loader, goes with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode, cut


def _check_machine(proof: Proof) -> dict[str, Any] | None:
    """Describe the machine; None where nothing can run on it."""
    description = proof.out / "machine.json"
    description.unlink(missing_ok=True)
    command = ("benchmarks.prove.environment", "--out", str(description))
    proof.run([Part("machine", command, weight=1, least=3)])
    if proof.outcomes[-1].status != "ok":
        return None
    return json.loads(description.read_text())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prove",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--out", type=Path, required=True, help="folder for rows and logs")
    parser.add_argument("--data-dir", type=Path, help="images; default: the synthetic set")
    return parser


@reader_may_leave(result_is_printed=False)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the proof and return its exit code."""
    options = _parser().parse_args(argv)
    if options.budget < 10:
        print(f"error: --budget must be at least 10 s, got {options.budget:g}", file=sys.stderr)
        return 2
    if options.data_dir is not None and not options.data_dir.is_dir():
        print(f"error: --data-dir {options.data_dir} is no folder", file=sys.stderr)
        return 2
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: --out {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    proof = Proof(options.out.resolve(), options.budget, options.data_dir)
    interrupted = False
    try:
        machine = _check_machine(proof)
        if machine is not None:
            proof.run(plan_parts(on_gpu=machine["gpu"] is not None, data_dir=options.data_dir))
    except KeyboardInterrupt:
        interrupted = True
        proof.leave_out("interrupted")
    print(f"\n{proof.table()}\n")
    failed = [outcome.name for outcome in proof.outcomes if outcome.status == "failed"]
    spent = proof.budget - proof.remaining
    verdict = f"red: {', '.join(failed)}" if failed else "nothing was red"
    print(f"{verdict}; {spent:.0f} of {proof.budget:g} s; {options.out}/summary.json")
    return 130 if interrupted else 1 if failed else 0
