"""Turn measurements into results.

`python -m benchmarks.report.collect runs WHAT RUN [RUN ...]` takes finished runs,
`python -m benchmarks.report.collect benchmarks WHAT FILE.json` a report of pytest --benchmark-json,
`python -m benchmarks.report.collect study DIR` what `fastres study degradation` has written,
`python -m benchmarks.report.collect proof DIR` every row of a proof, see benchmarks.prove.proof.

Runs that differ in nothing but seed and route become one row a metric with n measurements; a case
names what was changed of its recipe.
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from benchmarks.harness.records import (
    BenchmarkInfo,
    BenchmarkRecord,
    BenchmarkReport,
    RowProvenance,
)
from benchmarks.harness.rows import (
    RESULTS,
    Row,
    machine_key,
    newest,
    read_file,
    read_results,
    summarize,
    write_results,
)
from benchmarks.report.depth import rows_of_study
from fastres.config import Config, changed_options, from_json
from fastres.engine.summary import Summary
from fastres.output import reader_may_leave
from fastres.recipes import RECIPES, from_recipe
from fastres.studies.records import StudyRecord

__all__ = ["PeakRates", "main", "peak_rates_of", "rows_of", "rows_of_report"]

_METRICS = {
    "test_accuracy": "%",
    "test_loss": "nats",
    "train_seconds": "s",
    "images_per_second": "images/s",
    "evaluation_images_per_second": "images/s",
    "peak_memory_mib": "MiB",
}


# Options that a case says in other words, and the seed, which its rows sum over.
_TOLD = {
    "dataset",
    "limit_train",
    "model",
    "width",
    "recipe",
    "epochs",
    "steps",
    "batch_size",
    "seed",
}


def _case(summary: Summary, changes: str) -> str:
    return (
        f"{summary['dataset']} {summary['train_images']} {summary['model']} "
        f"w{summary['width']:g} {summary['recipe']} {summary['epochs']:g} epochs "
        f"batch {summary['batch_size']}"
    ) + (f", {changes}" if changes else "")


def _changes(config: Config) -> str:
    """Name what a run changed of its recipe, or of the defaults where that is a user's file."""
    base = from_recipe(config.recipe, config.model) if config.recipe in RECIPES else Config()
    names = [name for name in changed_options(base.to_json(), config) if name not in _TOLD]
    return ", ".join(f"{name}={getattr(config, name)}" for name in names)


def _provider(summary: Summary) -> str:
    layout = "channels_last" if summary["channels_last"] else "nchw"
    return f"{summary['route']} {summary['precision']} {layout} {summary['loader']}"


def rows_of(summaries: Sequence[Summary], changes: Sequence[str] | None = None) -> list[Row]:
    """Group run summaries by case and provider, one row a metric.

    Args:
        summaries: of finished runs.
        changes: what each of them changed of its recipe; None: nothing.

    Raises:
        ValueError: for two runs of one case from the same seed.
    """
    groups = defaultdict(list)
    for summary, changed in zip(summaries, changes or [""] * len(summaries), strict=True):
        groups[_case(summary, changed), _provider(summary)].append(summary)
    rows = []
    for (case, provider), runs in groups.items():
        seeds = [run["seed"] for run in runs]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"two runs of one seed: {case}")
        for metric, unit in _METRICS.items():
            values = [float(cast(Any, run)[metric]) for run in runs]
            rows.append(summarize("train", case, provider, metric, unit, values))
        accuracies = [run["test_accuracy"] for run in runs]
        for statistic, of in (("mean", statistics.mean), ("sd", statistics.stdev)):
            if len(runs) > 1:
                metric, value = f"test_accuracy_{statistic}", of(accuracies)
                row = summarize("train", case, provider, metric, "%", [value])
                rows.append(replace(row, n=len(runs)))
    return rows


# Operations/s by dtype and bytes/s that a machine was measured to reach at most.
PeakRates = tuple[dict[str, float], float]

