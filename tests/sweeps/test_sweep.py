"""Whole sweeps: their results, and going on after an end."""

import csv
import importlib.util
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from fastres import sweep
from fastres.engine.run_dir import RunDir
from tests.helpers.tiny_run import children, is_running, start

OPTIONS = {
    "model": "resnet8",
    "width": 0.25,
    "shortcut": "A",
    "whiten": "false",
    "dataset": "synthetic",
    "limit_train": 60,
    "batch_size": 10,
    "epochs": 1,
    "threads": 1,
}


def words_of(**changes):
    """Return the words that set the options of a tiny run."""
    return [w for name, v in (OPTIONS | changes).items() for w in ("--set", f"{name}={v}")]


def run_sweep(*words):
    return sweep.main([str(word) for word in words])


def table(out, name="runs.csv"):
    with open(out / name, newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_from_its_plan_to_its_table(tmp_path, capsys):
    out = tmp_path / "sweep"
    words = (*words_of(lr="0.05,0.1"), "--seeds", "2", "--jobs", "2", "--out", out)
    assert run_sweep(*words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["setting"], row["n"]) for row in found] == [("lr=0.05", 2), ("lr=0.1", 2)]
    assert [row["setting"] for row in table(out, "settings.csv")] == ["lr=0.05", "lr=0.1"]
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    rows = table(out)
    assert [(row["setting"], row["seed"]) for row in rows] == [
        (f"lr={lr}", seed) for lr in (0.05, 0.1) for seed in "01"
    ]
    assert {row["dataset"] for row in rows} == {"synthetic"}
    for row in rows:
        summary = json.loads((Path(row["path"]) / "summary.json").read_text())
        assert float(row["test_accuracy"]) == summary["test_accuracy"]
        assert summary["seed"] == int(row["seed"])
    config = json.loads((out / "runs" / "lr_0.05-seed1" / "config.json").read_text())
    assert (config["lr"], config["seed"], config["model"]) == (0.05, 1, "resnet8")
    # Another time nothing is run again; more seeds are.
    before = (out / "runs" / "lr_0.05-seed1" / "summary.json").stat().st_mtime_ns
    assert run_sweep("--resume", "--out", out, "--seeds", "3", "--jobs", "2") == 0
    printed = capsys.readouterr().out
    assert "4 of them done before" in printed
    assert "synthetic" in printed
    assert (out / "runs" / "lr_0.05-seed1" / "summary.json").stat().st_mtime_ns == before
    assert len(table(out)) == 6
    # Neither another sweep nor other settings come into its folder.
    assert run_sweep(*words) == 2
    assert "already holds a sweep" in capsys.readouterr().err
    assert run_sweep("--resume", "--out", out, "--set", "lr=1") == 2
    assert "a resumed sweep keeps its --set" in capsys.readouterr().err
    for words, message in (
        (["--fast"], "a resumed sweep keeps its --fast"),
        (["--seeds", "2"], "the sweep has --seeds 3 already"),
        (["--overwrite"], "give one"),
    ):
        assert run_sweep("--resume", "--out", out, *words) == 2
        assert message in capsys.readouterr().err
    assert len(table(out)) == 6


def test_a_run_that_fails_stops_no_other_and_is_tried_again(tmp_path, capsys):
    out = tmp_path / "sweep"
    # More images than there are to train on.
    words = (*words_of(batch_size="4000,10"), "--seeds", "1", "--jobs", "1", "--out", out)
    assert run_sweep(*words) == 1
    printed = capsys.readouterr().out
    assert "! batch_size_4000-seed0 failed: exit code 2: error: batch size 4000" in printed
    assert "1 of 2 runs failed" in printed
    # What it would have been compared with is missing.
    assert [row["difference"] for row in table(out, "settings.csv")] == [""]
    assert run_sweep("--resume", "--out", out) == 1
    assert "1 of them done before" in capsys.readouterr().out


