"""The CPU kernels: compiled once a machine with g++, kept in the user's cache, called by ctypes.

`library()` is the loaded library, or None with `unavailable()` saying why. Nothing happens before
the first call: no compiler is started by an import. FASTRES_CPU_KERNELS=0 leaves them out.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from fastres.cache_file import DamagedError, read_cache_file, write_cache_file
from fastres.errors import FailureError
from fastres.host import cache_folder

__all__ = ["call", "has_fused_conv", "library", "unavailable"]

_FOLDER = Path(__file__).resolve().parent
_SOURCES = ("block.cpp", "conv.cpp", "conv_strided.cpp", "batchnorm.cpp")
_HEADERS = ("conv.h", "simd.h")
# -ffp-contract: a * y + b rounds once in every kernel, so that an activation and its mask agree.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast")
_TIMEOUT_S = 120

# Letters of the signatures: p pointer (a tensor, or None), i 64-bit integer, d double.
_CODES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}
_SIGNATURES = {
    "bn_stats": "pppdpiii",
    "bn_apply": "pppppiiii",
    "bn_reduce": "ppppppppppiii",
    "bn_compute_dy": "ppppiii",
    "defer_dy": "pppppiippp",
    "conv_fprop": "ppppppdpiiiiiii",
    "conv_folded": "pppppiiiiiiii",
    "conv_backward": "pppppppppppiiiiiii",
    "block_folded": "ppppppppiiiiiii",
}
_TYPED = ("bn_stats", "bn_apply", "bn_reduce", "bn_compute_dy")
_TYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def _openmp_runtime() -> list[str]:
    """The OpenMP library that torch has loaded: two of them would fight for the cores."""
    loaded = {
        line.split(maxsplit=5)[5]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "libgomp" in line
    }
    return sorted(loaded)


def _processor() -> str:
    """What -march=native depends on; a home folder may be shared by different machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith("flags")), "")


def _compile(compiler: list[str], folder: Path) -> Path:
    """Return the library, compiled in `folder`.

    Raises: OSError, subprocess.SubprocessError: when it cannot be compiled.
    """
    objects = {_FOLDER / name: folder / f"{name}.o" for name in _SOURCES}
    compiled = [
        [*compiler, *_FLAGS, "-fPIC", "-c", str(source), "-o", str(made)]
        for source, made in objects.items()
    ]
    with ThreadPoolExecutor(len(compiled)) as pool:
        list(pool.map(_run, compiled))
    made = folder / "cpu.so"
    link = ["-shared", "-Wl,--as-needed", *map(str, objects.values()), *_openmp_runtime()]
    _run([*compiler, *link, "-o", str(made)])
    return made


def _file_name(compiler: list[str]) -> str:
    """Name the library after all that it depends on.

    Raises: OSError, subprocess.SubprocessError: when the compiler does not say what it is.
    """
    key = hashlib.sha256(_run([*compiler, "--version"]))
    # The library asks for its OpenMP runtime by name, and another torch may bring another name.
    for text in (*_FLAGS, _processor(), *map(os.path.basename, _openmp_runtime())):
        key.update(text.encode())
    for name in (*_SOURCES, *_HEADERS):
        key.update((_FOLDER / name).read_bytes())
    return f"libcpu-{key.hexdigest()[:16]}.so"


def _open(compiler: list[str]) -> ctypes.CDLL:
    """Load the library from the cache if it is there as it was stored, else compile and store it.

    The loader of the system maps what it is given and runs it: a damaged library would kill the
    process, or lack functions. A cache that cannot be used costs a compilation at every start.

    Raises: OSError, subprocess.SubprocessError: when it cannot be compiled or loaded.
    """
    name, stored, why = _file_name(compiler), None, "once on this machine"
    try:
        stored = cache_folder() / "kernels" / name
        read_cache_file(stored)
        return ctypes.CDLL(str(stored))
    except FileNotFoundError:
        pass
    except DamagedError as error:
        why = f"again: {error}"
    except (FailureError, OSError) as error:
        why = f"for this process: {error}"
    _say(f"compiling the CPU kernels, {why}")
    with tempfile.TemporaryDirectory() as folder:
        made = _compile(compiler, Path(folder))
        if stored is not None:
            try:
                write_cache_file(stored, made.read_bytes())
            except OSError as error:
                _say(f"the CPU kernels cannot be kept, so every start compiles: {error}")
                stored = None
        try:
            return ctypes.CDLL(str(made))
        except OSError:
            # Nothing may be run from many a folder of temporary files.
            if stored is None:
                raise
            return ctypes.CDLL(str(stored))


def _say(line: str) -> None:
    print(f"fastres: {line}", file=sys.stderr, flush=True)


def _run(command: list[str]) -> bytes:
    """Run a compiler and return what it prints.

    Raises: OSError, subprocess.SubprocessError: when it cannot be started, fails or hangs.
    """
    return subprocess.run(command, capture_output=True, check=True, timeout=_TIMEOUT_S).stdout


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or None and the reason."""
    if os.environ.get("FASTRES_CPU_KERNELS") == "0":
        return None, "FASTRES_CPU_KERNELS=0"
    if sys.platform != "linux":
        return None, f"they are built on Linux, not on {sys.platform}"
    # CXX may hold options and a launcher, such as `ccache g++`.
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(compiler[0]) is None:
        return None, f"no C++ compiler ({compiler[0]}) here"
    try:
        loaded = _open(compiler)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").splitlines()
        why = next((line for line in lines if "error" in line), lines[-1] if lines else str(error))
        return None, f"{compiler[0]} failed: {why.strip()}"
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"they cannot be built: {error}"
    for name, letters in _SIGNATURES.items():
        names = [f"{name}_{t}" for t in _TYPE_NAMES.values()] if name in _TYPED else [name]
        for function in (getattr(loaded, n) for n in names if hasattr(loaded, n)):
            function.argtypes = [_CODES[letter] for letter in letters]
            function.restype = None
    loaded.has_fused_conv.restype = ctypes.c_int64
    return loaded, None


def library() -> ctypes.CDLL | None:
    """The compiled kernels; the first call compiles them (seconds) or finds them in the cache."""
    return _load()[0]


def unavailable() -> str | None:
    """Why there are no CPU kernels here, or None when there are."""
    return _load()[1]


@functools.cache
def has_fused_conv() -> bool:
    """Whether the processor has the instructions that the fused convolutions are written in."""
    loaded = library()
    return loaded is not None and bool(loaded.has_fused_conv())


def call(name: str, *arguments: Tensor | float | None) -> None:
    """Run a kernel; tensors must be dense NHWC or per-channel vectors on the CPU.

    A kernel of several types is chosen by the dtype of its first argument.
    """
    first = arguments[0]
    if name in _TYPED:
        assert isinstance(first, Tensor)
        name = f"{name}_{_TYPE_NAMES[first.dtype]}"
    pointers = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
    getattr(library(), name)(*pointers)
