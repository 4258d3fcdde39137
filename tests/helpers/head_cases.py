"""What the tests of head and loss share: seeded inputs, autocast, the backends."""

import contextlib

import torch

from tests.helpers.interpreter import DEVICE
from tests.helpers.kernel_cases import channels_last

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def normal(*size, seed=0, dtype=FP32):
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return channels_last(values, dtype) if len(size) == 4 else values.to(DEVICE, dtype)


def draw_labels(n, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, classes, (n,), generator=generator).to(DEVICE)


def autocast(dtype):
    """Autocast to a half precision; nothing for the others."""
    if dtype in (BF16, FP16):
        return torch.autocast(DEVICE.type, dtype)
    return contextlib.nullcontext()
