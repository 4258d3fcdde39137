"""From options to a finished run in its folder: what the command and `fastres.train` share.

Its import loads no torch, which `prepare_process` has to come before.
"""

import os
from contextlib import nullcontext
from typing import TYPE_CHECKING

from fastres.config import Config
from fastres.engine.machine import keep_freed_memory

if TYPE_CHECKING:
    from fastres.engine.distributed import Processes
    from fastres.engine.run_dir import RunDir
    from fastres.engine.summary import Summary
    from fastres.engine.trackers import Trackers
    from fastres.engine.trainer import Trainer

__all__ = ["prepare_process", "run_in_folder"]


def prepare_process(config: Config) -> None:
    """Set what must stand before torch's first work: the allocator, cuBLAS's workspace."""
    if config.fast:
        keep_freed_memory()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def run_in_folder(
    trainer: "Trainer",
    folder: "RunDir",
    processes: "Processes",
    *,
    resume: bool,
    overwrite: bool,
    trackers: "Trackers",
) -> "Summary":
    """Compile, claim the folder, train to the end.

    Args:
        trainer: its first screen has been shown.
        folder: checked to be free, unless the run is resumed.
        processes: the first of them has the folder.
        resume: go on from the folder's last checkpoint.
        overwrite: replace the run that is there.
        trackers: that follow the run.

    Raises:
        Stopped: after a signal, with a checkpoint in the folder.
        UsageError, FailureError: as `Trainer.run`, and where another process has the folder.
    """
    prepared = trainer.prepare()
    with folder.claimed() if processes.is_main else nullcontext():
        if processes.is_main and not resume:
            # Again, now that nobody else can start a run in it.
            folder.begin(trainer.config.to_json(), overwrite=overwrite)
        if not processes.is_main:
            return trainer.run(prepared, resume=resume)
        with trackers.following(trainer, resume=resume):
            return trainer.run(prepared, resume=resume)
