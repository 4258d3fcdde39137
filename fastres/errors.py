"""The errors that a command reports in one sentence instead of a traceback.

Everything a user can cause (a wrong option, a truncated file, a full disk) is raised as one of the
two kinds here, or comes from the system: `sentence_for` puts those into words. Any other exception
is a bug in fastres and keeps its traceback.
"""

import errno
import re

__all__ = ["FailureError", "FastresError", "UsageError", "is_out_of_memory", "sentence_for"]

# What allocators of Python, torch, CUDA, cuBLAS and oneDNN say, each in its own class.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|(can't|cannot|failed to) allocate|not enough memory|bad_alloc|ALLOC_FAILED",
    re.IGNORECASE,
)
_AMOUNT = re.compile(r"tried to allocate ([\d.]+) ?(\w+)", re.IGNORECASE)


class FastresError(Exception):
    """A problem that one clear sentence explains; `exit_code` is what the process returns."""

    exit_code = 1


class FailureError(FastresError):
    """The request was sound and could not be carried out: bad data, no disk, diverged run."""

    exit_code = 1


class UsageError(FastresError, ValueError):
    """The request itself is wrong: an unknown name, a contradiction, a refused overwrite."""

    exit_code = 2


def sentence_for(error: Exception) -> str | None:
    """Return what went wrong and what would help, or None for a bug in fastres.

    Known are the errors above, the operating system's refusals (a full disk, a folder of others)
    and too little memory.
    """
    if isinstance(error, FastresError):
        return str(error)
    if is_out_of_memory(error):
        return (
            f"out of memory{_amount_asked(str(error))}; a smaller --batch-size needs less, and a "
            "smaller --eval-batch-size where a run evaluates"
        )
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that there was too little memory, of the host or of a GPU."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
    )


def _amount_asked(text: str) -> str:
    found = _AMOUNT.search(text)
    if found is None:
        return ""
    number, unit = found.groups()
    if unit == "bytes":
        number, unit = f"{int(number) / 2**20:,.0f}", "MiB"
    return f" ({number} {unit} more were asked for)"
