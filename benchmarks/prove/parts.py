"""One process of a proof: what it runs, what it needs, and how much of the budget it may take."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

__all__ = ["PYTEST", "ROOT", "Part", "Rehearsal", "suite_part"]

ROOT = Path(__file__).resolve().parents[2]

PYTEST = ("pytest", "-vv", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts=")
# What a part is told to measure for does not hold its start and end; of a suite, not the end alone.
_AROUND_S = 12
_SUITE_END_S = 6


class Rehearsal(NamedTuple):
    """What a machine without a GPU runs of a part: the same at a small size.

    is_interpreted: whether Triton interprets the kernels, on tensors of the CPU.
    """

    command: tuple[str, ...]
    is_interpreted: bool = False


@dataclass(frozen=True)
class Part:
    """One subprocess of a proof.

    Attributes:
        name: for people and for the log file.
        command: behind `python -m`; {OUT} and {SECONDS} are filled in.
        seconds: its time box, where the stage has the budget that it states. With another budget
            all boxes change alike, and what a part leaves over goes to those behind it.
        least: seconds under which it is not worth starting.
        rehearsal: what a machine without a GPU runs instead; None leaves it out there.
        needs, programs: modules and programs without which it is left out.
        suite: the benchmark suite whose report it writes, or None.
        quick_below: seconds under which of a suite only the small cases are worth starting.
        notes: lines to print and keep: what was left out of it beforehand.
        is_interpreted: whether Triton interprets its kernels.
        obstacle: why it cannot run here, or None.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    least: float
    rehearsal: Rehearsal | None = None
    needs: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    suite: str | None = None
    quick_below: float = 0.0
    notes: tuple[str, ...] = ()
    is_interpreted: bool = False
    obstacle: str | None = None

    @property
    def file_name(self) -> str:
        """The name as files are called."""
        return _file_name(self.name)

    @property
    def report_name(self) -> str:
        """The file of pytest-benchmark's report."""
        return _report_name(self.name)

    def arguments(self, out: Path, seconds: float) -> list[str]:
        """Return the command with the files in `out` and the time of this run filled in."""
        around = _SUITE_END_S if self.suite else _AROUND_S
        inner = max(0.5 * seconds, seconds - around)
        words = [w.replace("{OUT}", str(out)) for w in self.command]
        words = [w.replace("{SECONDS}", f"{inner:.0f}") for w in words]
        if seconds < self.quick_below:
            words.append("--quick")
        return words

    def rehearsed(self) -> "Part":
        """Return what a machine without a GPU runs of it."""
        if self.rehearsal is None:
            return replace(self, obstacle="needs an NVIDIA GPU")
        command, is_interpreted = self.rehearsal
        return replace(self, command=command, is_interpreted=is_interpreted)


def _file_name(name: str) -> str:
    return name.replace(" ", "_").replace(",", "")


def _report_name(name: str) -> str:
    return f"bench_{_file_name(name)}.json"


def suite_part(
    suite: str,
    seconds: float,
    least: float,
    *,
    name: str | None = None,
    cases: tuple[str, ...] = (),
    rehearsal: tuple[str, ...] | None = None,
    quick_below: float = 0.0,
    marks: str = "not slow",
) -> Part:
    """Return the part that measures a suite, or of it the tests `cases`, with their parameters.

    marks: which of them, by pytest's marks. rehearsal: words that choose among the suite's small
    cases on a machine without a GPU.
    """
    file = f"benchmarks/suites/bench_{suite}.py"
    name = name or suite
    report = ("--benchmark-json", f"{{OUT}}/{_report_name(name)}", "--budget", "{SECONDS}")
    command = (*PYTEST, "-m", marks, *report)
    small = None
    if rehearsal is not None:
        small = Rehearsal((*command, file, "--quick", *rehearsal))
    return Part(
        name,
        (*command, *([f"{file}::{case}" for case in cases] or [file])),
        seconds,
        least,
        rehearsal=small,
        needs=("pytest_benchmark",),
        suite=suite,
        quick_below=quick_below,
    )
