"""The one form of a result: rows in a CSV file, and their provenance in a JSON sidecar.

A file is named <what>_<machine>_<dtype>_torch<version>_<date>.csv and is never changed afterwards;
a second measurement of a day gets a number behind the date.
A row holds one metric of one case by one provider: median (or the only value), lowest, highest and
the number of measurements.
"""

import csv
import json
import re
import shutil
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import count
from pathlib import Path
from typing import get_type_hints

from benchmarks.harness.records import Clocks, RowProvenance
from fastres import host, strict_json
from fastres.host import Provenance

__all__ = [
    "RESULTS",
    "Result",
    "Row",
    "clocks",
    "machine_key",
    "make_provenance",
    "newest",
    "read_file",
    "read_results",
    "summarize",
    "write_results",
]

RESULTS = Path(__file__).resolve().parents[1] / "results"


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


Result = tuple[Row, RowProvenance]
"""A row and where it comes from."""


def summarize(
    suite: str, case: str, provider: str, metric: str, unit: str, values: Sequence[float]
) -> Row:
    """Make the row of repeated measurements."""
    middle = statistics.median(values)
    rounded = (float(f"{value:.6g}") for value in (middle, min(values), max(values)))
    return Row(suite, case, provider, metric, unit, len(values), *rounded)


def make_provenance(dtype: str, command: Sequence[str]) -> RowProvenance:
    """Say where measurements come from that this process, or its child, made now.

    Args:
        dtype: of the measurements, for the name of the file: fp32, bf16, mixed, ...
        command: the words that repeat them.
    """
    return {**host.provenance(command), "clocks": clocks(), "dtype": dtype}


def clocks() -> Clocks:
    """Return clocks in MHz as the system reports them right now, and the GPU's power limit."""
    found: Clocks = {}
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    cores = [float(value) for value in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", text, re.MULTILINE)]
    if cores:
        found["cpu_mhz"] = [min(cores), max(cores)]
    names = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return found
        values = answer.stdout.splitlines()[0].split(",") if answer.stdout else []
        found |= dict(zip(names, map(str.strip, values), strict=False))
    return found


def machine_key(provenance: Provenance | RowProvenance) -> tuple:
    """Return what decides the speed of the machine: only rows of equal keys compare."""
    keys = ("gpu", "cpu", "cpu_vectors", "cpu_bf16", "cores")
    return tuple(provenance["machine"].get(key) for key in keys)


def write_results(
    what: str,
    rows: Iterable[Row],
    provenance: RowProvenance,
    folder: Path = RESULTS,
    growing: Path | None = None,
) -> Path:
    """Write rows and their sidecar to a new pair of files.

    Args:
        what: first part of the name.
        rows: at least one.
        provenance: of the measurements.
        folder: where results are kept.
        growing: what an earlier call of the same measurement returned, to be replaced by all that
            it has measured since; at no moment is there less than before.

    Returns:
        The path of the CSV file; no other file that exists is touched.
    """
    if growing is not None:
        unfinished = growing.with_suffix(".part")
        unfinished.unlink(missing_ok=True)
        _write_pair(unfinished, growing.with_suffix(".json"), rows, provenance)
        unfinished.replace(growing)
        return growing
    where = provenance["machine"]
    name = where["gpu"] or f"{where['cpu']} {where['cores']} cores"
    parts = [
        what,
        re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        provenance["dtype"],
        f"torch{provenance['versions']['torch']}",
        provenance["date"][:10],
    ]
    stem = "_".join(parts)
    names = (f"{stem}.csv" if i == 1 else f"{stem}-{i}.csv" for i in count(1))
    path = next(folder / name for name in names if not (folder / name).exists())
    _write_pair(path, path.with_suffix(".json"), rows, provenance)
    return path


def _write_pair(path: Path, sidecar: Path, rows: Iterable[Row], provenance: RowProvenance) -> None:
    with path.open("x", newline="") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    unfinished = sidecar.with_suffix(".json.part")
    unfinished.write_text(strict_json.dumps(provenance, indent=2) + "\n")
    unfinished.replace(sidecar)


def read_file(path: Path) -> tuple[list[Row], RowProvenance]:
    """Return the rows of one CSV file and their provenance."""
    kinds = get_type_hints(Row)
    with path.open(newline="") as stream:
        records = list(csv.DictReader(stream))
    rows = [Row(**{name: kind(record[name]) for name, kind in kinds.items()}) for record in records]
    return rows, json.loads(path.with_suffix(".json").read_text())


def read_results(folder: Path = RESULTS) -> list[Result]:
    """Return every row with the provenance of its file, oldest file first."""
    files = [(path.name, *read_file(path)) for path in folder.glob("*.csv")]
    files.sort(key=lambda file: (file[2]["date"], file[0]))
    return [(row, provenance) for _, rows, provenance in files for row in rows]


def newest(results: Iterable[Result]) -> list[Result]:
    """Keep the last row of every suite, case, provider, metric and machine, in the given order."""
    kept: dict[tuple, Result] = {}
    for row, provenance in results:
        where = machine_key(provenance)
        kept[row.suite, row.case, row.provider, row.metric, where] = (row, provenance)
    return list(kept.values())
