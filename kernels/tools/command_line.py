"""What the commands of this folder share: their parser, and names that their options know.

Imports neither torch nor triton, so that --help is quick.
"""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

__all__ = [
    "ARCHITECTURES",
    "DTYPES",
    "NETWORKS",
    "NOTHING_TO_RUN",
    "PHASES",
    "Parser",
    "bad_batch",
    "bad_budget",
    "bad_file",
    "why_not_compile",
]

NETWORKS = ("resnet20", "resnet18")
DTYPES = ("bf16", "fp16", "tf32", "fp32")
PHASES = ("training", "inference")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

# The exit code of a command that this machine has nothing for; pytest has the same.
NOTHING_TO_RUN = 5


class Parser(argparse.ArgumentParser):
    """A parser that answers wrong use in one sentence."""

    def error(self, message: str) -> NoReturn:
        """Print it and end with 2."""
        self.exit(2, f"error: {message}\n")


def bad_batch(option: str, batches: Sequence[int]) -> str | None:
    """Why one of these is no batch, in a sentence, or None."""
    from fastres.kernels.tools.networks import MAX_BATCH

    for batch in batches:
        if batch < 1:
            return f"{option} must be at least 1, got {batch}"
        if batch > MAX_BATCH:
            return f"{option} must be at most {MAX_BATCH}, got {batch}"
    return None


def bad_budget(seconds: float) -> str | None:
    """Why this is no --budget, in a sentence, or None."""
    # Nor is NaN.
    return None if seconds > 0 else f"--budget must be above 0 seconds, got {seconds:g}"


def bad_file(option: str, path: Path | None) -> str | None:
    """Why no file can be written there, in a sentence, or None."""
    if path is None or path.resolve().parent.is_dir():
        return None
    return f"{option}: there is no folder {path.parent}"


def why_not_compile() -> str | None:
    """Why kernels cannot be compiled in this process, in a sentence, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (Linux only)"
    import triton

    if triton.knobs.runtime.interpret:
        return "kernels are interpreted in this process: unset TRITON_INTERPRET to compile them"
    try:
        tools = (triton.knobs.nvidia.ptxas.path, triton.knobs.nvidia.cuobjdump.path)
    except RuntimeError as error:
        return f"Triton's assembler for NVIDIA GPUs is missing: {error}"
    return None if all(tools) else "Triton's assembler for NVIDIA GPUs is missing"
