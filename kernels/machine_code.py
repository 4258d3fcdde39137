"""Machine code of a recorded launch, compiled for any NVIDIA architecture without a GPU.

`compile_launch` specialises a kernel exactly as the launch would (shapes as constants, 16-byte
aligned pointers, integers divisible by 16), assembles it with the ptxas of the Triton wheel, and
counts in the disassembly what decides a kernel's speed.

    with recording() as launches:
        conv_fprop(x_meta, w_meta, padding=1)
    code = compile_launch(launches[0], 90)
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastres.kernels.launch import Launch

__all__ = ["MachineCode", "compile_launch", "disassemble"]

POINTER_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


@dataclass(frozen=True)
class MachineCode:
    """Counts in the disassembly of one kernel; instructions are counted once, loops or not.

    registers: of one thread. shared_bytes: of one program. spills: loads and stores of registers
    that did not fit. hgmma: Hopper's warpgroup products. hmma: tensor-core products of Ampere.
    tcgen05: Blackwell's. wide_loads: 16-byte loads from global memory; narrow_loads: all others.
    wide_stores and narrow_stores: the same for stores.
    """

    registers: int
    shared_bytes: int
    spills: int
    hgmma: int
    hmma: int
    tcgen05: int
    wide_loads: int
    narrow_loads: int
    wide_stores: int
    narrow_stores: int

    @property
    def tensor_core_instructions(self) -> int:
        """Matrix products of any generation."""
        return self.hgmma + self.hmma + self.tcgen05


def _specialise(kernel: Any, args: Mapping[str, Any]) -> ASTSource:
    """The kernel with the types and constants that Triton's launcher would give it."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(kernel.params):
        value = args[parameter.name]
        aligned = isinstance(value, torch.Tensor)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTER_TYPES[value.dtype]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            signature[parameter.name] = "fp32"
        if aligned and (i,) not in constants:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def disassemble(cubin: bytes) -> tuple[str, int]:
    """The instructions of a cubin as text, and the registers of one thread."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        sass, usage = (
            subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        )
    found = re.search(r"REG:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no registers: {usage!r}")
    return sass, int(found.group(1))


def compile_launch(launch: Launch, compute_capability: int) -> MachineCode:
    """Compile the kernel of a recorded launch, e.g. for 80, 90 or 100, and count its instructions.

    Raises: ValueError: when the kernels are interpreted in this process and cannot be compiled.
    """
    if not isinstance(launch.kernel, triton.JITFunction):
        raise ValueError("kernels are interpreted; unset TRITON_INTERPRET to compile them")
    compiled = triton.compile(
        _specialise(launch.kernel, launch.args),
        target=GPUTarget("cuda", compute_capability, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    sass, registers = disassemble(compiled.asm["cubin"])

    def count(pattern: str) -> int:
        return len(re.findall(pattern, sass))

    wide_loads = count(r"\bLDG(?:STS)?\.\S*128")
    wide_stores = count(r"\bSTG\.\S*128")
    return MachineCode(
        registers=registers,
        shared_bytes=compiled.metadata.shared,
        spills=count(r"\b(?:STL|LDL)\b"),
        hgmma=count(r"\bHGMMA\b"),
        hmma=count(r"\bHMMA\b"),
        tcgen05=count(r"\bUTC\w*MMA\b"),
        wide_loads=wide_loads,
        narrow_loads=count(r"\bLDG(?:STS)?\b") - wide_loads,
        wide_stores=wide_stores,
        narrow_stores=count(r"\bSTG\b") - wide_stores,
    )
