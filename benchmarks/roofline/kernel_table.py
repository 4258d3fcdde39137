"""Where a step's time goes, kernel by kernel: `python -m benchmarks.roofline.kernel_table`.

Torch's profiler looks at replays of the step that --fast trains, or at the batches that it
evaluates: a line a kernel on a GPU, those inside a CUDA graph too; a line an operator with its own
time on a CPU. Beside it stands what the step's count says of the same kernels, an ESTIMATE of what
good kernels of their forms take (kernels/tools/step_report.py), and measured over estimated. What
is most above its estimate comes first; what has none counts as above it with all its time.

Of the steps that kernels/tools/step_bounds.json has, the count is there. Others are counted first:

    --estimate        compile and count the step here, which takes two cores some minutes
    --estimate FILE   take the count of another machine, which needs no GPU:
                      python -m fastres.kernels.tools.codegen --step resnet20 --batch 512 --json

Without a count the largest time comes first. The totals under the table
must add up: kernels, less what overlapped, plus the time in which none ran, is the wall time of the
steps under the profiler. Exit codes: 0 they do, 1 they do not, 2 bad use, 5 nothing to run here.
"""

import argparse
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.harness import ablation
from benchmarks.harness.ablation import Unavailable
from benchmarks.harness.check_command import make_parser, run_check, step_options
from benchmarks.harness.rows import Row, make_provenance, summarize, write_results
from benchmarks.harness.timing import wall_sample
from benchmarks.roofline.profile_step import Event, Profile, category_of_kernel, record_steps
from fastres.engine import machine
from fastres.engine.runtime import Runtime
from fastres.errors import UsageError
from fastres.host import usable_cores

__all__ = [
    "KernelTable",
    "KernelTime",
    "estimates_by_kernel",
    "main",
    "make_table",
    "problems",
    "read_estimate",
    "recorded_estimates",
    "short_name",
]

SUITE = "kernels"
# Clocks of the host and of the device differ by less than this share of the time between.
_CLOCKS = 0.01
_ROUNDS = 5
_CUDNN = "cuDNN convolutions"


@dataclass
class KernelTime:
    """All launches of one kernel, or calls of one operator.

    name: as the profiler gives it. launches: of a step. step_us: of all launches of a step, one
    value a step. estimate_us: ESTIMATE of a step, None where nobody counted this kernel.
    """

    name: str
    launches: float
    step_us: list[float]
    estimate_us: float | None = None

    @property
    def us(self) -> float:
        """Mean microseconds of a step."""
        return sum(self.step_us) / len(self.step_us)

    @property
    def above_us(self) -> float:
        """Microseconds of a step above the estimate; all where there is none."""
        return self.us - (self.estimate_us or 0.0)


@dataclass
class KernelTable:
    """The kernels of a step, the largest gap first, and the totals of a step in microseconds.

    kernels_us: all kernels, as the profiler has them. overlap_us: that two of them shared.
    profiled_us: wall time under the profiler. missing: {name: microseconds} estimated for kernels
    that the profiler did not see. wall_us: wall time without the profiler, one value a round.
    """

    kernels: list[KernelTime]
    kernels_us: float
    overlap_us: float
    profiled_us: float
    missing: dict[str, float]
    wall_us: list[float] = field(default_factory=list)

    @property
    def gap_us(self) -> float:
        """Time of a step in which no kernel ran."""
        return self.profiled_us - (self.kernels_us - self.overlap_us)


def _step_sums(times: Sequence[float], num_steps: int) -> list[float]:
    """Times of one kernel in order, as sums of each step; of all alike where steps differ."""
    if len(times) % num_steps:
        return [sum(times) / num_steps] * num_steps
    a_step = len(times) // num_steps
    return [sum(times[start : start + a_step]) for start in range(0, len(times), a_step)]


def _overlap_us(events: Iterable[Event]) -> float:
    """Time that kernels, in order of their start, run beside ones that started before them."""
    shared, end = 0.0, 0.0
    for event in events:
        stop = event.start_us + event.time_us
        shared += max(0.0, min(end, stop) - event.start_us)
        end = max(end, stop)
    return shared


def make_table(
    profile: Profile, num_steps: int, estimates: Mapping[str, float], *, of_kernels: bool
) -> KernelTable:
    """Sum the events of a profile up by name and set estimates, by name, beside them.

    of_kernels: whether the events are those of a GPU, which alone may overlap.
    """
    times: defaultdict[str, list[float]] = defaultdict(list)
    for event in profile.events:
        times[event.name].append(event.time_us)
    kernels = [
        KernelTime(name, len(of_name) / num_steps, _step_sums(of_name, num_steps))
        for name, of_name in times.items()
    ]
    missing = dict(estimates)
    for kernel in kernels:
        kernel.estimate_us = missing.pop(kernel.name, None)
    return KernelTable(
        sorted(kernels, key=lambda kernel: -kernel.above_us),
        sum(event.time_us for event in profile.events) / num_steps,
        _overlap_us(profile.events) / num_steps if of_kernels else 0.0,
        profile.wall_us / num_steps,
        missing,
    )


