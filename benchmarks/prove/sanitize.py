"""Kernels under NVIDIA's compute-sanitizer: `python -m benchmarks.prove.sanitize --tool memcheck`.

Runs `fastres.kernels.tools.parity` under it, on a few images. With --all every check of ResNet-20;
else, of what crashed or failed in the reports of that command in --reports, the smallest. Exit
codes: 0 nothing was found, 1 something was, 2 bad use, 5 nothing to run.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fastres.kernels.tools.command_line import DTYPES, NOTHING_TO_RUN
from fastres.kernels.tools.parity import last_states
from fastres.output import reader_may_leave

__all__ = ["failed_checks", "main"]

_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# So slow is every access under it that few images have to be enough.
_PARITY = ("fastres.kernels.tools.parity", "--batch", "4", "--models", "resnet20")
# What no later call of the process survived comes before what only raised an error.
_CRASHES = ("LOST", "begun")


def failed_checks(reports: Path) -> list[str]:
    """Return the names of what crashed, then of what failed, each the smallest first.

    Checks run from single kernels to whole networks, which fail where one of their kernels does.
    """
    states = {
        name: status
        for path in sorted(reports.glob("parity*.jsonl"))
        for name, status in last_states(path).items()
        if status in (*_CRASHES, "FAILED")
    }
    return sorted(states, key=lambda name: states[name] not in _CRASHES)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prove.sanitize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tool", choices=_TOOLS, default="memcheck")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="every check of ResNet-20")
    which.add_argument("--reports", type=Path, help="folder of parity's reports")
    text = "begin no check after this time; default: until all is done"
    parser.add_argument("--budget", type=float, metavar="SECONDS", help=text)
    return parser


@reader_may_leave()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(argv)
    if shutil.which("compute-sanitizer") is None:
        print("nothing to run on this machine: there is no compute-sanitizer")
        return NOTHING_TO_RUN
    chosen: tuple[str, ...] = ()
    if not options.all:
        failed = failed_checks(options.reports)
        if not failed:
            print("nothing to run: no kernel failed")
            return NOTHING_TO_RUN
        chosen = ("resnet18", "--dtypes", *DTYPES, "--only", failed[0])
    sanitizer = ("compute-sanitizer", "--tool", options.tool, "--error-exitcode", "1")
    # A run that ends in time is not killed before the sanitizer has printed what it found.
    limit = () if options.budget is None else ("--budget", f"{options.budget:g}")
    command = [*sanitizer, sys.executable, "-m", *_PARITY, *chosen, *limit]
    print("+", *command, flush=True)
    code = subprocess.run(command).returncode
    return code if code in (0, NOTHING_TO_RUN) else 1


if __name__ == "__main__":
    sys.exit(main())
