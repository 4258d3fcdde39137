"""Machine code of strips and of the fused backward in their heuristic configurations.

This file is also a program: a process that interprets kernels cannot compile them.
"""

import json
import re
import sys

import pytest
import torch

from tests.helpers.compiling import run_compiling

# The tensor-core instruction of each compute capability.
PRODUCTS = {90: "hgmma", 100: "tcgen05"}
BF16 = torch.bfloat16

# The layers of ResNet-20 that are computed in strips: C, K, height and width.
STAGE, STEM, WIDE = (16, 16, 32), (3, 16, 32), (32, 32, 16)
CASES = {
    "fprop": STAGE,
    "fprop, first of a block": STAGE,
    "fprop of the stem": STEM,
    "fprop of inference": STAGE,
    "dgrad with mask and sums": STAGE,
    "dgrad with shortcut": STAGE,
    "wgrad": STAGE,
    "wgrad, first of a block": STAGE,
    "wgrad of the stem": STEM,
    "wgrad of 32 channels": WIDE,
    "backward with mask and sums": STAGE,
    "backward with shortcut": STAGE,
}


def record(name):
    """The launch of a case at batch 512."""
    from fastres.kernels.conv_shape import ConvShape
    from fastres.kernels.conv_types import BatchNorm, DeferredGrad, LayerState
    from fastres.kernels.gpu.conv_backward import conv_gradients
    from fastres.kernels.gpu.conv_dgrad import conv_dgrad
    from fastres.kernels.gpu.conv_fprop import conv_fprop, conv_fprop_folded
    from fastres.kernels.gpu.conv_wgrad import conv_wgrad
    from fastres.kernels.gpu.launch import recording
    from fastres.kernels.gpu.launch_rules import fused_config, strip_config

    def tensor(*size):
        return torch.empty(size, dtype=BF16, device="meta", memory_format=torch.channels_last)

    def vectors(*size):
        return torch.empty(size, device="meta")

    c, k, side = CASES[name]
    shape = ConvShape(512, side, side, c, k)
    x, w, y = tensor(512, c, side, side), tensor(k, c, 3, 3), tensor(512, k, side, side)
    dy = DeferredGrad(y, y, vectors(3, k))
    mask = "mask" in name
    op, _, rest = name.partition(" ")
    is_raw = "stem" in name or "first" in name
    scale_shift = None if is_raw else vectors(2, c)
    grads = {
        "shortcut": None if mask else x,
        "producer": LayerState(x, vectors(5, c)) if mask else None,
        "producer_weight": vectors(c) if mask else None,
    }
    with recording() as launches:
        if op.startswith("backward"):
            config = fused_config(shape, BF16)
            conv_gradients(dy, x, w, padding=1, config=config, **grads)
            return launches[0]
        op = op.removesuffix(",")
        options = {"padding": 1, "config": strip_config(op, shape, BF16)}
        if rest == "of inference":
            conv_fprop_folded(x, w, vectors(2, k), residual=y, **options)
        elif op == "fprop":
            batch_norm = BatchNorm(vectors(k), vectors(k), 1e-5)
            conv_fprop(x, w, scale_shift=scale_shift, batch_norm=batch_norm, **options)
        elif op == "dgrad":
            conv_dgrad(dy, w, (side, side), **grads, **options)
        else:
            conv_wgrad(x, dy, (3, 3), scale_shift=scale_shift, **options)
    return launches[0]


def main() -> int:
    from dataclasses import asdict

    from fastres.kernels.tools.machine_code import compile_launch

    launches = {name: record(name) for name in CASES}
    codes = {
        kind: {
            name: {"kernel": launch.name, **asdict(compile_launch(launch, capability))}
            for name, launch in launches.items()
        }
        for capability, kind in PRODUCTS.items()
    }
    print(json.dumps(codes))
    return 0


@pytest.fixture(scope="module")
def codes():
    return run_compiling(__file__)


@pytest.mark.parametrize("kind", PRODUCTS.values())
def test_no_registers_spill_and_tensor_cores_multiply(codes, kind):
    for name, code in codes[kind].items():
        assert re.fullmatch(r"conv_(strip_\w+|backward)_kernel", code["kernel"]), name
        assert code["spills"] == 0, name
        assert code[kind] == code["hgmma"] + code["hmma"] + code["tcgen05"] > 0, name


@pytest.mark.parametrize("kind", PRODUCTS.values())
def test_pixels_are_loaded_and_stored_16_bytes_at_a_time(codes, kind):
    for name, code in codes[kind].items():
        bits = code["load_bits"]
        # Filters aside: rows of a window, and outputs.
        pixels = {pointer for pointer in bits if pointer in ("ptr", "producer_y_ptr")}
        assert pixels, name
        if "stem" not in name:
            assert all(bits[pointer] == 128 for pointer in pixels), (name, bits)
        if not name.startswith("wgrad"):
            assert code["wide_stores"] >= 4, name


if __name__ == "__main__":
    sys.exit(main())
