"""What the JSON of a measurement holds: provenance of rows, facts of a benchmark, messages.

Standard library alone: reports are read without importing torch.
"""

from typing import NotRequired, TypedDict

from fastres.host import Provenance

__all__ = [
    "BenchmarkInfo",
    "BenchmarkRecord",
    "BenchmarkReport",
    "FinalStats",
    "RoundDone",
    "RowProvenance",
    "TimedRun",
    "WorkerReady",
]

# Keys that are no identifiers: `clocks.sm`, `power.limit` and their like, as nvidia-smi names them.
Clocks = dict[str, str | list[float]]


class TimedRun(TypedDict):
    """One run of a time to accuracy: percent; seconds with the evaluation, and without it."""

    seed: int
    test_accuracy: float
    seconds: float
    train_seconds: float


class RowProvenance(Provenance):
    """The sidecar of a file of rows: where they come from.

    command: one, or those of all runs that became rows. dtype: of the measurements, for the name of
    the file: fp32, bf16, bf16-fp32, mixed, ... clock: how a suite took time. threads: of torch.
    seeds: of runs, or by op. runs: one by one, by provider, seed by seed.
    """

    command: str | list[str]  # type: ignore[misc]
    dtype: str
    clocks: NotRequired[Clocks]
    clock: NotRequired[list[str]]
    threads: NotRequired[int]
    seeds: NotRequired[list[int] | dict[str, list[int]]]
    dataset_fingerprint: NotRequired[list[str]]
    runs: NotRequired[dict[str, list[TimedRun]]]


class BenchmarkInfo(TypedDict, total=False):
    """Facts about one provider of a case: `extra_info` of pytest-benchmark.

    suite, case, provider: of its rows. baseline, baseline_seconds: whom it is compared with.
    dtype: it computes in. clock: how time is taken. images, bytes, flops: of one call, each gives a
    rate. peak_bytes, resident_bytes: memory. waits: whether the time beyond the baseline is that of
    the loader. evaluation_rates, test_accuracy, train_seconds: one a run. detail, data, choices,
    seeds: kept in the report alone.
    """

    suite: str
    case: str
    provider: str
    baseline: str
    baseline_seconds: float
    dtype: str
    clock: str
    images: int
    bytes: int
    flops: int
    peak_bytes: int
    resident_bytes: float
    waits: bool
    evaluation_rates: list[float]
    test_accuracy: list[float]
    train_seconds: list[float]
    detail: str
    data: str
    choices: dict[str, str]
    seeds: list[int]


class BenchmarkRecord(TypedDict):
    """One test in a report of pytest-benchmark; stats: {"data": [seconds, ...]} among others."""

    fullname: str
    extra_info: BenchmarkInfo
    stats: dict[str, list[float]]


class BenchmarkReport(TypedDict):
    """A report of pytest --benchmark-json on these suites."""

    benchmarks: list[BenchmarkRecord]
    provenance: RowProvenance
    datetime: str


class WorkerReady(TypedDict):
    """First message of a worker: it has trained one step. loss: of that step."""

    loss: float
    data: str
    dtype: str
    build_seconds: NotRequired[float]
    choices: NotRequired[dict[str, str]]


class RoundDone(TypedDict):
    """Message of a worker after a round of steps."""

    seconds: float
    images: int


class FinalStats(TypedDict):
    """Last message of a worker."""

    resident_bytes: float
