"""Where the time of a training step goes, by category, from torch's profiler."""

import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.roofline.step_traffic import category_of_operator

__all__ = ["OUTSIDE", "category_of_kernel", "profile_step"]

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


def profile_step(
    step: Callable[[], object], device: torch.device, num_steps: int
) -> dict[str, float]:
    """Run steps under the profiler and return {category: share of their time}.

    On a CPU operators count with their own time, without those that they call; on a GPU kernels
    count, also those inside a replayed graph. What neither explains is `OUTSIDE`: autograd, Python
    and launches on a CPU, gaps between kernels on a GPU.
    """
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
            total_us = 1e6 * (time.perf_counter() - started)
    found: defaultdict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if on_cuda:
            is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
            if is_kernel and not getattr(event, "is_user_annotation", False):
                found[category_of_kernel(event.key)] += event.self_device_time_total
        elif not event.key.startswith("autograd::"):
            found[category_of_operator(event.key)] += event.self_cpu_time_total
    found[OUTSIDE] = max(0.0, total_us - sum(found.values()))
    whole = sum(found.values())
    largest_first = sorted(found.items(), key=lambda item: -item[1])
    return {category: time_us / whole for category, time_us in largest_first}
