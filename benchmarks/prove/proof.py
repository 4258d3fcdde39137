"""All evidence in one command: `python -m benchmarks.prove --out DIR [--stage look]`.

Checks the machine, then runs the parts of a stage, the most valuable first (see stages.py). Every
part is a process of its own with its time box and its log; it writes its rows into DIR the moment
it ends. When the budget is spent, what is left is named and left out. Without --stage a GPU has
look, measure and confirm in turn, the later ones only if nothing before them was red; a machine
without one measures what a CPU can prove. A stage of the GPU is rehearsed there: the same commands
at small sizes, kernels interpreted.

Exit codes: 0 nothing was red, 1 something was, 2 bad use, 130 interrupted.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
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
from benchmarks.prove.parts import ROOT, Part
from benchmarks.prove.stages import STAGES, Stage, machine_part
from benchmarks.report.collect import rows_of_report
from fastres import strict_json
from fastres.kernels.tools.command_line import NOTHING_TO_RUN
from fastres.output import reader_may_leave

__all__ = ["Outcome", "judge", "main"]

# A part that was told to stop has this long to write down what it has.
_GRACE_S = 6.0
# What a machine may take to describe itself where no budget is given.
_MACHINE_S = 60.0
_WORDS = "(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
# Of pytest alone, and of the workers of pytest-xdist.
_TEST_LINES = (
    re.compile(rf"^\S+::\S.* {_WORDS}\b", re.MULTILINE),
    re.compile(rf"^\[gw\d+\] \[ *\d+%\] {_WORDS} \S+::", re.MULTILINE),
)


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
    if code == NOTHING_TO_RUN:
        return "left out", last if last.startswith("nothing to run") else "nothing to run here"
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
        # Parts say themselves whether they are interpreted.
        self._env.pop("TRITON_INTERPRET", None)
        if data_dir is not None:
            self._env["FASTRES_DATA"] = str(data_dir)
        self._left: list[Part] = []

    @property
    def remaining(self) -> float:
        """Seconds until the budget is spent."""
        return self.budget - (time.monotonic() - self._started)

    def run(self, parts: Sequence[Part], later: Sequence[Part] = ()) -> None:
        """Run `parts` in order; what does not fit any more is left out.

        later: what is still to come after them, and keeps its time.
        """
        behind = sum(part.seconds for part in later)
        for number, part in enumerate(parts):
            self._left = [*parts[number:], *later]
            print(f"{part.name}: {max(0, self.remaining):.0f} s left", flush=True)
            limit = self._limit(parts[number:], behind)
            outcome = self._why_not(part) or self._run(part, limit)
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

    def leave_out(self, parts: Sequence[Part], why: str) -> None:
        """Record that parts which have not run yet never will."""
        for part in parts:
            self.outcomes.append(Outcome(part.name, "left out", why))
        self.write_summary()

    def interrupt(self) -> None:
        """Record that what was running, and what should have followed, did not end."""
        self.leave_out(self._left, "interrupted")

    @property
    def failed(self) -> list[str]:
        """Names of the parts that were red."""
        return [outcome.name for outcome in self.outcomes if outcome.status == "failed"]

    def _limit(self, parts: Sequence[Part], behind: float = 0.0) -> float:
        """Seconds for the first of `parts`, so that the others keep theirs."""
        free = self.remaining - _GRACE_S
        boxes = behind + sum(part.seconds for part in parts)
        return max(parts[0].least, free * parts[0].seconds / boxes)

    def _why_not(self, part: Part) -> Outcome | None:
        if part.obstacle:
            return Outcome(part.name, "left out", part.obstacle)
        missing = [name for name in part.needs if not is_installed(name)]
        missing += [name for name in part.programs if shutil.which(name) is None]
        if missing:
            return Outcome(part.name, "left out", f"{', '.join(missing)} is not installed")
        left = max(0.0, self.remaining - _GRACE_S)
        if left < part.least:
            why = f"the budget has {left:.0f} s left for it; it needs {part.least:g} s"
            return Outcome(part.name, "left out", why)
        return None

    def _run(self, part: Part, limit: float) -> Outcome:
        log = self.out / f"{part.file_name}.log"
        command = [sys.executable, "-m", *part.arguments(self.out, limit)]
        before = set(self.out.glob("*.csv"))
        if part.suite:
            (self.out / part.report_name).unlink(missing_ok=True)
        started = time.monotonic()
        with log.open("w") as stream:
            settings = [f"{name}={value}" for name, value in self._settings(part).items()]
            stream.write(f"+ {' '.join([*settings, *command])}\n")
            stream.flush()
            code, cut = _run_limited(command, stream, self._environment(part), limit)
        seconds = round(time.monotonic() - started, 1)
        status, detail = judge(code, cut, log.read_text(errors="replace"))
        outcome = Outcome(part.name, status, detail, seconds, round(limit, 1))
        if part.suite:
            self._collect(part.suite, self.out / part.report_name, outcome)
        outcome.rows = sorted(path.name for path in set(self.out.glob("*.csv")) - before)
        outcome.notes += [f"rows: {name}" for name in outcome.rows]
        return outcome

    def _environment(self, part: Part) -> dict[str, str]:
        return self._env | self._settings(part)

    def _settings(self, part: Part) -> dict[str, str]:
        """Variables of a part alone: where one was tuned into `out`, its launch table."""
        table = self.out / "launch_table.json"
        tuned = {"FASTRES_LAUNCH_TABLE": str(table.resolve())} if table.exists() else {}
        interpreted = {"TRITON_INTERPRET": "1"} if part.is_interpreted else {}
        return tuned | interpreted

    def _collect(self, suite: str, report: Path, outcome: Outcome) -> None:
        """Turn the report of a suite into rows; a test that failed has left nothing in it."""
        try:
            content = json.loads(report.read_text())
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
        # A driver that hangs keeps even a killed process; the parts behind it need not wait.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_GRACE_S)
    return process.returncode or 0, cut


def _check_machine(proof: Proof) -> dict[str, Any] | None:
    """Describe the machine; None where nothing can run on it."""
    description = proof.out / "machine.json"
    description.unlink(missing_ok=True)
    proof.run([machine_part()])
    if proof.outcomes[-1].status != "ok":
        return None
    return json.loads(description.read_text())


def _stages(asked: str | None, *, on_gpu: bool) -> list[str]:
    """The stages to run, in order."""
    if asked is not None:
        return [asked]
    return [name for name in STAGES if name != "cpu"] if on_gpu else ["cpu"]


def _parts(name: str, stage: Stage, data_dir: Path | None, *, on_gpu: bool) -> list[Part]:
    """The parts of a stage as this machine runs them."""
    parts = stage.parts(data_dir)
    return parts if on_gpu or name == "cpu" else [part.rehearsed() for part in parts]


def _run_stages(proof: Proof, stages: Sequence[list[Part]]) -> None:
    """Run stages in turn; a number is worth nothing while a stage before it is red."""
    for number, parts in enumerate(stages):
        later = [part for parts_of_one in stages[number + 1 :] for part in parts_of_one]
        if number and proof.failed:
            why = f"repair what was red first: {', '.join(proof.failed)}"
            proof.leave_out([*parts, *later], why)
            return
        proof.run(parts, later)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prove",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    budgets = ", ".join(f"{name} {stage.budget:g}" for name, stage in STAGES.items())
    parser.add_argument("--stage", choices=STAGES, help="one stage alone")
    parser.add_argument("--budget", type=float, help=f"seconds for everything; default: {budgets}")
    parser.add_argument("--out", type=Path, required=True, help="folder for rows and logs")
    parser.add_argument("--data-dir", type=Path, help="images; default: the synthetic set")
    return parser


def _obstacle(options: argparse.Namespace) -> str | None:
    """Why there is nothing to run, or None."""
    if options.budget is not None and not 10 <= options.budget < math.inf:
        return f"--budget must be at least 10 s, got {options.budget:g}"
    if options.data_dir is not None and not options.data_dir.is_dir():
        return f"--data-dir {options.data_dir} is no folder"
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"--out {options.out}: {error.strerror}"
    return None


@reader_may_leave(result_is_printed=False)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the proof and return its exit code."""
    options = _parser().parse_args(argv)
    reason = _obstacle(options)
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    data_dir = None if options.data_dir is None else options.data_dir.resolve()
    proof = Proof(options.out.resolve(), options.budget or _MACHINE_S, data_dir)
    interrupted, machine = False, None
    try:
        machine = _check_machine(proof)
        if machine is not None:
            on_gpu = machine["gpu"] is not None
            names = _stages(options.stage, on_gpu=on_gpu)
            proof.budget = options.budget or sum(STAGES[name].budget for name in names)
            stages = [_parts(name, STAGES[name], data_dir, on_gpu=on_gpu) for name in names]
            _run_stages(proof, stages)
    except KeyboardInterrupt:
        interrupted = True
        proof.interrupt()
    print(f"\n{proof.table()}\n")
    spent = proof.budget - proof.remaining
    verdict = f"red: {', '.join(proof.failed)}" if proof.failed else "nothing was red"
    print(f"{verdict}; {spent:.0f} of {proof.budget:g} s; {options.out}/summary.json")
    # A machine that took all the time to describe itself is not red, and proves nothing.
    return 130 if interrupted else 1 if proof.failed or machine is None else 0