def problems(table: KernelTable) -> list[str]:
    """Say why the numbers of a table cannot all be right; nothing where they add up."""
    found = [
        f"{kernel.launches:g} launches a step of {short_name(kernel.name)}: some were not recorded"
        for kernel in table.kernels
        if kernel.launches % 1
    ]
    rows = sum(kernel.us for kernel in table.kernels)
    if not abs(rows - table.kernels_us) <= 1e-6 * table.kernels_us:
        found.append(f"the rows add up to {rows:.1f} us, the kernels to {table.kernels_us:.1f} us")
    if not table.gap_us >= -_CLOCKS * table.profiled_us:
        busy = table.kernels_us - table.overlap_us
        found.append(f"kernels ran {busy:.1f} us of a step of {table.profiled_us:.1f} us")
    return found


def short_name(name: str, width: int = 52) -> str:
    """Write the name of a kernel for people: without arguments, namespaces and templates."""
    if name.startswith(("Memcpy", "Memset")):
        return name[:width]
    plain = re.sub(r"^void |\((?!anonymous).*\)$|\(anonymous namespace\)::", "", name)
    functor = re.findall(r"(\w+(?:[fF]unctor|_kernel)\w*)", plain)
    plain = re.sub(r"\b(?:\w+::)+", "", plain.partition("<")[0])
    inner = next((word for word in functor if word != plain), "") if "<" in name else ""
    plain = f"{plain}<{inner}>" if inner else plain
    return plain if len(plain) <= width else f"{plain[: width - 20]}...{plain[-17:]}"


