"""The training command from outside: what it leaves behind, resumes, refuses and says."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastres import evaluate as evaluate_command
from fastres import train as train_command
from fastres.data.loaders import dali_missing
from fastres.engine import checkpoint, trainer
from fastres.engine.console import RunConsole
from fastres.engine.evaluation import evaluate
from fastres.engine.run_dir import RunDir
from fastres.engine.step import TrainStep
from fastres.errors import FailureError
from fastres.kernels.cpu import build as cpu_build

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    *("--dataset", "synthetic", "--limit-train", "400", "--model", "resnet8", "--shortcut", "A"),
    *(
        "--epochs",
        "2",
        "--batch-size",
        "50",
        "--lr",
        "0.1",
        "--width",
        "0.25",
        "--no-whiten",
        "--threads",
        "1",
    ),
)
FILES = {
    "config.json",
    "metrics.jsonl",
    "metrics.csv",
    "summary.json",
    "curves.png",
    "last.safetensors",
    "model.safetensors",
}
SUMMARY_KEYS = {
    *("dataset", "model", "route", "loader", "device", "precision", "epochs", "test_accuracy"),
    *("train_seconds", "compile_seconds", "images_per_second", "versions", "commit"),
}


def train(*arguments):
    return train_command.main([str(argument) for argument in arguments])


def weights(run):
    return checkpoint.read(run / "model.safetensors")[0]


def same_weights(one, two):
    return all(torch.equal(value, weights(two)[name]) for name, value in weights(one).items())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, for reading alone."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert train(*TINY, "--out", out) == 0
    return out


def test_a_run_leaves_its_records(run):
    assert {path.name for path in run.iterdir()} == FILES
    summary = json.loads((run / "summary.json").read_text())
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["dataset"] == "synthetic"
    assert (summary["route"], summary["precision"], summary["loader"]) == ("eager", "fp32", "torch")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    table = list(csv.DictReader((run / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == [1, 2]
    assert [float(row["train_loss"]) for row in table] == [row["train_loss"] for row in rows]
    assert summary["test_accuracy"] == rows[-1]["test_accuracy"]
    with Image.open(run / "curves.png") as picture:
        assert picture.width > 600
        assert np.asarray(picture).std() > 10


def test_the_weights_are_a_plain_state_dict(run):
    keys = weights(run).keys()
    assert "conv1.weight" in keys
    assert not [key for key in keys if key.startswith(("_orig_mod", "module.", "model."))]


def test_the_written_config_repeats_the_run(run, tmp_path):
    assert train("--config", run / "config.json", "--out", tmp_path / "again") == 0
    assert same_weights(run, tmp_path / "again")


def test_seeds_differ(run, tmp_path):
    assert train("--config", run / "config.json", "--seed", 1, "--out", tmp_path / "other") == 0
    assert not same_weights(run, tmp_path / "other")


def test_fast_is_the_same_training(run, tmp_path):
    assert train(*TINY, "--fast", "--amp", "off", "--out", tmp_path / "fast") == 0
    rows = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (run, tmp_path / "fast")
    ]
    for eager, fast in zip(*rows, strict=True):
        assert fast["train_loss"] == pytest.approx(eager["train_loss"], rel=1e-3)
    assert weights(run).keys() == weights(tmp_path / "fast").keys()


def metrics(run):
    """Return the rows of a run without what depends on the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


RESUMED = [
    (),
    ("--fast", "--ema", "0.9", "--val"),
    ("--optimizer", "adamw", "--lr", "0.01", "--ema", "0.9", "--cutout", "8"),
]


@pytest.mark.parametrize("options", RESUMED)
@pytest.mark.parametrize("last_step", [2, 7, 15])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(options, last_step, tmp_path, monkeypatch):
    """Ctrl-C within an epoch, in its last step or the run's: the same bits and rows."""
    arguments = [*TINY, "--limit-train", "480", "--batch-size", "54", "--deterministic", *options]
    assert train(*arguments, "--out", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        compute = TrainStep.__call__

        def interrupted(self, step, images, labels):
            compute(self, step, images, labels)
            if step == last_step:
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(TrainStep, "__call__", interrupted)
        assert train(*arguments, "--out", tmp_path / "stopped") == 130
    assert not (tmp_path / "stopped" / "summary.json").exists()
    assert train("--resume", "--out", tmp_path / "stopped") == 0
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "stopped")


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_stopped_evaluation_keeps_its_epoch(epoch, run, tmp_path, monkeypatch, capsys):
    """It may take longer than whoever sent the signal waits; resuming begins with it."""
    evaluated = []

    def interrupted(*arguments, **options):
        evaluated.append(arguments)
        if len(evaluated) == epoch:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, **options)

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", interrupted)
        assert train(*TINY, "--out", out) == 143
    progress = checkpoint.read(out / "last.safetensors")[1]["progress"]
    assert (progress["step"], len(progress["rows"])) == (8 * epoch, epoch - 1)
    assert train("--resume", "--out", out) == 0
    assert same_weights(run, out)
    assert metrics(run) == metrics(out)


