"""The codegen report: what every launch of a real network compiles to, on any GPU.

`plan_entries` records the launches of training and inference, `compile_entries` compiles each
different one once, in several processes. An entry says how a kernel was built (tile, registers,
spills, shared memory, tensor-core instructions, width of its loads), how many instructions its
warps issue, and what its launch declares to move and to compute; `CodegenEntry.violations` is what
a good kernel must not show.

All times are ESTIMATES of lower bounds for the cards of peak_rates.py: `issue_us` of the warp
instructions counted in the machine code (control_flow.py), if every scheduler issued in every
clock; `bytes_us` and `arithmetic_us` of what a launch declares. Nothing is measured.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fastres.kernels.conv_shape import ConvOp
from fastres.kernels.gpu.launch import Launch, Traffic
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.launch_rules import im2col_config, tma_config
from fastres.kernels.gpu.launch_table import Gpu, assume_entries, assume_gpu, load_table
from fastres.kernels.gpu.table_file import table_key
from fastres.kernels.tools.compile_pool import in_processes
from fastres.kernels.tools.describe import expected_bits, tile_label, variant_label
from fastres.kernels.tools.machine_code import Build, MachineCode, compile_build, to_build
from fastres.kernels.tools.network_launches import NamedLaunch, network_launches
from fastres.kernels.tools.networks import PRECISIONS, NamedConv, Precision, network_convs
from fastres.kernels.tools.peak_rates import PEAK_RATES

__all__ = [
    "CodegenEntry",
    "Plan",
    "architecture",
    "attainable_us",
    "compile_entries",
    "count_builds",
    "plan_entries",
    "plan_launch",
]

HEURISTICS = "heuristics"


# Share of its issue slots that a good kernel fills, of its peak that cuDNN reaches.
EFFICIENCY = 0.7


def attainable_us(issue_us: float, bytes_us: float, arithmetic_us: float) -> float:
    """ESTIMATE of what a good kernel takes: the longest of issue / 0.7, bytes and arithmetic."""
    return max(issue_us / EFFICIENCY, bytes_us, arithmetic_us)


@dataclass(frozen=True)
class Plan:
    """One different launch of a network, before it is compiled.

    launches: how often a training step or an inference pass of the network makes it. programs,
    num_warps: of one launch, warps of one program. trips, last_programs: see `Launch`. bytes,
    flops: declared by one launch. expected_bits: width that the layout and the tile of each operand
    in pixels or filters allow its loads to have.
    """

    model: str
    phase: str
    layer: str
    kernel: str
    variant: str
    precision: str
    arch: str
    configured_by: str
    tile: str
    launches: int
    programs: int
    num_warps: int
    trips: tuple[float, ...]
    last_programs: int
    bytes: int
    flops: int
    expected_bits: dict[str, int]
    build: Build


@dataclass(frozen=True)
class CodegenEntry:
    """What one plan compiled to."""

    plan: Plan
    code: MachineCode

    @property
    def warp_instructions(self) -> float:
        """Instructions that all warps of one launch issue, as counted in the machine code."""
        plan, program = self.plan, self.code.program
        every = plan.programs * program.instructions(plan.trips)
        return plan.num_warps * (every + plan.last_programs * program.last_instructions)

    @property
    def issue_us(self) -> float:
        """ESTIMATE of a lower bound of one launch, in microseconds: all schedulers always issue."""
        return PEAK_RATES[self.plan.arch].issue_us(self.warp_instructions)

    @property
    def bytes_us(self) -> float:
        """ESTIMATE of what the declared bytes of one launch take at least, in microseconds."""
        return PEAK_RATES[self.plan.arch].bytes_us(self.plan.bytes)

    @property
    def arithmetic_us(self) -> float:
        """ESTIMATE of what the declared arithmetic of one launch takes at least."""
        return PEAK_RATES[self.plan.arch].arithmetic_us(self.plan.flops, self.plan.precision)

    @property
    def attainable_us(self) -> float:
        """ESTIMATE of what a good kernel would take for this launch; see `attainable_us`."""
        return attainable_us(self.issue_us, self.bytes_us, self.arithmetic_us)

    @property
    def roofline_us(self) -> float:
        """ESTIMATE of the least time of one launch, in microseconds, its instructions aside."""
        return max(self.bytes_us, self.arithmetic_us)

    @property
    def bound(self) -> str:
        """What that estimate is bound by: memory or arithmetic."""
        return "arithmetic" if self.arithmetic_us > self.bytes_us else "memory"

    @property
    def programs_per_multiprocessor(self) -> int:
        """Programs that share a multiprocessor, by registers, shared memory and warps."""
        return PEAK_RATES[self.plan.arch].programs_per_multiprocessor(
            self.code.registers, self.code.shared_bytes, self.plan.num_warps
        )

    @property
    def count_notes(self) -> list[str]:
        """Where the count of instructions is no exact one, in words."""
        plan, program = self.plan, self.code.program
        notes = []
        if program.loop_depth:
            trips = " x ".join(f"{trips:.4g}" for trips in plan.trips[: program.loop_depth])
            notes.append(f"loop x {trips}")
        elif plan.trips[0] > 1:
            notes.append("loop unrolled, or on another way")
        if program.loop_depth > len(plan.trips):
            notes.append("inner loop of unknown trips counted once")
        if program.last_instructions:
            notes.append(f"{program.last_instructions} by the last program alone")
        if program.conditional:
            share = f" x {plan.trips[0]:.2g}" if program.is_one_trip(plan.trips) else ""
            notes.append(f"{program.conditional} under branches{share}")
        if program.skipped:
            notes.append(f"{program.skipped} of slow paths left out")
        return notes

    @property
    def tensor_cores(self) -> str:
        """Kind and number of the tensor-core instructions, or nothing."""
        kinds = {"HGMMA": self.code.hgmma, "HMMA": self.code.hmma, "tcgen05": self.code.tcgen05}
        return ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)

    @property
    def pixel_load_bits(self) -> int | None:
        """Width of the narrowest load from a tensor of pixels; None where none is loaded."""
        pixels = self.plan.expected_bits.keys() - {"w_ptr"}
        widths = [bits for name, bits in self.code.load_bits.items() if name in pixels]
        return min(widths, default=None)

    @property
    def narrow_operands(self) -> dict[str, int]:
        """Operands whose narrowest load, in bits, is narrower than layout and tile allow."""
        found = self.code.load_bits
        return {
            name: found[name]
            for name, bits in self.plan.expected_bits.items()
            if found.get(name, bits) < bits
        }

    @property
    def violations(self) -> list[str]:
        """What a good kernel must not show, in words; empty for a good one."""
        code, plan = self.code, self.plan
        violations = []
        if code.spills:
            violations.append(f"{code.spills} spills")
        limit = PEAK_RATES[plan.arch].shared_bytes
        if code.shared_bytes > limit:
            violations.append(
                f"{code.shared_bytes} bytes of shared memory, {plan.arch} has {limit}"
            )
        wanted = {"sm_80": code.hmma, "sm_90": code.hgmma, "sm_100": code.tcgen05}[plan.arch]
        if plan.kernel.startswith("conv") and plan.precision != "fp32" and not wanted:
            violations.append(f"no tensor-core instruction of {plan.arch}")
        if "_tma_" in plan.kernel and not code.tma_loads:
            violations.append("no TMA load")
        violations += [
            f"{name} read {bits} bits wide" for name, bits in self.narrow_operands.items()
        ]
        return violations


def plan_launch(
    named: NamedLaunch, arch: str, model: str, precision: str, configured_by: str
) -> Plan:
    """The plan of one launch of this project's kernels, made as often as `named` says.

    Raises: ValueError: when the kernels are interpreted in this process and cannot be compiled.
    """
    launch = named.launch
    assert isinstance(launch, Launch)
    return Plan(
        model=model,
        phase=named.phase,
        layer=named.layer,
        kernel=launch.name,
        variant=variant_label(launch),
        precision=precision,
        arch=arch,
        configured_by=configured_by,
        tile=tile_label(launch),
        launches=named.count,
        programs=math.prod(launch.grid),
        num_warps=launch.num_warps,
        trips=launch.trips,
        last_programs=launch.last_programs,
        bytes=launch.traffic.bytes,
        flops=launch.traffic.flops,
        expected_bits=expected_bits(launch),
        build=to_build(launch, int(arch.removeprefix("sm_"))),
    )


def architecture(arch: str) -> Gpu:
    """An architecture as a GPU of no other name: of compute capability (9, 0) for sm_90."""
    major, minor = divmod(int(arch.removeprefix("sm_")), 10)
    return Gpu(arch, (major, minor))


def plan_entries(
    arch: str, model: str, precision: str, batch: int, phases: Sequence[str]
) -> list[Plan]:
    """Every different launch of a network's training step and inference pass.

    Args:
        arch: a key of PEAK_RATES.
        model: a key of NETWORKS.
        precision: a key of PRECISIONS.
        batch: images.
        phases: "training", "inference" or both.

    Returns: plans, configured by the heuristics, by each section of the launch table for this
        architecture, measured or ESTIMATES, with TMA loads where the GPU has them, and with some
        products on the route cudnn, for the kernels around those.
    """
    convs, numbers = network_convs(model, batch), PRECISIONS[precision]
    plans: dict[tuple[Build, Traffic], Plan] = {}
    for configured_by, entries in _tables(arch, convs, numbers).items():
        with assume_entries(entries), assume_gpu(architecture(arch)):
            recorded = [
                named
                for phase in phases
                for named in network_launches(model, batch, numbers, phase)
                if isinstance(named.launch, Launch)
            ]
        counts: Counter[tuple[Build, Traffic]] = Counter()
        for named in recorded:
            plan = plan_launch(named, arch, model, precision, configured_by)
            key = (plan.build, named.launch.traffic)
            counts[key] += named.count
            plans.setdefault(key, plan)
        for key, count in counts.items():
            if plans[key].configured_by == configured_by:
                plans[key] = replace(plans[key], launches=count)
    return list(plans.values())


def _tables(
    arch: str, convs: Sequence[NamedConv], precision: Precision
) -> dict[str, Mapping[str, ConvConfig]]:
    """Entries of the launch table to plan with, by what they come from."""
    tables: dict[str, Mapping[str, ConvConfig]] = {HEURISTICS: {}}
    sources = load_table().sources(*architecture(arch))
    tables |= {name: section.entries for name, section in sources.items()}
    if arch != "sm_80":
        tables["TMA loads"] = _by_tma(convs, precision)
        tables["im2col"] = _by_im2col(convs, precision)
    routed: list[list[ConvOp]] = [["fprop", "dgrad", "wgrad"], ["dgrad"], ["wgrad"]]
    for ops in routed:
        tables[f"{', '.join(ops)} on cudnn"] = _on_cudnn(convs, precision, ops)
    return tables


def _by_tma(convs: Sequence[NamedConv], precision: Precision) -> dict[str, ConvConfig]:
    """Entries that load pixels by TMA wherever a layer can."""
    dtype, tf32 = precision.dtype, precision.tf32
    ops: list[ConvOp] = ["fprop", "dgrad"]
    entries = {
        table_key(op, shape, dtype, tf32=tf32): tma_config(op, shape, dtype, tf32=tf32)
        for op in ops
        for _, shape, _ in convs
    }
    return {key: config for key, config in entries.items() if config is not None}


def _by_im2col(convs: Sequence[NamedConv], precision: Precision) -> dict[str, ConvConfig]:
    """Entries of the form that takes what no other can."""
    dtype, tf32 = precision.dtype, precision.tf32
    ops: list[ConvOp] = ["fprop", "dgrad", "wgrad"]
    return {
        table_key(op, shape, dtype, tf32=tf32): im2col_config(op, shape, dtype, tf32=tf32)
        for op in ops
        for _, shape, _ in convs
    }


def _on_cudnn(
    convs: Sequence[NamedConv], precision: Precision, ops: Sequence[ConvOp]
) -> dict[str, ConvConfig]:
    """Entries that put these products of all layers on the route cudnn."""
    dtype, tf32 = precision.dtype, precision.tf32
    return {
        table_key(op, shape, dtype, tf32=tf32): replace(
            im2col_config(op, shape, dtype, tf32=tf32), route="cudnn"
        )
        for op in ops
        for _, shape, _ in convs
    }


def compile_entries(
    plans: Sequence[Plan],
    jobs: int,
    advance: Callable[[], None] = lambda: None,
    codes: dict[Build, MachineCode] | None = None,
) -> list[CodegenEntry]:
    """Compile every different build among the plans once.

    Args:
        plans: from `plan_entries`.
        jobs: processes, of which more than compilations are not started; 1 compiles in this one.
        advance: called after each compilation.
        codes: what was compiled before and need not be again; what is new is added.

    Returns: an entry a plan, in order.
    """
    codes = {} if codes is None else codes
    builds = [build for build in _builds(plans) if build not in codes]
    for build, code in in_processes(compile_build, builds, jobs):
        codes[build] = code
        advance()
    return [CodegenEntry(plan, codes[plan.build]) for plan in plans]


def count_builds(plans: Sequence[Plan]) -> int:
    """How many compilations `compile_entries` does."""
    return len(_builds(plans))


def _builds(plans: Sequence[Plan]) -> list[Build]:
    return list(dict.fromkeys(plan.build for plan in plans))
