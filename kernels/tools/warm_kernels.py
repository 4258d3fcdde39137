"""Every kernel of whole steps, compiled into Triton's cache for a GPU that need not be here.

`plan_kernels` records the launches of the networks on meta tensors and has Triton's launcher make
their keys, so that a launch on such a GPU finds its entry. `fill_cache` compiles in several
processes. Neither starts anything on a GPU.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal, NamedTuple

import torch

from fastres.kernels.gpu.launch import Launch, recording
from fastres.kernels.gpu.launch_table import Gpu, assume_gpu, gpu_of, load_table, wants_pdl
from fastres.kernels.tools.cache_keys import is_cached
from fastres.kernels.tools.candidates import unmeasured_start
from fastres.kernels.tools.codegen_report import architecture
from fastres.kernels.tools.compile_pool import in_processes
from fastres.kernels.tools.launchers import build_launcher
from fastres.kernels.tools.machine_code import Build, to_build
from fastres.kernels.tools.network_launches import NamedLaunch, network_launches, other_launches
from fastres.kernels.tools.networks import PRECISIONS
from fastres.kernels.tools.parity import TRAINING_BATCH
from fastres.kernels.tools.parity_plan import plan_checks
from fastres.kernels.tools.tune_workloads import conv_workloads
from fastres.kernels.tools.tuner import Tuner

__all__ = [
    "Outcome",
    "PdlChoice",
    "PlannedKernel",
    "Workload",
    "arch_here",
    "fill_cache",
    "gpus_of",
    "plan_kernels",
]

PdlChoice = Literal["table", "on", "off", "both"]

_META = torch.device("meta")


class Workload(NamedTuple):
    """What a network does: keys of NETWORKS and PRECISIONS, one of WARM_PHASES, images."""

    network: str
    phase: str
    dtype: str
    batch: int


@dataclass(frozen=True)
class PlannedKernel:
    """A kernel to have in the cache, and the launch that asks for it, or the first of several.

    pdl: whether it is started by programmatic dependent launch. weight: of two kernels, the one
    with the larger takes longer to compile, as a rule.
    """

    build: Build
    workload: Workload
    layer: str
    pdl: bool
    weight: tuple[bool, int]


@dataclass(frozen=True)
class Outcome:
    """What became of a kernel: "compiled", "cached" before, "failed", or "left" for another time.

    seconds: that compiling took. error: why it failed, in one line.
    """

    state: Literal["compiled", "cached", "failed", "left"]
    seconds: float = 0.0
    error: str = ""


def arch_here() -> str | None:
    """The architecture of the GPU that torch would use, e.g. "sm_90"; None without one."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def gpus_of(arch: str) -> list[Gpu]:
    """The GPUs of an architecture whose launches are wanted.

    That here, where it is one; else all that were measured, or any, as the launch table's ESTIMATES
    and the rules configure it.
    """
    if arch == arch_here():
        here = gpu_of(torch.device("cuda", torch.cuda.current_device()))
        return [] if here is None else [here]
    any_gpu = architecture(arch)
    measured = [
        Gpu(name, section.capability)
        for name, section in load_table().gpus.items()
        if section.capability == any_gpu.capability
    ]
    return measured or [any_gpu]


def plan_kernels(
    arch: str, workloads: Sequence[Workload], pdl: PdlChoice = "table"
) -> list[PlannedKernel]:
    """Every different kernel that the workloads launch, those first that take longest to compile.

    Args:
        arch: e.g. "sm_90".
        workloads: steps, whose launches with all recipes are meant.
        pdl: with programmatic dependent launch or without; "table" is what the launch table says of
            each GPU. GPUs before Hopper have none.

    Raises: ValueError: when the kernels are interpreted in this process and cannot be compiled.
    """
    planned: dict[str, PlannedKernel] = {}
    for gpu in gpus_of(arch):
        for workload in workloads:
            with assume_gpu(gpu):
                made = list(_launches(workload))
            for named in made:
                for enabled in _pdl_choices(gpu, pdl):
                    kernel = _planned(named, arch, workload, enabled)
                    planned.setdefault(kernel.build.key, kernel)
    return sorted(planned.values(), key=lambda kernel: kernel.weight, reverse=True)


