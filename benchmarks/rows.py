"""The one form of a result: rows in a CSV file and a JSON sidecar with their birth certificate.

A file is named <what>_<machine>_<dtype>_torch<version>_<date>.csv and is never changed afterwards.
A row holds one metric of one case by one provider: median (or the only value), lowest, highest and
the number of measurements.
"""

import csv
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "Row", "read_results", "summarize", "write_results"]

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One metric of one case.

    Attributes:
        suite: the kind of measurement: train, loaders, ...
        case: what was measured, with everything that the result depends on but the provider.
        provider: who did it: a route, a loader, a peer.
        metric: test_accuracy, train_seconds, images_per_second, ...
        unit: of the values.
        n: number of measurements.
        median, low, high: over them.
    """

    suite: str
    case: str
    provider: str
    metric: str
    unit: str
    n: int
    median: float
    low: float
    high: float


def summarize(
    suite: str, case: str, provider: str, metric: str, unit: str, values: Sequence[float]
) -> Row:
    """Make the row of repeated measurements."""
    middle = statistics.median(values)
    rounded = (float(f"{value:.6g}") for value in (middle, min(values), max(values)))
    return Row(suite, case, provider, metric, unit, len(values), *rounded)


def write_results(
    what: str, rows: Iterable[Row], certificate: dict[str, Any], folder: Path = RESULTS
) -> Path:
    """Write rows and their sidecar to a new pair of files.

    Args:
        what: first part of the name.
        rows: at least one.
        certificate: machine, versions, commit, date, command and dtype of the measurements.
        folder: where results are kept.

    Returns:
        The path of the CSV file.

    Raises:
        FileExistsError: results are append-only.
    """
    machine = certificate["machine"]
    name = machine["gpu"] or f"{machine['cpu']} {machine['cores']} cores"
    parts = [
        what,
        re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        certificate["dtype"],
        f"torch{certificate['versions']['torch']}",
        certificate["date"][:10],
    ]
    path = folder / ("_".join(parts) + ".csv")
    with path.open("x", newline="") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    path.with_suffix(".json").write_text(json.dumps(certificate, indent=2) + "\n")
    return path


def read_results(folder: Path = RESULTS) -> list[tuple[Row, dict[str, Any]]]:
    """Return every row with the certificate of its file, oldest file first."""
    found = []
    for path in sorted(folder.glob("*.csv"), key=lambda path: path.stem[-10:]):
        certificate = json.loads(path.with_suffix(".json").read_text())
        with path.open(newline="") as stream:
            for record in csv.DictReader(stream):
                row = Row(
                    suite=record["suite"],
                    case=record["case"],
                    provider=record["provider"],
                    metric=record["metric"],
                    unit=record["unit"],
                    n=int(record["n"]),
                    median=float(record["median"]),
                    low=float(record["low"]),
                    high=float(record["high"]),
                )
                found.append((row, certificate))
    return found
