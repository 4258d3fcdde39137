"""The build of the CPU kernels: where they cannot be had, and what they are kept as."""

import ctypes
import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastres.kernels.cpu import backend as cpu_backend
from fastres.kernels.cpu import build as cpu_build

# A parameter of a C++ kernel is one of these, by the letters of the ctypes signatures.
LETTERS = [
    ("p", r"(?:const )?(?:T|bf16|float|double) ?\*\w+"),
    ("i", r"int64_t \w+"),
    ("d", r"double \w+"),
]


def letter_of(parameter: str) -> str:
    found = [letter for letter, kind in LETTERS if re.fullmatch(kind, parameter)]
    assert len(found) == 1, f"{parameter!r} is no kind of parameter that ctypes is told of"
    return found[0]


def declarations() -> list[tuple[str, str, str]]:
    """Result, name and letters of the parameters of every `extern "C"` function."""
    folder = Path(cpu_build.__file__).parent
    sources = " ".join((folder / name).read_text() for name in cpu_build._SOURCES)
    # Macros hold declarations too, with a backslash at the end of each line.
    text = re.sub(r"[\\\s]+", " ", sources).replace("* ", "*")
    found = re.findall(r'extern "C" (\w+) (\w+(?:##NAME)?)\(([^)]*)\) \{', text)
    assert len(found) == text.count('extern "C"')
    return [
        (result, name, "".join(map(letter_of, filter(None, map(str.strip, given.split(","))))))
        for result, name, given in found
    ]


def test_ctypes_signatures_are_those_of_the_sources():
    """Number, order and kind of every parameter: ctypes would pass on whatever it is told."""
    kernels = {name: letters for result, name, letters in declarations() if result == "void"}
    typed = {f"{name}_##NAME" for name in cpu_build._TYPED}
    assert {name for name in kernels if name.endswith("##NAME")} == typed
    assert {n.removesuffix("_##NAME"): p for n, p in kernels.items()} == cpu_build._SIGNATURES
    others = {found for found in declarations() if found[0] != "void"}
    assert others == {("int64_t", "has_fused_conv", "")}


def test_kernels_of_several_types_are_compiled_for_each():
    source = (Path(cpu_build.__file__).parent / "batchnorm.cpp").read_text()
    compiled = re.findall(r"^FASTRES_FOR_TYPE\(\w+, (\w+)\)", source, re.MULTILINE)
    assert sorted(compiled) == sorted(cpu_build._TYPE_NAMES.values())


@pytest.fixture(autouse=True)
def _forget():
    cpu_build._load.cache_clear()
    yield
    cpu_build._load.cache_clear()


def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cpu_build.library() is None
    assert cpu_build.unavailable() == "no C++ compiler (no-such-compiler) here"
    assert not cpu_backend.runs_on(torch.zeros(1, 16, 8, 8))


def test_with_a_compiler_that_fails(monkeypatch, tmp_path):
    fake = tmp_path / "c++"
    script = '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "x: error: no" >&2\nexit 1\n'
    fake.write_text(script)
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path))
    assert cpu_build.library() is None
    assert "failed: x: error: no" in cpu_build.unavailable()
    assert not (tmp_path / "kernels").exists()


def test_switched_off(monkeypatch):
    monkeypatch.setenv("FASTRES_CPU_KERNELS", "0")
    assert cpu_build.unavailable() == "FASTRES_CPU_KERNELS=0"


def test_a_second_process_finds_the_library(monkeypatch, tmp_path, capsys):
    if shutil.which(os.environ.get("CXX") or "g++") is None:
        pytest.skip("no C++ compiler here")
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path))
    assert cpu_build.library() is not None
    made = [(path.name, path.stat().st_mtime_ns) for path in (tmp_path / "kernels").iterdir()]
    cpu_build._load.cache_clear()
    assert cpu_build.library() is not None
    again = [(path.name, path.stat().st_mtime_ns) for path in (tmp_path / "kernels").iterdir()]
    assert made == again
    assert len(made) == 1
    assert capsys.readouterr().err == "fastres: compiling the CPU kernels, once on this machine\n"


@pytest.fixture
def compiler(monkeypatch, tmp_path) -> Path:
    """A compiler that writes down how it is called and makes a file that is no library."""
    fake = tmp_path / "c++"
    calls = tmp_path / "calls"
    fake.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\n[ "$1" = --version ] && exit 0\n'
        'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path))
    return calls


def test_another_openmp_runtime_is_another_library(monkeypatch, compiler, tmp_path):
    """A library asks for its runtime by name: one built beside another torch cannot be loaded."""
    for name in ("libgomp-1.so", "libgomp-2.so"):
        monkeypatch.setattr(cpu_build, "_openmp_runtime", lambda name=name: [f"/some/where/{name}"])
        cpu_build._load.cache_clear()
        assert cpu_build.library() is None
        assert "cannot be built" in cpu_build.unavailable()
    assert len(list((tmp_path / "kernels").iterdir())) == 2


def test_a_compiler_may_have_a_launcher(monkeypatch, compiler):
    monkeypatch.setenv("CXX", f"env {os.environ['CXX']}")
    cpu_build.library()
    first, *sources, link = compiler.read_text().splitlines()
    assert first == "--version"
    assert sum("conv.cpp" in source for source in sources) == 1
    assert "-shared" in link


