"""Whole runs from the outside: time to accuracy, evaluation, memory, start-up, compilation.

Every measurement is a process started as a user starts it, with the time until it has done what is
asked for. Seeds take turns between the routes. Time to accuracy trains on $FASTRES_DATA where that
is set, else on the synthetic set, with `python -m fastres.train` and its default recipe.
"""

import csv
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.ablation import Unavailable, here, why_not
from benchmarks.harness.records import BenchmarkInfo
from benchmarks.harness.scheduler import Prepared
from benchmarks.harness.worker_pool import Worker
from benchmarks.suites.ablation_cases import data_arguments, load_data
from fastres import host
from fastres.engine.summary import Summary

DEVICE = here()
_ROOT = Path(__file__).resolve().parents[2]
_CORES = host.usable_cores()
_SEEDS = 3 if DEVICE.type == "cpu" else 5
# A CPU compiles ResNet-20 for the better part of a minute.
_COMPILED = "resnet8" if DEVICE.type == "cpu" else "resnet20"
# Where a run has to come, in percent, and how: (data, device) decide.
_GOALS: dict[tuple[str, str], tuple[float, tuple[str, ...]]] = {
    ("synthetic", "cpu"): (25.0, ("--limit-train", "2000", "--epochs", "3", "--batch-size", "50")),
    ("synthetic", "cuda"): (90.0, ("--epochs", "5")),
    ("files", "cpu"): (40.0, ("--limit-train", "5000", "--epochs", "3")),
    ("files", "cuda"): (80.0, ()),
}


def _run(words: list[str], **options: Any) -> str:
    """Run a python command in the checkout and return what it prints.

    Raises:
        RuntimeError: when it fails, with the end of what it wrote to stderr.
    """
    done = subprocess.run(
        [sys.executable, *words], cwd=_ROOT, capture_output=True, text=True, **options
    )
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-8:])
        raise RuntimeError(f"python {' '.join(words[:4])} ended with {done.returncode}: {tail}")
    return done.stdout


def _source(data_dir: str | None) -> list[str]:
    return ["--data-dir", data_dir] if data_dir else ["--dataset", "synthetic"]


