"""What a sweep starts as a process: `fastres train`, which ends with whoever started it.

    python -m fastres.sweeps.child [OPTIONS of fastres train]

A sweep may be killed, and a run that outlived it would hold the folder that the resumed sweep
wants.
"""

import ctypes
import signal
import sys
from collections.abc import Sequence

from fastres.train import main as train

__all__ = ["end_with_parent", "main"]

# From sys/prctl.h.
_PR_SET_PDEATHSIG = 1
# Slurm warns all processes of a job of its time limit, and submitit answers for it; either signal
# would end a process that does not expect it.
_WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)


def end_with_parent() -> None:
    """Get a SIGTERM when the process that started this one ends, be it by SIGKILL; Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main(argv: Sequence[str] | None = None) -> int:
    """Train and return the exit code."""
    end_with_parent()
    for number in _WARNINGS:
        signal.signal(number, signal.SIG_IGN)
    return train(argv)


if __name__ == "__main__":
    sys.exit(main())