def test_how_many_at_once_is_measured(tmp_path, capsys, monkeypatch):
    from fastres.sweeps import local

    monkeypatch.setattr(local, "_TRIAL_S", 0.3)
    out = tmp_path / "sweep"
    assert run_sweep(*words_of(batch_size="10,20"), "--seeds", "1", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "a moment of batch_size_20-seed0" in printed
    assert re.search(r"^ +1: [\d,]+ images/s together", printed, re.MULTILINE)
    assert re.search(r"^  [12] at once", printed, re.MULTILINE)


# Going on


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_sweep_goes_on(tmp_path, capsys, number):
    out = tmp_path / "sweep"
    words = [*words_of(epochs=20), "--seeds", "2", "--jobs", "2", "--out", str(out)]
    process = start(["-m", "fastres", "sweep", *words])
    folders = [out / "runs" / f"base-seed{seed}" for seed in range(2)]
    wait_for(lambda: all((folder / "last.safetensors").exists() for folder in folders))
    # Another sweep of the folder is refused meanwhile.
    assert run_sweep("--resume", "--out", out) == 2
    assert "another process" in capsys.readouterr().err
    runs = children(process.pid)
    process.send_signal(number)
    printed = process.communicate(timeout=120)[0]
    wait_for(lambda: not any(map(is_running, runs)))
    if number == signal.SIGTERM:
        assert process.returncode == 128 + number, printed
        assert "go on with: fastres sweep --resume" in printed
        assert "failed" not in printed
    assert not any((folder / "summary.json").exists() for folder in folders)
    logs = [(out / "runs" / f"base-seed{seed}.log").read_text() for seed in range(2)]
    assert all("stopped by SIGTERM" in log for log in logs)
    assert run_sweep("--resume", "--out", out) == 0
    assert len(table(out)) == 2
    logs = [(out / "runs" / f"base-seed{seed}.log").read_text() for seed in range(2)]
    assert all(re.search(r"^resume .* after \d", log, re.MULTILINE) for log in logs)


def test_a_recipe_that_has_changed_is_no_longer_the_sweeps(tmp_path, capsys):
    recipe, out = tmp_path / "mine.toml", tmp_path / "sweep"
    recipe.write_text("lr = 0.1\n")
    words = (*words_of(), "--recipe", recipe, "--seeds", "1", "--jobs", "1", "--out", out)
    assert run_sweep(*words) == 0
    recipe.write_text("lr = 0.2\n")
    assert run_sweep("--resume", "--out", out, "--seeds", "2") == 1
    assert "base-seed0.json has another lr than the recipe has now" in capsys.readouterr().err


def test_overwriting_removes_the_runs_that_were_there(tmp_path, capsys):
    out = tmp_path / "sweep"
    words = ("--jobs", "1", "--out", out)
    assert run_sweep(*words_of(), "--seeds", "2", *words) == 0
    assert run_sweep(*words_of(lr=0.01), "--seeds", "1", *words, "--overwrite") == 0
    assert len(table(out)) == 1
    assert sorted(os.listdir(out / "runs")) == ["base-seed0", "base-seed0.json", "base-seed0.log"]


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "sweep.json").write_text("{}")
    for words in (["--resume"], ["--overwrite", *words_of()]):
        assert run_sweep(*words, "--out", tmp_path) != 0
        assert capsys.readouterr().err.count("\n") == 1
    assert run_sweep("--resume", "--out", tmp_path / "nothing") == 2
    assert "is no sweep folder" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["sweep.json"]


