"""Turn measurements into results.

`python -m benchmarks.collect runs WHAT RUN [RUN ...]` takes finished runs,
`python -m benchmarks.collect benchmarks WHAT FILE.json CASE` a report of pytest --benchmark-json.

Runs that differ in nothing but seed and route become one row a metric with n measurements.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, summarize, write_results
from fastres.engine import machine

__all__ = ["main", "rows_of", "rows_of_benchmarks"]

_METRICS = {
    "test_accuracy": "%",
    "test_loss": "nats",
    "train_seconds": "s",
    "images_per_second": "images/s",
}


def _case(summary: dict[str, Any]) -> str:
    return (
        f"{summary['dataset']} {summary['train_images']} {summary['model']} "
        f"w{summary['width']:g} {summary['recipe']} {summary['epochs']:g} epochs "
        f"batch {summary['batch_size']}"
    )


def _provider(summary: dict[str, Any]) -> str:
    layout = "channels_last" if summary["channels_last"] else "nchw"
    return f"{summary['route']} {summary['precision']} {layout} {summary['loader']}"


def rows_of(summaries: Sequence[dict[str, Any]]) -> list[Row]:
    """Group run summaries by case and provider, one row a metric."""
    groups = defaultdict(list)
    for summary in summaries:
        groups[_case(summary), _provider(summary)].append(summary)
    return [
        summarize("train", case, provider, metric, unit, [float(run[metric]) for run in runs])
        for (case, provider), runs in groups.items()
        for metric, unit in _METRICS.items()
    ]


def rows_of_benchmarks(report: dict[str, Any], case: str) -> list[Row]:
    """Turn a pytest-benchmark report into rows of images/s, one a benchmark."""
    rows = []
    for benchmark in report["benchmarks"]:
        suite, _, _ = benchmark["group"].partition(" ")
        stats, work = benchmark["stats"], benchmark["extra_info"]["images"]
        rows.append(
            summarize(
                suite,
                f"{benchmark['group']}, {case}",
                benchmark["params"]["provider"],
                "images_per_second",
                "images/s",
                [work / seconds for seconds in stats["data"]],
            )
        )
    return rows


def _collect_runs(what: str, folders: Sequence[Path]) -> Path:
    summaries = [json.loads((run / "summary.json").read_text()) for run in folders]
    for key in ("machine", "versions", "commit"):
        if any(summary[key] != summaries[0][key] for summary in summaries):
            raise ValueError(f"the runs differ in their {key}; collect them apart")
    certificate = {key: summaries[-1][key] for key in ("machine", "versions", "commit", "date")}
    certificate |= {
        "dtype": "-".join(sorted({summary["precision"] for summary in summaries})),
        "command": [summary["command"] for summary in summaries],
        "seeds": [summary["seed"] for summary in summaries],
        "dataset_fingerprint": sorted({summary["dataset_fingerprint"] for summary in summaries}),
    }
    return write_results(what, rows_of(summaries), certificate)


def _collect_benchmarks(what: str, path: Path, case: str) -> Path:
    report = json.loads(path.read_text())
    certificate = {
        "machine": machine.describe_machine(),
        "versions": machine.versions(),
        "commit": report["commit_info"]["id"][:12] + "+changes" * report["commit_info"]["dirty"],
        "date": report["datetime"],
        "dtype": "fp32",
        "command": f"pytest benchmarks/{what}.py --benchmark-json FILE",
    }
    return write_results(what, rows_of_benchmarks(report, case), certificate)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the results of some runs or benchmarks and print the path of the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collect", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    runs = kinds.add_parser("runs", help="finished run folders")
    runs.add_argument("what", help="first part of the file name")
    runs.add_argument("folders", nargs="+", type=Path)
    benchmarks = kinds.add_parser("benchmarks", help="a report of pytest --benchmark-json")
    benchmarks.add_argument("what", help="first part of the file name: the suite's file")
    benchmarks.add_argument("report", type=Path)
    benchmarks.add_argument("case", help="the data that was measured on, as the rows name it")
    options = parser.parse_args(argv)
    try:
        if options.kind == "runs":
            path = _collect_runs(options.what, options.folders)
        else:
            path = _collect_benchmarks(options.what, options.report, options.case)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
