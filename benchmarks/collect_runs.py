"""Turn finished runs into results: `python -m benchmarks.collect_runs WHAT RUN [RUN ...]`.

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

__all__ = ["main", "rows_of"]

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


def main(argv: Sequence[str] | None = None) -> int:
    """Write the results of some runs and print the path of the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collect_runs", description=__doc__)
    parser.add_argument("what", help="first part of the file name")
    parser.add_argument("runs", nargs="+", type=Path, help="finished run folders")
    options = parser.parse_args(argv)
    summaries = [json.loads((run / "summary.json").read_text()) for run in options.runs]
    for key in ("machine", "versions", "commit"):
        if any(summary[key] != summaries[0][key] for summary in summaries):
            print(f"error: the runs differ in their {key}; collect them apart", file=sys.stderr)
            return 2
    precisions = sorted({summary["precision"] for summary in summaries})
    certificate = {key: summaries[-1][key] for key in ("machine", "versions", "commit", "date")}
    certificate |= {
        "dtype": "-".join(precisions),
        "command": [summary["command"] for summary in summaries],
        "seeds": [summary["seed"] for summary in summaries],
        "dataset_fingerprint": sorted({summary["dataset_fingerprint"] for summary in summaries}),
    }
    print(write_results(options.what, rows_of(summaries), certificate))
    return 0


if __name__ == "__main__":
    sys.exit(main())