def read_estimate(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON of the codegen command if it is the count of this step.

    Raises:
        UsageError: for a file that is none, or is of another step.
    """
    try:
        report = json.loads(path.read_text())
        given = {name: report[name] for name in (*wanted, "rows")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--estimate {path} is no JSON of codegen --step: {error}") from None
    other = [f"{name} {given[name]}" for name in wanted if given[name] != wanted[name]]
    if other:
        raise UsageError(f"--estimate {path} is of another step: {', '.join(other)}")
    return report


def estimates_by_kernel(report: Mapping[str, Any]) -> dict[str, float]:
    """Sum the estimates of a count up, in microseconds of a step, by the kernel's name on a GPU.

    Torch's own launches are counted by operator, whose kernels have other names; convolutions of
    cuDNN are one entry.
    """
    return _by_kernel((row["name"], row["launches"] * row["bound_us"]) for row in report["rows"])


def _by_kernel(sums: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Add up what was counted, by the names that kernels have on a GPU."""
    found: defaultdict[str, float] = defaultdict(float)
    for name, microseconds in sums:
        if name.startswith("torch convolution"):
            found[_CUDNN] += microseconds
        else:
            found[name if name.startswith("torch ") else f"_{name}_kernel"] += microseconds
    return dict(found)


def recorded_estimates(wanted: Mapping[str, Any]) -> dict[str, float]:
    """What the committed count has of a step, by kernel; nothing of steps that it does not have."""
    from fastres.kernels.tools.step_report import recorded_steps

    recorded = recorded_steps()
    steps = recorded["steps"]
    name = f"{wanted['step']} {wanted['phase']}"
    same = all(recorded[key] == wanted[key] for key in ("arch", "precision", "batch"))
    if not same or name not in steps:
        return {}
    return _by_kernel((row.split(" | ")[1], sums[-1]) for row, sums in steps[name].items())


def _count(options: argparse.Namespace, runtime: Runtime) -> dict[str, float]:
    """The estimate of each kernel; none on a CPU, whose operators nobody counts."""
    is_tf32 = runtime.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    precision = "tf32" if is_tf32 else runtime.precision
    wanted = {"step": options.model, "phase": options.phase, "batch": options.batch_size}
    wanted["precision"] = precision
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        wanted["arch"] = f"sm_{major}{minor}"
    report = read_estimate(Path(options.estimate), wanted) if options.estimate else None
    if not torch.cuda.is_available():
        if options.estimate is None:
            return {}
        print("no estimate: what a CPU runs is not counted", flush=True)
        return {}
    if report is not None:
        return estimates_by_kernel(report)
    if options.estimate is None:
        return recorded_estimates(wanted)
    from fastres.kernels.tools.networks import NETWORKS
    from fastres.kernels.tools.peak_rates import PEAK_RATES
    from fastres.kernels.tools.step_report import count_step

    if options.model not in NETWORKS or wanted["arch"] not in PEAK_RATES:
        print(f"no estimate: {options.model} on {wanted['arch']} is not counted", flush=True)
        return {}
    case = (options.model, precision, options.batch_size, options.phase)
    return estimates_by_kernel(count_step(wanted["arch"], *case, jobs=usable_cores()).record())


def _show(table: KernelTable, *, of_kernels: bool) -> None:
    """Print a line a kernel, then the totals."""
    kind = "kernel" if of_kernels else "operator"
    columns = f"{'launches':>8} {'us each':>9} {'us a step':>10} {'share':>7}"
    print(f"{kind:<54} {columns} {'ESTIMATE':>9} {'factor':>7} {'above':>9}", flush=True)
    for kernel in table.kernels:
        each, share = kernel.us / kernel.launches, 100 * kernel.us / table.profiled_us
        line = f"{short_name(kernel.name):<54} {kernel.launches:8g} {each:9.2f} {kernel.us:10.1f}"
        line += f" {share:6.1f}%"
        if kernel.estimate_us:
            factor = kernel.us / kernel.estimate_us
            line += f" {kernel.estimate_us:9.1f} {factor:7.2f} {kernel.above_us:9.1f}"
        print(line, flush=True)
    for name, us in table.missing.items():
        measured = _cudnn_us(table) if name == _CUDNN else 0.0
        said = f"{measured:.1f} us in lines of their own" if measured else "not seen"
        print(f"{name}: ESTIMATE {us:.1f} us, {said}", flush=True)
    print(
        f"a step: {median(table.wall_us):.1f} us; under the profiler {table.profiled_us:.1f} us = "
        f"{table.kernels_us:.1f} {kind}s - {table.overlap_us:.1f} overlapping + "
        f"{table.gap_us:.1f} between them",
        flush=True,
    )


def _cudnn_us(table: KernelTable) -> float:
    """Microseconds of a step in convolutions that are no Triton kernels."""
    return sum(
        kernel.us
        for kernel in table.kernels
        if category_of_kernel(kernel.name) == "convolutions"
        and not kernel.name.startswith(("_", "triton_"))
    )


def _rows(case: str, table: KernelTable) -> list[Row]:
    """Time, launches and estimate of every kernel by its full name, and the totals of a step."""
    rows = []
    for kernel in table.kernels:
        given = (SUITE, case, kernel.name)
        rows.append(summarize(*given, "time", "us", kernel.step_us))
        rows.append(summarize(*given, "launches", "per step", [kernel.launches]))
        if kernel.estimate_us is not None:
            rows.append(summarize(*given, "estimate", "us, estimated", [kernel.estimate_us]))
    totals = {"wall": table.wall_us}
    for name in ("profiled", "kernels", "overlap", "gap"):
        totals[name] = [getattr(table, f"{name}_us")]
    of_step = [summarize(SUITE, case, "step", name, "us", us) for name, us in totals.items()]
    return rows + of_step


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("benchmarks.roofline.kernel_table", __doc__)
    add = parser.add_argument
    add("--phase", choices=("training", "inference"), default="training")
    add("--steps", type=int, default=20, help="under the profiler; default 20")
    add(
        "--estimate",
        nargs="?",
        const="",
        metavar="FILE",
        help="see above; default: what is committed",
    )
    add("--out", type=Path, help="folder for rows; default: no rows")
    options = parser.parse_args(argv)
    if options.steps < 1:
        raise UsageError(f"--steps must be at least 1, got {options.steps}")
    return options


def _fast_step(
    options: argparse.Namespace, device: torch.device
) -> tuple[Callable[[], object], Runtime]:
    """The step that --fast trains on a fixed batch, or the batch that it evaluates."""
    case = ("fast", options.model, options.batch_size, device)
    if options.phase == "inference":
        return ablation.build_inference(*case, **step_options(options))
    built = ablation.build(*case, **step_options(options))
    return built.train, built.runtime


def _run(argv: Sequence[str]) -> int:
    options = _parse(argv)
    # The profiler of torch talks on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    machine.keep_freed_memory()
    device = ablation.here()
    of_kernels = device.type == "cuda"
    step, runtime = _fast_step(options, device)
    estimates = _count(options, runtime)
    sample = wall_sample(step, device)
    wall_us = [1e6 * sample() for _ in range(_ROUNDS)]
    profile = record_steps(step, device, options.steps)
    if not profile.events:
        raise Unavailable("torch's profiler sees no kernel; CUPTI is missing or forbidden")
    table = make_table(profile, options.steps, estimates, of_kernels=of_kernels)
    table.wall_us = wall_us
    case = f"{options.model} batch {options.batch_size}, {runtime.precision}"
    case += "" if options.phase == "training" else ", inference"
    route = next(setting for setting in runtime.settings if setting.name == "route")
    graph = ", one CUDA graph" if runtime.graph and options.phase == "training" else ""
    print(f"{case}: {route.value}{graph}, {options.steps} steps", flush=True)
    _show(table, of_kernels=of_kernels)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        command = ["python", "-m", "benchmarks.roofline.kernel_table", *argv]
        provenance = make_provenance(runtime.precision, command)
        print(write_results("kernels", _rows(case, table), provenance, options.out), flush=True)
    found = problems(table)
    for problem in found:
        print(f"WRONG: {problem}", flush=True)
    return 1 if found else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_check(lambda: _run(arguments))


if __name__ == "__main__":
    sys.exit(main())
