"""The machine code of head, loss, augmentation and of what else a step launches, without a GPU.

Kernels are interpreted in the test process, so they are compiled in another one, which this file
is the program of.
"""

import dataclasses
import json
import sys

import pytest
import torch

from fastres.kernels.gpu.augment import augment_normalize
from fastres.kernels.gpu.cross_entropy import smooth_cross_entropy_bwd, smooth_cross_entropy_fwd
from fastres.kernels.gpu.launch import recording
from fastres.kernels.gpu.pool_linear import pool_linear_bwd, pool_linear_fwd
from fastres.kernels.gpu.running_stats import MAX_AVERAGES, move_running_stats
from fastres.kernels.gpu.sgd import SGDTensors, SGDUpdate
from fastres.kernels.gpu.totals import add_to_totals
from fastres.kernels.tools.machine_code import compile_launch
from tests.helpers.compiling import run_compiling


def meta(*size, dtype=torch.float32):
    memory_format = torch.channels_last if len(size) == 4 else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format)


def start_head(channels, size, classes, dtype):
    """Forward and backward of a head and its loss at batch 512."""
    weight, bias = meta(classes, channels), meta(classes)
    x = meta(512, channels, size, size, dtype=dtype)
    logits, pooled = pool_linear_fwd(x, weight, bias)
    loss, grad = smooth_cross_entropy_fwd(logits, meta(512, dtype=torch.int64), 0.1)
    smooth_cross_entropy_bwd(loss, grad, dtype)
    pool_linear_bwd(logits, pooled, weight, (size, size))


def start_augmentation(dtype):
    """A batch of 512 with everything that a plan may ask for."""
    images = torch.empty((50000, 32, 32, 3), dtype=torch.uint8, device="meta")
    augment_normalize(
        images,
        meta(512, dtype=torch.int64),
        meta(3),
        meta(3),
        crop=meta(512, 2, dtype=torch.int64),
        padding=4,
        flip=meta(512, dtype=torch.bool),
        cutout=meta(512, 4, dtype=torch.int64),
        colour=meta(3, dtype=torch.uint8),
        dtype=dtype,
    )


def start_step(dtype):
    """SGD with a copy of one parameter, a whole chunk and a tail; sums; running statistics.

    Of the latter as many as a launch takes, so as many arguments as there are at most.
    """
    p = meta(1500)
    tensors = SGDTensors(p, p, p, meta(1500, dtype=dtype), meta(), 5e-4)
    SGDUpdate([p])([tensors], momentum=0.9, nesterov=True)
    logits, labels = meta(512, 10, dtype=dtype), meta(512, dtype=torch.int64)
    add_to_totals(meta(4, dtype=torch.float64), meta(), logits, labels)
    averages, values = ([meta(512) for _ in range(MAX_AVERAGES)] for _ in range(2))
    counts = [meta(dtype=torch.int64) for _ in range(MAX_AVERAGES)]
    assert move_running_stats(averages, values, counts, 0.1)


GROUPS = {
    "resnet20 bf16": (start_head, (64, 8, 10, torch.bfloat16), 90),
    "resnet18 fp16": (start_head, (512, 4, 100, torch.float16), 80),
    "resnet50 fp32": (start_head, (2048, 7, 1000, torch.float32), 90),
    "augmentation fp32": (start_augmentation, (torch.float32,), 80),
    "augmentation bf16": (start_augmentation, (torch.bfloat16,), 90),
    "step fp16": (start_step, (torch.float16,), 80),
    "step bf16": (start_step, (torch.bfloat16,), 90),
}


def main() -> int:
    codes = {}
    for group, (start, arguments, architecture) in GROUPS.items():
        with recording() as launches:
            start(*arguments)
        codes[group] = [
            {"kernel": launch.name} | dataclasses.asdict(compile_launch(launch, architecture))
            for launch in launches
        ]
    print(json.dumps(codes))
    return 0


@pytest.fixture(scope="module")
def codes():
    return run_compiling(__file__)


@pytest.mark.parametrize("group", GROUPS)
def test_machine_code(codes, group):
    """No spills; 16-byte loads of x and parameters, 16-byte stores of dx, batches, parameters."""
    assert codes[group]
    for code in codes[group]:
        assert code["spills"] == 0, code
        if code["kernel"] == "pool_linear_fwd_kernel":
            assert code["wide_loads"] > 0, code
        if code["kernel"] in ("pool_linear_bwd_kernel", "augment_normalize_kernel"):
            assert code["wide_stores"] > 0, code
        if code["kernel"] == "sgd_kernel":
            # Two each of parameter, gradient and buffer in a whole chunk; a tail goes one by one.
            assert code["wide_loads"] >= 6, code
            assert code["wide_stores"] >= 4, code
        if code["kernel"] == "running_stats_kernel":
            assert code["wide_loads"] >= 8, code
            assert code["wide_stores"] >= 4, code


if __name__ == "__main__":
    sys.exit(main())
