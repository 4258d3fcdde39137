"""Measure this GPU and write its launch table: `python -m fastres.kernels.tools.tune`.

Round 1 times, for every convolution of the chosen networks, the forms of its kernels and, as equal
work, the `triton` and `cudnn` routes: few compilations. Round 2 turns the knobs of the fastest
form: tiles, patches, load order, warps, stages, programs, parts of a wgrad. Layers that move most
bytes come first, every candidate is proved right before it is timed, and the table is written after
each layer, so a run that is cut off loses little. Last, whole steps of the networks are timed with
and without programmatic dependent launch, where the GPU has it (Hopper and later): one switch for
all its kernels. The rounds leave a seventh of the budget for that. Entries of other GPUs and of
other layers stay; a table that is not there begins as the one in use. See tuner.py and tune_pdl.py.

    python -m fastres.kernels.tools.tune --estimate sm_90

measures nothing and needs no GPU: forms and routes are compared by what is counted in their
machine code, see estimate.py, and entries labelled ESTIMATE are written, which GPUs of this
architecture use for what was not measured. Ends with 1 when the GPU stops answering, with 2 when
nothing can be measured.
"""

import argparse
import functools
import importlib.util
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres.host import provenance, usable_cores
from fastres.kernels.tools.command_line import (
    ARCHITECTURES,
    DTYPES,
    NETWORKS,
    Parser,
    bad_batch,
    bad_budget,
    bad_file,
    why_not_compile,
)
from fastres.output import reader_may_leave

if TYPE_CHECKING:
    import torch

    from fastres.kernels.conv_shape import ConvOp
    from fastres.kernels.gpu.launch_config import ConvConfig
    from fastres.kernels.tools.estimate import Estimate
    from fastres.kernels.tools.tune_pdl import PdlChoice
    from fastres.kernels.tools.tune_workloads import ConvWorkload
    from fastres.kernels.tools.tuner import Choice, Timer, Tuner

__all__ = ["main"]

BUDGET = 180.0

# Of the budget, what the rounds leave for programmatic dependent launch.
PDL_SHARE = 1 / 7


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m fastres.kernels.tools.tune", description=__doc__)
    add = parser.add_argument
    text = f"networks: {', '.join(NETWORKS)}; default all"
    add("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME", help=text)
    add("--batches", nargs="+", type=int, default=[512], metavar="N", help="images; default 512")
    text = f"precisions: {', '.join(DTYPES)} (tf32: fp32 as torch multiplies it); default bf16"
    add("--dtypes", nargs="+", choices=DTYPES, default=["bf16"], metavar="NAME", help=text)
    text = f"stop in time and keep what is done; default {BUDGET:g}, inf: until all is tried"
    add("--budget", type=float, default=BUDGET, metavar="SECONDS", help=text)
    add("--out", type=Path, metavar="FILE", help="table to write; default: the package's")
    text = "configurations that round 2 tries of a product; default 24"
    add("--candidates", type=int, default=24, metavar="N", help=text)
    text = (
        "cold: emptied before every call; hot: as the call before left it; both (default): the "
        "mean of the two, because in a training step some operands are there and some are not"
    )
    add("--l2", choices=("cold", "hot", "both"), default="both", help=text)
    text = f"count instead of measure, without a GPU, for one of {', '.join(ARCHITECTURES)}"
    add("--estimate", choices=ARCHITECTURES, metavar="ARCH", help=text)
    add("--jobs", type=int, metavar="N", help="with --estimate: processes that compile")
    add("--dry-run", action="store_true", help="list the candidates and measure nothing")
    return parser


def _obstacle(options: argparse.Namespace) -> str | None:
    """Why nothing can be measured here, or None."""
    wrong = bad_batch("--batches", options.batches) or bad_budget(options.budget)
    if wrong is not None:
        return wrong
    if options.candidates < 1:
        return f"--candidates must be at least 1, got {options.candidates}"
    if options.jobs is not None and options.jobs < 1:
        return f"--jobs must be at least 1, got {options.jobs}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (Linux only)"
    wrong = bad_file("--out", options.out)
    if wrong is not None or options.estimate:
        return wrong or why_not_compile()
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        return "no NVIDIA GPU is here to be measured; --dry-run lists what would be"
    return None


def _workloads(options: argparse.Namespace) -> "list[ConvWorkload]":
    from fastres.kernels.tools.networks import PRECISIONS
    from fastres.kernels.tools.tune_workloads import conv_workloads

    precisions = [PRECISIONS[name] for name in options.dtypes]
    return conv_workloads(options.models, options.batches, precisions)


