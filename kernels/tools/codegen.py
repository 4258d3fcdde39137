"""Print the codegen report: `python -m fastres.kernels.tools.codegen --arch sm_80 sm_90`.

Compiles every kernel in every configuration that the launch table or the heuristics give for the
layers of the chosen networks, in training and in inference, by pointer loads and by TMA, for GPUs
that this machine need not have. See codegen_report.py for what an entry says.

    python -m fastres.kernels.tools.codegen --step resnet20 --batch 512 --arch sm_90 [--json]

counts instead what one training step, or one inference batch, launches, torch's own launches among
them, and what it would take at least on one named card; see step_report.py.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres.host import usable_cores
from fastres.kernels.tools.command_line import (
    ARCHITECTURES,
    DTYPES,
    NETWORKS,
    PHASES,
    Parser,
    bad_batch,
    why_not_compile,
)
from fastres.output import reader_may_leave
from fastres.strict_json import dumps

if TYPE_CHECKING:
    from rich.table import Table

    from fastres.kernels.tools.codegen_report import CodegenEntry
    from fastres.kernels.tools.step_report import StepReport

__all__ = ["entry_record", "main"]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m fastres.kernels.tools.codegen",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add_names(option: str, names: Sequence[str], default: Sequence[str], what: str) -> None:
        text = f"{what}: {', '.join(names)}; default {' '.join(default)}"
        parser.add_argument(option, nargs="+", choices=names, metavar="NAME", help=text)

    add_names("--arch", ARCHITECTURES, ["sm_90"], "GPU architectures")
    add_names("--model", NETWORKS, NETWORKS, "networks")
    add_names("--dtype", DTYPES, ["bf16"], "precisions (tf32: fp32 as torch multiplies it)")
    add_names("--phase", PHASES, PHASES, "what the network does; with --step training")
    add = parser.add_argument
    step = "count one step of this network, on one architecture, in one precision and phase: "
    add("--step", choices=NETWORKS, metavar="NAME", help=step + ", ".join(NETWORKS))
    add("--batch", type=int, default=512, help="images; default 512")
    add("--jobs", type=int, help="processes that compile; default: the usable cores")
    json_help = "also write all entries as JSON; with --step print one JSON object, without a FILE"
    add("--json", nargs="?", const=True, metavar="FILE", help=json_help)
    add("--csv", type=Path, metavar="FILE", help="also write all entries as CSV")
    return parser


def _settle(options: argparse.Namespace) -> str | None:
    """Fill in the defaults of what was not given; say what does not go together, or None."""
    if options.step is None:
        if options.json is True:
            return "--json needs a FILE, but with --step"
        options.json = options.json and Path(options.json)
        options.model = options.model or list(NETWORKS)
    else:
        for name in ("arch", "dtype", "phase"):
            given = getattr(options, name) or []
            if len(given) > 1:
                return f"--step counts one --{name} at a time, got {' '.join(given)}"
        if options.model:
            return "--step names the network: leave --model out"
        if options.csv or options.json not in (None, True):
            return "--step writes no file: give --json without one, and no --csv"
    options.arch = options.arch or ["sm_90"]
    options.dtype = options.dtype or ["bf16"]
    options.phase = options.phase or (list(PHASES) if options.step is None else ["training"])
    return None


def _obstacle(options: argparse.Namespace) -> str | None:
    """Why nothing can be compiled here, or None."""
    if options.jobs is not None and options.jobs < 1:
        return f"--jobs must be at least 1, got {options.jobs}"
    return bad_batch("--batch", [options.batch]) or why_not_compile()


def entry_record(entry: "CodegenEntry") -> dict[str, Any]:
    """An entry as flat, plain values: a row of the CSV file."""
    plan, code = entry.plan, entry.code
    names = ("arch", "model", "phase", "layer", "kernel", "variant", "precision")
    return {
        **{name: getattr(plan, name) for name in names},
        "configured_by": plan.configured_by,
        "tile": plan.tile,
        "launches": plan.launches,
        "programs": plan.programs,
        "registers": code.registers,
        "spills": code.spills,
        "shared_bytes": code.shared_bytes,
        "tensor_core_instructions": code.tensor_core_instructions,
        "tensor_cores": entry.tensor_cores,
        "tma_loads": code.tma_loads,
        "wide_loads": code.wide_loads,
        "narrow_loads": code.narrow_loads,
        "wide_stores": code.wide_stores,
        "narrow_stores": code.narrow_stores,
        "pixel_load_bits": entry.pixel_load_bits,
        "load_bits": ", ".join(f"{name} {bits}" for name, bits in code.load_bits.items()),
        "programs_per_multiprocessor": entry.programs_per_multiprocessor,
        "warp_instructions": round(entry.warp_instructions),
        "last_program_instructions": code.program.last_instructions,
        "count": "; ".join(entry.count_notes),
        "declared_bytes": plan.bytes,
        "declared_flops": plan.flops,
        "issue_us_estimate": round(entry.issue_us, 3),
        "bytes_us_estimate": round(entry.bytes_us, 3),
        "arithmetic_us_estimate": round(entry.arithmetic_us, 3),
        "roofline_us_estimate": round(entry.roofline_us, 3),
        "bound": entry.bound,
        "violations": "; ".join(entry.violations),
    }


def _compile(options: argparse.Namespace) -> "list[CodegenEntry]":
    """Plan and compile with a bar on stderr, silent when that is not a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    from fastres.kernels.tools.codegen_report import compile_entries, count_builds, plan_entries

    plans = [
        plan
        for arch in options.arch
        for precision in options.dtype
        for model in options.model
        for plan in plan_entries(arch, model, precision, options.batch, options.phase)
    ]
    jobs = options.jobs or usable_cores()
    console = Console(stderr=True)
    hidden = not sys.stderr.isatty()
    with Progress(console=console, disable=hidden, transient=True) as progress:
        task = progress.add_task("compiling kernels", total=count_builds(plans))
        return compile_entries(plans, jobs, lambda: progress.advance(task))


