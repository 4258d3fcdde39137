"""What a proof runs on: `python -m benchmarks.prove.environment --out FILE.json`.

Prints versions, processor, GPU, clocks and free memory, and one line for everything that stands
against a proof. Exit code 1 where something needed is missing.
"""

import argparse
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.rows import make_provenance
from fastres import strict_json
from fastres.output import reader_may_leave

__all__ = ["find_problems", "is_installed", "main"]

_NEEDED = ("torch", "numpy", "pytest")
# Parts that need one of these are left out without it.
_USEFUL = (
    *("PIL", "safetensors", "rich", "tyro"),
    *("triton", "torchvision", "nvidia.dali", "matplotlib", "pytest_benchmark", "hypothesis"),
)
_LEAST_TORCH = (2, 11)
_LEAST_FREE_GIB = 4


def is_installed(module: str) -> bool:
    """Tell whether `module` can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _gpu() -> dict[str, Any] | None:
    """Describe the GPU that torch would use, or return None."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "memory_gib": round(total / 2**30, 1),
        "free_gib": round(free / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _missing_to_launch() -> list[str]:
    """What Triton lacks here to build the C functions that start its kernels."""
    missing = []
    if not any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang"))):
        missing.append("a C compiler")
    # As Triton looks for them: Debian's own scheme may name a folder under /usr/local.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    if not Path(sysconfig.get_path("include", scheme), "Python.h").is_file():
        missing.append("the headers of Python")
    return missing


def find_problems(found: dict[str, Any]) -> list[str]:
    """Say what in a description of `main` stands against a proof."""
    faults = [f"{name} is not installed" for name in found["missing"] if name in _NEEDED]
    torch_version = found["versions"]["torch"]
    if torch_version:
        numbers = tuple(int(part) for part in torch_version.split("+")[0].split(".")[:2])
        if numbers < _LEAST_TORCH:
            faults.append(f"torch {torch_version} is older than 2.11")
    gpu = found["gpu"]
    if gpu is not None and found["missing_to_launch"]:
        what = " and ".join(found["missing_to_launch"])
        faults.append(f"Triton can start no kernel without {what}")
    if gpu is None and found["nvidia_smi"]:
        faults.append("there is an NVIDIA driver here and torch finds no usable GPU")
    if gpu is not None and gpu["free_gib"] < _LEAST_FREE_GIB:
        faults.append(f"{gpu['free_gib']} GiB of GPU memory are free, {_LEAST_FREE_GIB} are needed")
    return faults


@reader_may_leave()
def main(argv: Sequence[str] | None = None) -> int:
    """Describe the machine and return 0 where a proof can run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prove.environment", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the description")
    options = parser.parse_args(argv)
    missing = [name for name in (*_NEEDED, *_USEFUL) if not is_installed(name)]
    provenance = make_provenance("mixed", ["python", "-m", "benchmarks.prove.environment"])
    found: dict[str, Any] = {
        **provenance,
        "gpu": None if "torch" in missing else _gpu(),
        "nvidia_smi": shutil.which("nvidia-smi") is not None,
        "missing": missing,
        "missing_to_launch": _missing_to_launch(),
    }
    found["faults"] = find_problems(found)
    options.out.write_text(strict_json.dumps(found, indent=2) + "\n")
    for key in ("machine", "clocks", "versions", "gpu", "commit"):
        print(f"{key}: {found[key]}")
    for name in missing:
        print(f"not installed: {name}")
    for fault in found["faults"]:
        print(f"fault: {fault}")
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
