"""Tensors of more than 2^31 elements: where offsets need 64 bits, and that every kernel has them.

Kernels are interpreted in the test process, so they are compiled in another one, which this file is
the program of. It stops at Triton's own intermediate representation (TTIR), where pointers still
have their parameters' names.
"""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
import triton.language as tl

from fastres.kernels.gpu.checks import index_dtype
from fastres.kernels.gpu.launch import recording
from fastres.kernels.tools.machine_code import to_build
from tests.helpers.compiling import run_compiling
from tests.helpers.interpreter import DEVICE, needs_gpu
from tests.helpers.kernel_cases import make_tensors, wgrad
from tests.helpers.kernel_forms import FORMS, all_tensors, map_tensors
from tests.helpers.numerics import assert_like_eager, assert_statistics

BF16 = torch.bfloat16

# Elements that 32-bit offsets do not reach, and what tails of tiles may reach beyond the last one.
LIMIT, TAIL = 2**31, 2**20


def meta(*size):
    return torch.empty(size, dtype=BF16, device="meta")


def with_image_stride(images, stride):
    return torch.empty_strided((images, 16, 4, 4), (stride, 1, 64, 16), device="meta")


@pytest.mark.parametrize(
    ("tensors", "wanted"),
    [
        ([meta(LIMIT - TAIL)], tl.int32),
        ([meta(LIMIT - TAIL + 1)], tl.int64),
        ([meta(2, (LIMIT - TAIL) // 2)], tl.int32),
        ([meta(2, (LIMIT - TAIL) // 2 + 1)], tl.int64),
        # 256 numbers of an image, the last of which is the one that matters.
        ([with_image_stride(2, LIMIT - TAIL - 256)], tl.int32),
        ([with_image_stride(2, LIMIT - TAIL - 255)], tl.int64),
        ([with_image_stride(3, (LIMIT - TAIL) // 2)], tl.int64),
        ([meta(8), None, meta(LIMIT)], tl.int64),
        ([meta(LIMIT), None, meta(8)], tl.int64),
        ([None], tl.int32),
    ],
)
def test_offsets_have_64_bits_where_32_do_not_reach(tensors, wanted):
    assert index_dtype(*tensors) == wanted


def enlarged(t, size, device):
    """Activations of `size` images, all of them zeros but the last, which are those of t."""

    def enlarge(name, tensor):
        if tensor.dim() != 4 or name == "w":
            return tensor.to(device)
        like = {"dtype": tensor.dtype, "device": device}
        large = torch.empty(
            (size, *tensor.shape[1:]), memory_format=torch.channels_last, **like
        ).zero_()
        large[-len(tensor) :] = tensor
        return large

    return map_tensors(enlarge, t)


def large_batch(t):
    """Images enough for 2^31 elements in the larger of input and output: at most 30 GB in all."""
    return LIMIT // max(v[0].numel() for v in (t.x, t.dy.g)) + 8


class TtirReachedError(Exception):
    """Ends a compilation behind its first stage."""


def to_ttir(launch):
    """The TTIR of a recorded launch."""
    from triton.backends.nvidia.compiler import CUDABackend

    def stop(module, *args):
        raise TtirReachedError(str(module))

    before, CUDABackend.make_ttgir = CUDABackend.make_ttgir, staticmethod(stop)
    try:
        to_build(launch, 90).run_launcher()
    except TtirReachedError as reached:
        return reached.args[0]
    finally:
        CUDABackend.make_ttgir = before
    raise AssertionError("the kernel came from Triton's cache")


def offset_types(ttir):
    """Of which types the offsets are that are added to each parameter: {"x_ptr": {"i64"}}.

    To the parameter itself: what is added to the sum, such as taps, stays within one image.
    """
    parameter = {name: name[1:] for name in re.findall(r"(%\w+): !tt\.ptr", ttir)}
    types = {}
    # A later region may define a name again, so definitions are followed as they come.
    for line in ttir.splitlines():
        found = re.match(r"\s*(%\w+) = (\S+) (%\w+)", line)
        if found is None:
            continue
        name, operation, base = found.groups()
        if operation == "tt.addptr" and parameter.get(base) is not None:
            offsets = re.search(r", (?:tensor<(?:\d+x)*)?(i\d+)>? loc", line)
            types.setdefault(parameter[base], set()).add(offsets.group(1))
        is_same = operation in ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape")
        parameter[name] = parameter.get(base) if is_same else None
    return types


def describe(form):
    """What the test below asks of one form, compiled for tensors of 2^31 elements."""
    t = make_tensors(form.shape, BF16)
    batch = large_batch(t)
    with recording() as launches:
        form.run(enlarged(t, batch, "meta"), replace(form.shape, N=batch), form.config)
    (launch,) = launches
    activations = [
        name
        for name, value in launch.args.items()
        if isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[0] == batch
    ]
    types = offset_types(to_ttir(launch))
    return {
        "kernel": launch.name,
        "index": str(launch.args["INDEX"]),
        "types": {name: sorted(types.get(name, ())) for name in activations},
    }


def main() -> int:
    print(json.dumps({name: describe(form) for name, form in FORMS.items()}))
    return 0


@pytest.fixture(scope="module")
def descriptions(tmp_path_factory):
    # From an empty cache, for what is found in one never comes by TTIR.
    return run_compiling(__file__, TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))


@pytest.mark.parametrize("name", FORMS)
def test_offsets_into_every_large_tensor_have_64_bits(name, descriptions):
    form, found = FORMS[name], descriptions[name]
    assert found["kernel"] == form.kernel
    assert found["index"] == "int64"
    # TMA takes coordinates, which are small.
    by_descriptor = {"tma fprop": 1, "tma folded fprop": 1, "tma dgrad": 2}.get(name, 0)
    assert len(found["types"]) >= len(form.operands) - by_descriptor
    assert {*map(tuple, found["types"].values())} <= {("i64",)}, found["types"]


def numbers_that_leave_zeros(name, tensor):
    """Shifts of 0: what images of zeros become in a prologue, and what follows from them, is 0."""
    if name in ("scale_shift", "dy.coefficients"):
        tensor = tensor.clone()
        tensor[-1] = 0
    return tensor


@needs_gpu
@pytest.mark.parametrize("name", FORMS)
def test_behind_2_to_the_31_elements(name):
    """The last images of a batch that 32-bit offsets cannot reach are computed as they are alone.

    The others are zeros, so that filter gradients and statistics are known too.
    """
    form = FORMS[name]
    t = map_tensors(numbers_that_leave_zeros, make_tensors(form.shape, BF16))
    batch = large_batch(t)
    check_last_images(form, t, batch)


def filter_gradient(form, t):
    """What the kernel of the form computes beside or instead of dx."""
    if "producer.y" in form.operands:
        t = t._replace(x=t.producer.y, scale_shift=t.producer.scale_shift)
    return wgrad(t, form.shape, "shortcut" not in form.operands, True)


def check_last_images(form, t, batch):
    few = 264 if DEVICE.type == "cuda" else 3
    config = replace(form.config, grid_size=form.config.grid_size and few, split_k=few)
    large = enlarged(t, batch, DEVICE)
    alone = all_tensors(form.run(t, form.shape, config))
    found = all_tensors(form.run(large, replace(form.shape, N=batch), config))
    num_images = len(t.x)
    is_compared = False
    for one, other in zip(alone, found, strict=True):
        if one.dim() == 4 and one.shape[0] == num_images:
            torch.testing.assert_close(other[-num_images:], one, rtol=0, atol=0)
            is_compared = True
        elif one.shape == t.w.shape:
            eager, truth = (filter_gradient(form, v) for v in (t, t.double()))
            assert_like_eager("dw", other, eager, truth)
            is_compared = True
    if form.kernel == "bn_stats_kernel":
        pixels = t.dy.y.double().sum((0, 2, 3)), t.dy.y.double().abs().sum((0, 2, 3))
        mean, size = (v * num_images / batch / t.dy.y[:, 0].numel() for v in pixels)
        assert_statistics("mean", found[0][0], mean, size)
        is_compared = True
    assert is_compared


if __name__ == "__main__":
    sys.exit(main())