def _print_entries(entries: "Sequence[CodegenEntry]", arch: str) -> None:
    """Print the entries of one architecture as a table, the peak rates below it."""
    from rich.table import Table

    from fastres.kernels.tools.peak_rates import PEAK_RATES

    rates = PEAK_RATES[arch]
    table = Table(title=f"{arch}: {len(entries)} different launches", show_lines=False)
    for name in ("kernel", "variant", "network, layer", "tile"):
        table.add_column(name, overflow="fold")
    numbers = ["times", "regs", "spills", "shared", "CTAs/SM", "tensor cores"]
    numbers += ["narrowest loads, bits", "MB", "MFLOP"]
    times = (f"{rates.gpu} issue, us (ESTIMATE)", f"{rates.gpu} roofline, us (ESTIMATE)")
    for name in (*numbers, *times):
        table.add_column(name, justify="right", overflow="fold")
    for entry in entries:
        plan, code = entry.plan, entry.code
        table.add_row(
            plan.kernel.removesuffix("_kernel"),
            plan.variant,
            f"{plan.model} {plan.layer} {plan.precision}",
            plan.tile,
            str(plan.launches),
            str(code.registers),
            str(code.spills),
            f"{code.shared_bytes / 1024:.1f} KiB",
            str(entry.programs_per_multiprocessor),
            entry.tensor_cores,
            " ".join(f"{n.removesuffix('_ptr')}:{bits}" for n, bits in code.load_bits.items()),
            f"{plan.bytes / 1e6:.3g}",
            f"{plan.flops / 1e6:.3g}",
            f"{entry.issue_us:.2f}",
            f"{entry.roofline_us:.2f} {entry.bound}",
            style="red" if entry.violations else None,
        )
    _print_table(table)
    _print_rates(arch)


def _print_table(table: "Table") -> None:
    from rich.console import Console

    console = Console()
    # A file or a pipe has no width of its own; a table squeezed into 80 columns is unreadable.
    (console if console.is_terminal else Console(width=220)).print(table)