_WHOLE_RUNS = ("accuracy", "whole run", "start-up", "compile")
_RATES: tuple[tuple[Literal["images", "bytes", "flops"], str, str, float], ...] = (
    ("images", "images_per_second", "images/s", 1),
    ("bytes", "bandwidth", "GB/s", 1e9),
    ("flops", "arithmetic", "GFLOP/s", 1e9),
)
_MEMORY: tuple[tuple[Literal["peak_bytes", "resident_bytes"], str], ...] = (
    ("peak_bytes", "peak_memory"),
    ("resident_bytes", "resident_memory"),
)
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def peak_rates_of(provenance: RowProvenance, folder: Path = RESULTS) -> PeakRates | None:
    """Return the peak rates of a provenance's machine from `folder`; None: not measured yet."""
    here = machine_key(provenance)
    found = {
        row.case: row.median * 1e9
        for row, other in newest(read_results(folder))
        if row.suite == "ceilings" and machine_key(other) == here
    }
    products = {
        case.removeprefix("matrix product, "): rate
        for case, rate in found.items()
        if case.startswith("matrix product, ")
    }
    copy = found.get("copy, large")
    return (products, copy) if products and copy else None


def rows_of_report(
    report: BenchmarkReport, folder: Path = RESULTS
) -> tuple[list[Row], RowProvenance]:
    """Turn a report of pytest --benchmark-json into rows and their provenance.

    A benchmark's extra_info says what a call works on: `images`, `bytes`, `flops`; every such
    amount gives a rate. The share of the roofline needs peak rates of this machine among the
    results of `folder`.
    """
    provenance = report["provenance"] | {"date": report["datetime"]}
    peak_rates = peak_rates_of(provenance, folder)
    rows = [row for benchmark in report["benchmarks"] for row in _rows_of(benchmark, peak_rates)]
    dtypes = {benchmark["extra_info"]["dtype"] for benchmark in report["benchmarks"]} - {"any"}
    names = sorted({_SHORT.get(dtype, dtype) for dtype in dtypes})
    provenance["dtype"] = "-".join(names) or "any"
    provenance["clock"] = sorted({b["extra_info"]["clock"] for b in report["benchmarks"]})
    return rows, provenance


def _rows_of(benchmark: BenchmarkRecord, peak_rates: PeakRates | None) -> Iterator[Row]:
    """Yield the rows of one provider of one case."""
    info, seconds = benchmark["extra_info"], benchmark["stats"]["data"]

    def row(metric: str, unit: str, value: Callable[[float], float]) -> Row:
        values = [value(s) for s in seconds]
        return summarize(info["suite"], info["case"], info["provider"], metric, unit, values)

    def amount(metric: str, unit: str, *values: float) -> Row:
        return summarize(info["suite"], info["case"], info["provider"], metric, unit, values)

    if info["suite"] in _WHOLE_RUNS:
        yield row("seconds", "s", lambda s: s)
        if len(seconds) > 1:
            yield replace(amount("seconds_mean", "s", statistics.mean(seconds)), n=len(seconds))
            yield replace(amount("seconds_sd", "s", statistics.stdev(seconds)), n=len(seconds))
    else:
        yield row("time", "ms", lambda s: 1e3 * s)
    for key, metric, unit, scale in _RATES:
        if key in info:
            work = info[key] / scale
            yield row(metric, unit, lambda s, work=work: work / s)  # type: ignore[misc]
    floor = _floor(info, peak_rates)
    if floor:
        yield row("roofline_share", "%", lambda s: 100 * floor / s)
    base = info.get("baseline_seconds")
    if base and info.get("waits"):
        yield row("loader_share", "%", lambda s: 100 * (1 - base / s))
    if base and info["provider"].startswith("first_step"):
        yield row("import_share", "%", lambda s: 100 * base / s)
    if "evaluation_rates" in info:
        rates = info["evaluation_rates"]
        yield amount("evaluation_images_per_second", "images/s", *rates)
        training = (info["images"] / s for s in seconds)
        ratios = (rate / own for rate, own in zip(rates, training, strict=True))
        yield amount("evaluation_over_training", "x", *ratios)
    for amount_key, metric in _MEMORY:
        if amount_key in info:
            yield amount(metric, "MiB", info[amount_key] / 2**20)
    if info.get("test_accuracy"):
        yield amount("test_accuracy", "%", *info["test_accuracy"])
        yield amount("train_seconds", "s", *info["train_seconds"])


