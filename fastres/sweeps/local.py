"""The queue of this machine: some runs at once, each with its share of the cores and of the GPUs.

How many at once is measured. A small network leaves cores and GPUs idle between its small kernels;
how much is a matter of the network and the machine. So a moment of training is tried with one, two,
four, ... processes, until another doubling no longer adds to the images a second of all together,
or memory does not allow it.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fastres import host, strict_json
from fastres.config import Config
from fastres.engine.signals import Stopped, StopSignal
from fastres.errors import FailureError
from fastres.sweeps.job import STOPPED, Job, last_line, process_environment, visible_gpus

__all__ = ["Trial", "best_trial", "measure_parallel", "run_queue", "threads_of", "try_processes"]

_POLL_S = 0.2
_GAIN = 1.05
_MEMORY_SHARE = 0.8
_TRIAL_S = 8.0


@dataclass(frozen=True)
class Trial:
    """What some processes at once came to.

    Attributes:
        processes: how many.
        images_per_second: of all together.
        host_bytes: of memory, of the largest of them.
        gpu_share: of the memory of the fullest GPU that was in use, by whomever; 0 without one.
    """

    processes: int
    images_per_second: float
    host_bytes: int
    gpu_share: float


def best_trial(trials: Sequence[Trial]) -> Trial:
    """Return the fewest processes that nothing beats by more than 5 %."""
    most = max(trial.images_per_second for trial in trials)
    return next(trial for trial in trials if trial.images_per_second * _GAIN >= most)


def measure_parallel(
    config: Config, most: int, say: Callable[[str], None] = lambda line: None
) -> list[Trial]:
    """Try the steps of a run in more and more processes.

    Args:
        config: the options of the run.
        most: processes at once, at most.
        say: called with a line on each trial.

    Returns:
        At least one, of one process.

    Raises:
        FailureError: when one process alone fails.
        Stopped: after a signal.
    """
    trials: list[Trial] = []
    count = 1
    while True:
        try:
            trial = try_processes(config, count, _TRIAL_S)
        except FailureError as error:
            # So many are too many, for the memory most likely.
            if not trials:
                raise
            say(f"  {count:>3}: {error}")
            return trials
        rate, used = trial.images_per_second, f"{trial.host_bytes / 2**30:.1f} GiB each"
        if trial.gpu_share:
            used += f", {100 * trial.gpu_share:.0f} % of the GPU's memory in use"
        say(f"  {count:>3}: {rate:,.0f} images/s together, {used}")
        gains = not trials or rate >= _GAIN * trials[-1].images_per_second
        trials.append(trial)
        count = min(2 * count, most)
        if not gains or count == trial.processes or not _fits(trial, count):
            return trials


def _fits(trial: Trial, count: int) -> bool:
    """Tell whether memory allows for `count` processes, more than there were in the trial."""
    if count * trial.host_bytes > _MEMORY_SHARE * _free_bytes():
        return False
    gpus = max(1, len(visible_gpus()))
    growth = -(-count // gpus) / -(-trial.processes // gpus)
    return growth * trial.gpu_share <= _MEMORY_SHARE


def _free_bytes() -> float:
    """Return the host memory that new processes may have: of the machine, and of a container."""
    found = [float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))]
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024.0 * int(next(x for x in lines if "MemAvailable" in x).split()[1]))
    # A container sees its own limit there; without one the file says "max", or is missing.
    with suppress(OSError, ValueError):
        found.append(float(int(Path("/sys/fs/cgroup/memory.max").read_text())))
    return min(found)


def threads_of(processes: int) -> int | None:
    """Return the CPU threads of each of several processes; None leaves one alone to itself."""
    return None if processes == 1 else max(1, host.usable_cores() // processes)


def try_processes(config: Config, count: int, seconds: float) -> Trial:
    """Train for some seconds in `count` processes at once, and return how fast all were together.

    None of them is left when this returns or raises.

    Raises:
        FailureError: when one of them fails.
        Stopped: after a signal.
    """
    threads = config.threads or threads_of(count)
    config = config.replace(threads=threads)
    stop = StopSignal()
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as name, stop.caught():
        folder = Path(name)
        (folder / "options.json").write_text(strict_json.dumps(config.to_json()))
        words = [sys.executable, "-m", "fastres.sweeps.trial", name, str(count), str(seconds)]
        try:
            for number in range(count):
                with open(folder / f"{number}.log", "wb") as log:
                    process = subprocess.Popen(
                        [*words, str(number)],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=process_environment(threads, number),
                        start_new_session=True,
                    )
                processes.append(process)
            while None in [process.poll() for process in processes]:
                if stop.number is not None:
                    raise Stopped(stop.number)
                # The others would wait for one that has failed.
                if any(process.returncode for process in processes):
                    break
                time.sleep(_POLL_S)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        codes = {number: process.returncode for number, process in enumerate(processes)}
        # Those that were killed above have a negative one.
        number = max(codes, key=lambda n: (codes[n] != 0, codes[n]))
        if codes[number]:
            said = last_line(folder / f"{number}.log")
            raise FailureError(f"a trial failed with exit code {codes[number]}: {said}")
        found = [strict_json.loads((folder / f"{n}.json").read_bytes()) for n in range(count)]
    return Trial(
        count,
        sum(one["images_per_second"] for one in found),
        max(one["host_bytes"] for one in found),
        max(one["gpu_share"] for one in found),
    )


def run_queue(jobs: Iterable[Job], at_once: int, ended: Callable[[Job, int], None]) -> None:
    """Run jobs, `at_once` at a time, in their order; a job that fails stops no other.

    After a signal all of them are asked to save and stop. None is left when this returns or raises.

    Args:
        jobs: taken when there is room for one; those that have ended are passed over.
        at_once: processes.
        ended: called with each that ends and its exit code, but for those that were asked to stop.

    Raises:
        Stopped: after a signal, once all have saved.
    """
    waiting = (job for job in jobs if not job.is_done())
    running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
    stop = StopSignal()
    asked = exhausted = False
    with stop.caught():
        try:
            while True:
                while not exhausted and stop.number is None and len(running) < at_once:
                    if (job := next(waiting, None)) is None:
                        exhausted = True
                    else:
                        slot = next(n for n in range(at_once) if n not in running)
                        running[slot] = (job, job.start(slot))
                if not running:
                    break
                time.sleep(_POLL_S)
                for slot, (job, process) in list(running.items()):
                    if (code := process.poll()) is not None:
                        del running[slot]
                        if not (asked and code in STOPPED):
                            ended(job, code)
                if stop.number is not None and not asked:
                    asked = True
                    for _, process in running.values():
                        process.terminate()
        finally:
            # After an error of this process.
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.wait()
    if stop.number is not None:
        raise Stopped(stop.number)
