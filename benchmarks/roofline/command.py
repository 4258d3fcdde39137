"""How close a training step comes to what this machine can do: `python -m benchmarks.roofline`.

Measures the step in turns with the machine's peak rates, counts its bytes and operations from the
model, and prints the floor, the share of it that is reached and where the rest goes.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.rows import make_provenance, write_results
from fastres.cli import guarded
from fastres.errors import UsageError

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    parser.add_argument("--seconds", type=float, default=20, help="time to measure")
    parser.add_argument("--out", type=Path, help="PNG file for the plot; default: no plot")
    parser.add_argument("--record", action="store_true", help="add rows to the results")
    parser.add_argument("--results", type=Path, help="folder of --record; default: the project's")
    return parser


def _run(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    from fastres.config import Config, validate
    from fastres.engine.machine import keep_freed_memory

    # The profiler of torch talks on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # Before the first tensor: --fast does the same.
    keep_freed_memory()
    precision: Any = {"fp32": "off"}.get(options.dtype, options.dtype)
    config = validate(
        Config(
            fast=True,
            model=options.model,
            batch_size=options.batch_size,
            threads=options.threads,
            amp=precision,
            loader="resident",
        )
    )
    if options.seconds <= 0:
        raise UsageError(f"--seconds must be more than 0, got {options.seconds:g}")
    if options.results and not options.results.is_dir():
        raise UsageError(f"--results must be a folder, got {options.results}")
    if options.out and options.out.suffix.lower() != ".png":
        raise UsageError(f"--out must be a .png file, got {options.out}")
    from benchmarks.roofline.measure import measure, rows_of_roofline

    result = measure(config, options.seconds)
    from benchmarks.roofline.view import draw, show

    show(result)
    if options.out:
        options.out.write_bytes(draw(result))
        print(f"{options.out}: plot")
    if options.record or options.results:
        provenance = make_provenance(result.dtype, ["python", "-m", "benchmarks.roofline", *argv])
        folder = {"folder": options.results} if options.results else {}
        print(write_results("roofline", rows_of_roofline(result), provenance, **folder))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _run(arguments), debug=False)
