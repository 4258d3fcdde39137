"""Is anything slower than recorded? `python -m benchmarks.prove.check` measures and compares.

A time or rate fails when its median lies outside of the recorded spread on the slow side. Only rows
of this machine count; where it has none, that is said and nothing fails. Options go to pytest:

    python -m benchmarks.prove.check benchmarks/suites/bench_ops.py -k resnet20
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness.records import RowProvenance
from benchmarks.harness.rows import RESULTS, Result, Row, machine_key, newest, read_results
from benchmarks.prove.compare import ROOT, run_suite
from benchmarks.report.collect import rows_of_report
from benchmarks.report.tables import HIGHER_IS_BETTER, LOWER_IS_BETTER, machine_label
from fastres.cli import guarded
from fastres.errors import UsageError

__all__ = ["Verdict", "judge", "main"]


@dataclass
class Verdict:
    """What a comparison found, a line a row."""

    slower: list[str] = field(default_factory=list)
    in_spread: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def judge(rows: Iterable[Row], provenance: RowProvenance, recorded: Iterable[Result]) -> Verdict:
    """Compare new rows with the newest recorded ones of the same machine.

    A recorded row of a single measurement has no spread and judges nobody.
    """
    where = machine_key(provenance)
    known = {
        (old.suite, old.case, old.provider, old.metric, old.unit): old
        for old, provenance in newest(recorded)
        if machine_key(provenance) == where and old.n > 1
    }
    verdict = Verdict()
    for row in rows:
        if row.unit not in (*LOWER_IS_BETTER, *HIGHER_IS_BETTER):
            continue
        name = f"{row.suite}, {row.case}, {row.provider}: {row.metric}"
        old = known.get((row.suite, row.case, row.provider, row.metric, row.unit))
        if old is None:
            verdict.unknown.append(name)
            continue
        lower_is_better = row.unit in LOWER_IS_BETTER
        slower = row.median > old.high if lower_is_better else row.median < old.low
        recorded_text = f"recorded {old.median:g}, {old.low:g} to {old.high:g}"
        line = f"{name} {row.median:g} {row.unit} ({recorded_text})"
        (verdict.slower if slower else verdict.in_spread).append(line)
    return verdict


def _run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prove.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of recorded rows")
    options, suite = parser.parse_known_args(argv)
    if not options.results.is_dir():
        raise UsageError(f"--results must be a folder, got {options.results}")
    if not any(argument.startswith("benchmarks") for argument in suite):
        suite = ["benchmarks/", *suite]
    rows, provenance = rows_of_report(run_suite(ROOT, suite))
    verdict = judge(rows, provenance, read_results(options.results))
    for line in verdict.slower:
        print(f"slower: {line}")
    if verdict.unknown:
        where = machine_label(provenance)
        print(f"{len(verdict.unknown)} of {len(rows)} rows were never recorded on {where}")
    print(f"{len(verdict.in_spread)} within the recorded spread, {len(verdict.slower)} slower")
    return 1 if verdict.slower else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _run(arguments), debug=False)


if __name__ == "__main__":
    sys.exit(main())
