"""Machine code of a recorded launch, compiled for any NVIDIA architecture without a GPU.

`to_build` asks Triton's own launcher how it would specialize the kernel (shapes as constants,
16-byte aligned pointers, integers divisible by 16); `compile_build` has the launcher compile that
for a GPU that a driver stands in for, and counts in the code what decides a kernel's speed.

    with recording() as launches:
        conv_fprop(x_meta, w_meta, padding=1)
    code = compile_launch(launches[0], 90)
"""

import ast
import functools
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import triton

from fastres.kernels.gpu import launch
from fastres.kernels.gpu.cache_key import settle_cache_key
from fastres.kernels.gpu.launch import Launch
from fastres.kernels.tools.cache_keys import collecting_keys
from fastres.kernels.tools.control_flow import ProgramCount, count_program
from fastres.kernels.tools.stand_in_driver import standing_in

__all__ = [
    "Build",
    "MachineCode",
    "compile_build",
    "compile_launch",
    "count_instructions",
    "disassemble",
    "to_build",
]

_LOAD = re.compile(r"\bld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s")
_COUNTED = re.compile(r"\b(?:LDG|STG|STL|LDL|HGMMA|HMMA|UTC|UTMALDG)\S*")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S* \[[^]]+\], \[[^]]+\], (0x\w+|\d+)")


@dataclass(frozen=True)
class Build:
    """A kernel as a launch on one kind of GPU builds it; hashable and fit for pickling.

    module, kernel: where the kernel is. compute_capability: e.g. 90. key: of its entry in Triton's
    cache, see cache_keys.py. args, options: a launch that has this key.
    """

    module: str
    kernel: str
    compute_capability: int
    key: str
    args: Mapping[str, Any] = field(compare=False, repr=False)
    options: Mapping[str, Any] = field(compare=False, repr=False)

    def run_launcher(self, *, remembers: bool = True) -> Any:
        """Let Triton's launcher compile the kernel, and return what it returns."""
        kernel = getattr(importlib.import_module(self.module), self.kernel)
        settle_cache_key(kernel)
        with standing_in(self.compute_capability, remembers=remembers):
            return kernel.run(grid=(1,), warmup=True, **self.args, **self.options)


@dataclass(frozen=True)
class MachineCode:
    """Counts in the code of one kernel; what is not `program` is counted once, loops or not.

    registers: of one thread. shared_bytes: of one program. spills: loads and stores of registers
    that did not fit. hgmma: Hopper's warpgroup products. hmma: tensor-core products of Ampere.
    tcgen05: Blackwell's. tma_loads: TMA copies, of Hopper and later.
    wide_loads: 16-byte loads from global memory by a thread; narrow_loads: all others. wide_stores
    and narrow_stores: the same for stores. load_bits: for each pointer that the source loads from,
    as the loading function calls it, the width of its narrowest load. program: instructions that a
    warp issues.
    """

    registers: int
    shared_bytes: int
    spills: int
    hgmma: int
    hmma: int
    tcgen05: int
    tma_loads: int
    wide_loads: int
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    load_bits: dict[str, int]
    program: ProgramCount

    @property
    def tensor_core_instructions(self) -> int:
        """Matrix products of any generation."""
        return self.hgmma + self.hmma + self.tcgen05


def to_build(launch: Launch, compute_capability: int) -> Build:
    """What compiling a recorded launch takes; nothing is compiled yet.

    Raises: ValueError: when the kernels are interpreted in this process and cannot be compiled.
    """
    if not isinstance(launch.kernel, triton.JITFunction):
        raise ValueError("kernels are interpreted; unset TRITON_INTERPRET to compile them")
    fn = launch.kernel.fn
    build = Build(fn.__module__, fn.__name__, compute_capability, "", launch.args, launch.options)
    with collecting_keys() as keys:
        # Where the kernel was compiled before, the launcher would have no key to ask for.
        build.run_launcher(remembers=False)
    return replace(build, key=keys[0])


@functools.cache
def _loads_of_source(path: str) -> list[tuple[int, int, str]]:
    """Every `tl.load` of a file: first line, last line, name of the pointer.

    Triton keeps what it compiled by content, so the path may be that of another checkout with the
    same kernels, gone by now.
    """
    own = Path(launch.__file__).with_name(Path(path).name)
    source = own if own.exists() else Path(path)
    if not source.exists():
        return []
    found = []
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
            pointer = node.args[0]
            while isinstance(pointer, ast.BinOp | ast.Subscript):
                pointer = pointer.left if isinstance(pointer, ast.BinOp) else pointer.value
            found.append((node.lineno, node.end_lineno or node.lineno, ast.unparse(pointer)))
    return found


def _load_bits(ptx: str) -> dict[str, int]:
    """The narrowest load of each pointer, found by the source lines that the PTX names."""
    files = dict(re.findall(r'\.file\s+(\d+) "([^"]+)"', ptx))
    narrowest: dict[str, int] = {}
    for pointer, bits in _located_loads(ptx, files):
        narrowest[pointer] = min(bits, narrowest.get(pointer, bits))
    return narrowest


def _located_loads(ptx: str, files: dict[str, str]) -> Iterator[tuple[str, int]]:
    """Yield pointer and bits of every load from global memory."""
    path, line, in_assembly = "", 0, False
    for text in ptx.splitlines():
        if "inline asm" in text:
            in_assembly = "begin" in text
        place = re.match(r"\s*\.loc\s+(\d+) (\d+)", text)
        if place:
            # Inside inline assembly LLVM counts its lines on from the one that holds the load.
            if not in_assembly:
                path, line = files[place.group(1)], int(place.group(2))
            continue
        load, copy = _LOAD.search(text), _COPY.search(text)
        if load:
            bits = int(load.group(1) or 1) * int(load.group(2))
        elif copy:
            bits = 8 * int(copy.group(1), 0)
        else:
            continue
        for first, last, pointer in _loads_of_source(path):
            if first <= line <= last:
                yield pointer, bits


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
    return compile_build(to_build(launch, compute_capability))


def compile_build(build: Build) -> MachineCode:
    """Compile what `to_build` described, and count its instructions."""
    compiled = build.run_launcher()
    sass, registers = disassemble(compiled.asm["cubin"])
    return MachineCode(
        registers=registers,
        shared_bytes=compiled.metadata.shared,
        **count_instructions(sass),
        load_bits=_load_bits(compiled.asm["ptx"]),
        program=count_program(sass),
    )


def count_instructions(sass: str) -> dict[str, int]:
    """What `MachineCode` counts in a disassembly, by its names."""
    # One pass over a text of hundreds of kilobytes; the patterns below search the few words found.
    words = " ".join(_COUNTED.findall(sass))

    def count(pattern: str) -> int:
        return len(re.findall(pattern, words))

    # Whole words: LTC128B asks the cache to fetch 128 bytes and is no width.
    wide_loads = count(r"\bLDG(?:STS)?\S*\.128\b")
    wide_stores = count(r"\bSTG\S*\.128\b")
    return {
        "spills": count(r"\b(?:STL|LDL)\b"),
        "hgmma": count(r"\bHGMMA\b"),
        "hmma": count(r"\bHMMA\b"),
        "tcgen05": count(r"\bUTC\w*MMA\b"),
        "tma_loads": count(r"\bUTMALDG\b"),
        "wide_loads": wide_loads,
        "narrow_loads": count(r"\bLDG(?:STS)?\b") - wide_loads,
        "wide_stores": wide_stores,
        "narrow_stores": count(r"\bSTG\b") - wide_stores,
    }
