"""Which kernel is right here, which is wrong, which crashes: `-m fastres.kernels.tools.parity`.

The first command to run on a GPU that nobody has tried. Every product of every layer of the chosen
networks, every other kernel, whole blocks and whole networks, forward and backward, are compared
with the truth in fp64 as plain torch in the same dtype is, run twice and compared bit for bit, on
memory full of NaN. What was unknown comes first: products of a pipelined loop with an operand that
a prologue forms in registers, and rank-4 tensor descriptors, in a CUDA graph too. Nothing is
measured; the milliseconds are for orientation.

A line says what begins before it begins, so the last one names what hangs or kills the process:

    12/90 fprop/bf16/h32w32c16k16r3s3u1p1/prologue/strip [triton 64x16x16 ...]: ok 0.31 1.2 ms

The number after `ok` is the largest error as a share of what is allowed. DIFFERS: right, but two
runs are not the same bits. After an error that the GPU keeps, such as a bad address, the command
stops, names what was running and prints how to repeat that alone under compute-sanitizer. Kernels
are compiled in groups before they run; with --threads 0 each is when its line has begun, which then
names what kills the compiler.

    --json FILE --resume

goes on in a new process behind what FILE says was begun, whatever became of that.

With TRITON_INTERPRET=1 the kernels are interpreted on the CPU; CUDA graphs are left out.

Exit codes: 0 all right, 1 something was not, 2 bad use, 5 nothing was run, 130 interrupted.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from fastres.host import usable_cores
from fastres.kernels.tools.command_line import (
    DTYPES,
    NETWORKS,
    NOTHING_TO_RUN,
    Parser,
    bad_budget,
    bad_file,
)
from fastres.output import reader_may_leave
from fastres.strict_json import dumps

if TYPE_CHECKING:
    import torch

    from fastres.kernels.tools.parity_check import Check, ParityRun, Result

__all__ = ["TRAINING_BATCH", "last_states", "main"]

# Images: of training, whose configurations every check has, and of a check in the interpreter.
TRAINING_BATCH = 512
INTERPRETED_BATCH = 2

# How checks end, the bad ones worst first.
BAD = ("LOST", "FAILED", "WRONG", "DIFFERS")
STATUSES = ("ok", *BAD, "left out", "not run")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m fastres.kernels.tools.parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    text = f"networks: {', '.join(NETWORKS)}; default all"
    add("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME", help=text)
    text = (
        f"images; default {TRAINING_BATCH}, interpreted {INTERPRETED_BATCH}. Fewer have the "
        f"configurations of {TRAINING_BATCH}, but constants of the kernels follow the batch"
    )
    add("--batch", type=int, metavar="N", help=text)
    text = f"precisions: {', '.join(DTYPES)} (tf32: fp32 as torch multiplies it); default bf16"
    add("--dtypes", nargs="+", choices=DTYPES, default=["bf16"], metavar="NAME", help=text)
    text = (
        "chosen (default): what the launch table or the rules give; all: also the start of every "
        "other form, operands formed and stored, and the route cudnn"
    )
    add("--forms", choices=("chosen", "all"), default="chosen", help=text)
    text = "the check of this name; where there is none, those whose names have it in them"
    add("--only", metavar="TEXT", help=text)
    text = "stop in time and say what was not run; default: until all is done"
    add("--budget", type=float, default=float("inf"), metavar="SECONDS", help=text)
    text = "write one JSON object for each check as it begins and as it ends"
    add("--json", type=Path, metavar="FILE", help=text)
    text = "add to FILE of --json, and run what it does not say was begun"
    add("--resume", action="store_true", help=text)
    add("--list", action="store_true", help="print the names and run nothing")
    text = "compile ahead in so many threads; default: all cores; 0: each kernel as it is run"
    add("--threads", type=int, default=usable_cores(), metavar="N", help=text)
    return parser


def _wrong_use(options: argparse.Namespace) -> str | None:
    if options.batch is not None and options.batch < 1:
        return f"--batch must be at least 1, got {options.batch}"
    if options.threads < 0:
        return f"--threads must not be negative, got {options.threads}"
    if options.resume and options.json is None:
        return "--resume goes on from a file: name it with --json"
    return bad_budget(options.budget) or bad_file("--json", options.json)


def _obstacle(options: argparse.Namespace) -> str | None:
    """Why no kernel runs on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import torch

    from fastres.kernels.gpu.primitives import INTERPRETED

    if options.list or torch.cuda.is_available() or INTERPRETED.value:
        return None
    return "no NVIDIA GPU, and TRITON_INTERPRET=1 is not set to interpret the kernels on the CPU"


def _device() -> "torch.device":
    import torch

    from fastres.kernels.gpu.primitives import INTERPRETED

    if INTERPRETED.value or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _checks(options: argparse.Namespace, device: "torch.device", batch: int) -> "list[Check]":
    """The checks that were asked for, in order."""
    from fastres.kernels.tools.parity_plan import plan_checks

    checks = plan_checks(
        options.models, batch, max(batch, TRAINING_BATCH), options.dtypes, options.forms, device
    )
    if options.only is None:
        return checks
    named = [check for check in checks if check.name == options.only]
    return named or [check for check in checks if options.only in check.name]


def last_states(report: Path) -> dict[str, str]:
    """Read a report: the last state of each check that was begun, "begun" where it did not end."""
    states: dict[str, str] = {}
    for line in report.read_text().splitlines() if report.exists() else []:
        with contextlib.suppress(ValueError):  # A process that is killed may leave half a line.
            found = json.loads(line)
            states[found["name"]] = found["status"]
    return {name: status for name, status in states.items() if status != "not run"}