def _print_candidates(workloads: "Sequence[ConvWorkload]", limit: int) -> None:
    """List what would be timed, most valuable layer first."""
    from fastres.kernels.tools.candidates import (
        GpuLimits,
        neighbourhood,
        product_of,
        start_configs,
    )

    whole, gpu = sum(workload.bytes for workload in workloads), GpuLimits()
    num_starts = 0
    for workload in workloads:
        ops: list[ConvOp] = ["fprop", "dgrad", "wgrad"]
        if not any(variant.need_dx for variant in workload.variants):
            ops.remove("dgrad")
        for op in ops:
            product = product_of(op, workload)
            starts = start_configs(product, gpu)
            num_starts += len(starts)
            share = workload.bytes / whole
            print(f"{product.key}: {100 * share:.1f} % of the bytes")
            for start in starts:
                tiles = neighbourhood(product, start, gpu)
                near = min(limit, len(tiles))
                print(f"  {start.form}: {start.label}; nearest {near} of {len(tiles)} neighbours:")
                for config in tiles[:limit]:
                    print(f"    {config.label}")
    print(
        f"{num_starts} starts of {len(workloads)} layers, and cudnn for each product; then up to "
        f"{limit} neighbours of the fastest, nearest to the fastest so far first; then whole steps "
        "with and without programmatic dependent launch"
    )


def _provenance(options: argparse.Namespace, device: "torch.device") -> dict[str, Any]:
    """How the entries were measured: kept in the table beside them."""
    import torch

    command = ["python", "-m", "fastres.kernels.tools.tune", *sys.argv[1:]]
    return {
        **provenance(command),
        "cudnn": torch.backends.cudnn.version(),
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count,
        "l2": options.l2,
    }


def _report(choices: "Sequence[Choice]") -> None:
    """Print one line a product: its time against that without a measurement, and by route."""
    for choice in choices:
        config = choice.config
        routes = ", ".join(f"{route} {1e6 * s:.1f} us" for route, s in choice.by_route.items())
        print(
            f"{choice.key}: {config.route} {config.label}, {1e6 * choice.seconds:.1f} us, "
            f"unmeasured {1e6 * choice.baseline_seconds:.1f} us, {choice.speedup:.2f} times; "
            f"at best {routes}",
            flush=True,
        )


def _report_pdl(choice: "PdlChoice") -> None:
    """Print one line a step: its time both ways; then what is chosen."""
    for name, (with_it, without) in choice.seconds.items():
        print(
            f"{name}: {1e6 * with_it:.1f} us with programmatic dependent launch, "
            f"{1e6 * without:.1f} us without, {without / with_it:.3f} times"
        )
    print(f"programmatic dependent launch: {'on' if choice.enabled else 'off'}", flush=True)


def _choose_pdl(options: argparse.Namespace, tuner: "Tuner", out: Path) -> "PdlChoice | None":
    """Time whole steps as the table now has them launched."""
    from fastres.kernels.gpu.launch_table import gpu_of
    from fastres.kernels.gpu.table_file import read_table
    from fastres.kernels.tools.tune_pdl import StepName, choose_pdl

    names = [
        StepName(network, batch, precision)
        for network in options.models
        for batch in options.batches
        for precision in options.dtypes
    ]
    gpu = gpu_of(tuner.device)
    assert gpu is not None
    entries: dict[str, ConvConfig] = {}
    # Those that are asked first take the place of others.
    for section in reversed(read_table(out).sources(*gpu).values()):
        entries |= section.entries
    return choose_pdl(tuner, names, entries, _step_timer(tuner.device))


def _step_timer(device: "torch.device") -> "Timer":
    """A step fills the L2 cache many times over: what it finds there at first does not matter."""
    from fastres.kernels.tools.graph_timer import GraphTimer

    return GraphTimer(device, l2="cold")


def _tuner(options: argparse.Namespace, device: "torch.device") -> "Tuner":
    import torch

    from fastres.kernels.gpu.launch_table import gpu_of
    from fastres.kernels.tools.candidates import gpu_limits, unmeasured_start
    from fastres.kernels.tools.graph_timer import GraphTimer
    from fastres.kernels.tools.tuner import Tuner

    gpu = gpu_of(device)
    assert gpu is not None
    return Tuner(
        device,
        GraphTimer(device, l2=options.l2),
        gpu=gpu_limits(device),
        limit=options.candidates,
        unmeasured=functools.partial(unmeasured_start, gpu=gpu),
        threads=usable_cores(),
        synchronize=lambda: torch.cuda.synchronize(device),
    )


