"""Which test files a proof runs: those that this machine can import, the most telling first."""

import ast
from collections.abc import Iterator
from pathlib import Path

from benchmarks.prove.environment import is_installed
from benchmarks.prove.parts import ROOT

__all__ = ["marked_for_gpus", "missing_imports", "usable_test_files"]

# What breaks first when a kernel is wrong comes first.
_TEST_ORDER = (
    "kernels/test_block",
    "kernels/test_ops",
    "model/test_fuse",
    "kernels/",
    "engine/test_step",
    "",
)


def _imports(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports when it is imported itself."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def missing_imports(path: Path, root: Path = ROOT, seen: frozenset[Path] = frozenset()) -> set[str]:
    """Return the packages that a test file, or a helper that it imports, lacks here.

    Args:
        path: of the file.
        root: the folder that the package `tests` lies in.
        seen: files that were looked at before.
    """
    missing: set[str] = set()
    for name in _imports(path):
        top = name.partition(".")[0]
        helper = (root / name.replace(".", "/")).with_suffix(".py")
        if top == "tests":
            if helper.exists() and helper not in seen:
                missing |= missing_imports(helper, root, seen | {path})
        elif top not in ("fastres", "benchmarks") and not is_installed(top):
            missing.add(top)
    return missing


def usable_test_files(tests: Path) -> tuple[list[Path], tuple[str, ...]]:
    """Return the test files that can be imported, in order of value, and a line for each other."""

    def value(path: Path) -> int:
        name = path.relative_to(tests).as_posix()
        return next(i for i, start in enumerate(_TEST_ORDER) if name.startswith(start))

    files, notes = [], []
    for path in sorted(tests.rglob("test_*.py"), key=lambda path: (value(path), path)):
        missing = missing_imports(path, tests.parent)
        if missing:
            notes.append(f"{path.name} left out: no {', '.join(sorted(missing))} here")
        else:
            files.append(path)
    return files, tuple(notes)


def marked_for_gpus(path: Path) -> bool:
    """Tell whether a file has tests that need a GPU."""
    text = path.read_text()
    return "needs_gpu" in text or "mark.gpu" in text
