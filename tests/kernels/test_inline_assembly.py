"""Whole kernels with their inline assembly, interpreted, against the plain form bit by bit.

test_prologue.py shows that the assembly is right for the operands that it expects. What a kernel
hands to it, in which order, masked how and for which pixels, is seen here.
"""

import pytest
import torch

from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.gpu import prologue
from fastres.kernels.gpu.launch import recording
from tests.helpers.interpreter import HAS_GPU, strict_memory  # noqa: F401
from tests.helpers.kernel_cases import make_tensors
from tests.helpers.kernel_forms import FORMS, all_tensors, map_tensors
from tests.helpers.ptx import interpret_assembly

pytestmark = [
    pytest.mark.usefixtures("strict_memory"),
    pytest.mark.skipif(HAS_GPU, reason="a GPU runs the assembly itself, and has tests of its own"),
]

ACTIVATE, BACKWARD, ROUND = (
    text.value
    for text in (prologue.ACTIVATE_PTX, prologue.BACKWARD_BN_PTX, prologue.ROUND_PAIR_PTX)
)

# What each launch must have packed. Gradients of im2col and TMA tiles are rounded in plain form.
TEXTS = {
    "im2col fprop": {ACTIVATE, ROUND},
    "im2col folded fprop": {ROUND},
    "im2col dgrad": {BACKWARD},
    "im2col wgrad": {ACTIVATE, BACKWARD},
    "tma fprop": {ACTIVATE, ROUND},
    "tma dgrad": {BACKWARD},
    "strip fprop": {ACTIVATE, ROUND},
    "strip folded fprop": {ROUND},
    "strip dgrad": {BACKWARD, ROUND},
    "strip wgrad": {ACTIVATE, BACKWARD},
    "pixel fprop": {ACTIVATE, ROUND},
    "pixel folded fprop": {ROUND},
    "pixel dgrad": {BACKWARD, ROUND},
    "pixel dgrad, stride 2": {BACKWARD, ROUND},
    "pixel wgrad": {ACTIVATE, BACKWARD},
    "fused, producer": {ACTIVATE, BACKWARD, ROUND},
    "fused, shortcut": {BACKWARD, ROUND},
}


def shortened(name, tensor):
    """Per-channel numbers of 8 bits: their products are exact, whether fused with a sum or not."""
    return tensor.bfloat16().to(tensor.dtype)


@pytest.mark.parametrize("odd", [False, True], ids=["whole", "odd"])
@pytest.mark.parametrize("name", TEXTS)
def test_the_packed_form_gives_the_bits_of_the_plain_one(name, odd, monkeypatch):
    executed = interpret_assembly(monkeypatch)
    form = FORMS[name]
    # Patches and tiles that hang over in each direction, and padding all around.
    shape = ConvShape(3, 5, 7, 16, 16, stride=form.shape.stride) if odd else form.shape
    t = map_tensors(shortened, make_tensors(shape, torch.bfloat16))
    with recording() as launches:
        packed = all_tensors(form.run(t, shape, form.config))
        texts = {*executed}
        with prologue.plain_arithmetic():
            plain = all_tensors(form.run(t, shape, form.config))
    if not odd:
        assert {launch.name for launch in launches} == {form.kernel}
    assert texts == TEXTS[name]
    for a, b in zip(packed, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
