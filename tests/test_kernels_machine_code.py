"""The machine code of representative launches, compiled for GPUs that this machine need not have.

Kernels are interpreted in the test process, so they are compiled in another one, which this file
is the program of.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreter import HAS_GPU

from fastres.kernels.batchnorm import bn_apply, bn_stats
from fastres.kernels.batchnorm_backward import bn_backward_apply, bn_backward_reduce
from fastres.kernels.conv_dgrad import conv_dgrad
from fastres.kernels.conv_fprop import conv_fprop, conv_fprop_folded
from fastres.kernels.conv_wgrad import conv_wgrad
from fastres.kernels.launch import recording
from fastres.kernels.machine_code import compile_launch
from fastres.kernels.operands import BNInput, FoldedGrad

REPO = Path(__file__).resolve().parents[1]


def meta(*size, dtype=torch.float32):
    memory_format = torch.channels_last if len(size) == 4 else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format)


def narrow(dtype):
    """ResNet-20's first stage at batch 512: every prologue and epilogue of training."""
    x, w = meta(512, 16, 32, 32, dtype=dtype), meta(16, 16, 3, 3, dtype=dtype)
    ab, dy = meta(2, 16), FoldedGrad(x, x, meta(3, 16))
    conv_fprop(x, w, padding=1, scale_shift=ab, store_stats=True)
    conv_dgrad(
        dy, w, (32, 32), padding=1, shortcut=x, bn_input=BNInput(x, meta(16), scale_shift=ab)
    )
    conv_wgrad(x, dy, (3, 3), padding=1, scale_shift=ab)


def wide(dtype):
    """ResNet-18's third stage at batch 512, strided where it begins."""
    x, y = meta(512, 128, 16, 16, dtype=dtype), meta(512, 256, 8, 8, dtype=dtype)
    w = meta(256, 128, 3, 3, dtype=dtype)
    conv_fprop_folded(x, w, meta(2, 256), stride=2, padding=1, residual=y)
    conv_dgrad(FoldedGrad(y, y, meta(3, 256)), w, (16, 16), stride=2, padding=1)


def rows(dtype):
    """The batch-norm kernels of ResNet-20's first stage."""
    y = meta(512, 16, 32, 32, dtype=dtype)
    bn_stats(y)
    bn_apply(y, meta(2, 16), residual=y, residual_scale_shift=meta(2, 16))
    bn_backward_reduce(y, y, meta(16), out=y, y_shortcut=y, mean_shortcut=meta(16))
    bn_backward_apply(FoldedGrad(y, y, meta(3, 16)))


GROUPS = {
    "narrow bf16": (narrow, torch.bfloat16, 90),
    "narrow fp16": (narrow, torch.float16, 80),
    "narrow fp32": (narrow, torch.float32, 90),
    "wide bf16": (wide, torch.bfloat16, 90),
    "rows bf16": (rows, torch.bfloat16, 80),
}


def main() -> int:
    cards = {}
    for group, (start, dtype, architecture) in GROUPS.items():
        with recording() as launches:
            start(dtype)
        cards[group] = [
            {"kernel": launch.name} | dataclasses.asdict(compile_launch(launch, architecture))
            for launch in launches
            if launch.name != "sum_parts_kernel"
        ]
    print(json.dumps(cards))
    return 0


@pytest.fixture(scope="module")
def cards():
    path = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("group", GROUPS)
def test_machine_code(cards, group):
    _, dtype, architecture = GROUPS[group]
    assert cards[group]
    for card in cards[group]:
        assert card["spills"] == 0, card
        assert card["shared_bytes"] <= 99 * 1024, card
        assert card["wide_loads"] > 0, card
        if card["kernel"].startswith("conv") and dtype != torch.float32:
            assert card["hgmma" if architecture == 90 else "hmma"] > 0, card
        if card["kernel"].startswith(("conv_fprop", "conv_dgrad", "bn_apply")):
            assert card["wide_stores"] > 0, card


@pytest.mark.skipif(HAS_GPU, reason="kernels are not interpreted where there is a GPU")
def test_interpreted_kernels_are_refused():
    with recording() as launches:
        bn_stats(meta(1, 16, 2, 2))
    with pytest.raises(ValueError, match="unset TRITON_INTERPRET"):
        compile_launch(launches[0], 90)


if __name__ == "__main__":
    sys.exit(main())
