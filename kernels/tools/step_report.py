"""A training step, or an inference batch, of one network as a sum of its launches, on one card.

    report = count_step("sm_90", "resnet20", "bf16", 512, "training", jobs=2)
    report.attainable_us, report.num_launches, report.rows[0].name

All times are ESTIMATES, see codegen_report.py, for the card of peak_rates.py. The sum of
max(issue / 0.7, bytes, arithmetic) over all launches is what good kernels of these forms would take
one after another: latency, the tail of a grid and the time between launches come on top, data that
is still in the L2 cache goes off. A convolution on cuDNN counts as max(arithmetic / 0.7, bytes),
all else of torch's as its bytes.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastres.kernels.gpu.launch import Launch
from fastres.kernels.gpu.launch_table import Gpu, assume_gpu, load_table
from fastres.kernels.tools.codegen_report import (
    EFFICIENCY,
    CodegenEntry,
    Plan,
    architecture,
    attainable_us,
    compile_entries,
    count_builds,
    plan_launch,
)
from fastres.kernels.tools.network_launches import NamedLaunch, network_launches
from fastres.kernels.tools.networks import PRECISIONS
from fastres.kernels.tools.peak_rates import PEAK_RATES
from fastres.kernels.tools.torch_launches import TorchLaunch

__all__ = [
    "RECORDED_PATH",
    "StepReport",
    "StepRow",
    "count_step",
    "plan_launches",
    "recorded_steps",
    "torch_attainable_us",
]

# What was counted of the steps of both networks on an H100, launch by launch. A test holds it
# against the code.
RECORDED_PATH = Path(__file__).with_name("step_bounds.json")


@dataclass(frozen=True)
class StepRow:
    """Equal launches of a step; times are of one of them, in microseconds.

    layer, name: where in the network, which kernel or operator. launches: how many. issue_us: 0 for
    launches of torch's, whose instructions nobody sees here. entry: how the kernel was built, None
    for torch's.
    """

    layer: str
    name: str
    launches: int
    issue_us: float
    bytes_us: float
    arithmetic_us: float
    attainable_us: float
    entry: CodegenEntry | None = None

    @property
    def total_us(self) -> float:
        """What all of them add to the step's sum."""
        return self.launches * self.attainable_us

    def record(self) -> dict[str, Any]:
        """Flat, plain values."""
        times = ("issue_us", "bytes_us", "arithmetic_us")
        row = {
            "layer": self.layer,
            "name": self.name,
            "launches": self.launches,
            **{name: round(getattr(self, name), 4) for name in times},
            "bound_us": round(self.attainable_us, 4),
        }
        if self.entry is None:
            return row
        plan, code = self.entry.plan, self.entry.code
        return row | {
            "variant": plan.variant,
            "tile": plan.tile,
            "programs": plan.programs,
            "registers": code.registers,
            "spills": code.spills,
            "shared_bytes": code.shared_bytes,
            "programs_per_multiprocessor": self.entry.programs_per_multiprocessor,
            "warp_instructions": round(self.entry.warp_instructions),
            "last_program_instructions": code.program.last_instructions,
            "count": "; ".join(self.entry.count_notes),
            "violations": "; ".join(self.entry.violations),
        }


@dataclass(frozen=True)
class StepReport:
    """All launches of a step, those that add most first."""

    arch: str
    network: str
    precision: str
    batch: int
    phase: str
    rows: tuple[StepRow, ...]

    def _sum(self, name: str) -> float:
        return sum(row.launches * getattr(row, name) for row in self.rows)

    @property
    def issue_us(self) -> float:
        """ESTIMATE: what the instructions of all Triton kernels take at least."""
        return self._sum("issue_us")

    @property
    def bytes_us(self) -> float:
        """ESTIMATE: what the bytes of all launches take at least."""
        return self._sum("bytes_us")

    @property
    def arithmetic_us(self) -> float:
        """ESTIMATE: what the arithmetic of all launches takes at least."""
        return self._sum("arithmetic_us")

    @property
    def attainable_us(self) -> float:
        """ESTIMATE: the sum over all launches of the longest of the three, issue / 0.7."""
        return self._sum("attainable_us")

    @property
    def num_launches(self) -> int:
        """Launches of the step, torch's own among them."""
        return sum(row.launches for row in self.rows)

    def record(self) -> dict[str, Any]:
        """Flat, plain values, the rows in a list."""
        return {
            "step": self.network,
            "phase": self.phase,
            "batch": self.batch,
            "precision": self.precision,
            "arch": self.arch,
            "gpu": PEAK_RATES[self.arch].gpu,
            "kind": "ESTIMATE of a lower bound, nothing was measured",
            "issue_us": round(self.issue_us, 2),
            "bytes_us": round(self.bytes_us, 2),
            "arithmetic_us": round(self.arithmetic_us, 2),
            "bound_us": round(self.attainable_us, 2),
            "launches": self.num_launches,
            "rows": [row.record() for row in self.rows],
        }


