"""What the commands that check a training step share: their options and their exit codes.

0: right. 1: wrong, or it failed. 2: bad use. 5: nothing to run on this machine.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.harness.ablation import Unavailable
from fastres.cli import guarded
from fastres.config import Config, validate
from fastres.kernels.tools.command_line import NOTHING_TO_RUN

__all__ = ["make_parser", "run_check", "step_options"]


def make_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of `python -m module`, with the options of a step."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="resnet20", help="network; default resnet20")
    add("--batch-size", type=int, default=512, help="images a step; default 512")
    add("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="precision")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile around it")
    return parser


def step_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the command line says about the step as options of `Config`.

    Raises:
        UsageError: for a value that its option may not have.
    """
    precision = {"fp32": "off"}.get(options.dtype, options.dtype)
    validate(Config(batch_size=options.batch_size))
    return {"amp": precision, "compile": options.compile}


def run_check(command: Callable[[], int]) -> int:
    """Run a command and return its exit code; what a user can mend is one sentence."""

    def check() -> int:
        try:
            return command()
        except Unavailable as reason:
            print(f"nothing to run on this machine: {reason}", file=sys.stderr)
            return NOTHING_TO_RUN

    return guarded(check, debug=False)
