"""Machine code of TMA loads in a persistent grid and in TF32, which the codegen report leaves out.

This file is also a program: a process that interprets kernels cannot compile them.
"""

import json
import sys
from dataclasses import asdict, replace

import pytest
import torch

from tests.helpers.compiling import run_compiling

# op, compute capability, dtype; fp32 is rounded to TF32.
PRODUCTS = [
    ("fprop", 90, "bfloat16"),
    ("dgrad", 90, "bfloat16"),
    ("fprop", 100, "bfloat16"),
    ("fprop", 90, "float32"),
]


def code_of(op, capability, dtype, grid_size):
    """The machine code of a 3x3 convolution of 64 channels, with its prologue."""
    from fastres.kernels.conv_shape import ConvShape
    from fastres.kernels.conv_types import BatchNorm, DeferredGrad
    from fastres.kernels.gpu.conv_dgrad import conv_dgrad
    from fastres.kernels.gpu.conv_fprop import conv_fprop
    from fastres.kernels.gpu.launch import recording
    from fastres.kernels.gpu.launch_rules import tma_config
    from fastres.kernels.tools.machine_code import compile_launch

    dtype = getattr(torch, dtype)
    tf32 = dtype == torch.float32
    shape = ConvShape(512, 16, 16, 64, 64)
    config = replace(tma_config(op, shape, dtype, tf32=tf32), grid_size=grid_size)
    x, w = (
        torch.empty(size, dtype=dtype, device="meta", memory_format=torch.channels_last)
        for size in ((512, 64, 16, 16), (64, 64, 3, 3))
    )
    options = {"padding": 1, "allow_tf32": tf32, "config": config}
    with recording() as launches:
        if op == "fprop":
            ab = torch.empty(2, 64, device="meta")
            vector = torch.empty(64, device="meta")
            norm = BatchNorm(vector, vector)
            conv_fprop(x, w, scale_shift=ab, batch_norm=norm, **options)
        else:
            dy = DeferredGrad(x, x, torch.empty(3, 64, device="meta"))
            conv_dgrad(dy, w, (16, 16), shortcut=x, **options)
    (launch,) = launches
    return {"grid": launch.grid, **asdict(compile_launch(launch, capability))}


def main() -> int:
    codes = [[code_of(*product, grid_size) for grid_size in (0, 132)] for product in PRODUCTS]
    print(json.dumps(codes))
    return 0


@pytest.fixture(scope="module")
def codes():
    return run_compiling(__file__)


@pytest.mark.parametrize(
    "product", range(len(PRODUCTS)), ids=lambda i: " ".join(map(str, PRODUCTS[i]))
)
def test_a_persistent_grid_loads_by_tma_and_multiplies_on_tensor_cores(codes, product):
    single, persistent = codes[product]
    assert single["grid"] != persistent["grid"] == [132]
    kind = {90: "hgmma", 100: "tcgen05"}[PRODUCTS[product][1]]
    for code in (single, persistent):
        assert code["tma_loads"] > 0
        assert code[kind] > 0
        assert code["spills"] == 0
    # The flattened loop holds the products once, as the loop over taps does.
    assert persistent[kind] == single[kind]


if __name__ == "__main__":
    sys.exit(main())
