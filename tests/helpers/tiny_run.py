"""Training runs of seconds: in the process of a test, or in one to be signalled or killed."""

import os
import subprocess
import sys
from pathlib import Path

from fastres import train

ROOT = Path(__file__).resolve().parents[2]
TINY_NET = (
    *("--model", "resnet8", "--width", "0.25", "--shortcut", "A", "--no-whiten", "--threads", "1"),
)
TINY = (*TINY_NET, "--dataset", "synthetic", "--limit-train", "100", "--batch-size", "10")
ENDLESS = (*TINY, "--epochs", "100000")


def run_train(*arguments):
    """Train in this process and return the exit code."""
    return train.main([str(argument) for argument in arguments])


def start(command, **options):
    """Start `python COMMAND ...` from the root of the repository; pipes unless `options` differ."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "bufsize": 1}
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=env, **(pipes | options)
    )


def wait_for_epoch(lines):
    """Read what a run prints until the row of its first epoch."""
    for line in lines:
        if line.split()[:1] == ["1.00"]:
            return
    raise AssertionError("the run ended before its first epoch")


def is_running(pid):
    """Tell whether a process is there and more than a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def children(pid):
    """Return the process ids of all children."""
    tasks = list(Path(f"/proc/{pid}/task").iterdir())
    try:
        found = [(task / "children").read_text().split() for task in tasks]
    except (FileNotFoundError, ProcessLookupError):
        # A thread has ended meanwhile, and another one has its children.
        return children(pid)
    return [int(child) for of_thread in found for child in of_thread]