def test_the_cache_may_be_named_by_a_tilde(monkeypatch, compiler, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FASTRES_CACHE", "~/named")
    cpu_build.library()
    assert len(list((tmp_path / "named" / "kernels").iterdir())) == 1


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    """The real library, compiled once for the tests below."""
    if shutil.which(os.environ.get("CXX") or "g++") is None:
        pytest.skip("no C++ compiler here")
    return cpu_build._compile(["g++"], tmp_path_factory.mktemp("compiled"))


@pytest.fixture
def compilations(compiled, monkeypatch, tmp_path) -> list[Path]:
    """The folders of compilations, which copy the compiled library; the cache is `tmp_path`."""
    folders: list[Path] = []

    def compile_by_copying(_, folder):
        folders.append(folder)
        return Path(shutil.copy(compiled, folder / "cpu.so"))

    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu_build, "_compile", compile_by_copying)
    return folders


def load_as_a_new_process() -> bool:
    cpu_build._load.cache_clear()
    return cpu_build.library() is not None


def loads_in_a_child() -> bool:
    """Load in a forked process, which a damaged library could kill."""
    child = os.fork()
    if not child:
        os._exit(0 if load_as_a_new_process() else 1)
    return os.waitpid(child, 0)[1] == 0


DAMAGES = {
    **{
        f"cut to {part}/12": lambda content, part=part: content[: len(content) * part // 12]
        for part in range(12)
    },
    **{
        f"zeros from {part}/12 on": lambda content, part=part: content[
            : len(content) * part // 12
        ].ljust(len(content), b"\0")
        for part in range(12)
    },
    "a byte longer": lambda content: content + b"x",
    "another file": lambda content: b"#!/bin/sh\n",
    "without its digest": lambda content: content[:-64],
    "a flipped bit in the middle": lambda content: (
        content[: len(content) // 2]
        + bytes([content[len(content) // 2] ^ 1])
        + content[len(content) // 2 + 1 :]
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_built_again_with_one_line(damage, compilations, tmp_path, capfd):
    assert load_as_a_new_process()
    (stored,) = (tmp_path / "cache" / "kernels").iterdir()
    whole = stored.read_bytes()
    # As damage comes about; the library that this process has mapped is another file.
    stored.write_bytes(DAMAGES[damage](whole))
    capfd.readouterr()
    assert loads_in_a_child()
    line = f"fastres: compiling the CPU kernels, again: {stored.name} does not match its SHA-256\n"
    assert capfd.readouterr().err == line
    assert stored.read_bytes() == whole
    assert loads_in_a_child()
    assert capfd.readouterr().err == ""


UNUSABLE = {
    "File exists": lambda cache: cache.write_text("no folder"),
    "Not a directory": lambda cache: [cache.mkdir(), (cache / "kernels").write_text("no folder")],
    "Too many levels": lambda cache: cache.symlink_to(cache),
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_a_cache_that_cannot_be_used_stops_nothing(reason, compilations, tmp_path, capsys):
    UNUSABLE[reason](tmp_path / "cache")
    for _ in range(2):
        assert load_as_a_new_process()
    assert len(compilations) == 2
    assert not any(folder.exists() for folder in compilations)
    assert "cannot be kept, so every start compiles" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_cache_that_cannot_be_written_stops_nothing(number, compilations, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cpu_build, "write_cache_file", refuse)
    assert load_as_a_new_process()
    assert os.strerror(number) in capsys.readouterr().err


def test_without_a_home_folder(compilations, monkeypatch, capsys):
    monkeypatch.delenv("FASTRES_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert load_as_a_new_process()
    assert "for this process: this user has no home folder" in capsys.readouterr().err


def test_a_folder_in_the_place_of_the_library_makes_way(compilations, tmp_path):
    assert load_as_a_new_process()
    (stored,) = (tmp_path / "cache" / "kernels").iterdir()
    stored.unlink()
    (stored / "x").mkdir(parents=True)
    assert load_as_a_new_process()
    assert stored.is_file()


def test_where_nothing_may_be_run_from_temporary_files(compilations, monkeypatch, tmp_path):
    load = ctypes.CDLL

    def load_elsewhere(path):
        if not path.startswith(str(tmp_path)):
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(cpu_build.ctypes, "CDLL", load_elsewhere)
    assert load_as_a_new_process()
    monkeypatch.setattr(cpu_build, "write_cache_file", lambda *_: os.listdir(tmp_path / "none"))
    shutil.rmtree(tmp_path / "cache")
    assert not load_as_a_new_process()
    assert "failed to map segment" in cpu_build.unavailable()


def test_what_killed_processes_left_is_removed_when_old(compilations, tmp_path):
    folder = tmp_path / "cache" / "kernels"
    folder.mkdir(parents=True)
    old, new = folder / ".unfinished-old", folder / ".unfinished-new"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    assert load_as_a_new_process()
    assert not old.exists()
    assert new.exists()


def test_two_processes_build_at_once(compiler, tmp_path):
    """Each makes its own file and moves it: neither ever sees half of one."""
    program = "from fastres.kernels.cpu import build; print(build.unavailable())"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    answers = [process.communicate()[0] for process in running]
    assert all("cannot be built" in answer for answer in answers)
    assert len(list((tmp_path / "kernels").iterdir())) == 1
