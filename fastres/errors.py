"""The two kinds of error a command reports in one sentence instead of a traceback.

Everything a user can cause (a wrong option, a truncated file, a full disk) is raised as one of
these; any other exception is a bug in fastres and keeps its traceback.
"""

__all__ = ["FailureError", "FastresError", "UsageError"]


class FastresError(Exception):
    """A problem that one clear sentence explains; `exit_code` is what the process returns."""

    exit_code = 1


class FailureError(FastresError):
    """The request was sound and could not be carried out: bad data, no disk, diverged run."""

    exit_code = 1


class UsageError(FastresError, ValueError):
    """The request itself is wrong: an unknown name, a contradiction, a refused overwrite."""

    exit_code = 2
