"""Machine code of what the rules choose for narrow layers: warpgroup products only, no spills.

Every layer of 1 to 64 channels, in the networks of this project or not, as the back end launches
it: a layer that reads an image or a stored activation, one that reads the raw output of another,
one of inference. A sample runs with every test run, all of them with `-m slow`.

This file is also a program: a process that interprets kernels cannot compile them.
"""

import itertools
import json
import sys
from dataclasses import dataclass

import pytest
import torch

from tests.helpers.compiling import run_compiling

USES = ("first of a block", "second of a block", "inference")
WINDOWS = ((3, 1), (3, 2), (1, 1), (1, 2))
BUILDS = ["sm_90 bf16", "sm_90 fp16", "sm_100 bf16", "sm_100 fp16"]


@dataclass(frozen=True)
class Layer:
    """A layer of images of size x size pixels, and where it stands in a network."""

    size: int
    c: int
    k: int
    r: int
    stride: int
    use: str


def all_layers():
    """Whole and partial tiles; images of 64 channels are 8 pixels wide, in wide networks 32."""
    narrow, first_or_inference = (16, 32, 64), USES[::2]
    layers = []
    for c, k, (r, stride), use in itertools.product(narrow, narrow, WINDOWS, USES):
        sizes = {512 // max(c, k) * stride}
        if r == 3:
            sizes.add(15)
            if (max(c, k), stride) == (64, 1):
                sizes.add(32)
        layers += [Layer(size, c, k, r, stride, use) for size in sorted(sizes)]
    for c, k, size, use in itertools.product((1, 2, 3, 4), narrow, (15, 32), first_or_inference):
        layers.append(Layer(size, c, k, 3, 1, use))
    for k, (r, stride), use in itertools.product(narrow, WINDOWS[1:], first_or_inference):
        layers.append(Layer(32, 3, k, r, stride, use))
    return layers


SAMPLE = [
    Layer(15, 4, 16, 3, 1, "first of a block"),
    Layer(15, 16, 16, 3, 1, "second of a block"),
    Layer(15, 32, 64, 3, 1, "second of a block"),
    Layer(15, 64, 64, 3, 1, "second of a block"),
]


def record(layer, dtype):
    """The launches of a layer's products at batch 512."""
    from fastres.kernels.conv_shape import ConvShape
    from fastres.kernels.conv_types import ConvBN, DeferredGrad, LayerState
    from fastres.kernels.gpu import backend
    from fastres.kernels.gpu.launch import recording

    def tensor(*size):
        return torch.empty(size, dtype=dtype, device="meta", memory_format=torch.channels_last)

    def vectors(*size):
        return torch.empty(size, device="meta")

    size, c, k, r = layer.size, layer.c, layer.k, layer.r
    shape = ConvShape(512, size, size, c, k, r, r, layer.stride, r // 2)
    x, y = tensor(512, c, size, size), tensor(512, k, shape.P, shape.Q)
    conv = ConvBN(
        tensor(k, c, r, r),
        vectors(k),
        vectors(k),
        layer.stride,
        r // 2,
        dw_dtype=torch.float32,
    )
    with recording() as launches:
        if layer.use == "inference":
            backend.conv_folded(x, conv, vectors(2, k), y, True)
        else:
            producer = LayerState(x, vectors(5, c)) if "second" in layer.use else None
            backend.conv_bn(x, conv, None if producer is None else producer.scale_shift)
            backend.conv_backward(
                DeferredGrad(y, y, vectors(3, k)),
                x,
                conv,
                producer=producer,
                producer_weight=None if producer is None else vectors(c),
                shortcut=x if producer is None and c >= 16 else None,
                need_dx=c >= 16,
            )
    return [launch for launch in launches if launch.name.startswith("conv")]


def main() -> int:
    """Compile for the GPUs and precisions, and the layers, that the arguments name."""
    from fastres.host import usable_cores
    from fastres.kernels.gpu.launch_table import assume_entries, assume_gpu
    from fastres.kernels.tools.codegen_report import architecture, compile_entries, plan_launch
    from fastres.kernels.tools.network_launches import NamedLaunch
    from fastres.kernels.tools.networks import PRECISIONS

    layers = SAMPLE if sys.argv[1] == "sample" else all_layers()
    plans = []
    for arch, precision in (build.split() for build in sys.argv[2:]):
        with assume_gpu(architecture(arch)), assume_entries({}):
            plans += [
                plan_launch(NamedLaunch("", str(layer), launch, 1), arch, "", precision, "rules")
                for layer in layers
                for launch in record(layer, PRECISIONS[precision].dtype)
            ]
    # The sample in this process, which has imported everything and keeps disassemblies.
    entries = compile_entries(plans, 1 if layers is SAMPLE else usable_cores())
    print(json.dumps([describe(entry) for entry in entries]))
    return 0


def describe(entry):
    names = ("arch", "precision", "layer", "kernel", "variant", "tile")
    counts = ("registers", "spills", "hgmma", "hmma", "tcgen05")
    return {name: getattr(entry.plan, name) for name in names} | {
        name: getattr(entry.code, name) for name in counts
    }


def check(layers, builds):
    """Every product by the instructions of its GPU alone, and every register in the file."""
    codes = run_compiling(__file__, layers, *builds)
    kinds = {"sm_90": "hgmma", "sm_100": "tcgen05"}
    wrong = [
        code
        for code in codes
        if code["spills"]
        or not code[kinds[code["arch"]]]
        or code[kinds[code["arch"]]] != code["hgmma"] + code["hmma"] + code["tcgen05"]
    ]
    assert wrong == []
    return codes


def test_a_sample():
    codes = check("sample", BUILDS[:1])
    forms = {code["kernel"] for code in codes}
    assert forms >= {"conv_strip_wgrad_kernel", "conv_wgrad_pixel_kernel", "conv_backward_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDS)
def test_all_layers(build):
    assert len(check("all", [build])) > 400


if __name__ == "__main__":
    sys.exit(main())
