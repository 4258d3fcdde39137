"""What works, what is missing and what is broken, each told apart."""

import json
import subprocess
import sys

import pytest

from fastres import doctor
from fastres.doctor import Finding
from fastres.engine.runtime import resolve_runtime
from fastres.model.resnet import network_of
from fastres.recipes import from_recipe


@pytest.fixture
def looks(monkeypatch):
    """Put other looks in the place of this machine's, and nothing in that of --fast."""

    def put(**found):
        monkeypatch.setattr(doctor, "_looks", lambda options: found)
        monkeypatch.setattr(
            doctor, "_what_fast_takes", lambda settings: Finding("--fast", "ok", "nothing")
        )

    return put


def test_this_machine(capsys):
    code = doctor.main(["--quick", "--json"])
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    by_name = {look["name"]: look for look in found["findings"]}
    assert code == any(look["status"] == "broken" for look in by_name.values())
    assert {"GPU", "bf16", "Triton", "DALI", "C++ compiler", "cache", "data"} <= by_name.keys()
    assert "torch.compile" not in by_name
    for name in ("fastres", "libraries", "processor", "torch", "cache", "--fast"):
        assert by_name[name]["status"] == "ok", by_name[name]
    config = from_recipe("quick").replace(fast=True)
    settings = resolve_runtime(config, network_of(config, 10)).settings
    assert found["fast"] == {s.name: {"value": s.value, "reason": s.reason} for s in settings}
    assert "ok       torch " in printed.err


def test_json(looks, capsys):
    looks(torch=lambda: Finding("torch", "ok", "2.0"))
    assert doctor.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == [
        {"name": "torch", "status": "ok", "detail": "2.0"},
        {"name": "--fast", "status": "ok", "detail": "nothing"},
    ]


def test_missing_is_no_fault_and_broken_is(looks, capsys):
    looks(a=lambda: Finding("a", "missing", "not installed"))
    assert doctor.main([]) == 0
    looks(b=lambda: Finding("b", "broken", "it is bent"), c=lambda: 1 / 0)
    assert doctor.main([]) == 1
    printed = capsys.readouterr().out
    assert "it is bent" in printed
    assert "ZeroDivisionError" in printed
    assert "installed, and does not work: b, c\n" in printed


def test_without_torch_it_is_torch_alone_that_is_named(looks, capsys):
    looks(torch=lambda: Finding("torch", "broken", "no libc"), GPU=lambda: 1 / 0, b=lambda: 1 / 0)
    assert doctor.main([]) == 1
    printed = capsys.readouterr().out
    assert "installed, and does not work: torch, b\n" in printed
    assert "needs torch" in printed


def test_it_asks_without_torch():
    """Its own process survives a torch that does not."""
    code = """
import sys

class NoTorch:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("a torch that does not load")

sys.meta_path.insert(0, NoTorch)
from fastres import doctor
for look in (doctor._fastres, doctor._processor, doctor._libraries, doctor._cache):
    assert look().status == "ok"
doctor._compiler()
doctor._data(None)
sys.exit(doctor.main(["--help"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout


@pytest.mark.parametrize(
    ("module", "code", "status", "detail"),
    [
        ("no_such_module_at_all", "", "missing", "not installed"),
        ("no.such.module", "", "missing", "not installed"),
        ("json", "print('a')\nprint('1.2')", "ok", "1.2"),
        ("json", "print('missing: a GPU')", "missing", "a GPU"),
        ("json", "raise RuntimeError('bent')", "broken", "RuntimeError: bent"),
        (
            "json",
            "import sys; sys.exit('Traceback:\\na.b.TheError: bent\\n\\nSet X=1 to see more.')",
            "broken",
            "a.b.TheError: bent",
        ),
        ("json", "import os; os.kill(os.getpid(), 11)", "broken", "killed by signal 11"),
        ("json", "import sys; sys.exit(3)", "broken", "ended with exit code 3"),
        ("json", "import fastres, inspect, __main__; inspect.getsource(__main__)", "ok", ""),
    ],
)
def test_what_is_installed_is_used(module, code, status, detail, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctor._tried("x", module, code) == Finding("x", status, detail)


def test_what_hangs_is_stopped(monkeypatch):
    monkeypatch.setattr(doctor, "_PROBE_S", 0.5)
    found = doctor._tried("x", "json", "import time; time.sleep(60)")
    assert found.status == "broken"
    assert "hung" in found.detail


@pytest.mark.parametrize(
    ("driver", "visible", "status", "detail"),
    [
        (None, None, "missing", "no NVIDIA GPU"),
        ("H200, 580.1", None, "broken", "torch sees none; nvidia-smi: H200, 580.1; built for CPUs"),
        ("H200, 580.1", "", "missing", "hidden by CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_gpu_that_torch_does_not_see(driver, visible, status, detail, monkeypatch):
    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    monkeypatch.setattr(doctor, "_tried", lambda *_: Finding("GPU", "missing", "built for CPUs"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = doctor._gpu()
    assert found.status == status
    assert detail in found.detail


def test_data_is_told_of_and_never_downloaded(tmp_path):
    assert doctor._data(None).status == "missing"
    found = doctor._looked("data", lambda: doctor._data(str(tmp_path / "gone")))
    assert found == Finding("data", "broken", f"the data folder {tmp_path / 'gone'} does not exist")
