"""ESTIMATES for an architecture without a GPU of it: what the tuner would choose by counts.

The tuner's first round, with a timer that counts: the launches of a trial are recorded on the meta
device, compiled for the architecture, and its time is the sum of max(issue / 0.7, bytes,
arithmetic) over them, torch's and cuDNN's among them, see step_report.py. So forms and routes are
compared; where they count the same, a product of 64 or more channels is cuDNN's, any other stays
with the rules. Tiles are not compared: what they are for, latency and how many programs hide it, no
count knows. For the same reason a filter gradient by pointers gets more parts than the count asks
for, see `fill_multiprocessors`.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.gpu import backend as gpu_backend
from fastres.kernels.gpu.launch import recording
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.launch_table import assume_entries, assume_gpu
from fastres.kernels.tools.candidates import GpuLimits, heuristic_start, product_of
from fastres.kernels.tools.codegen_report import CodegenEntry, architecture, compile_entries
from fastres.kernels.tools.graph_timer import Trial
from fastres.kernels.tools.machine_code import Build, MachineCode
from fastres.kernels.tools.network_launches import NamedLaunch
from fastres.kernels.tools.networks import PRECISIONS
from fastres.kernels.tools.peak_rates import PEAK_RATES
from fastres.kernels.tools.step_report import plan_launches, torch_attainable_us
from fastres.kernels.tools.torch_launches import AnyLaunch, TorchLaunch, recording_all
from fastres.kernels.tools.tune_workloads import ConvWorkload, conv_workloads, make_case
from fastres.kernels.tools.tuner import Choice, Entries, Tuner

__all__ = ["CountTimer", "Estimate", "WgradParts", "estimate", "fill_multiprocessors"]

# Channels from which cuDNN computes a product unless it counts as slower.
CUDNN_CHANNELS = 64

# Programs of a filter gradient for each of the rule's, at most: every one leaves a partial sum.
MOST_PARTS = 4

# Pixels of a part, at least: those of the rule.
PIXELS_A_PART = 256

META = torch.device("meta")


@dataclass
class CountTimer:
    """A `Timer` that counts what trials would take on an architecture; they run on meta tensors.

    What spills, or does not fit shared memory, takes for ever: no count knows what that costs.

    Attributes:
        arch: a key of PEAK_RATES.
        precision: a key of PRECISIONS.
        jobs: processes that compile.
    """

    arch: str
    precision: str
    jobs: int
    _codes: dict[Build, MachineCode] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, trials: Sequence[Trial]) -> list[float]:
        """ESTIMATE of the seconds of one run of each trial."""
        recorded = []
        for trial in trials:
            with recording_all() as launches:
                trial.run()
            recorded.append(launches)
        # All at once, so that all processes have something to compile.
        self.compile([launch for launches in recorded for launch in launches])
        return [self._seconds(launches) for launches in recorded]

    def compile(self, launches: Sequence[AnyLaunch]) -> list[CodegenEntry]:
        """What this project's kernels among the launches compile to; each is compiled once."""
        named = [NamedLaunch("", "", launch, 1) for launch in launches]
        plans = plan_launches(named, self.arch, "", self.precision)
        return compile_entries(plans, self.jobs, codes=self._codes)

    def _seconds(self, launches: Sequence[AnyLaunch]) -> float:
        entries = self.compile(launches)
        if any(entry.violations for entry in entries):
            return math.inf
        kernels = sum(entry.attainable_us for entry in entries)
        of_torch = [launch for launch in launches if isinstance(launch, TorchLaunch)]
        others = sum(torch_attainable_us(x, self.arch, self.precision) for x in of_torch)
        # Picoseconds: what counts the same is the same, in whatever order it was added.
        return round(1e-6 * (kernels + others), 12)


def prefer_cudnn(shape: ConvShape, entries: Entries) -> int:
    """A `Tuner.rank`: fewest products on other routes, where there are channels enough."""
    is_wide = max(shape.C, shape.K) >= CUDNN_CHANNELS
    return sum(config.route != "cudnn" for config in entries) if is_wide else 0


class WgradParts(NamedTuple):
    """What more parts of a filter gradient by pointers cost, in all its launches of a step.

    before, after: parts. programs: that share a multiprocessor. before_us, after_us: ESTIMATES.
    added_bytes: of partial sums, written and read. added_instructions: of warps, by those before.
    """

    key: str
    before: int
    after: int
    programs: int
    before_us: float
    after_us: float
    added_bytes: int
    added_instructions: float