def _launches(workload: Workload) -> Iterator[NamedLaunch]:
    """Those of this project's kernels."""
    of_phase: dict[str, Callable[[Workload], Iterable[NamedLaunch]]] = {
        "checks": _launches_of_checks,
        "forms": _launches_of_forms,
    }
    for named in of_phase.get(workload.phase, _launches_of_step)(workload):
        if isinstance(named.launch, Launch):
            yield named


def _launches_of_step(workload: Workload) -> Iterator[NamedLaunch]:
    network, phase, dtype, batch = workload
    steps = (network, batch, PRECISIONS[dtype], phase)
    return chain(network_launches(*steps), other_launches(*steps))


def _launches_of_checks(workload: Workload) -> Iterator[NamedLaunch]:
    """What the parity command launches."""
    network, phase, dtype, batch = workload
    chosen_batch = max(batch, TRAINING_BATCH)
    for check in plan_checks([network], batch, chosen_batch, [dtype], "chosen", _META):
        with recording() as launches:
            check.run(check.make(_META, 0))
        for launch in launches:
            yield NamedLaunch(phase, check.name, launch, 1)


def _launches_of_forms(workload: Workload) -> Iterator[NamedLaunch]:
    """What the tuner's first round launches."""
    network, phase, dtype, batch = workload
    gpu = gpu_of(_META)
    assert gpu is not None
    tuner = Tuner(
        _META,
        timer=lambda trials: [0.0] * len(trials),
        unmeasured=functools.partial(unmeasured_start, gpu=gpu),
    )
    for layer in conv_workloads([network], [batch], [PRECISIONS[dtype]]):
        for launch in tuner.launches_of_forms(layer):
            yield NamedLaunch(phase, layer.shape.layer_key, launch, 1)


def _pdl_choices(gpu: Gpu, pdl: PdlChoice) -> tuple[bool, ...]:
    if gpu.capability < (9, 0):
        return (False,)
    of_table = (wants_pdl(gpu),)
    return {"table": of_table, "on": (True,), "off": (False,), "both": (False, True)}[pdl]


def _planned(named: NamedLaunch, arch: str, workload: Workload, pdl: bool) -> PlannedKernel:
    launch = named.launch
    assert isinstance(launch, Launch)
    # On meta tensors no launch is a dependent one.
    launch = replace(launch, args={**launch.args, "PDL": pdl})
    build = to_build(launch, int(arch.removeprefix("sm_")))
    return PlannedKernel(build, workload, named.layer, pdl, _weight(launch))


def _weight(launch: Launch) -> tuple[bool, int]:
    """The forms in patches first, whose whole windows are unrolled; many channels, large tiles."""
    leaves = launch.leaves
    if "SHAPE.PATCH_H" in leaves:
        return True, leaves["C"] * leaves["K"]
    return False, math.prod(v for name, v in leaves.items() if name.startswith("BLOCK"))


def fill_cache(
    planned: Sequence[PlannedKernel], jobs: int, deadline: float = math.inf
) -> Iterator[tuple[PlannedKernel, Outcome]]:
    """Compile what Triton's cache does not have yet; yield each kernel as it is done with.

    Args:
        planned: from `plan_kernels`.
        jobs: processes that compile.
        deadline: by time.monotonic(); none is begun after it.
    """
    missing: dict[Build, PlannedKernel] = {}
    for kernel in planned:
        if is_cached(kernel.build.key, kernel.build.kernel):
            yield kernel, Outcome("cached")
        else:
            missing[kernel.build] = kernel
    for build, outcome in in_processes(_compile, list(missing), jobs, deadline):
        yield missing[build], outcome


def _compile(build: Build, deadline: float) -> Outcome:
    """Compile one kernel into the cache; runs in a process of its own."""
    started = time.monotonic()
    if started >= deadline:
        return Outcome("left")
    try:
        kernel = build.run_launcher(remembers=False)
    except Exception as error:
        # Not raised: not every exception of the compiler can be sent from one process to another.
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        return Outcome("failed", time.monotonic() - started, line)
    key = kernel.hash
    assert key == build.key, f"{build.kernel} was cached as {key}, not as {build.key}"
    with contextlib.suppress(Exception):  # The first launch meets it again, and names it.
        build_launcher(kernel)
    return Outcome("compiled", time.monotonic() - started)
