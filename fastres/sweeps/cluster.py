"""The runs of a sweep on a cluster, by submitit: Slurm, or processes of this machine to try it.

Slurm is what university clusters run, and submitit needs nothing there but the `sbatch` command: no
service to keep alive, no head node, as Ray would. Its local executor runs the same code.
https://github.com/facebookincubator/submitit
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fastres.engine.signals import Stopped, StopSignal
from fastres.errors import FailureError, UsageError
from fastres.sweeps.job import Job, visible_gpus

__all__ = ["run_on_cluster"]

_POLL_S = 0.5
# For a run to save after it was cancelled.
_SAVE_S = 60.0
_DAY_MIN = 24 * 60


def run_on_cluster(
    jobs: Iterable[Job],
    *,
    cluster: Literal["slurm", "local"],
    at_once: int,
    options: Mapping[str, Any],
    folder: Path,
    ended: Callable[[Job, int], None],
) -> None:
    """Submit the jobs that have not ended, and wait for them.

    Where Slurm's time limit ends a job, submitit submits it again, and it goes on from its
    checkpoint. An interrupt of this process cancels the jobs that are left and waits until their
    runs have saved; a resumed sweep submits them again. On this machine jobs take GPUs in turns.

    Args:
        jobs: of the sweep; the folder of each must be one that the nodes see.
        cluster: where they run.
        at_once: jobs that may run at a time.
        options: of the executor: slurm_partition, timeout_min, gpus_per_node, cpus_per_task, ...
        folder: for submitit's own files.
        ended: called with each that ends and its exit code.

    Raises:
        UsageError: where submitit does not take an option.
        FailureError: where there is no Slurm, it does not take the jobs, or runs of the sweep still
            go on: submitit's processes outlive one that was killed.
        Stopped: after a signal.
    """
    executor = _executor(cluster, at_once, options, folder)
    waiting = [job for job in jobs if not job.is_done()]
    if running := [job.folder for job in waiting if job.is_running()]:
        raise FailureError(
            f"{len(running)} of the sweep's runs still go on, submitted before it was killed: "
            f"resume it when they have ended ({running[0]}, ...)"
        )
    submitted: dict[Any, Job] = {}
    # submitit's processes would all see the first GPUs, whatever this one sees.
    gpus = visible_gpus() if cluster == "local" else []
    free = [gpus[slot % len(gpus)] for slot in range(at_once)] if gpus else []
    stop = StopSignal()
    with stop.caught():
        try:
            while (waiting or submitted) and stop.number is None:
                # Slurm keeps the queue itself; the local executor starts all that it is given.
                room = len(waiting) if cluster == "slurm" else at_once - len(submitted)
                batch, waiting = waiting[:room], waiting[room:]
                if free:
                    batch = [dataclasses.replace(job, gpu=free.pop()) for job in batch]
                if batch:
                    submitted |= dict(zip(_submit(executor, batch), batch, strict=True))
                time.sleep(_POLL_S)
                for handle in [h for h in submitted if h.done()]:
                    job = submitted.pop(handle)
                    free += [job.gpu] if job.gpu is not None else []
                    ended(job, _exit_code(handle))
        finally:
            for handle in submitted:
                handle.cancel(check=False)
            _wait_until_saved(list(submitted.values()))
    if stop.number is not None:
        raise Stopped(stop.number)


def _wait_until_saved(jobs: Sequence[Job]) -> None:
    """Wait until no run has its folder any more, so that a resumed sweep finds it free."""
    deadline = time.monotonic() + _SAVE_S
    while time.monotonic() < deadline and any(job.is_running() for job in jobs):
        time.sleep(_POLL_S)


def _executor(cluster: str, at_once: int, options: Mapping[str, Any], folder: Path) -> Any:
    import submitit

    given: dict[str, Any] = {
        "name": "fastres",
        "timeout_min": _DAY_MIN,
        "slurm_array_parallelism": at_once,
        **options,
    }
    if cluster == "local":
        # Its processes see no GPU that was not asked for.
        given.setdefault("gpus_per_node", len(visible_gpus()))
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**given)
    except (NameError, TypeError, ValueError, AssertionError) as error:
        raise UsageError(f"--engine-option: {_first_line(error)}") from None
    except RuntimeError as error:
        raise FailureError(f"submitit cannot use {cluster}: {_first_line(error)}") from None
    return executor


def _submit(executor: Any, jobs: Sequence[Job]) -> list[Any]:
    try:
        return executor.submit_array(jobs)
    except Exception as error:  # of sbatch, in submitit's own classes
        raise FailureError(f"the jobs were not submitted: {_first_line(error)}") from None


def _exit_code(handle: Any) -> int:
    """Return that of the run, or 1 where the job itself failed."""
    try:
        return int(handle.result())
    except Exception:  # whatever the node or Slurm raised; the logs of run and job have it
        return 1


def _first_line(error: Exception) -> str:
    """Return what an error says, without the lists that submitit adds."""
    return next(iter(str(error).splitlines()), type(error).__name__)