def fails(*_arguments, **_options):
    raise FailureError("this failed")


@pytest.mark.parametrize(
    ("where", "name", "saved"),
    [
        (RunConsole, "row", ("last.safetensors", "metrics.csv")),
        (RunDir, "write_metrics", ("last.safetensors",)),
        (trainer, "draw_curves", ("last.safetensors", "model.safetensors", "summary.json")),
    ],
)
def test_nothing_is_reported_before_it_is_saved(where, name, saved, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(where, name, fails)
        assert train(*TINY, "--epochs", "1", "--out", tmp_path) == 1
    assert capsys.readouterr().err == "error: this failed\n"
    assert {"config.json", *saved} <= {path.name for path in tmp_path.iterdir()}
    progress = checkpoint.read(tmp_path / "last.safetensors")[1]["progress"]
    assert [row["epoch"] for row in progress["rows"]] == [1]


def test_a_signal_from_outside_saves_and_ends_with_its_code(tmp_path):
    out = tmp_path / "stopped"
    command = [sys.executable, "-m", "fastres.train", *TINY, "--epochs", "500", "--out", str(out)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    for line in child.stdout:
        if line.split()[:1] == ["1.00"]:
            child.send_signal(signal.SIGTERM)
    assert child.wait() == 143
    _, meta = checkpoint.read(out / "last.safetensors")
    assert meta["progress"]["step"] >= 8


def test_resuming_a_finished_run_changes_nothing(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    assert train("--resume", "--out", tmp_path / "copy") == 0
    assert same_weights(run, tmp_path / "copy")


def test_validation_chooses_and_the_test_set_does_not(tmp_path):
    out = tmp_path / "val"
    assert train(*TINY, "--val", "--out", out) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: row["val_accuracy"])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["checkpoint"] == "best.safetensors"
    assert summary["train_images"] == 360
    assert summary["test_accuracy"] == best["test_accuracy"]


def test_json_is_all_there_is_on_stdout(tmp_path, capsys):
    assert train(*TINY, "--epochs", "0.25", "--json", "--out", tmp_path / "run") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "run" / "summary.json").read_text())


def test_a_dry_run_describes_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train(*TINY, "--model", "resnet20", "--width", "1", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "layer3.2.conv2" in text
    assert "269,722" in text
    assert not list(tmp_path.iterdir())


def test_evaluation_repeats_the_accuracy(run, capsys):
    summary = json.loads((run / "summary.json").read_text())
    for options in (
        [],
        ["--batch-size", "7"],
        ["--checkpoint", "last"],
        ["--fast", "--amp", "off"],
    ):
        assert evaluate_command.main([str(run), "--json", *options]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["images"] == summary["test_images"] == 2000
        assert result["accuracy"] == pytest.approx(summary["test_accuracy"], abs=0.1)
    assert evaluate_command.main([str(run), "--json", "--tta", "flip"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] != result["loss"]


def test_evaluation_refuses_other_data(run, tmp_path, capsys):
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(folder / "0.png")
    arguments = [str(run), "--dataset", "folder", "--data-dir", str(tmp_path)]
    assert evaluate_command.main(arguments) == 1
    error = capsys.readouterr().err
    assert "trained on synthetic, does not fit image folder" in error
    assert "it was trained on 10 classes, and there are 2 here" in error


def test_evaluation_refuses_another_models_checkpoint(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "mixed")
    config = json.loads((run / "config.json").read_text())
    (tmp_path / "mixed" / "config.json").write_text(json.dumps(config | {"width": 0.5}))
    assert evaluate_command.main([str(tmp_path / "mixed")]) == 1
    assert "another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "resnet21"], 2, "unknown model 'resnet21'; the models are"),
        (["--recipe", "slow"], 2, "unknown recipe 'slow'; the recipes are quick"),
        (["--batch-size", "401"], 2, "batch size 401 is larger than the 400 training images"),
        (["--batch-size", "0"], 2, "--batch-size must be between 1"),
        (["--epochs", "0"], 2, "--epochs must be more than 0"),
        (["--lr", "nan"], 2, "--lr must be between 0 and"),
        (["--compile", "on", "--route", "eager"], 2, "contradicts"),
        (["--config", "none.json"], 2, "cannot read the options in none.json"),
        (["--config", "x.json", "--recipe", "quick"], 2, "--recipe does not go with --config"),
        (["--data-dir", "nowhere", "--dataset", "cifar10"], 2, "nowhere"),
        (["--lr", "1e30", "--warmup", "0", "--schedule", "constant"], 1, "diverged"),
        *(
            [(["--device", "cuda"], 2, "no usable NVIDIA GPU")]
            if not torch.cuda.is_available()
            else []
        ),
    ],
)
def test_bad_use_is_one_sentence_and_an_exit_code(
    arguments, code, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert train(*TINY, "--out", "run", *arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    if code == 2:
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--nonsense"], ["--loader", "ffcv"], ["--epochs", "many"], ["--optimizer", "lbfgs"]],
)
def test_what_the_parser_refuses_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        train(*TINY, *arguments)
    assert stop.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a JSON file"),
        ("[]", "must hold a JSON object"),
        ('{"learning_rate": 1}', "unknown option 'learning_rate'"),
        ('{"epochs": "ten"}', "'epochs' must be a number, got 'ten'"),
        ('{"loader": "ffcv"}', "'loader' must be one of auto, dali"),
    ],
)
def test_a_bad_config_file_is_named(text, message, tmp_path, capsys):
    (tmp_path / "c.json").write_text(text)
    assert train("--config", tmp_path / "c.json") == 2
    assert message in capsys.readouterr().err


