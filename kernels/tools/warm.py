"""Fill Triton's cache before the first step: `python -m fastres.kernels.tools.warm --arch sm_90`.

Compiles every kernel that whole steps of the chosen networks launch, in several processes, and for
a GPU that need not be here: training on it then starts without compiling. Any recipe's augmentation
and loss are included, SGD and 1x1 projections are taken for granted. The keys of the entries are
those that Triton's launcher computes there, given the same releases of Python, Triton and fastres
and the same TRITON_ variables. GPUs are not touched, beyond being asked what they are.

A cache may be carried to another machine, to a folder of the same path, as Triton notes the whole
paths of its files. With TRITON_STORE_BINARY_ONLY=1 in the environment it is about a sixth as large,
and whoever reads it need not have that set; only codegen wants the rest, so give it another folder.
A batch of another size has kernels of its own: name that of evaluation too, --batches 512 1000.

Exit codes: 0; 1 when a kernel does not compile; 2 when nothing can be; 130 when interrupted, which
lets the kernels finish that were begun.
"""

import argparse
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres.host import usable_cores, versions
from fastres.kernels.tools.command_line import (
    DTYPES,
    NETWORKS,
    PHASES,
    Parser,
    bad_batch,
    bad_budget,
    bad_file,
    why_not_compile,
)
from fastres.output import reader_may_leave
from fastres.strict_json import dumps

if TYPE_CHECKING:
    from fastres.kernels.tools.warm_kernels import Outcome, PlannedKernel

__all__ = ["main"]

WARM_PHASES = (*PHASES, "checks", "forms")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m fastres.kernels.tools.warm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add_names(option: str, names: Sequence[str], default: Sequence[str], what: str) -> None:
        text = f"{what}: {', '.join(names)}; default {' '.join(default)}"
        parser.add_argument(
            option, nargs="+", choices=names, default=default, metavar="NAME", help=text
        )

    add = parser.add_argument
    add("--arch", metavar="NAME", help="GPU architecture, such as sm_90; default: that of this GPU")
    add_names("--models", NETWORKS, NETWORKS, "networks")
    add("--batches", nargs="+", type=int, default=[512], metavar="N", help="images; default 512")
    add_names("--dtypes", DTYPES, ["bf16"], "precisions (tf32: fp32 as torch multiplies it)")
    what = (
        "what the networks do; checks: what the parity command runs; forms: what the tuner times "
        "first"
    )
    add_names("--phases", WARM_PHASES, PHASES, what)
    text = "programmatic dependent launch; default: what the launch table says of the GPU"
    add("--pdl", choices=("on", "off", "both"), default="table", help=text)
    add("--jobs", type=int, metavar="N", help="processes that compile; default: the usable cores")
    text = "begin no kernel after this time, and say how many are left; default: no limit"
    add("--budget", type=float, default=float("inf"), metavar="SECONDS", help=text)
    add("--cache", type=Path, metavar="DIR", help="folder of the cache; default: Triton's own")
    add("--json", type=Path, metavar="FILE", help="also write what became of each kernel as JSON")
    add("-v", "--verbose", action="store_true", help="print a line a kernel")
    return parser


def _obstacle(options: argparse.Namespace) -> str | None:
    """Fill in the architecture; say why nothing can be compiled, or None."""
    if options.jobs is not None and options.jobs < 1:
        return f"--jobs must be at least 1, got {options.jobs}"
    reason = (
        bad_budget(options.budget)
        or bad_file("--json", options.json)
        or bad_batch("--batches", options.batches)
        or why_not_compile()
    )
    if reason is not None:
        return reason
    from fastres.kernels.tools.warm_kernels import arch_here

    options.arch = options.arch or arch_here()
    if options.arch is None:
        return "no NVIDIA GPU is here: name an architecture with --arch, such as sm_90"
    number = re.fullmatch(r"sm_(\d{2,3})", options.arch)
    if number is None or int(number[1]) < 80:
        return f"--arch must be sm_80 or later, such as sm_90, got {options.arch}"
    return None


def _fill(options: argparse.Namespace, started: float) -> "list[tuple[PlannedKernel, Outcome]]":
    """Plan and compile with a bar on stderr, silent when that is not a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    from fastres.kernels.tools.warm_kernels import Workload, fill_cache, plan_kernels

    workloads = [
        Workload(*words)
        for words in product(options.models, options.phases, options.dtypes, options.batches)
    ]
    outcomes = []
    hidden = not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), disable=hidden, transient=True) as progress:
        task = progress.add_task("compiling kernels", total=None)
        planned = plan_kernels(options.arch, workloads, options.pdl)
        progress.update(task, total=len(planned))
        jobs = options.jobs or usable_cores()
        for kernel, outcome in fill_cache(planned, jobs, started + options.budget):
            outcomes.append((kernel, outcome))
            progress.advance(task)
            if outcome.state == "failed":
                print(f"failed: {_label(kernel)}: {outcome.error}", file=sys.stderr)
            elif options.verbose:
                print(f"{outcome.state} {outcome.seconds:.1f} s: {_label(kernel)}")
    return outcomes


def _label(kernel: "PlannedKernel") -> str:
    network, phase, dtype, batch = kernel.workload
    where = f"{network} {kernel.layer} {phase} {dtype} batch {batch}"
    return f"{kernel.build.kernel.removeprefix('_')} of {where}{' pdl' if kernel.pdl else ''}"


def _cache_size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _record(kernel: "PlannedKernel", outcome: "Outcome") -> dict[str, Any]:
    """What became of a kernel, as flat, plain values."""
    return {
        "kernel": kernel.build.kernel.removeprefix("_"),
        **kernel.workload._asdict(),
        "layer": kernel.layer,
        "pdl": kernel.pdl,
        "key": kernel.build.key,
        "state": outcome.state,
        "seconds": round(outcome.seconds, 3),
        "error": outcome.error,
    }


def _warm(options: argparse.Namespace) -> int:
    """Compile, print, write; 1 where a kernel does not compile."""
    started = time.monotonic()
    outcomes = _fill(options, started)
    seconds = time.monotonic() - started
    import triton

    folder = Path(triton.knobs.cache.dir)
    size = _cache_size(folder)
    count = Counter(outcome.state for _, outcome in outcomes)
    print(
        f"{options.arch}: {len(outcomes)} kernels in {seconds:.1f} s: {count['compiled']} "
        f"compiled, {count['cached']} cached before, {count['failed']} failed, {count['left']} "
        f"left; {folder} holds {size / 1e6:.1f} MB"
    )
    if count["left"]:
        print(f"{count['left']} kernels were not begun in {options.budget:g} s; another run will")
    if options.json is not None:
        report = {
            "arch": options.arch,
            "versions": versions(),
            "seconds": round(seconds, 3),
            "cache": str(folder),
            "cache_bytes": size,
            "kernels": [_record(*item) for item in outcomes],
        }
        options.json.write_text(dumps(report, indent=1) + "\n")
    return 1 if count["failed"] else 0


@reader_may_leave()
def main(argv: Sequence[str] | None = None) -> int:
    """Compile; 1 where a kernel does not compile, 2 where nothing can be, 130 when interrupted."""
    options = _parser().parse_args(argv)
    if options.cache is not None:
        # The processes that compile have it from the environment, as Triton has.
        os.environ["TRITON_CACHE_DIR"] = str(options.cache.resolve())
    reason = _obstacle(options)
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    try:
        return _warm(options)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was compiled stays", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
