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
    "bn_stats": "pppdppppiii",
    "bn_apply": "pppppiiii",
    "bn_reduce": "ppppppppppiii",
    "bn_compute_dy": "ppppiii",
    "defer_dy": "pppppiippp",
    "conv_fprop": "ppppppdppppiiiiiii",
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


def _build(compiler: list[str]) -> Path:
    """Return the path of the library, compiled unless the cache has it.

    Raises: OSError, subprocess.SubprocessError: when it cannot be compiled or stored.
    """
    sources = [_FOLDER / name for name in _SOURCES]
    runtime = _openmp_runtime()
    key = hashlib.sha256(_run([*compiler, "--version"]))
    # The library asks for its OpenMP runtime by name, and another torch may bring another name.
    for text in (*_FLAGS, _processor(), *map(os.path.basename, runtime)):
        key.update(text.encode())
    for path in (*sources, *(_FOLDER / name for name in _HEADERS)):
        key.update(path.read_bytes())
    target = cache_folder() / "kernels" / f"cpu-{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    print("fastres: compiling the CPU kernels, once on this machine", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        compiled = [
            [*compiler, *_FLAGS, "-fPIC", "-c", str(source), "-o", made]
            for source, made in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(len(compiled)) as pool:
            list(pool.map(_run, compiled))
        link = ["-shared", "-Wl,--as-needed", *objects, *runtime]
        _run([*compiler, *link, "-o", str(made)])
        made.replace(target)
    return target


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
        loaded = ctypes.CDLL(str(_build(compiler)))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").splitlines()
        why = next((line for line in lines if "error" in line), lines[-1] if lines else str(error))
        return None, f"{compiler[0]} failed: {why.strip()}"
    # A user without a home folder has no cache folder either.
    except (OSError, FailureError, subprocess.SubprocessError) as error:
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
