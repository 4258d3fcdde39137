"""The packed arithmetic of prologues and epilogues against the plain form, bit by bit.

The interpreter cannot run inline assembly, so the PTX itself is executed here, instruction by
instruction on arrays of numbers: what a GPU would compute, without one.
"""

import numpy as np
import pytest
import torch

from fastres.kernels.gpu import prologue
from tests.helpers.ptx import fma, run_ptx

# Pairs of numbers; every bit pattern of bf16 is among the operands.
SIZE = 1 << 15


def bf16_operands(seed):
    """Every bf16 number once, in random order: bits of pairs, and both as fp32."""
    generator = np.random.default_rng(seed)
    numbers = generator.permutation(np.arange(1 << 16, dtype=np.uint32))
    low, high = numbers[:SIZE], numbers[SIZE:]
    return (high << 16) | low, [(half << 16).view(np.float32) for half in (low, high)]


def fp32_operands(seed):
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(SIZE).astype(np.float32) for _ in range(2)]


def mask_operand(seed):
    """Which numbers of every pair stay, and the masks of both as one register."""
    inside = np.random.default_rng(seed).random((2, SIZE)) < 0.75
    low, high = np.where(inside, np.uint32(0xFFFF), np.uint32(0))
    return inside, (high << 16) | low


def rounded(values):
    """As torch rounds to bf16, in fp32."""
    return torch.from_numpy(values).to(torch.bfloat16).float()


def check_pairs(packed, expected):
    for half, values in zip((packed << 16, packed & np.uint32(0xFFFF0000)), expected, strict=True):
        found = torch.from_numpy(half.astype(np.uint32).view(np.float32))
        torch.testing.assert_close(found, rounded(values), rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_packed_activation():
    x, xs = bf16_operands(0)
    a, b = fp32_operands(1), fp32_operands(2)
    inside, mask = mask_operand(3)
    operands = {"$1": x, "$2": a[0], "$3": a[1], "$4": b[0], "$5": b[1], "$6": mask}
    found = run_ptx(prologue.ACTIVATE_PTX.value, operands)["$0"]
    z = [fma(*numbers) for numbers in zip(xs, a, b, strict=True)]
    activations = [np.where(v <= 0, np.float32(0), v) for v in z]
    check_pairs(found, np.where(inside, activations, np.float32(0)))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_packed_backward():
    g, gs = bf16_operands(0)
    y, ys = bf16_operands(1)
    c0, c1, c2 = fp32_operands(2), fp32_operands(3), fp32_operands(4)
    inside, mask = mask_operand(5)
    vectors = [v for pair in (c0, c1, c2) for v in pair]
    operands = {"$1": g, "$2": y, "$9": mask}
    operands |= {f"${i}": vector for i, vector in enumerate(vectors, start=3)}
    found = run_ptx(prologue.BACKWARD_BN_PTX.value, operands)["$0"]
    dy = [fma(gs[i], c0[i], fma(ys[i], c1[i], c2[i])) for i in range(2)]
    check_pairs(found, np.where(inside, dy, np.float32(0)))


def test_packed_rounding():
    values = fp32_operands(0)
    values[0][:4] = [np.nan, np.inf, -np.inf, -0.0]
    # Ties go to the even neighbour.
    values[1][:2] = np.array([0x3F808000, 0x3F818000], np.uint32).view(np.float32)
    registers = run_ptx(prologue.ROUND_PAIR_PTX.value, {"$3": values[0], "$4": values[1]})
    check_pairs(registers["$0"], values)
    for name, value in (("$1", values[0]), ("$2", values[1])):
        wide = torch.from_numpy(registers[name].view(np.float32))
        torch.testing.assert_close(wide, rounded(value), rtol=0, atol=0, equal_nan=True)


def test_the_plain_form_can_be_chosen():
    assert prologue.uses_assembly()
    with prologue.plain_arithmetic():
        assert not prologue.uses_assembly()
