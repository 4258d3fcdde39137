"""What a process asks of the system that it runs on: memory, time, a compiler."""

import ctypes
import os
import resource
import shutil
import sys
import time
from pathlib import Path

__all__ = [
    "cxx_compiler",
    "keep_freed_memory",
    "peak_memory_mib",
    "process_seconds",
]

# glibc's mallopt parameters, from malloc.h, and the kernel's advice, from sys/mman.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_MADV_HUGEPAGE = 14
_HUGE_PAGE = 2 << 20
_HEAP_BYTES = 1 << 30


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