def _floor(info: BenchmarkInfo, peak_rates: PeakRates | None) -> float | None:
    """Seconds under which a call that declares its bytes and operations cannot be."""
    dtype = _SHORT.get(info["dtype"], info["dtype"])
    if peak_rates is None or "bytes" not in info or dtype not in peak_rates[0]:
        return None
    products, copy = peak_rates
    return max(info["bytes"] / copy, info["flops"] / products[dtype])


def _collect_runs(what: str, folders: Sequence[Path]) -> Path:
    summaries = [json.loads((run / "summary.json").read_text()) for run in folders]
    for key in ("machine", "versions", "commit"):
        if any(summary[key] != summaries[0][key] for summary in summaries):
            raise ValueError(f"the runs differ in their {key}; collect them apart")
    last = summaries[-1]
    provenance: RowProvenance = {
        "machine": last["machine"],
        "versions": last["versions"],
        "commit": last["commit"],
        "date": last["date"],
        "dtype": "-".join(sorted({summary["precision"] for summary in summaries})),
        "command": [summary["command"] for summary in summaries],
        "seeds": [summary["seed"] for summary in summaries],
        "dataset_fingerprint": sorted({summary["dataset_fingerprint"] for summary in summaries}),
    }
    configs = [
        from_json((run / "config.json").read_bytes(), run / "config.json") for run in folders
    ]
    return write_results(what, rows_of(summaries, [*map(_changes, configs)]), provenance)


def _collect_study(folder: Path) -> Path:
    study: StudyRecord = json.loads((folder / "results.json").read_text())
    summaries = [net["summary"] for net in study["nets"]]
    provenance: RowProvenance = {
        **study["provenance"],
        "dtype": "-".join(sorted({summary["precision"] for summary in summaries})),
        "seeds": sorted({net["seed"] for net in study["nets"]}),
        "dataset_fingerprint": sorted({summary["dataset_fingerprint"] for summary in summaries}),
    }
    return write_results("study_degradation", rows_of_study(study["nets"]), provenance)


def _collect_benchmarks(what: str, path: Path) -> Path:
    report = json.loads(path.read_text())
    if not isinstance(report, dict) or not {"benchmarks", "provenance"} <= report.keys():
        raise ValueError(f"{path} is no report of these suites")
    rows, provenance = rows_of_report(cast(BenchmarkReport, report))
    if not rows:
        raise ValueError(f"{path} holds no benchmark that ended well")
    return write_results(what, rows, provenance)


def _collect_proof(folder: Path) -> list[Path]:
    """Take over every file of rows, in new files under the same names."""
    found = sorted(folder.glob("*.csv"))
    if not found:
        raise ValueError(f"{folder} is no folder with rows")
    written = []
    for path in found:
        # <what>_<machine>_<dtype>_<torch>_<date>; only `what` may hold the separator.
        what = path.stem.rsplit("_", 4)[0]
        written.append(write_results(what, *read_file(path)))
    return written


@reader_may_leave()
def main(argv: Sequence[str] | None = None) -> int:
    """Write results and print the paths of their files."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report.collect", description=__doc__
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    runs = kinds.add_parser("runs", help="finished run folders")
    runs.add_argument("what", help="first part of the file name")
    runs.add_argument("folders", nargs="+", type=Path)
    benchmarks = kinds.add_parser("benchmarks", help="a report of pytest --benchmark-json")
    benchmarks.add_argument("what", help="first part of the file name: the suite's file")
    benchmarks.add_argument("report", type=Path)
    study = kinds.add_parser("study", help="the folder of a study of depth")
    study.add_argument("folder", type=Path)
    proof = kinds.add_parser("proof", help="the folder of a proof")
    proof.add_argument("folder", type=Path)
    options = parser.parse_args(argv)
    try:
        if options.kind == "runs":
            paths = [_collect_runs(options.what, options.folders)]
        elif options.kind == "benchmarks":
            paths = [_collect_benchmarks(options.what, options.report)]
        elif options.kind == "study":
            paths = [_collect_study(options.folder)]
        else:
            paths = _collect_proof(options.folder)
    except KeyError as error:
        print(f"error: a run lacks the entry {error}: other versions wrote it", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
