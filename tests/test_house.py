"""The house rules that a machine can check: imports, packaging, names, a cheap import."""

import ast
import glob
import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {"kernels": 0, "fastres": 1, "benchmarks": 2, "tests": 3}
MAY_USE_KERNELS = (
    "fastres/model/",
    "fastres/data/loaders/resident.py",
    "fastres/engine/step_kernels.py",
)
# Below everything: what the machine is, how an error is reported, how a command prints, what a
# cache holds, how JSON is written.
FOR_ALL = (
    "fastres.host",
    "fastres.errors",
    "fastres.output",
    "fastres.cache_file",
    "fastres.strict_json",
)


def sources():
    return [path for folder in LAYERS for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path):
    """Yield the dotted names that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def home(name):
    """Return which top folder a dotted name lives in, or None for a library."""
    if name == "fastres.kernels" or name.startswith("fastres.kernels."):
        return "kernels"
    top = name.partition(".")[0]
    assert top != "kernels", "kernels is imported as fastres.kernels"
    return top if top in LAYERS else None


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    relative = path.relative_to(ROOT).as_posix()
    if relative.startswith("fastres/kernels/"):
        pytest.skip("the same file as under kernels/")
    own = relative.partition("/")[0]
    for name in imported(path):
        target = home(name)
        if target is None or target == own or name.startswith(FOR_ALL):
            continue
        assert LAYERS[target] < LAYERS[own], f"{relative} imports {name}"
        if own == "fastres" and target == "kernels":
            assert relative.startswith(MAY_USE_KERNELS), f"{relative} imports {name}"


# Rooms of a folder, each with those that it may import from.
ROOMS = {
    "kernels": {
        "reference": {"reference"},
        "cpu": {"cpu", "reference"},
        "gpu": {"gpu", "reference"},
        "tools": {"tools", "gpu", "reference", "cpu"},
    },
    "benchmarks": {
        "harness": {"harness"},
        "peers": {"peers", "harness"},
        "suites": {"suites", "peers", "harness"},
        "roofline": {"roofline", "harness"},
        "report": {"report", "harness"},
        "prove": {"prove", "report", "peers", "harness"},
    },
}


@pytest.mark.parametrize(("folder", "room"), [(f, room) for f in ROOMS for room in ROOMS[f]])
def test_rooms_are_imported_one_way(folder, room):
    package = "fastres.kernels" if folder == "kernels" else folder
    files = sorted((ROOT / folder / room).glob("*.py"))
    assert files
    for path in files:
        for name in imported(path):
            other = name.removeprefix(f"{package}.").partition(".")[0]
            if name.startswith(f"{package}.") and other in ROOMS[folder]:
                assert other in ROOMS[folder][room], f"{path.relative_to(ROOT)} imports {name}"


def test_json_has_one_writer():
    for path in sources():
        if path.is_relative_to(ROOT / "tests") or path.name == "strict_json.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps"):
                owner = ast.unparse(node.value)
                assert owner != "json", f"{path}:{node.lineno} writes JSON past strict_json"


def test_every_package_is_shipped():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        os.path.dirname(path).replace("/", ".")
        for path in glob.glob("fastres/**/__init__.py", root_dir=ROOT, recursive=True)
    }
    assert set(config["packages"]) == found
    assert config["package-dir"] == {"fastres.kernels": "kernels"}
    assert (ROOT / "fastres" / "kernels").readlink() == Path("../kernels")


def test_kernels_answers_to_one_name_alone():
    module = importlib.import_module("fastres.kernels")
    assert module.__name__ == "fastres.kernels"
    command = [sys.executable, "-c", "import kernels"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "import this package as fastres.kernels" in result.stderr


@pytest.mark.parametrize(
    "module",
    [
        *("fastres", "fastres.train", "fastres.evaluate", "fastres.predict", "fastres.sweep"),
        "fastres.engine.launch",
    ],
)
def test_importing_a_command_loads_neither_torch_nor_dali(module):
    heavy = ("torch", "triton", "nvidia.dali")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_public_names_resolve():
    fastres = importlib.import_module("fastres")
    for name in fastres.__all__:
        assert callable(getattr(fastres, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastres.nothing


def test_every_module_says_what_it_is_and_what_it_exports():
    for path in sources():
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} has no docstring"
