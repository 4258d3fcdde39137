"""The codegen report: what every launch of a real network compiles to, on any GPU.

`plan_entries` records the launches of training and inference, `compile_entries` compiles each
different one once, in several processes. An entry says how a kernel was built (tile, registers,
spills, shared memory, tensor-core instructions, width of its loads) and what its launch declares to
move and to compute; `CodegenEntry.violations` is what a good kernel must not show.

The roofline time of an entry is an ESTIMATE: declared bytes over the memory's bandwidth, or
declared arithmetic over the peak, whichever is longer, with `PEAK_RATES`. Nothing is measured.
"""

import multiprocessing
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import NamedTuple

from fastres.kernels.conv_shape import ConvOp
from fastres.kernels.gpu.launch import Launch, Traffic
from fastres.kernels.gpu.launch_config import (
    ConvConfig,
    assume_entries,
    heuristic_config,
    load_table,
    table_key,
    tma_config,
)
from fastres.kernels.tools.describe import expected_bits, tile_label, variant_label
from fastres.kernels.tools.machine_code import Build, MachineCode, compile_build, specialize
from fastres.kernels.tools.network_launches import (
    record_augmentation,
    record_head,
    record_inference,
    record_training,
)
from fastres.kernels.tools.networks import (
    PRECISIONS,
    NamedBlock,
    NamedConv,
    Precision,
    network_blocks,
    network_convs,
)

__all__ = [
    "PEAK_RATES",
    "CodegenEntry",
    "PeakRates",
    "Plan",
    "compile_entries",
    "count_builds",
    "plan_entries",
]

HEURISTICS = "heuristics"


class PeakRates(NamedTuple):
    """What a class of GPUs can do at most, for one architecture.

    gpu: the class. bandwidth: bytes/s. peak: FLOP/s by precision. shared_bytes: shared memory that
    one program may have. tables: GPUs of the launch table with this architecture, by words of
    their names. source: where the figures are from.
    """

    gpu: str
    bandwidth: float
    peak: dict[str, float]
    shared_bytes: int
    tables: tuple[str, ...]
    source: str


def _peak(bf16: float, fp32: float) -> dict[str, float]:
    """Tensor cores multiply TF32 at half the rate of 16-bit numbers on all three."""
    return {"bf16": bf16, "fp16": bf16, "tf32": bf16 / 2, "fp32": fp32}


PEAK_RATES = {
    "sm_80": PeakRates(
        "A100 80 GB SXM",
        2.039e12,
        _peak(312e12, 19.5e12),
        163 * 1024,
        ("A100", "A30"),
        "NVIDIA A100 datasheet, published",
    ),
    "sm_90": PeakRates(
        "H200",
        4.3e12,
        _peak(790e12, 67e12),
        227 * 1024,
        ("H100", "H200", "GH200"),
        "copy and bf16 product as measured on an H200; fp32 from NVIDIA's H200 datasheet",
    ),
    "sm_100": PeakRates(
        "B200",
        8e12,
        _peak(2250e12, 80e12),
        227 * 1024,
        ("B200", "B100"),
        "NVIDIA Blackwell architecture brief, HGX B200, dense, published",
    ),
}


@dataclass(frozen=True)
class Plan:
    """One different launch of a network, before it is compiled.

    launches: how often a training step or an inference pass of the network makes it. bytes, flops:
    declared by one launch. expected_bits: width that the layout and the tile of each operand in
    pixels or filters allow its loads to have.
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
    def roofline_us(self) -> float:
        """ESTIMATE of the least time of one launch, in microseconds."""
        rates = PEAK_RATES[self.plan.arch]
        peak = rates.peak[self.plan.precision]
        return 1e6 * max(self.plan.bytes / rates.bandwidth, self.plan.flops / peak)

    @property
    def bound(self) -> str:
        """What that estimate is bound by: memory or arithmetic."""
        rates = PEAK_RATES[self.plan.arch]
        seconds = self.plan.flops / rates.peak[self.plan.precision]
        return "arithmetic" if seconds > self.plan.bytes / rates.bandwidth else "memory"

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


def _layer_name(block: NamedBlock, launch: Launch) -> str:
    """The convolution that a launch computes, as networks.py calls it; else the block."""
    if not launch.name.startswith("conv"):
        return block.name
    return next(
        conv.name
        for conv in block.convs()
        if conv.shape.constexprs().items() <= launch.args.items()
    )


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

    Returns: plans, configured by the heuristics, by each GPU of this architecture that the launch
        table knows, with TMA loads where the GPU has them, and with some products on the route
        cudnn, for the kernels around those.
    """
    blocks, convs = network_blocks(model, batch), network_convs(model, batch)
    plans: dict[tuple[Build, Traffic], Plan] = {}
    for configured_by, entries in _tables(arch, convs, PRECISIONS[precision]).items():
        with assume_entries(entries):
            recorded = _recorded(blocks, precision, phases)
        counts: Counter[tuple[Build, Traffic]] = Counter()
        for phase, layer, launch, count in recorded:
            build = specialize(launch)
            key = (build, launch.traffic)
            counts[key] += count
            plans.setdefault(
                key,
                Plan(
                    model=model,
                    phase=phase,
                    layer=layer,
                    kernel=launch.name,
                    variant=variant_label(launch),
                    precision=precision,
                    arch=arch,
                    configured_by=configured_by,
                    tile=tile_label(launch),
                    launches=0,
                    bytes=launch.traffic.bytes,
                    flops=launch.traffic.flops,
                    expected_bits=expected_bits(launch),
                    build=build,
                ),
            )
        for key, count in counts.items():
            if plans[key].configured_by == configured_by:
                plans[key] = replace(plans[key], launches=count)
    return list(plans.values())