def _run(
    run: "ParityRun", checks: "Sequence[Check]", json_file: TextIO | None
) -> "Iterator[Result]":
    """Run the checks; what begins is printed before it begins, how it ended behind it."""
    begun: list[Check] = []

    def write(record: dict[str, object]) -> None:
        if json_file is not None:
            json_file.write(dumps(record) + "\n")
            json_file.flush()

    def begin(check: "Check") -> None:
        begun.append(check)
        print(f"{len(begun)}/{len(checks)} {_title(check)}: ", end="", flush=True)
        write({"name": check.name, "status": "begun"})

    try:
        for result in run.results(checks, begin):
            if result.status != "not run":
                print(_outcome(result), flush=True)
            write(_record(result))
            yield result
    except KeyboardInterrupt:
        if begun:
            write({"name": begun[-1].name, "status": "not run", "detail": "interrupted"})
        raise


def _resume(
    options: argparse.Namespace, checks: "Sequence[Check]"
) -> "tuple[list[Check], list[Result]]":
    """What an earlier process has not begun, and what it began and did not end."""
    from fastres.kernels.tools.parity_check import Result

    states = last_states(options.json) if options.resume else {}
    text = "its process ended, or was ended, while it ran"
    killed = [
        Result(c.name, c.label, "LOST", text) for c in checks if states.get(c.name) == "begun"
    ]
    return [check for check in checks if check.name not in states], killed


def _title(of: "Check | Result") -> str:
    return f"{of.name} [{of.label}]" if of.label else of.name


def _outcome(result: "Result") -> str:
    """A result in one line, but for its name."""
    numbers = ""
    if result.share is not None and result.milliseconds is not None:
        numbers = f" {result.share:.2f} {result.milliseconds:.1f} ms"
    return f"{result.status}{numbers}{': ' if result.detail else ''}{result.detail}"


def _record(result: "Result") -> dict[str, object]:
    """A result for JSON, which has no infinity: the share of a NaN is null."""
    share = result.share
    return {
        **result._asdict(),
        "share": share if share is not None and math.isfinite(share) else None,
    }


def _summarise(results: "Sequence[Result]") -> int:
    """Print counts, what was not run, and each bad result again; return the exit code."""
    by_status: dict[str, list[Result]] = {word: [] for word in STATUSES}
    for result in results:
        by_status[result.status].append(result)
    print(", ".join(f"{len(found)} {word}" for word, found in by_status.items() if found))
    if by_status["not run"]:
        why = by_status["not run"][0].detail
        print(f"not run, since {why}: {', '.join(r.name for r in by_status['not run'])}")
    bad = [result for word in BAD for result in by_status[word]]
    for result in bad:
        print(f"{_title(result)}: {_outcome(result)}")
    if bad:
        return 1
    if by_status["ok"]:
        return 0
    print(f"nothing to run on this machine: {results[0].detail}")
    return NOTHING_TO_RUN


def _repeat(options: argparse.Namespace, name: str) -> str:
    """The command that runs one check alone under compute-sanitizer."""
    given = [f"--models {' '.join(options.models)}", f"--dtypes {' '.join(options.dtypes)}"]
    if options.forms == "all":
        given.append("--forms all")
    return (
        "compute-sanitizer --tool memcheck python -m fastres.kernels.tools.parity "
        f'--only "{name}" --batch 4 {" ".join(given)}'
    )


def _parity_run(options: argparse.Namespace, device: "torch.device", started: float) -> "ParityRun":
    import torch

    from fastres.kernels.tools.parity_check import ParityRun

    def is_late() -> bool:
        return time.monotonic() - started >= options.budget

    if device.type == "cpu":
        return ParityRun(device, is_late=is_late)
    synchronize = functools.partial(torch.cuda.synchronize, device)
    say = functools.partial(print, flush=True)
    return ParityRun(device, options.threads, synchronize, is_late, has_graphs=True, say=say)


def _prove(options: argparse.Namespace) -> int:
    """Run the checks that were asked for, or list them."""
    started = time.monotonic()
    device = _device()
    batch = options.batch or (TRAINING_BATCH if device.type == "cuda" else INTERPRETED_BATCH)
    checks = _checks(options, device, batch)
    if not checks:
        print(f"error: no check has {options.only} in its name", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(check.name for check in checks))
        return 0
    from fastres.kernels.gpu.launch_table import gpu_of

    checks, results = _resume(options, checks)
    if not checks and not results:
        print(f"nothing to run: {options.json} has all of it")
        return NOTHING_TO_RUN
    gpu = gpu_of(device)
    where = "CPU, interpreted" if gpu is None else gpu.name
    count = "1 check" if len(checks) == 1 else f"{len(checks)} checks"
    print(f"{where}: {count}, {batch} images", flush=True)
    mode = "a" if options.resume else "w"
    with options.json.open(mode) if options.json else contextlib.nullcontext() as json_file:
        if json_file is not None:
            # A process that was killed may have left half a line.
            json_file.write("\n" if options.resume else "")
            json_file.writelines(dumps(_record(result)) + "\n" for result in results)
        try:
            results.extend(_run(_parity_run(options, device, started), checks, json_file))
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            _summarise(results)
            return 130
    code = _summarise(results)
    for lost in (result for result in results if result.status == "LOST"):
        print(f"repeat it alone: {_repeat(options, lost.name)}")
    return code


@reader_may_leave()
def main(argv: Sequence[str] | None = None) -> int:
    """Check the kernels; the exit code says whether all are right."""
    options = _parser().parse_args(argv)
    wrong = _wrong_use(options)
    if wrong is not None:
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    reason = _obstacle(options)
    if reason is not None:
        print(f"nothing to run on this machine: {reason}")
        return NOTHING_TO_RUN
    try:
        return _prove(options)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
