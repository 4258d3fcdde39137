"""Inline assembly without a GPU: its PTX executed on numpy arrays, in Triton's interpreter too.

The interpreter refuses inline assembly, so kernels leave theirs out there and compute in a plain
form. `interpret_assembly` lets them keep it. Operands are bound as LLVM binds them, by the list of
constraints: results first, then the operands in their order, each as many registers as `pack`
elements of it fill, 16-bit elements two to a register and the first of them in the lower half.
"""

import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

__all__ = ["fma", "interpret_assembly", "run_ptx"]


def _bits(value):
    return value.view(np.uint32)


def _to_bf16(value, *, relu):
    """fp32 to the bits of bf16, to nearest even; a NaN becomes the canonical one."""
    if relu:
        value = np.where(value < 0, np.float32(0), value)
    wide = _bits(value.astype(np.float32))
    rounded = (wide + np.uint32(0x7FFF) + ((wide >> 16) & 1)) >> 16
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint32)


def fma(x, y, z):
    """`x * y + z` rounded once, where 8 bits are enough for x or y.

    A product of two fp32 numbers is exact in fp64; its sum is rounded twice, which differs from a
    fused one only where the first rounding makes a tie: with 8-bit operands, never seen.
    """
    return (x.astype(np.float64) * y + z).astype(np.float32)


def run_ptx(text: str, operands: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Execute `text` on 32-bit registers; operands {"$1": array, ...}, and all registers after."""
    registers = dict(operands)

    def read(name):
        return np.uint32(int(name, 16)) if name.startswith("0x") else _bits(registers[name])

    for operation, rest in re.findall(r"^ *(\w[\w.]*) ([^;]*);", text, re.MULTILINE):
        target, *sources = [name.strip() for name in rest.split(",")]
        if operation == "shl.b32":
            result = read(sources[0]) << np.uint32(int(sources[1]))
        elif operation == "and.b32":
            result = read(sources[0]) & read(sources[1])
        elif operation == "mov.b32":
            result = read(sources[0]).copy()
        elif operation == "fma.rn.f32":
            result = _bits(fma(*(read(name).view(np.float32) for name in sources)))
        else:
            assert operation in ("cvt.rn.bf16x2.f32", "cvt.rn.relu.bf16x2.f32")
            high, low = (
                _to_bf16(read(name).view(np.float32), relu="relu" in operation) for name in sources
            )
            result = (high << 16) | low
        registers[target] = result.astype(np.uint32)
    return registers


def _to_registers(data: np.ndarray) -> list[np.ndarray]:
    """The two neighbours of every pair of elements: in one register, or in one each."""
    first, second = data.reshape(-1, 2).T
    if data.itemsize == 4:
        return [np.ascontiguousarray(first), np.ascontiguousarray(second)]
    low, high = (np.ascontiguousarray(half).view(np.uint16) for half in (first, second))
    return [low.astype(np.uint32) | (high.astype(np.uint32) << 16)]


def _from_registers(registers: Sequence[np.ndarray]) -> np.ndarray:
    """The elements in their order, as unsigned integers."""
    if len(registers) == 2:
        return np.stack(registers, axis=1).reshape(-1)
    low, high = registers[0] & np.uint32(0xFFFF), registers[0] >> np.uint32(16)
    return np.stack([low, high], axis=1).reshape(-1).astype(np.uint16)


def _execute(text: str, constraints: str, values: Sequence[Any], types: Sequence[Any]) -> list[Any]:
    """What `InterpreterBuilder.create_inline_asm` would compute; the results' handles."""
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype

    letters = [letter.strip("=&") for letter in constraints.split(",")]
    widths = [ty.scalar.primitive_bitwidth for ty in types]
    num_results = sum(2 if width == 32 else 1 for width in widths)
    assert constraints.count("=") == num_results
    inputs = [register for value in values for register in _to_registers(value.data)]
    assert len(letters) == num_results + len(inputs)
    for letter, register in zip(letters[num_results:], inputs, strict=True):
        assert letter == ("f" if register.dtype == np.float32 else "r")
    operands = {f"${num_results + i}": register for i, register in enumerate(inputs)}
    registers = run_ptx(text, operands)
    results, first = [], 0
    for ty, width in zip(types, widths, strict=True):
        last = first + (2 if width == 32 else 1)
        elements = _from_registers([registers[f"${i}"] for i in range(first, last)])
        data = elements.view(_get_np_dtype(ty)).reshape(values[0].data.shape)
        results.append(TensorHandle(data, ty.scalar))
        first = last
    return results


def interpret_assembly(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let interpreted kernels execute their inline assembly, and list the texts as they do."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    from fastres.kernels.gpu import prologue

    executed: list[str] = []

    def create_inline_asm(self, text, constraints, values, types, is_pure, pack):
        assert pack == 2
        executed.append(text)
        results = _execute(text, constraints, values, types)
        return SimpleNamespace(get_result=results.__getitem__)

    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", create_inline_asm)
    monkeypatch.setattr(prologue, "INTERPRETED", tl.constexpr(False))
    return executed
