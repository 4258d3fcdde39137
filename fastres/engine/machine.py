"""What this machine is and can do, found out without running anything on it."""

import ctypes
import functools
import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

__all__ = [
    "bf16_instructions",
    "commit",
    "cxx_compiler",
    "describe_machine",
    "has_avx512",
    "keep_freed_memory",
    "peak_memory_mib",
    "process_seconds",
    "usable_cores",
    "versions",
]

_PACKAGES = ("torch", "torchvision", "triton", "nvidia-dali", "numpy")

# glibc's mallopt parameters, from malloc.h, and the kernel's advice, from sys/mman.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_MADV_HUGEPAGE = 14
_HUGE_PAGE = 2 << 20
_HEAP_BYTES = 1 << 30


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def _cpu_info() -> tuple[str, frozenset[str]]:
    """Return the processor's name and instruction-set flags, as the kernel lists them."""
    name, flags = platform.processor() or platform.machine(), frozenset[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return name, flags
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = frozenset(value.split())
    return name, flags


def bf16_instructions() -> str | None:
    """Name the processor's bfloat16 arithmetic, or return None where it has none.

    Without it torch emulates bfloat16, which is many times slower than float32.
    """
    flags = _cpu_info()[1]
    return next((name for name in ("amx_bf16", "avx512_bf16", "bf16") if name in flags), None)


def has_avx512() -> bool:
    """Tell whether the processor has vectors of 16 floats."""
    return "avx512f" in _cpu_info()[1]


def cxx_compiler() -> str | None:
    """Return the C++ compiler that torch.compile would call for CPU code, or None."""
    chosen = os.environ.get("CXX")
    candidates = [chosen] if chosen else ["g++", "clang++"]
    return next((name for name in candidates if shutil.which(name)), None)


def keep_freed_memory() -> bool:
    """Make malloc keep freed memory, in huge pages; call before torch is imported.

    A training step frees and allocates the same activations every time. By default glibc hands
    large blocks back to the kernel, and the next step maps and clears fresh pages; in pages of
    4 KiB, whose addresses take a second walk through tables on a virtual machine. Here the heap is
    grown once without being touched, marked for huge pages, and kept. Returns whether the C library
    took the settings; a kernel without huge pages is no hindrance.
    """
    if sys.platform != "linux":
        return False
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return False
    settings = {
        _M_MMAP_THRESHOLD: _HEAP_BYTES,
        _M_TRIM_THRESHOLD: (1 << 31) - 1,
        _M_TOP_PAD: 256 << 20,
    }
    kept = all(mallopt(name, value) for name, value in settings.items())
    if kept:
        _use_huge_pages(libc, _HEAP_BYTES - _HUGE_PAGE)
    return kept


def _use_huge_pages(libc: ctypes.CDLL, size: int) -> None:
    """Have the next `size` bytes of the heap backed by huge pages once they are touched."""
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block is None:
        return
    first = -(-block // _HUGE_PAGE) * _HUGE_PAGE
    libc.madvise(first, (block + size - first) // _HUGE_PAGE * _HUGE_PAGE, _MADV_HUGEPAGE)
    libc.free(block)


def process_seconds() -> float | None:
    """Return the seconds since this process was started, or None where Linux does not tell."""
    try:
        # The process's name may hold spaces; the fields after it are counted from its bracket.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def peak_memory_mib() -> float:
    """Return the most memory that this process has had resident, in MiB (2**20 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**10 if sys.platform == "linux" else peak / 2**20


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that decide speed and numbers."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    installed = {
        (dist.metadata["Name"] or "").lower(): dist.version
        for dist in importlib.metadata.distributions()
    }
    for package in _PACKAGES:
        names = [
            name for name in installed if name == package or name.startswith(package + "-cuda")
        ]
        found[package] = installed[names[0]] if names else None
    return found


def commit() -> str | None:
    """Return the commit of the checkout that fastres runs from, marked where it has changes.

    Of a copy without history: what the environment variable FASTRES_COMMIT says.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or not shutil.which("git"):
        return os.environ.get("FASTRES_COMMIT") or None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        revision = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision + ("+changes" if changed else "")


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, memory and GPU as plain values for a record."""
    import torch

    name, flags = _cpu_info()
    vectors = next((v for v in ("avx512f", "avx2", "asimd") if v in flags), None)
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return {
        "cpu": name,
        "cpu_vectors": vectors,
        "cpu_bf16": bf16_instructions(),
        "cores": usable_cores(),
        "memory_gib": memory,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
