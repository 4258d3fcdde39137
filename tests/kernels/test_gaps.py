"""Operands that are slices of larger tensors: each of those of each kernel in turn.

A form that wants tensors without gaps gives the launch to im2col tiles, whose results are then
those of the same tiles without gaps, bit for bit. What lies in the gaps is NaN.
"""

import functools
from dataclasses import replace

import pytest
import torch

from fastres.kernels.gpu.launch import recording
from tests.helpers.interpreter import DEVICE, strict_memory  # noqa: F401
from tests.helpers.kernel_cases import make_tensors
from tests.helpers.kernel_forms import FORMS, all_tensors, map_tensors

pytestmark = pytest.mark.usefixtures("strict_memory")

BF16 = torch.bfloat16
HAS_TMA = DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= (9, 0)

# How many times as large the tensor is that an operand is a slice of, in each dimension of NHWC.
GAPS = {"pixels": (1, 1, 1, 2), "rows": (1, 1, 2, 1), "images": (1, 2, 1, 1), "batch": (2, 1, 1, 1)}

# Every operand of every kernel, with gaps of each kind by turns.
OPERANDS = [(name, operand) for name, form in FORMS.items() for operand in form.operands]
CASES = [(*case, list(GAPS)[i % len(GAPS)]) for i, case in enumerate(OPERANDS)]
CASES += [("strip fprop", "x", kind) for kind in GAPS if ("strip fprop", "x", kind) not in CASES]


def with_gaps(tensor, kind):
    """The same numbers as a slice of a larger tensor, which is NaN elsewhere."""
    n, c, h, w = tensor.shape
    sizes = [size * times for size, times in zip((n, h, w, c), GAPS[kind], strict=True)]
    large = torch.full(sizes, torch.nan, dtype=tensor.dtype, device=tensor.device)
    # Every other image, and in an image what lies at its end.
    part = large[GAPS[kind][0] - 1 :: GAPS[kind][0], -h:, -w:, -c:].permute(0, 3, 1, 2)
    part.copy_(tensor)
    assert part.shape == tensor.shape
    return part


@functools.cache
def dense_results(name, form_of_tiles):
    form = FORMS[name]
    config = replace(form.config, form=form_of_tiles, grid_size=0)
    return all_tensors(form.run(make_tensors(form.shape, BF16), form.shape, config))


@pytest.mark.parametrize(("name", "operand", "kind"), CASES)
def test_an_operand_with_gaps_gives_the_bits_of_one_without(name, operand, kind):
    form = FORMS[name]
    seen = []

    def cut(field, tensor):
        if field != operand:
            return tensor
        seen.append(with_gaps(tensor, kind))
        return seen[-1]

    t = map_tensors(cut, make_tensors(form.shape, BF16))
    assert len(seen) == 1
    with recording() as launches:
        result = form.run(t, form.shape, form.config)
    if form.config.form == "fused":
        # Whoever asks launches two kernels instead.
        assert result is None
        assert not launches
        return
    (launch,) = launches
    if form.config.form in ("strip", "pixel"):
        assert launch.name in ("conv_fprop_kernel", "conv_dgrad_kernel", "conv_wgrad_kernel")
        expected = dense_results(name, "im2col")
    else:
        assert launch.name == form.kernel or not HAS_TMA
        expected = dense_results(name, form.config.form)
    found = all_tensors(result)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", FORMS)
def test_images_of_a_larger_batch_have_no_gaps(name):
    """Neighbouring images: the form is kept, and begins where they do."""
    form = FORMS[name]

    def cut(field, tensor):
        if field not in form.operands:
            return tensor
        around = torch.full_like(tensor[:1], torch.nan)
        whole = torch.cat([around, tensor, around]).to(memory_format=torch.channels_last)
        return whole[1:-1]

    t = make_tensors(form.shape, BF16)
    expected = all_tensors(form.run(t, form.shape, form.config))
    with recording() as launches:
        found = all_tensors(form.run(map_tensors(cut, t), form.shape, form.config))
    assert launches[0].name == form.kernel or not HAS_TMA
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