# Wrong use


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--out", ""], "--out is empty"),
        (["--search", "3"], "--search and --space belong together"),
        (["--space", "lr=1..2"], "--search and --space belong together"),
        (["--search", "3", "--space", "lr=2..1"], "is empty"),
        (["--search", "3", "--space", "nothing=1..2"], "unknown option 'nothing'"),
        (["--search", "3", "--space", "model=resnet8,resnet21"], "unknown model 'resnet21'"),
        (["--search", "3", "--space", "lr=1..2", "--set", "lr=1"], "in --set and in --space"),
        (["--search", "3", "--space", "lr=1..2", "--set", "flip=none,random"], "into --space"),
        (["--search", "3", "--space", "lr=1..2", "--set", "val=false"], "leave out --set val"),
        (["--search", "3", "--space", "lr=1..2", "--engine", "slurm"], "leave out --engine"),
        (["--resume"], "--resume needs --out"),
        (["--engine-option", "a=b"], "is for --engine slurm"),
        (["--engine", "slurm", "--engine-option", "a"], "must be NAME=VALUE"),
        (["--set", "nothing=1"], "unknown option 'nothing'"),
        (["--set", "lr=[1]"], "must be a number"),
        (["--recipe", "no.toml"], "no.toml"),
    ],
)
def test_wrong_use_is_one_sentence(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_sweep(*words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("optuna", ["--search", "3", "--space", "lr=0.1..0.2"]),
        ("submitit", ["--engine", "slurm"]),
        ("submitit", ["--engine", "submitit-local"]),
    ],
)
def test_a_missing_extra_is_named(package, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec

    def find_others(name, *rest):
        return None if name == package else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_others)
    assert run_sweep(*words) == 2
    assert f"needs {package}: pip install {package}" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


# Elsewhere


def test_two_workers_of_submitit(tmp_path, capsys):
    pytest.importorskip("submitit")
    out = tmp_path / "sweep"
    words = (*words_of(), "--seeds", "3", "--jobs", "2", "--engine", "submitit-local")
    assert run_sweep(*words, "--out", out) == 0
    assert len(table(out)) == 3
    assert len(list((out / "submitit").glob("*_result.pkl"))) == 3


def test_a_signal_cancels_the_jobs_of_submitit(tmp_path):
    pytest.importorskip("submitit")
    out = tmp_path / "sweep"
    words = [*words_of(epochs=2000), "--seeds", "1", "--engine", "submitit-local"]
    process = start(["-m", "fastres", "sweep", *words, "--jobs", "1", "--out", str(out)])
    folder = out / "runs" / "base-seed0"
    wait_for(lambda: (folder / "last.safetensors").exists())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    # The run saves and lets go of its folder.
    log = out / "runs" / "base-seed0.log"
    wait_for(lambda: "stopped by SIGTERM" in log.read_text())
    wait_for(lambda: not RunDir(folder).has_only_begun())


@pytest.mark.parametrize(
    ("option", "message"), [("nothing=1", "nothing"), ("timeout_min=soon", "timeout_min")]
)
def test_options_that_submitit_does_not_take_are_named(tmp_path, capsys, option, message):
    pytest.importorskip("submitit")
    words = (*words_of(), "--seeds", "1", "--jobs", "1", "--engine", "submitit-local")
    assert run_sweep(*words, "--engine-option", option, "--out", tmp_path / "sweep") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --engine-option: ")
    assert message in error


def test_a_search_is_judged_by_validation_images_and_goes_on(tmp_path, capsys):
    pytest.importorskip("optuna")
    out = tmp_path / "sweep"
    space = ("--space", "lr=0.01..0.2:log", "--space", "flip=none,random")
    assert run_sweep(*words_of(), "--search", "2", *space, "--jobs", "1", "--out", out) == 0
    assert "validation" in capsys.readouterr().out
    first = [row["setting"] for row in table(out)]
    assert len(first) == 2
    assert all(float(row["val_accuracy"]) >= 0 for row in table(out))
    assert run_sweep("--resume", "--out", out, "--search", "4") == 0
    settings = [row["setting"] for row in table(out)]
    assert settings[:2] == first
    # The proposals go on, too.
    assert len(set(settings)) == 4


def test_a_setting_that_is_proposed_again_is_run_from_its_next_seed(tmp_path):
    pytest.importorskip("optuna")
    out = tmp_path / "sweep"
    words = (*words_of(), "--search", "3", "--space", "flip=none,random", "--jobs", "2")
    assert run_sweep(*words, "--out", out) == 0
    rows = table(out)
    assert len({(row["setting"], row["seed"]) for row in rows}) == 3
    assert len({row["setting"] for row in rows}) <= 2


def test_the_command_has_an_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_sweep("--help")
    assert stopped.value.code == 0
    assert "fastres sweep --seeds 5 --set lr=0.1,0.2" in " ".join(capsys.readouterr().out.split())
