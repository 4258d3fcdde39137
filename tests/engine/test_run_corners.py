"""Runs at the edge: odd options, folders that others use, data and directories that change."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastres import cli, evaluate
from fastres.config import Config, validate
from fastres.engine.run_dir import RunDir
from fastres.engine.step import TrainStep
from fastres.engine.trainer import Trainer
from tests.helpers.data_fixtures import image_folder
from tests.helpers.tiny_run import TINY_NET, run_train

ROOT = Path(__file__).resolve().parents[2]
TINY = (*TINY_NET, "--batch-size", "10", "--epochs", "0.5")
SYNTHETIC = (*TINY, "--dataset", "synthetic", "--limit-train", "100")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, for reading alone."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert run_train(*SYNTHETIC, "--out", out) == 0
    return out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", str(2**63)], f"between 0 and {2**63 - 1}, got {2**63}"),
        (["--batch-size", "1" + 400 * "0"], "between 1 and 1048576"),
        (["--lr", "inf"], "--lr must be between 0 and 3.4e+38, got inf"),
        (["--warmup", "1.5"], "--warmup must be between 0 and 1, got 1.5"),
        (["--data-dir", ""], "--data-dir is empty"),
        (["--out", ""], "--out is empty"),
        (["--recipe", ""], "unknown recipe ''"),
        (["--data-dir", "~no-such-user/data"], "does not exist"),
    ],
)
def test_odd_values_are_named(options, message, capsys):
    assert run_train("--dry-run", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_number_beyond_floats_is_a_number():
    """There are fewer images, so the limit does nothing."""
    assert validate(Config(limit_train=10**400)).limit_train == 10**400


@pytest.mark.parametrize(
    "text", [b"\x8a\x00\xff", b'{"seed": ' + 5000 * b"1" + b"}", 100_000 * b"["]
)
def test_a_config_file_that_is_no_json_is_named(text, tmp_path, capsys):
    (tmp_path / "c.json").write_bytes(text)
    assert run_train("--config", tmp_path / "c.json") == 2
    assert "c.json is not a JSON file" in capsys.readouterr().err


def test_what_the_system_refuses_is_one_sentence(tmp_path, capsys):
    assert run_train(*SYNTHETIC, "--out", tmp_path / (300 * "a")) == 1
    assert capsys.readouterr().err.endswith(f"{300 * 'a'}: File name too long\n")
    assert cli.guarded((tmp_path / "none").iterdir().__next__, debug=False) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'}: No such file or directory\n"


def test_a_path_that_the_terminal_cannot_show(tmp_path):
    folder = image_folder(tmp_path / "bilder-ü")
    result = subprocess.run(
        [sys.executable, "-m", "fastres.train", "--dry-run", "--data-dir", folder, *TINY],
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "bilder-\\xfc" in result.stdout


def test_evaluation_names_its_own_options(run, capsys):
    assert evaluate.main([str(run), "--batch-size", "0"]) == 2
    assert "error: --batch-size must be between 1" in capsys.readouterr().err


def test_a_run_is_found_again_from_another_directory(tmp_path, monkeypatch, capsys):
    image_folder(tmp_path / "mine", per_class=10)
    image_folder(tmp_path / "other", per_class=11)
    monkeypatch.chdir(tmp_path)
    assert run_train(*TINY, "--data-dir", "mine", "--out", "run") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    assert evaluate.main(["../run", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["accuracy"] == pytest.approx(summary["test_accuracy"])
    assert "trained on other data" not in printed.err
    assert evaluate.main(["../run", "--data-dir", "../other"]) == 0
    assert "trained on other data than this: folder-mine" in capsys.readouterr().out


def test_ctrl_c_reaches_the_workers_too_and_one_process_answers(tmp_path):
    command = [sys.executable, "-m", "fastres.train", *SYNTHETIC, "--loader", "torch"]
    child = subprocess.Popen(
        [*command, "--workers", "2", "--epochs", "500", "--out", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    for line in child.stdout:
        if line.split()[:1] == ["1.00"]:
            os.killpg(child.pid, signal.SIGINT)
    assert child.wait() == 130
    assert child.stderr.read() == "stopping after this step; once more to stop at once\n"


def test_two_runs_do_not_share_a_folder(run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    with RunDir(out).claimed():
        for mode in ([*SYNTHETIC, "--overwrite"], ["--resume"]):
            assert run_train(*mode, "--out", out) == 2
            assert "another process is training in" in capsys.readouterr().err
    assert (out / "summary.json").read_bytes() == (run / "summary.json").read_bytes()
    assert run_train("--resume", "--out", out) == 0


def test_a_run_that_ended_meanwhile_is_kept(run, tmp_path, monkeypatch, capsys):
    """Compiling takes a while, in which another process may have used the folder."""
    out = tmp_path / "run"
    prepare = Trainer.prepare

    def prepare_slowly(trainer):
        prepare(trainer)
        shutil.copytree(run, out)

    monkeypatch.setattr(Trainer, "prepare", prepare_slowly)
    assert run_train(*SYNTHETIC, "--out", out) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


@pytest.mark.parametrize("change", [{"optimizer": "adamw"}, {"ema": 0.9}, {"epochs": 2.0}])
def test_a_checkpoint_of_other_options_is_refused(change, run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | change))
    assert run_train("--resume", "--out", out) == 1
    error = capsys.readouterr().err
    assert f"than its config.json names: {next(iter(change))}" in error
    assert error.count("\n") == 1


def test_a_resumed_run_says_how_its_steps_were_made(tmp_path, monkeypatch):
    """The way of the steps, not that of the process that looked at the finished run last."""
    out = tmp_path / "run"

    def summary():
        found = json.loads((out / "summary.json").read_text())
        return [found[key] for key in ("fast", "channels_last", "precision", "processes")]

    with monkeypatch.context() as patch:
        compute = TrainStep.__call__

        def interrupted(self, step, images, labels):
            compute(self, step, images, labels)
            os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(TrainStep, "__call__", interrupted)
        assert run_train(*SYNTHETIC, "--out", out) == 130
    assert run_train("--resume", "--channels-last", "on", "--out", out) == 0
    assert summary() == [False, "mixed", "fp32", 1]
    assert run_train("--resume", "--fast", "--amp", "off", "--out", out) == 0
    assert summary() == [False, "mixed", "fp32", 1]
