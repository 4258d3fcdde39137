"""The parts of a proof: what each runs, what it needs, and how much of the budget it may take."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.prove.environment import is_installed

__all__ = ["ROOT", "Part", "missing_imports", "plan_parts"]

ROOT = Path(__file__).resolve().parents[2]

_PYTEST = ("pytest", "-vv", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts=")
# One file that cannot be imported here must not void the others.
_PARITY_TESTS = (*_PYTEST, "--continue-on-collection-errors")
# Compiling kernels takes most of their time, and shares the GPU well.
_WORKERS = ("-n", "8")
# What breaks first when a kernel is wrong comes first.
_TEST_ORDER = (
    "kernels/test_block",
    "kernels/test_ops",
    "model/test_fuse",
    "kernels/",
    "engine/test_step",
    "",
)
_PARITY = ("tests/kernels/", "tests/model/test_fuse", "tests/engine/test_step")
# What a part is told to measure for does not hold its start and end; of a suite, not the end alone.
_AROUND_S = 12
_SUITE_END_S = 6


@dataclass(frozen=True)
class Part:
    """One subprocess of a proof.

    Attributes:
        name: for people and for the log file.
        command: behind `python -m`.
        weight: its share of the remaining budget, against the weights of the parts behind it.
        least: seconds under which it is not worth starting.
        needs: modules without which it is left out.
        suite: the benchmark suite whose report it writes, or None.
        notes: lines to print and keep: what was left out of it beforehand.
    """

    name: str
    command: tuple[str, ...]
    weight: float
    least: float
    needs: tuple[str, ...] = ()
    suite: str | None = None
    notes: tuple[str, ...] = ()

    def arguments(self, out: Path, seconds: float) -> list[str]:
        """Return the command with the files in `out` and the time of this run filled in."""
        around = _SUITE_END_S if self.suite else _AROUND_S
        inner = max(0.5 * seconds, seconds - around)
        words = [w.replace("{OUT}", str(out)) for w in self.command]
        words = [w.replace("{SECONDS}", f"{inner:.0f}") for w in words]
        if self.suite and seconds < _full_seconds(self.suite):
            words.append("--quick")
        return words


def _full_seconds(suite: str) -> float:
    """Seconds under which only the small cases of a suite are worth starting."""
    return {"ops": 60, "model": 90, "loaders": 40, "train": 90}[suite]


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


def _test_files(tests: Path) -> tuple[list[Path], tuple[str, ...]]:
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


def _suite(suite: str, weight: float, least: float) -> Part:
    files = (
        f"benchmarks/suites/bench_{suite}.py",
        "--benchmark-json",
        f"{{OUT}}/bench_{suite}.json",
    )
    command = (*_PYTEST, "-m", "not slow", *files, "--budget", "{SECONDS}")
    return Part(suite, command, weight, least, needs=("pytest_benchmark",), suite=suite)


def _roofline(model: str, batch_size: int) -> Part:
    """The roofline of a ladder's case; a suite's share of it is counted from its peak_rates."""
    case = ("--model", model, "--batch-size", str(batch_size), "--seconds", "{SECONDS}")
    files = ("--results", "{OUT}", "--out", f"{{OUT}}/roofline_{model}.png")
    command = ("benchmarks.roofline", *case, *files)
    return Part(f"roofline {model}", command, 1, 15, needs=("rich", "matplotlib", "tyro"))


def plan_parts(*, on_gpu: bool, data_dir: Path | None = None) -> list[Part]:
    """Return all parts that this machine can run, the most valuable first.

    Args:
        on_gpu: whether there is a GPU to prove anything on.
        data_dir: images; they are read once beforehand, so that no measurement waits for them.
    """
    files, notes = _test_files(ROOT / "tests")
    names = {path: path.relative_to(ROOT).as_posix() for path in files}
    kernels = [names[path] for path in files if names[path].startswith(_PARITY)]
    marked = [
        names[p] for p in files if "needs_gpu" in p.read_text() or "mark.gpu" in p.read_text()
    ]
    suites = [
        _suite("model", 3, 20),
        _suite("ops", 2, 20),
        _suite("loaders", 1, 15),
        _suite("train", 2, 25),
    ]
    model, ops, loaders, train = suites
    data = []
    if data_dir is not None:
        command = ("fastres.train", "--dry-run", "--data-dir", str(data_dir.resolve()))
        data = [Part("data", command, 1, 20, needs=("tyro",))]
    if not on_gpu:
        parity = (*_PARITY_TESTS, "-m", "not gpu and not slow", *kernels)
        first = [Part("parity", parity, 1.5, 8, notes=notes), _roofline("resnet20", 128)]
        return [*data, *first, model, ops, loaders, train, _roofline("resnet18", 64)]
    workers = _WORKERS if is_installed("xdist") else ()
    by_gpu = (*_PARITY_TESTS, *workers, "-m", "gpu and not slow", *marked)
    by_kernels = (*_PARITY_TESTS, *workers, "-m", "not gpu and not slow", *kernels)
    tune = (
        "fastres.kernels.tools.tune",
        "--budget",
        "{SECONDS}",
        "--out",
        "{OUT}/launch_table.json",
    )
    return [
        Part("parity on the GPU", by_gpu, 3, 20, notes=notes),
        Part("tune", tune, 3, 25, needs=("triton",)),
        *data,
        _roofline("resnet20", 512),
        ops,
        model,
        loaders,
        train,
        Part("parity of all kernels, tuned", by_kernels, 2, 20),
        _roofline("resnet18", 512),
    ]
