"""What this machine is: cache folder, cores, versions, commit, and the provenance of a result.

The one module that every other may import: standard library alone, and nothing runs at import.
"""

import functools
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict

from fastres.errors import FailureError

__all__ = [
    "Host",
    "Machine",
    "Provenance",
    "bf16_instructions",
    "cache_folder",
    "commit",
    "describe_host",
    "describe_machine",
    "has_avx512",
    "provenance",
    "usable_cores",
    "versions",
]

_PACKAGES = ("torch", "torchvision", "triton", "nvidia-dali", "numpy")


class Host(TypedDict):
    """What decides speed beside a GPU: processor, widest vectors, bf16 instructions, memory."""

    cpu: str
    cpu_vectors: str | None
    cpu_bf16: str | None
    cores: int
    memory_gib: float | None


class Machine(Host):
    """The same with its GPU."""

    gpu: str | None


class Provenance(TypedDict):
    """Where a result comes from; command: the words that repeat it, quoted for a shell."""

    machine: Machine
    versions: dict[str, str | None]
    commit: str | None
    date: str
    command: str


def cache_folder() -> Path:
    """$FASTRES_CACHE, else $XDG_CACHE_HOME/fastres, else ~/.cache/fastres.

    As its specification asks, an $XDG_CACHE_HOME that is no absolute path does not count.

    Raises:
        FailureError: neither is set and this user has no home folder, or the one named is below a
            home folder that nobody has.
    """
    if named := os.environ.get("FASTRES_CACHE"):
        folder = os.path.expanduser(named)
        if folder.startswith("~"):
            raise FailureError(f"the cache folder FASTRES_CACHE={named} is in nobody's home folder")
        return Path(folder)
    if os.path.isabs(shared := os.environ.get("XDG_CACHE_HOME", "")):
        return Path(shared) / "fastres"
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        raise FailureError("this user has no home folder: name a cache folder with FASTRES_CACHE")
    return Path(home) / ".cache" / "fastres"


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
    root = Path(__file__).resolve().parents[1]
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


def describe_host() -> Host:
    """Return processor, cores and memory as plain values; torch is not needed for them."""
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
    }


def describe_machine() -> Machine:
    """Return processor, cores, memory and GPU as plain values for a record."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {**describe_host(), "gpu": gpu}


def provenance(command: Sequence[str]) -> Provenance:
    """Say where a result of this process, or of its child, comes from, now."""
    return {
        "machine": describe_machine(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
    }
