"""Several seeds on one GPU: which way is the fastest? `python -m benchmarks.prove.seeds_at_once`.

A small network leaves most of a GPU idle. The same k runs, from k seeds, are trained

    processes     one process each, as `fastres sweep` does; the GPU takes turns between them
    streams       in one process, a captured graph and a stream each, launched in turn

and what is measured is the images a second of all together, over some seconds behind the first
steps. One at once is a run alone. Without a GPU there are no streams: runs of one process follow
each other step by step, which shows that the command works and nothing of a GPU.

Exit codes: 0 measured, 1 failure, 2 bad use; 129, 130 and 143 stopped by a signal.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from benchmarks.harness.rows import RESULTS, make_provenance, summarize, write_results
from fastres.cli import guarded
from fastres.config import Config, validate
from fastres.engine.console import RunConsole
from fastres.engine.machine import keep_freed_memory
from fastres.engine.run_dir import RunDir
from fastres.engine.signals import Stopped
from fastres.engine.trainer import Trainer
from fastres.errors import UsageError
from fastres.recipes import from_recipe
from fastres.sweeps.local import try_processes
from fastres.sweeps.trial import endless_batches

__all__ = ["main", "run_streams"]

_WARM_STEPS = 3


def run_streams(config: Config, count: int, seconds: float, folder: Path) -> float:
    """Train `count` seeds in this process in turns and return the images a second of all.

    Args:
        config: of each, but for the seed.
        count: runs.
        seconds: to measure, behind the first steps.
        folder: for what runs may want to write; they write nothing.
    """
    runs = []
    for seed in range(count):
        trainer = Trainer(config.replace(seed=seed), RunDir(folder), RunConsole(silent=True))
        runs.append(trainer.prepare())
    on_gpu = trainer.runtime.device.type == "cuda"
    streams = [torch.cuda.Stream() if on_gpu else None for _ in runs]
    batches = [endless_batches(run) for run in runs]

    def within(stream: "torch.cuda.Stream | None") -> AbstractContextManager[object]:
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    wait()
    images, started, step = 0, 0.0, 0
    try:
        while step <= _WARM_STEPS or time.perf_counter() - started < seconds:
            if step == _WARM_STEPS:
                wait()
                images, started = 0, time.perf_counter()
            for run, stream, served in zip(runs, streams, batches, strict=True):
                with within(stream):
                    batch, labels = next(served)
                    # Images are as large as they get at the end of a run.
                    run.step(run.total_steps - 1, batch, labels)
                images += len(batch)
            step += 1
        wait()
        return images / (time.perf_counter() - started)
    finally:
        for run in runs:
            run.close()


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prove.seeds_at_once",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="resnet20")
    add("--batch-size", type=int, default=512)
    add("--counts", type=int, nargs="+", default=[1, 2, 4, 8], help="runs at once")
    add("--rounds", type=int, default=3, help="of all of them, in turns")
    add("--seconds", type=float, default=5.0, help="of each measurement")
    add("--limit-train", type=int, help="images of the set; default: all")
    add("--data-dir", help="images; default: synthetic ones")
    add("--out", type=Path, default=RESULTS, help="folder for rows; default benchmarks/results")
    options = parser.parse_args(argv)
    if min(options.counts) < 1 or options.rounds < 1 or options.seconds <= 0:
        raise UsageError("--counts, --rounds and --seconds must be positive")
    return options


def _run(argv: Sequence[str]) -> int:
    options = _parse(argv)
    keep_freed_memory()
    config = validate(
        from_recipe("standard", options.model).replace(
            fast=True,
            compile="off",
            batch_size=options.batch_size,
            limit_train=options.limit_train,
            dataset="auto" if options.data_dir else "synthetic",
            data_dir=options.data_dir,
        )
    )
    rates: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for count in options.counts:
                found = {
                    "processes": try_processes(config, count, options.seconds).images_per_second,
                    "streams": run_streams(config, count, options.seconds, Path(folder)),
                }
                for way, rate in found.items():
                    rates.setdefault((way, count), []).append(rate)
                    print(f"{count} {way}: {rate:,.0f} images/s together", flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [
        summarize(
            "seeds_at_once",
            f"{device} {options.model} batch {options.batch_size}, {count} at once",
            way,
            "images_per_second",
            "images/s",
            values,
        )
        for (way, count), values in rates.items()
    ]
    words = ["python", "-m", "benchmarks.prove.seeds_at_once", *argv]
    options.out.mkdir(parents=True, exist_ok=True)
    print(write_results("seeds_at_once", rows, make_provenance("mixed", words), options.out, None))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def run() -> int:
        try:
            return _run(arguments)
        except Stopped as stopped:
            return stopped.exit_code

    return guarded(run, debug=False)


if __name__ == "__main__":
    sys.exit(main())