def test_a_used_folder_is_refused_and_left_alone(run, tmp_path, capsys):
    before = (run / "last.safetensors").read_bytes()
    assert train(*TINY, "--out", run) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (run / "last.safetensors").read_bytes() == before
    (tmp_path / "notes.txt").write_text("mine")
    assert train(*TINY, "--out", tmp_path, "--overwrite") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_overwriting_spares_what_is_not_the_runs(run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    (out / "notes.txt").write_text("mine")
    assert train(*TINY, "--epochs", "0.25", "--out", out, "--overwrite") == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_a_failure(tmp_path, capsys):
    """/proc takes no new folders, not even root's."""
    assert train(*TINY, "--out", "/proc/run") == 1
    assert "/proc" in capsys.readouterr().err


def test_resuming_needs_a_run(tmp_path, capsys):
    assert train("--resume") == 2
    assert "--resume needs --out" in capsys.readouterr().err
    assert train("--resume", "--out", tmp_path) == 2
    assert "cannot read the options" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_mathematics(run, capsys):
    assert train("--resume", "--out", run, "--lr", "0.3") == 2
    assert "keeps its --lr of 0.1" in capsys.readouterr().err


def test_without_a_compiler_fast_says_so(monkeypatch, capsys):
    monkeypatch.setattr("fastres.model.kernel_status.is_interpreted", lambda: False)
    cpu_build._load.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert train(*TINY, "--fast", "--amp", "bf16", "--device", "cpu", "--dry-run") == 0
    assert "no C++ compiler" in capsys.readouterr().out
    cpu_build._load.cache_clear()
    for switch in (["--route", "compile"], ["--route", "fused", "--compile", "on"]):
        assert train(*TINY, *switch, "--dry-run") == 2
        assert "needs a C++ compiler" in capsys.readouterr().err


def test_without_bf16_instructions_fast_stays_in_fp32(monkeypatch, capsys):
    monkeypatch.setattr("fastres.host.bf16_instructions", lambda: None)
    assert train(*TINY, "--fast", "--device", "cpu", "--dry-run") == 0
    assert "no bf16 instructions" in capsys.readouterr().out
    monkeypatch.setattr("fastres.host.bf16_instructions", lambda: "amx_bf16")
    assert train(*TINY, "--fast", "--device", "cpu", "--dry-run") == 0
    assert "bf16  (the processor has amx_bf16)" in capsys.readouterr().out


def test_a_layout_that_corrupts_memory_is_not_used(capsys):
    narrow = [*TINY, "--shortcut", "B", "--fast", "--device", "cpu"]
    assert train(*narrow, "--dry-run") == 0
    assert "NCHW  (! oneDNN's strided 1x1 convolution is unsafe" in capsys.readouterr().out
    assert train(*narrow, "--channels-last", "on", "--dry-run") == 2
    assert "the 4 channels of layer2.0.downsample.0" in capsys.readouterr().err


def test_fast_on_a_cpu_takes_the_resident_loader(capsys):
    assert train(*TINY, "--fast", "--device", "cpu", "--dry-run") == 0
    assert "resident  (the fastest beside a training step on a CPU)" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("loader", ["dali", "resident"])
def test_fast_trains_on_the_gpu(loader, tmp_path):
    if loader == "dali" and dali_missing():
        pytest.skip(dali_missing())
    options = ["--epochs", "3", "--threads", "4", "--loader", loader]
    assert train(*TINY, "--fast", *options, "--out", tmp_path / "fast") == 0
    summary = json.loads((tmp_path / "fast" / "summary.json").read_text())
    assert summary["device"] == "cuda"
    assert summary["graph"]
