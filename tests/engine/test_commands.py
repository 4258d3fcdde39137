"""All commands under one name, and what they print before they do anything."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastres
from fastres import __main__ as fastres_command
from fastres import train as train_command

ROOT = Path(__file__).resolve().parents[2]
GROUPS = {
    "run options": {"--fast", "--recipe", "--seed", "--out", "--resume", "--dry-run", "--debug"},
    "data options": {"--dataset", "--data-dir", "--val", "--flip", "--cutout"},
    "network options": {"--model", "--width", "--shortcut", "--whiten"},
    "optimisation options": {"--epochs", "--batch-size", "--lr", "--schedule", "--ema"},
    "machine options": {"--device", "--threads", "--loader", "--amp", "--route", "--graph"},
}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_command_all_are_listed(arguments, capsys):
    assert fastres_command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in fastres_command.COMMANDS)


def test_an_unknown_command_is_one_sentence(capsys):
    assert fastres_command.main(["trian"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown command 'trian'; the commands are")


def test_the_version_is_printed(capsys):
    assert fastres_command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastres {fastres.__version__}\n"


@pytest.mark.parametrize("name", fastres_command.COMMANDS)
def test_every_command_has_its_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        fastres_command.main([name, "--help"])
    assert ended.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_python_m_fastres_is_the_same_command_without_torch():
    code = (
        "import runpy, sys; sys.argv = ['fastres', '--help']\n"
        "try: runpy.run_module('fastres', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr


def test_train_runs_by_its_short_name(capsys):
    words = ["train", "--dataset", "synthetic", "--limit-train", "400", "--dry-run"]
    assert fastres_command.main(words) == 0
    assert "resnet11" in capsys.readouterr().out


def test_a_record_names_the_command_that_repeats_it(tmp_path):
    words = ["--dataset", "synthetic", "--limit-train", "40", "--batch-size", "20", "--epochs", "1"]
    words += ["--model", "resnet8", "--width", "0.25", "--shortcut", "A", "--threads", "1"]
    words += ["--out", str(tmp_path / "run")]
    assert fastres_command.main(["train", *words]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["command"] == f"python -m fastres.train {' '.join(words)}"


def test_help_is_in_groups(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        train_command.main(["--help"])
    lines = [line.strip("│╭ ─") for line in capsys.readouterr().out.splitlines()]
    starts = {line: number for number, line in enumerate(lines) if line in GROUPS}
    assert list(starts) == list(GROUPS)
    ends = [*list(starts.values())[1:], len(lines)]
    for (group, first), end in zip(starts.items(), ends, strict=True):
        found = {line.split()[0].rstrip(",") for line in lines[first:end] if line.startswith("--")}
        assert GROUPS[group] <= found, group