def _print_rates(arch: str) -> None:
    """Say what the times of a table are, and for which card."""
    from fastres.kernels.tools.peak_rates import PEAK_RATES

    rates = PEAK_RATES[arch]
    peaks = ", ".join(f"{dtype} {flops / 1e12:g}" for dtype, flops in rates.peak.items())
    print(f"Issue time and roofline are ESTIMATES of lower bounds for {rates.gpu}: "
          f"{rates.multiprocessors} multiprocessors at {rates.clock / 1e9:g} GHz, "
          f"{rates.bandwidth / 1e12:g} TB/s; TFLOP/s: {peaks} ({rates.source}). "
          "No GPU time was measured.")  # fmt: skip


def _count_step(options: argparse.Namespace) -> "StepReport":
    """Compile and count a step with a bar on stderr, silent when that is not a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    from fastres.kernels.tools.step_report import count_step

    hidden = not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), disable=hidden, transient=True) as progress:
        task = progress.add_task("compiling kernels", total=None)
        return count_step(
            options.arch[0],
            options.step,
            options.dtype[0],
            options.batch,
            options.phase[0],
            jobs=options.jobs or usable_cores(),
            start=lambda total: progress.update(task, total=total),
            advance=lambda: progress.advance(task),
        )


def _print_step(report: "StepReport") -> None:
    """Print the launches of a step as a table, those that add most first, and the sums below."""
    from rich.table import Table

    title = f"{report.network} {report.phase}, batch {report.batch}, {report.precision}"
    table = Table(title=f"{title}, {report.arch}: ESTIMATES of lower bounds, us")
    for name in ("kernel", "form", "layer", "tile"):
        table.add_column(name, overflow="fold")
    numbers = ("times", "regs", "CTAs/SM", "issue", "bytes", "arithmetic", "bound", "all of them")
    for name in numbers:
        table.add_column(name, justify="right")
    table.add_column("count of instructions", overflow="fold")
    for row in report.rows:
        entry = row.entry
        table.add_row(
            row.name,
            entry.plan.variant if entry else "",
            row.layer,
            entry.plan.tile if entry else "",
            str(row.launches),
            str(entry.code.registers) if entry else "",
            str(entry.programs_per_multiprocessor) if entry else "",
            f"{row.issue_us:.2f}" if entry else "",
            f"{row.bytes_us:.2f}",
            f"{row.arithmetic_us:.2f}",
            f"{row.attainable_us:.2f}",
            f"{row.total_us:.1f}",
            "; ".join(entry.count_notes) if entry else "",
        )
    _print_table(table)
    print(f"{report.num_launches} launches. Sums, us: issue {report.issue_us:.0f}, "
          f"bytes {report.bytes_us:.0f}, arithmetic {report.arithmetic_us:.0f}; "
          f"max(issue / 0.7, bytes, arithmetic) {report.attainable_us:.0f}")  # fmt: skip
    _print_rates(report.arch)


def _write(entries: "Sequence[CodegenEntry]", options: argparse.Namespace) -> None:
    records = [entry_record(entry) for entry in entries]
    if options.json:
        options.json.write_text(dumps(records, indent=1) + "\n")
    if options.csv:
        with options.csv.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(records[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(records)


@reader_may_leave()
def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print, write; 1 where an entry has a violation, 2 where nothing can be compiled."""
    options = _parser().parse_args(argv)
    reason = _settle(options) or _obstacle(options)
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    if options.step is not None:
        report = _count_step(options)
        print(dumps(report.record(), indent=1)) if options.json else _print_step(report)
        return 0
    entries = _compile(options)
    for arch in options.arch:
        _print_entries([entry for entry in entries if entry.plan.arch == arch], arch)
    try:
        _write(entries, options)
    except OSError as error:
        print(f"error: cannot write the report: {error}", file=sys.stderr)
        return 2
    bad = [entry for entry in entries if entry.violations]
    for entry in bad:
        plan = entry.plan
        where = f"{plan.arch} {plan.precision} {plan.model} {plan.layer} {plan.kernel}"
        print(f"violation: {where} ({plan.variant}) {plan.tile}: {'; '.join(entry.violations)}")
    print(f"{len(entries)} entries, {len(bad)} with a violation")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
