"""Where the time of a training step goes, by category, from torch's profiler."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.roofline.step_traffic import category_of_operator

__all__ = ["OUTSIDE", "Event", "Profile", "category_of_kernel", "profile_step", "record_steps"]

OUTSIDE = "between operators"

# First match wins, on the lower-cased name of a GPU kernel. Kernels that torch.compile made carry
# the names of all operators in them and count as what costs most: batch norm.
_KERNELS = (
    ("casts and copies", ("nchwtonhwc", "nhwctonchw", "memcpy", "memset", "copy_kernel", "fill")),
    ("optimizer", ("fusedsgd", "fused_sgd", "fusedadam", "multi_tensor_apply")),
    ("head and loss", ("softmax", "nll_loss", "gemv", "splitkreduce")),
    ("batch norm", ("batch_norm", "batchnorm", "bn_fw", "bn_bw", "bn_")),
    (
        "convolutions",
        ("conv", "fprop", "dgrad", "wgrad", "implicit", "xmma", "cudnn", "winograd", "nhwc"),
    ),
    ("ReLU", ("threshold", "clamp", "relu")),
    ("head and loss", ("gemm", "cublas", "cutlass", "reduce")),
    ("add", ("add",)),
)


def category_of_kernel(name: str) -> str:
    """Return the category of a GPU kernel by its name."""
    plain = name.lower()
    for category, words in _KERNELS:
        if any(word in plain for word in words):
            return category
    return "other"


class Event(NamedTuple):
    """One operator on a CPU with its own time, without those that it calls; one kernel on a GPU."""

    name: str
    start_us: float
    time_us: float


@dataclass(frozen=True)
class Profile:
    """What ran in a number of steps.

    events: in order of their start. wall_us: of all steps, the device drained before and after.
    """

    events: list[Event]
    wall_us: float


def record_steps(step: Callable[[], object], device: torch.device, num_steps: int) -> Profile:
    """Run steps under the profiler: operators on a CPU, kernels on a GPU, also inside a graph."""
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]
    # The first profile of a process starts the profiler, which takes longer than the steps.
    for count in (1, num_steps):
        with profile(activities=activities) as profiler:
            started = time.perf_counter()
            for _ in range(count):
                step()
            if on_cuda:
                torch.cuda.synchronize(device)
            wall_us = 1e6 * (time.perf_counter() - started)
    kind = torch.autograd.DeviceType.CUDA if on_cuda else torch.autograd.DeviceType.CPU
    events = [
        Event(
            event.name,
            event.time_range.start,
            event.time_range.elapsed_us() if on_cuda else event.self_cpu_time_total,
        )
        for event in profiler.events() or []
        if event.device_type == kind
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith("autograd::")
    ]
    return Profile(sorted(events, key=lambda event: event.start_us), wall_us)


def profile_step(
    step: Callable[[], object], device: torch.device, num_steps: int
) -> dict[str, float]:
    """Run steps under the profiler and return {category: share of their time}.

    What no operator or kernel explains is `OUTSIDE`: autograd, Python and launches on a CPU, gaps
    between kernels on a GPU.
    """
    recorded = record_steps(step, device, num_steps)
    categorize = category_of_kernel if device.type == "cuda" else category_of_operator
    found: defaultdict[str, float] = defaultdict(float)
    for event in recorded.events:
        found[categorize(event.name)] += event.time_us
    found[OUTSIDE] = max(0.0, recorded.wall_us - sum(found.values()))
    whole = sum(found.values())
    largest_first = sorted(found.items(), key=lambda item: -item[1])
    return {category: time_us / whole for category, time_us in largest_first}
