"""The codegen report of the kernels as rows, and as the tables of docs/codegen.md.

    python -m fastres.kernels.tools.codegen --arch sm_80 sm_90 sm_100 --json REPORT
    python -m benchmarks.report.codegen collect REPORT     rows of benchmarks/results
    python -m benchmarks.report.codegen page [--check]    the page, from the newest rows

A row holds one number of one launch; its provider is the GPU architecture. Nothing here was
measured on a GPU: registers and instructions are the compiler's, bytes and operations are declared
by the launch, and issue time and roofline are ESTIMATES of lower bounds. Rows of older reports have
no issue time; the page shows it where it is known.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.rows import (
    Result,
    Row,
    make_provenance,
    read_results,
    write_results,
)
from fastres.kernels.tools.command_line import ARCHITECTURES
from fastres.output import reader_may_leave

__all__ = ["fill", "main", "rows_of"]

# As the recorded rows name it.
SUITE = "kernel_card"
PRECISION = "bf16"  # of the page
PAGE = Path(__file__).resolve().parents[2] / "docs" / "codegen.md"
COMMAND = ("python", "-m", "fastres.kernels.tools.codegen", "--arch", *ARCHITECTURES)

# What depends on the architecture, and what a launch declares whatever it runs on.
_UNITS = {
    "registers": "per thread",
    "spills": "instructions",
    "shared_bytes": "B",
    "tensor_core_instructions": "instructions",
    "pixel_load_bits": "bits",
    "roofline_us_estimate": "us, estimated",
    "programs_per_multiprocessor": "programs",
    "warp_instructions": "instructions",
    "issue_us_estimate": "us, estimated",
    "launches": "per step",
    "declared_bytes": "B",
    "declared_flops": "FLOP",
}
_DECLARED = ("launches", "declared_bytes", "declared_flops")
_CASE = ("precision", "model", "layer", "kernel", "variant", "tile", "configured_by")
_BLOCK = re.compile(r"(<!-- codegen: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


class Launch(NamedTuple):
    """One launch of the report: the labels of its case, and its numbers by metric."""

    labels: dict[str, str]
    numbers: dict[str, float]


def rows_of(entries: Iterable[dict[str, Any]]) -> list[Row]:
    """Turn the JSON of the codegen command into rows; what is declared is kept once."""
    rows: dict[tuple[str, str, str], Row] = {}
    seen: set[str] = set()
    for entry in entries:
        case = " | ".join(str(entry[name]) for name in _CASE)
        skipped = _DECLARED if case in seen else ()
        for metric, unit in _UNITS.items():
            value = entry.get(metric)
            if value is not None and metric not in skipped:
                key = (case, entry["arch"], metric)
                rows[key] = Row(SUITE, case, entry["arch"], metric, unit, 1, *[float(value)] * 3)
        seen.add(case)
    return list(rows.values())


def _launches(results: Sequence[Result]) -> dict[str, list[Launch]]:
    """The newest report in bf16: the launches of every architecture, in the order of the rows.

    No older one beside it, whose launches the networks may no longer have.
    """
    reports = [(row, by) for row, by in results if row.suite == SUITE and by["dtype"] == PRECISION]
    date = max((by["date"] for _, by in reports), default="")
    rows = [row for row, by in reports if by["date"] == date]
    declared = {(row.case, row.metric): row.median for row in rows if row.metric in _DECLARED}
    found: dict[str, dict[str, Launch]] = {}
    for row in rows:
        labels = dict(zip(_CASE, row.case.split(" | "), strict=True))
        shared = {name: declared[row.case, name] for name in _DECLARED}
        launches = found.setdefault(row.provider, {})
        launches.setdefault(row.case, Launch(labels, shared)).numbers[row.metric] = row.median
    return {arch: list(launches.values()) for arch, launches in found.items()}


def _markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = "|" + " --- |" * len(header)
    return "\n".join([f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(x)} |" for x in lines)])


def _bits(values: Sequence[float]) -> str:
    return f"{min(values):.0f}" if values else ""


def worst_table(launches: dict[str, list[Launch]]) -> str:
    """One line a kernel and architecture: the worst of all its launches."""
    lines = []
    kernels = sorted({launch.labels["kernel"] for every in launches.values() for launch in every})
    for kernel in kernels:
        for arch in ARCHITECTURES:
            of_kernel = [x for x in launches.get(arch, []) if x.labels["kernel"] == kernel]
            if not of_kernel:
                continue
            numbers = {name: [x.numbers[name] for x in of_kernel] for name in list(_UNITS)[:4]}
            # The images that a stem reads have 3 channels, so no wide load fits them.
            deep = [x for x in of_kernel if x.labels["layer"] != "stem"]
            bits = [x.numbers["pixel_load_bits"] for x in deep if "pixel_load_bits" in x.numbers]
            is_conv = kernel.startswith("conv")
            lines.append(
                [
                    kernel.removesuffix("_kernel"),
                    arch,
                    str(len(of_kernel)),
                    f"{max(numbers['registers']):.0f}",
                    f"{max(numbers['spills']):.0f}",
                    f"{max(numbers['shared_bytes']) / 1024:.1f}",
                    f"{min(numbers['tensor_core_instructions']):.0f}" if is_conv else "",
                    _bits(bits),
                ]
            )
    header = ["kernel", "GPU", "launches", "registers", "spills", "shared memory, KiB"]
    return _markdown([*header, "tensor-core instructions, at least", "pixel loads, bits"], lines)


def launch_table(launches: Iterable[Launch]) -> str:
    """One line a launch of the heuristics: form, layer, tile and all numbers."""
    launches = [x for x in launches if x.labels["configured_by"] == "heuristics"]
    has_issue = any("issue_us_estimate" in launch.numbers for launch in launches)
    lines = [
        [
            labels["kernel"].removesuffix("_kernel"),
            labels["variant"],
            f"{labels['model']} {labels['layer']}",
            labels["tile"],
            f"{numbers['launches']:.0f}",
            f"{numbers['registers']:.0f}",
            f"{numbers['shared_bytes'] / 1024:.1f}",
            f"{numbers['tensor_core_instructions']:.0f}",
            f"{numbers['pixel_load_bits']:.0f}" if "pixel_load_bits" in numbers else "",
            f"{numbers['declared_bytes'] / 1e6:.3g}",
            f"{numbers['declared_flops'] / 1e6:.3g}",
            f"{numbers['roofline_us_estimate']:.3g}",
            *([_issue_cell(numbers)] if has_issue else []),
        ]
        for labels, numbers in launches
    ]
    header = ["kernel", "form", "layer", "tile", "times", "regs", "KiB", "tensor cores"]
    header += ["pixel loads, bits", "MB", "MFLOP", "roofline, us (ESTIMATE)"]
    header += ["issue, us (ESTIMATE); CTAs an SM"] if has_issue else []
    return _markdown(header, lines)


def _issue_cell(numbers: dict[str, float]) -> str:
    """Least time of the instructions, and the programs that share a multiprocessor."""
    if "issue_us_estimate" not in numbers:
        return ""
    return f"{numbers['issue_us_estimate']:.3g}; {numbers['programs_per_multiprocessor']:.0f}"


def fill(page: str, results: Sequence[Result]) -> str:
    """Return `page` with every block `<!-- codegen: NAME -->` written anew.

    NAME is `worst`, or an architecture whose launches are listed.
    """
    launches = _launches(results)

    def block(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        made = worst_table(launches) if name == "worst" else launch_table(launches.get(name, []))
        return f"{opening}\n{made}\n\n{closing}"

    return _BLOCK.sub(block, page)


@reader_may_leave()
def main(argv: Sequence[str] | None = None) -> int:
    """Write rows, or write or check the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report.codegen",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    collect = kinds.add_parser("collect", help="write rows")
    collect.add_argument("report", type=Path, help="JSON of the codegen command")
    page = kinds.add_parser("page", help="write the page from the rows")
    page.add_argument("--check", action="store_true", help="change nothing, fail on a difference")
    options = parser.parse_args(argv)
    if options.kind == "collect":
        try:
            entries = json.loads(options.report.read_text())
            if not isinstance(entries, list) or not entries:
                raise ValueError("no report of the codegen command")
            dtype = "-".join(sorted({entry["precision"] for entry in entries}))
            provenance = make_provenance(dtype, [*COMMAND, "--json", "REPORT"])
            print(write_results(SUITE, rows_of(entries), provenance))
        except (OSError, ValueError, KeyError) as error:
            print(f"error: {options.report}: {error}", file=sys.stderr)
            return 2
        return 0
    text = PAGE.read_text()
    filled = fill(text, read_results())
    if filled != text:
        print(f"{PAGE.name}: {'differs from the rows' if options.check else 'written'}")
        if not options.check:
            PAGE.write_text(filled)
    return 1 if options.check and filled != text else 0


if __name__ == "__main__":
    sys.exit(main())
