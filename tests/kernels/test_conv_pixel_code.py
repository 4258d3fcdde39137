"""Machine code of the pixel form as `pixel_config` chooses it: registers, products, load widths.

This file is also a program: a process that interprets kernels cannot compile them.
"""

import json
import sys
from dataclasses import asdict

import pytest
import torch

from tests.helpers.compiling import run_compiling

# op, (size, C, K, R, stride), a prologue or deferred dy, a shortcut, a producer.
LAUNCHES = [
    ("fprop", (16, 32, 32, 3, 1), True, False, False),
    ("fprop", (8, 64, 64, 3, 1), True, False, False),
    ("fprop", (15, 64, 64, 3, 1), True, False, False),
    ("dgrad", (16, 32, 32, 3, 1), True, True, True),
    ("dgrad", (8, 64, 64, 3, 1), True, False, True),
    ("dgrad", (32, 64, 64, 3, 1), True, True, True),
    ("dgrad", (32, 16, 32, 3, 2), True, True, True),
    ("dgrad", (16, 32, 64, 3, 2), True, True, True),
    ("dgrad", (16, 32, 64, 1, 2), True, True, True),
    ("wgrad", (16, 32, 32, 3, 1), True, False, False),
    ("wgrad", (8, 64, 64, 3, 1), True, False, False),
    ("wgrad", (32, 64, 64, 3, 1), True, False, False),
    ("wgrad", (8, 32, 64, 3, 1), True, False, False),
]
BUILDS = [(90, "bfloat16"), (100, "bfloat16")]


def record(op, layer, prologue, has_shortcut, has_producer, dtype):
    """The launch of a layer at batch 512."""
    from fastres.kernels.conv_shape import ConvShape
    from fastres.kernels.conv_types import BatchNorm, DeferredGrad, LayerState
    from fastres.kernels.gpu.conv_dgrad import conv_dgrad
    from fastres.kernels.gpu.conv_fprop import conv_fprop
    from fastres.kernels.gpu.conv_wgrad import conv_wgrad
    from fastres.kernels.gpu.launch import recording
    from fastres.kernels.gpu.launch_rules import pixel_config

    size, c, k, r, stride = layer
    shape = ConvShape(512, size, size, c, k, r, r, stride, r // 2)

    def pixels(*size):
        channels_last = torch.channels_last
        return torch.empty(size, dtype=dtype, device="meta", memory_format=channels_last)

    def vector(*size):
        return torch.empty(size, device="meta")

    x, w = pixels(512, c, size, size), pixels(k, c, r, r)
    g = pixels(512, k, shape.P, shape.Q)
    dy = DeferredGrad(g, g, vector(3, k)) if prologue else g
    scale_shift = vector(2, c) if prologue else None
    options = {"stride": stride, "padding": r // 2, "config": pixel_config(op, shape, dtype)}
    with recording() as launches:
        if op == "fprop":
            batch_norm = BatchNorm(vector(k), vector(k), 1e-5)
            conv_fprop(x, w, scale_shift=scale_shift, batch_norm=batch_norm, **options)
        elif op == "dgrad":
            producer = LayerState(x, vector(5, c)) if has_producer else None
            conv_dgrad(
                dy,
                w,
                (size, size),
                shortcut=x if has_shortcut else None,
                producer=producer,
                producer_weight=vector(c) if has_producer else None,
                **options,
            )
        else:
            conv_wgrad(x, dy, (r, r), scale_shift=scale_shift, **options)
    return launches[0]


def main() -> int:
    from fastres.kernels.tools.machine_code import compile_launch

    codes = []
    for arguments in LAUNCHES:
        for capability, dtype in BUILDS:
            launch = record(*arguments, getattr(torch, dtype))
            code = asdict(compile_launch(launch, capability))
            codes.append({"name": launch.name, "num_warps": launch.num_warps, **code})
    print(json.dumps(codes))
    return 0


@pytest.fixture(scope="module")
def codes():
    return run_compiling(__file__)


@pytest.mark.parametrize("build", range(len(BUILDS)), ids=lambda i: f"sm_{BUILDS[i][0]}")
@pytest.mark.parametrize("launch", range(len(LAUNCHES)), ids=lambda i: str(LAUNCHES[i][:2]))
def test_registers_products_and_widths(codes, launch, build):
    code = codes[launch * len(BUILDS) + build]
    assert "pixel" in code["name"]
    assert code["spills"] == 0
    op, (size, c, k, *_), *_ = LAUNCHES[launch]
    # A warpgroup makes products of 64 rows: channels or filters, where it is a filter gradient.
    few_rows = op == "wgrad" and max(c, k) < 64
    kind = "hmma" if few_rows else {90: "hgmma", 100: "tcgen05"}[BUILDS[build][0]]
    assert code[kind] == code["hgmma"] + code["hmma"] + code["tcgen05"] > 0
    # Two programs a multiprocessor at least, one of which computes while the other waits; partial
    # tiles of 64 channels do not fit one of four warps.
    programs = 1 if (op, size % 2) == ("fprop", 1) else 2
    assert programs * code["num_warps"] * 32 * -(-code["registers"] // 8) * 8 <= 65536
    # Narrow are filters of 16 channels, and partials with what the last program makes of them.
    assert code["load_bits"]["ptr"] == 128
    assert code["narrow_loads"] <= 11
    assert code["narrow_stores"] <= 13
    assert code["wide_loads"] > 2 * code["narrow_loads"]
    assert code["wide_stores"] > 0


if __name__ == "__main__":
    sys.exit(main())
