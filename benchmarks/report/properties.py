"""Rows of a long property run: `python -m benchmarks.report.properties run.xml [run.xml ...]`.

Reads the JUnit reports of tests/kernels/test_properties.py; several runs of one op, each from its
own seed, add up.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.harness.records import RowProvenance
from benchmarks.harness.rows import Row, summarize, write_results
from fastres import host
from fastres.output import reader_may_leave

__all__ = ["main", "rows_of_reports"]

_METRICS = ("cases", "redrawn", "refused")


def rows_of_reports(paths: Iterable[Path]) -> tuple[list[Row], dict[str, list[int]]]:
    """Return a row for each op and metric, and the seeds of each op.

    cases: how many were judged; redrawn: how many of them took more numbers than one draw; refused:
    how many the error bound did not accept.

    Raises:
        ValueError: when no report holds a property run.
    """
    totals: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(_METRICS, 0))
    seeds: dict[str, list[int]] = defaultdict(list)
    for path in paths:
        for test in ElementTree.parse(path).iter("testcase"):
            found = {p.get("name"): p.get("value") for p in test.iter("property")}
            op, seed = found.get("op"), found.get("seed")
            if op is not None and seed is not None:
                seeds[op].append(int(seed))
                for metric in _METRICS:
                    totals[op][metric] += int(found.get(metric) or 0)
    if not totals:
        raise ValueError("no report of tests/kernels/test_properties.py among the files")
    rows = [
        summarize("properties", op, "triton interpreter", metric, "cases", [float(count[metric])])
        for op, count in totals.items()
        for metric in _METRICS
    ]
    return rows, dict(seeds)


@reader_may_leave()
def main(argv: Sequence[str] | None = None) -> int:
    """Write the rows and print the path of their file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report.properties", description=__doc__
    )
    parser.add_argument("reports", nargs="+", type=Path)
    options = parser.parse_args(argv)
    try:
        rows, seeds = rows_of_reports(options.reports)
    except (OSError, ValueError, ElementTree.ParseError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = ["FASTRES_EXAMPLES=N", "pytest", "-m", "slow", "tests/kernels/test_properties.py"]
    provenance: RowProvenance = {
        **host.provenance(command),
        "dtype": "bf16-fp16-fp32",
        "seeds": seeds,
    }
    print(write_results("properties", rows, provenance))
    return 0


if __name__ == "__main__":
    sys.exit(main())