class Estimate(NamedTuple):
    """What is chosen for a layer, and why. parts: None where the filter gradient keeps its."""

    choices: list[Choice]
    parts: WgradParts | None

    @property
    def entries(self) -> dict[str, ConvConfig]:
        """For the launch table."""
        entries = {choice.key: choice.config for choice in self.choices}
        if self.parts is not None:
            config = entries[self.parts.key]
            entries[self.parts.key] = replace(config, split_k=self.parts.after)
        return entries


def estimate(
    arch: str,
    networks: Sequence[str],
    batches: Sequence[int],
    precision: str,
    *,
    jobs: int,
    say: Callable[[str], None] = print,
) -> Iterator[Estimate]:
    """Yield the choices for every layer of the networks, those that move most bytes first.

    Args:
        arch: a key of PEAK_RATES.
        networks: keys of NETWORKS.
        batches: images.
        precision: a key of PRECISIONS.
        jobs: processes that compile.
        say: receives a line for each candidate that is left out, and why.

    Raises: ValueError: when the kernels are interpreted in this process and cannot be compiled.
    """
    rates, gpu = PEAK_RATES[arch], architecture(arch)
    timer = CountTimer(arch, precision, jobs)
    has_tma = gpu.capability >= (9, 0)
    tuner = Tuner(
        META,
        timer,
        gpu=GpuLimits(rates.shared_bytes, rates.multiprocessors, has_tma, has_pdl=has_tma),
        limit=0,
        unmeasured=functools.partial(heuristic_start, capability=gpu.capability),
        rank=prefer_cudnn,
        say=say,
    )
    workloads = conv_workloads(networks, batches, [PRECISIONS[precision]])
    with assume_gpu(gpu):
        for workload, tuned in zip(workloads, tuner.run(workloads), strict=True):
            parts = fill_multiprocessors(workload, tuned.choices, timer)
            yield Estimate(tuned.choices, parts)


def fill_multiprocessors(
    workload: ConvWorkload, choices: Sequence[Choice], timer: CountTimer
) -> WgradParts | None:
    """Parts of a filter gradient for all programs that fit the multiprocessors at a time.

    The rule starts one program on each, which waits for its own loads. Of the form by pointers
    alone: a program of the others shifts and adds whole copies of dw before it ends.
    """
    key = product_of("wgrad", workload).key
    entries = {choice.key: choice.config for choice in choices}
    config = entries.get(key)
    if config is None or (config.route, config.form) != ("triton", "im2col"):
        return None
    before = _wgrads(workload, entries, timer)
    if not before:
        return None  # Both gradients are one launch.
    programs = min(entry.programs_per_multiprocessor for entry in before)
    gemm = workload.shape.gemm("wgrad")
    tiles = -(-gemm.n // config.block_m) * -(-gemm.m // config.block_n)
    room = PEAK_RATES[timer.arch].multiprocessors * programs // tiles
    split_k = min(room, MOST_PARTS * config.split_k, -(-gemm.k // PIXELS_A_PART))
    if split_k <= config.split_k:
        return None
    after = _wgrads(workload, entries | {key: replace(config, split_k=split_k)}, timer)
    instructions = [sum(entry.warp_instructions for entry in of) for of in (before, after)]
    return WgradParts(
        key,
        config.split_k,
        split_k,
        programs,
        sum(entry.attainable_us for entry in before),
        sum(entry.attainable_us for entry in after),
        sum(entry.plan.bytes for entry in after) - sum(entry.plan.bytes for entry in before),
        instructions[1] / instructions[0] - 1,
    )


def _wgrads(
    workload: ConvWorkload, entries: dict[str, ConvConfig], timer: CountTimer
) -> list[CodegenEntry]:
    """The filter gradients by pointers that a step launches with these entries."""
    launches: list[AnyLaunch] = []
    for variant, count in workload.variants.items():
        case = make_case(workload.shape, variant, workload.precision.dtype, META)
        with assume_entries(entries), recording() as recorded:
            case.backward(gpu_backend)
        launches += count * [x for x in recorded if x.name == "conv_wgrad_kernel"]
    return timer.compile(launches)