def recorded_steps() -> dict[str, Any]:
    """The counts of RECORDED_PATH.

    Returns: "triton", "arch", "precision", "batch", and "steps": {network and phase: {layer, kernel
    and form: launches of a step, then microseconds of all of them together: issue, bytes,
    arithmetic, bound}}.
    """
    recorded: dict[str, Any] = json.loads(RECORDED_PATH.read_text())
    return recorded


def _card(arch: str) -> Gpu:
    """The card of an architecture by the name that the launch table has of it, if any."""
    word, gpu = PEAK_RATES[arch].gpu.split()[0], architecture(arch)
    return gpu._replace(name=next((name for name in load_table().gpus if word in name), word))


def count_step(
    arch: str,
    network: str,
    precision: str,
    batch: int,
    phase: str,
    *,
    jobs: int,
    start: Callable[[int], None] = lambda num_builds: None,
    advance: Callable[[], None] = lambda: None,
) -> StepReport:
    """Record, compile and count every launch of a step.

    Args:
        arch: a key of PEAK_RATES.
        network: a key of NETWORKS.
        precision: a key of PRECISIONS.
        batch: images.
        phase: "training" or "inference".
        jobs: processes that compile; 1 compiles in this one.
        start: called with the number of compilations before the first.
        advance: called after each compilation.

    Returns: the report; its launches are configured as the launch table and the rules do it on the
        card.

    Raises: ValueError: when the kernels are interpreted in this process and cannot be compiled.
    """
    with assume_gpu(_card(arch)):
        named = list(network_launches(network, batch, PRECISIONS[precision], phase))
    plans = plan_launches(named, arch, network, precision)
    start(count_builds(plans))
    entries = compile_entries(plans, jobs, advance)
    rows = [*_torch_rows(named, arch, precision), *map(_row, entries)]
    return StepReport(arch, network, precision, batch, phase, _merged(rows))


def plan_launches(
    named: Sequence[NamedLaunch], arch: str, network: str, precision: str
) -> list[Plan]:
    """The plans of those that are of this project's kernels; torch's are not compiled."""
    return [
        plan_launch(launch, arch, network, precision, "step")
        for launch in named
        if isinstance(launch.launch, Launch)
    ]


def _row(entry: CodegenEntry) -> StepRow:
    plan = entry.plan
    return StepRow(
        plan.layer,
        plan.kernel.removesuffix("_kernel"),
        plan.launches,
        entry.issue_us,
        entry.bytes_us,
        entry.arithmetic_us,
        entry.attainable_us,
        entry,
    )


def _torch_rows(named: list[NamedLaunch], arch: str, precision: str) -> Iterator[StepRow]:
    """The rows of what torch launches."""
    for item in named:
        if isinstance(item.launch, TorchLaunch):
            times = _torch_us(item.launch, arch, precision)
            bound = torch_attainable_us(item.launch, arch, precision)
            yield StepRow(item.layer, f"torch {item.launch.name}", item.count, 0.0, *times, bound)


def _torch_us(launch: TorchLaunch, arch: str, precision: str) -> tuple[float, float]:
    """What its bytes and its arithmetic take at least."""
    rates, traffic = PEAK_RATES[arch], launch.traffic
    return rates.bytes_us(traffic.bytes), rates.arithmetic_us(traffic.flops, precision)


def torch_attainable_us(launch: TorchLaunch, arch: str, precision: str) -> float:
    """ESTIMATE of what a launch of torch's takes; cuDNN, too, is granted a share of the peak."""
    bytes_us, arithmetic_us = _torch_us(launch, arch, precision)
    return attainable_us(0.0, bytes_us, arithmetic_us / EFFICIENCY)


def _merged(rows: list[StepRow]) -> tuple[StepRow, ...]:
    """Equal rows as one, the largest sums first."""
    merged: dict[tuple[Any, ...], StepRow] = {}
    for row in rows:
        plan = None if row.entry is None else row.entry.plan
        form = None if plan is None else (plan.variant, plan.tile, plan.programs)
        key = (row.layer, row.name, form, row.issue_us, row.bytes_us, row.arithmetic_us)
        before = merged[key].launches if key in merged else 0
        merged[key] = replace(row, launches=before + row.launches)
    return tuple(sorted(merged.values(), key=lambda row: -row.total_us))