def _tables(
    arch: str, convs: Sequence[NamedConv], precision: Precision
) -> dict[str, dict[str, ConvConfig]]:
    """Entries of the launch table to plan with, by what they come from."""
    tables: dict[str, dict[str, ConvConfig]] = {HEURISTICS: {}}
    tables |= {
        gpu: entries
        for gpu, entries in load_table().items()
        if any(word in gpu for word in PEAK_RATES[arch].tables)
    }
    if arch != "sm_80":
        tables["TMA loads"] = _by_tma(convs, precision)
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


def _on_cudnn(
    convs: Sequence[NamedConv], precision: Precision, ops: Sequence[ConvOp]
) -> dict[str, ConvConfig]:
    """Entries that put these products of all layers on the route cudnn."""
    dtype, tf32 = precision.dtype, precision.tf32
    return {
        table_key(op, shape, dtype, tf32=tf32): replace(
            heuristic_config(op, shape, dtype, tf32=tf32), route="cudnn"
        )
        for op in ops
        for _, shape, _ in convs
    }


def _recorded(
    blocks: Sequence[NamedBlock], precision: str, phases: Sequence[str]
) -> list[tuple[str, str, Launch, int]]:
    """Every launch of a network: phase, layer, launch, and how often it is made."""
    numbers = PRECISIONS[precision]
    record = {"training": record_training, "inference": record_inference}
    found = [
        (phase, _layer_name(block, launch), launch, block.count)
        for phase in phases
        for block in blocks
        for launch in record[phase](block, numbers)
    ]
    last = blocks[-1].layers[-1]
    for phase in phases:
        is_training = phase == "training"
        around = {"head": record_head(last, numbers, training=is_training)}
        if is_training:
            around["augmentation"] = record_augmentation(last.N, numbers)
        found += [(phase, name, launch, 1) for name in around for launch in around[name]]
    return found


def compile_entries(
    plans: Sequence[Plan], jobs: int, advance: Callable[[], None] = lambda: None
) -> list[CodegenEntry]:
    """Compile every different build among the plans once.

    Args:
        plans: from `plan_entries`.
        jobs: processes; 1 compiles in this one.
        advance: called after each compilation.

    Returns: an entry a plan, in order.
    """
    builds = _builds(plans)
    codes: dict[tuple[Build, int], MachineCode] = {}
    if jobs == 1:
        for build in builds:
            codes[build] = compile_build(*build)
            advance()
    else:
        # The server imports torch and triton once; its children are forked from it, so no thread
        # of this process is copied.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            running = {pool.submit(compile_build, *build): build for build in builds}
            for done in as_completed(running):
                codes[running[done]] = done.result()
                advance()
    return [CodegenEntry(plan, codes[plan.build, _capability(plan)]) for plan in plans]


def count_builds(plans: Sequence[Plan]) -> int:
    """How many compilations `compile_entries` does."""
    return len(_builds(plans))


def _builds(plans: Sequence[Plan]) -> list[tuple[Build, int]]:
    return list(dict.fromkeys((plan.build, _capability(plan)) for plan in plans))


def _capability(plan: Plan) -> int:
    return int(plan.arch.removeprefix("sm_"))
