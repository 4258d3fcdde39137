"""One run of a sweep as a process of its own, in its folder.

A run that was interrupted goes on from its checkpoint; one that has ended is not run again.
"""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastres.engine.run_dir import RunDir
from fastres.errors import UsageError

__all__ = ["STOPPED", "Job", "last_line", "process_environment", "visible_gpus"]

# Exit codes of a run that was asked to stop by a SIGTERM: once it had saved, and before it had
# anything to save.
STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)


def visible_gpus() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES calls each GPU that this process sees; starts no CUDA."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def process_environment(threads: int | None, slot: int | None) -> dict[str, str]:
    """Return the environment of one of several processes that train at the same time.

    Args:
        threads: CPU threads that it may use; None leaves them to it.
        slot: which of those at the same time it is: they take the GPUs in turns. None leaves it all
            GPUs.
    """
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    if slot is not None and len(gpus := visible_gpus()) > 1:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return environment


def last_line(log: Path) -> str:
    """Return the last line of what a process has printed."""
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError:
        lines = []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


@dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
        options: a file of its options.
        folder: its run folder.
        threads: CPU threads that it may use; None leaves them to it.
        gpu: what CUDA_VISIBLE_DEVICES calls the one that it may use; None leaves it all.
    """

    options: str
    folder: str
    threads: int | None = None
    gpu: str | None = None

    @property
    def log(self) -> Path:
        """Return the file that it prints to, beside its folder."""
        return Path(f"{self.folder}.log")

    def is_done(self) -> bool:
        """Tell whether it has ended."""
        return Path(self.folder, "summary.json").exists()

    def is_running(self) -> bool:
        """Tell whether a process has its folder; on another node, where the file system locks."""
        if not os.path.isdir(self.folder):
            return False
        try:
            with RunDir(Path(self.folder)).claimed():
                return False
        except UsageError:
            return True

    def command(self) -> list[str]:
        """Return the words that start it or go on with it."""
        words = [sys.executable, "-m", "fastres.sweeps.child", "--out", self.folder]
        if Path(self.folder, "last.safetensors").exists():
            words.append("--resume")
        else:
            words += ["--config", self.options, "--overwrite"]
        return words if self.threads is None else [*words, "--threads", str(self.threads)]

    def start(self, slot: int | None = None) -> "subprocess.Popen[bytes]":
        """Start it as the process of a slot; what it prints is added to its log."""
        environment = process_environment(self.threads, slot)
        if self.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpu
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                # Ctrl-C in a terminal is for the sweep, which asks its runs to stop, once.
                start_new_session=True,
            )

    def __call__(self) -> int:
        """Run it to its end and return its exit code; what submitit calls on a node."""
        return 0 if self.is_done() else self.start().wait()

    def checkpoint(self) -> Any:
        """Return what submitit submits again where Slurm's time limit has ended the job."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