def _measure(options: argparse.Namespace) -> int:
    """Tune, writing after each layer; 1 where the GPU stops answering."""
    import torch

    from fastres.kernels.gpu.launch_table import gpu_of
    from fastres.kernels.tools.table_writer import merge_table
    from fastres.kernels.tools.tuner import GpuLostError

    # As training sets it: cuDNN times its algorithms too.
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda", torch.cuda.current_device())
    gpu, out = gpu_of(device), _table_to_write(options)
    assert gpu is not None
    started = time.monotonic()
    tuner, workloads = _tuner(options, device), _workloads(options)
    share = PDL_SHARE if tuner.gpu.has_pdl else 0
    tuner.deadline = started + options.budget * (1 - share)
    measured = _provenance(options, device)
    print(
        f"{gpu.name}: {len(workloads)} layers, {options.l2} L2, {options.budget:g} s, table {out}"
    )
    num_layers, written = Counter[str](), set[str]()
    lost: GpuLostError | None = None
    try:
        for tuned in tuner.run(workloads):
            if tuned.choices:
                entries = {choice.key: choice.config for choice in tuned.choices}
                merge_table(out, gpu, entries, measured)
                written |= set(entries)
            _report(tuned.choices)
            num_layers[tuned.round] += 1
        tuner.deadline = started + options.budget
        pdl = _choose_pdl(options, tuner, out)
        if pdl is not None:
            merge_table(out, gpu, {}, measured, pdl=pdl.enabled)
            _report_pdl(pdl)
    except GpuLostError as error:
        lost = error
    print(
        f"{len(written)} entries written to {out} in {time.monotonic() - started:.0f} s: forms of "
        f"{num_layers['forms']}, tiles of {num_layers['tiles']} of {len(workloads)} layers"
    )
    if lost is not None:
        print(f"error: {lost}", file=sys.stderr)
        return 1
    return 0


def _table_to_write(options: argparse.Namespace) -> Path:
    """The table that is asked for, begun as the one in use: what it knows of others stays known."""
    from fastres.kernels.gpu.launch_table import TABLE_PATH

    out: Path = options.out or TABLE_PATH
    if not out.exists() and TABLE_PATH.exists():
        shutil.copyfile(TABLE_PATH, out)
    return out


def _estimate(options: argparse.Namespace) -> int:
    """Count, print how it came out, write."""
    from fastres.kernels.tools.codegen_report import architecture
    from fastres.kernels.tools.estimate import estimate
    from fastres.kernels.tools.table_writer import merge_table

    out = _table_to_write(options)
    entries: dict[str, ConvConfig] = {}
    print(
        "ESTIMATES in us: a layer's pass, of all such layers in a step, a product on each route\n"
    )
    print("| product | triton | cudnn | chosen |\n| --- | --- | --- | --- |")
    parts = []
    for precision in options.dtypes:
        for found in estimate(
            options.estimate,
            options.models,
            options.batches,
            precision,
            jobs=options.jobs or usable_cores(),
            say=lambda line: print(line, file=sys.stderr),
        ):
            entries |= found.entries
            _print_routes(found)
            parts += [found.parts] if found.parts else []
    print()
    for part in parts:
        print(
            f"{part.key}: {part.after} parts for {part.before}, {part.programs} programs a "
            f"multiprocessor: {part.before_us:.1f} -> {part.after_us:.1f} us, "
            f"{part.added_bytes / 1e6:+.2f} MB of partial sums, "
            f"{100 * part.added_instructions:+.1f} % instructions"
        )
    command = ["python", "-m", "fastres.kernels.tools.tune", *sys.argv[1:]]
    about = {"kind": "ESTIMATE: counted in machine code, nothing timed", **provenance(command)}
    merge_table(out, architecture(options.estimate), entries, about, basis="ESTIMATE")
    print(f"{len(entries)} entries written to {out}")
    return 0


def _print_routes(found: "Estimate") -> None:
    """A line a product of a table in Markdown."""
    for choice in found.choices:
        times = (choice.by_route.get(route) for route in ("triton", "cudnn"))
        cells = ["" if s is None else f"{1e6 * s:.2f}" for s in times]
        config = choice.config
        form = config.form + (", stored" if config.stored else "")
        chosen = form if config.route == "triton" else "cudnn"
        print(f"| {choice.key} | {cells[0]} | {cells[1]} | {chosen} |", flush=True)


@reader_may_leave()
def main(argv: Sequence[str] | None = None) -> int:
    """Tune or list; 1 where the GPU stops answering, 2 where nothing can be measured."""
    options = _parser().parse_args(argv)
    reason = _obstacle(options)
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    try:
        if options.dry_run:
            _print_candidates(_workloads(options), options.candidates)
            return 0
        return _estimate(options) if options.estimate else _measure(options)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was written stays", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