def _train(words: list[str], processes: int = 1) -> "_Run":
    """Train apart from this process and return the run's summary, with its epochs as `rows`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    program = ["-m", "fastres.train", *words, "--json"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        started = program if processes == 1 else [*launcher, *program]
        printed = _run([*started, "--out", str(out)])
        with (out / "metrics.csv").open(newline="") as stream:
            return json.loads(printed) | {"rows": list(csv.DictReader(stream))}


class _Run(Summary):
    """The summary of a run, and its epochs."""

    rows: list[dict[str, str]]


class _Runs:
    """Whole training runs, one seed after the other, and how long each took to the goal."""

    def __init__(self, provider: str, data_dir: str | None):
        kind = "files" if data_dir else "synthetic"
        self.goal, self.options = _GOALS[kind, DEVICE.type]
        self.provider = provider
        self.source = _source(data_dir)
        self.seeds = itertools.count()
        self.summaries: list[_Run] = []

    def sample(self) -> float:
        """Train the next seed and return the seconds of training until it reached the goal."""
        words = [*self.source, *self.options, "--seed", str(next(self.seeds))]
        summary = _train([*words, *(["--fast"] if self.provider == "fast" else [])])
        self.summaries.append(summary)
        for row in summary["rows"]:
            if float(row["test_accuracy"]) >= self.goal:
                return float(row["train_seconds"])
        raise AssertionError(
            f"{self.provider}, seed {summary['seed']}: {summary['test_accuracy']:.2f} % at the "
            f"end, the goal is {self.goal:g} %"
        )

    def finish(self) -> BenchmarkInfo:
        """Return what the runs ended with; nothing where none came to its end."""
        if not self.summaries:
            return {}
        last = self.summaries[-1]
        return {
            "case": f"{self.goal:g} % on {last['dataset']}, {last['train_images']} images, "
            f"{last['model']} w{last['width']:g} batch {last['batch_size']}",
            "dtype": last["precision"],
            "seeds": [summary["seed"] for summary in self.summaries],
            "test_accuracy": [summary["test_accuracy"] for summary in self.summaries],
            "train_seconds": [summary["train_seconds"] for summary in self.summaries],
        }


def _prepare_accuracy(data_dir: str | None, quick: bool, provider: str) -> Prepared:
    if quick and provider == "eager":
        raise Unavailable("--quick trains one seed, by --fast")
    runs = _Runs(provider, data_dir)
    info: BenchmarkInfo = {
        "suite": "accuracy",
        "clock": "training time at the end of the epoch that reached it",
    }
    rounds = 1 if quick else _SEEDS
    return Prepared(runs.sample, info, runs.finish, warm=False, rounds=rounds)


@pytest.mark.share(50.0 if DEVICE.type == "cpu" else 90.0)
@pytest.mark.parametrize("provider", ["eager", "fast"])
def bench_time_to_accuracy(measure, data_dir, quick, provider):
    """Seconds of training to a stated accuracy, over seeds: the reference and `--fast`."""
    measure(functools.partial(_prepare_accuracy, data_dir, quick), "eager")


class _WholeRun:
    """Short runs of ResNet-20 in large batches: training, evaluation, memory."""

    def __init__(self, data_dir: str | None):
        self.words = [*_source(data_dir), "--fast", "--recipe", "standard", "--batch-size", "512"]
        self.words += ["--limit-train", "5120", "--epochs", "1"]
        self.summaries: list[_Run] = []

    def sample(self) -> float:
        """Run once and return the seconds of training."""
        self.summaries.append(_train(self.words))
        return self.summaries[-1]["train_seconds"]

    def finish(self) -> BenchmarkInfo:
        """Return what else the runs measured; nothing where none came to its end."""
        if not self.summaries:
            return {}
        last = self.summaries[-1]
        peak_mib = max(summary["peak_memory_mib"] for summary in self.summaries)
        return {
            "case": f"{last['model']} batch {last['batch_size']}, {last['train_images']} images "
            f"trained, {last['test_images']} evaluated, {last['dataset']}",
            "dtype": last["precision"],
            "images": last["train_images"],
            "evaluation_rates": [s["evaluation_images_per_second"] for s in self.summaries],
            "resident_bytes": peak_mib * 2**20,
        }


def _prepare_whole_run(data_dir: str | None, provider: str) -> Prepared:
    runs = _WholeRun(data_dir)
    info: BenchmarkInfo = {"suite": "whole run", "clock": "training time of an epoch, own process"}
    return Prepared(runs.sample, info, runs.finish, warm=False, rounds=3)


@pytest.mark.full
@pytest.mark.share(30.0)
@pytest.mark.parametrize("provider", ["fast"])
def bench_whole_run(measure, data_dir, provider):
    """An epoch of ResNet-20 at batch 512 and its evaluation: both rates, and resident memory."""
    measure(functools.partial(_prepare_whole_run, data_dir), "fast")


def _prepare_scaling(data_dir: str | None, provider: str) -> Prepared:
    if DEVICE.type == "cuda":
        raise Unavailable("beside a GPU the CPU's threads do not compute the step")
    kind, count = provider.rsplit("_", 1)
    # A multiple of the cores, so that processes share every batch evenly.
    batch, images = 64 * _CORES, 30 * 64 * _CORES
    words = [*_source(data_dir), "--fast", "--recipe", "standard", "--batch-size", str(batch)]
    words += ["--limit-train", str(images), "--epochs", "1"]
    if kind == "threads":
        words += ["--threads", count]

    def sample() -> float:
        return _train(words, int(count) if kind == "processes" else 1)["train_seconds"]

    info: BenchmarkInfo = {
        "suite": "scaling",
        "case": f"resnet20 batch {batch}, {load_data(data_dir).name}",
        "dtype": "bf16" if host.bf16_instructions() else "fp32",
        "images": images,
        "clock": "training time of an epoch, own processes",
    }
    return Prepared(sample, info, warm=False, rounds=3)


_SHARES = ["threads_1", *([f"threads_{_CORES}", f"processes_{_CORES}"] if _CORES > 1 else [])]


@pytest.mark.full
@pytest.mark.share(30.0)
@pytest.mark.parametrize("provider", _SHARES)
def bench_scaling(measure, data_dir, provider):
    """One core, all of them by threads, and all of them by processes of one thread (torchrun)."""
    measure(functools.partial(_prepare_scaling, data_dir), "threads_1")


_COMMANDS = {
    "import_torch": ["-c", "import torch"],
    "import_fastres": ["-c", "import fastres"],
    "help": ["-m", "fastres.train", "--help"],
}


# What a first step is taken of; by its name alone, at width 1.
_STARTED = "resnet20"


def _first_step(data_dir: str | None, *, fast: bool) -> float:
    """Seconds from the start of a training process to the end of its first step, as it says.

    The data have been read before, so that they come from the cache.
    """
    words = [*_source(data_dir), "--model", _STARTED, "--limit-train", "128", "--epochs", "1"]
    seconds = _train([*words, *(["--fast"] if fast else [])])["first_step_seconds"]
    if seconds is None:
        raise Unavailable("this system does not tell when a process was started")
    return seconds


def _prepare_start_up(data_dir: str | None, quick: bool, provider: str) -> Prepared:
    if quick and provider.startswith("first_step"):
        raise Unavailable("--quick leaves out what starts a training")

    def sample() -> float:
        if provider.startswith("first_step"):
            return _first_step(data_dir, fast=provider == "first_step_fast")
        started = time.perf_counter()
        _run(_COMMANDS[provider])
        return time.perf_counter() - started

    data = load_data(data_dir).name
    what = f"from the start of the process, {_STARTED} w1, cached data: {data}"
    info: BenchmarkInfo = {"suite": "start-up", "case": what, "dtype": "any", "clock": "wall clock"}
    return Prepared(sample, info, warm=False, rounds=1 if quick else 3)


@pytest.mark.share(30.0)
@pytest.mark.parametrize(
    "provider", ["import_torch", "import_fastres", "help", "first_step", "first_step_fast"]
)
def bench_start_up(measure, data_dir, quick, provider):
    """From pressing enter to: torch imported, help printed, first training step done."""
    measure(functools.partial(_prepare_start_up, data_dir, quick), "import_torch")


def _prepare_compile(folder: Path, provider: str) -> Prepared:
    configuration = "eager" if provider == "eager" else "compile"
    reason = why_not(configuration, DEVICE)
    if reason:
        raise Unavailable(reason)
    if provider == "cold":
        shutil.rmtree(folder, ignore_errors=True)
    words = ["--configuration", configuration, "--loader", "none"]
    words += data_arguments(DEVICE.type, _COMPILED, 128, 1, None)
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": f"{folder}/t"}

    def sample() -> float:
        worker = Worker("benchmarks.suites.ablation_worker", words, 1, env)
        seconds = worker.hello["build_seconds"]
        worker.close()
        return seconds

    info: BenchmarkInfo = {
        "suite": "compile",
        "case": f"{_COMPILED} batch 128, building the network and its first step",
        "dtype": "any",
        "clock": "wall clock, new process",
    }
    return Prepared(sample, info, warm=False, rounds=1)


@pytest.mark.full
@pytest.mark.share(30.0)
@pytest.mark.parametrize("provider", ["eager", "cold", "cached"])
def bench_compile(measure, tmp_path_factory, provider):
    """What torch.compile costs before the first step: with an empty cache, and with a full one."""
    folder = tmp_path_factory.getbasetemp() / "compile_cache"
    measure(functools.partial(_prepare_compile, folder), "eager")
