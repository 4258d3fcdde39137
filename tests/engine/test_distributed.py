"""Several processes train one network: the same state everywhere, the mean of their gradients."""

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastres
from fastres import evaluate as evaluate_command
from fastres.config import from_json
from fastres.data.loaders import LOADERS, BatchSpec, build_loader, dali_missing
from fastres.data.plan import Augmentation
from fastres.data.source import split_validation
from fastres.engine import checkpoint
from fastres.engine.distributed import ALONE, Processes
from fastres.engine.optim import lr_factor
from fastres.errors import UsageError
from tests.helpers import stop_one_process
from tests.helpers.ranks import by_ranks
from tests.helpers.tiny_run import children, is_running, start, wait_for_epoch

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("--dataset", "synthetic", "--limit-train", "100", "--recipe", "standard", "--shortcut", "A"),
    *("--model", "resnet8", "--width", "0.25", "--batch-size", "24", "--epochs", "2"),
    *("--device", "cpu", "--threads", "1"),
]


def torchrun(count, program, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(count), *program, *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)


def train_by(count, out, *arguments):
    done = by_ranks(count, out.with_suffix(".streams"), *TINY, "--out", out, *arguments)
    assert done.codes == [0] * count, done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run by three processes of torchrun, for reading alone, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "three"
    done = torchrun(3, ["-m", "fastres.train"], *TINY, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def weights(folder):
    return checkpoint.read(folder / "model.safetensors")[0]


def test_one_process_speaks_and_writes_for_all(run):
    out, printed = run
    assert printed.count("% test accuracy on synthetic") == 1
    assert "processes  3  (8 images of a batch each)" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["processes"], summary["batch_size"]) == (3, 24)


def test_every_test_image_counts_once(run, capsys):
    out, _ = run
    assert evaluate_command.main([str(out), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    summary = json.loads((out / "summary.json").read_text())
    assert alone["images"] == 2000
    assert summary["test_accuracy"] == alone["accuracy"]
    assert summary["test_loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_images_in_doubt_are_a_quarter_of_the_set_for_any_number_of_processes(tmp_path, capsys):
    train_by(3, tmp_path / "run", "--epochs", "0.25", "--tta", "multi")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert evaluate_command.main([str(tmp_path / "run"), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert summary["test_accuracy"] == alone["accuracy"]
    assert summary["test_loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_a_signal_to_one_stops_all_and_the_run_goes_on_as_if_never_stopped(run, tmp_path):
    whole, _ = run
    out = tmp_path / "stopped"
    words = (*TINY, "--out", out)
    stopped = by_ranks(3, tmp_path / "first", *words, program=stop_one_process.main)
    assert stopped.codes == [128 + signal.SIGTERM] * 3
    assert "stopped by SIGTERM" in stopped.stdout
    assert not (out / "model.safetensors").exists()
    assert checkpoint.read(out / "last.safetensors")[1]["progress"]["step"] == 3
    resumed = by_ranks(3, tmp_path / "second", "--resume", "--out", out)
    assert resumed.codes == [0] * 3, resumed.stderr
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(out)[name]), name
    losses = [
        [json.loads(line)["train_loss"] for line in (folder / "metrics.jsonl").open()]
        for folder in (whole, out)
    ]
    assert losses[0] == losses[1]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


WAYS = {"plain": (), "fast": ("--fast", "--amp", "off", "--route", "eager")}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_step_is_that_of_the_mean_gradient(tmp_path, way, one_thread):
    out = tmp_path / "step"
    train_by(2, out, "--epochs", "0.25", *way)
    config = from_json((out / "config.json").read_text(), "config.json")
    data = fastres.load_dataset("synthetic")
    trained = weights(out)

    images = split_validation(data.train, 100, config.seed)[1]
    grads, buffers = [], []
    model = fastres.create_model("resnet8", 10, width=0.25, shortcut="A", seed=config.seed)
    for part in range(2):
        batches = BatchSpec(
            images, data.mean, data.std, 24, config.seed, Augmentation(), True, part, 2
        )
        loader = build_loader("torch", batches, torch.device("cpu"))
        pixels, labels = next(iter(loader))
        assert len(labels) == 12
        half = copy.deepcopy(model).train()
        # In its own layout: another order of sums flips a ReLU near 0 now and then.
        layout = torch.channels_last if way else torch.contiguous_format
        half.to(memory_format=layout)
        F.cross_entropy(half(pixels.contiguous(memory_format=layout)), labels).backward()
        grads.append({name: p.grad for name, p in half.named_parameters()})
        buffers.append({n: b for n, b in half.named_buffers() if b.is_floating_point()})

    lr = config.lr * lr_factor(config.schedule, 0.5, config.warmup)
    for name, param in model.named_parameters():
        grad = (grads[0][name] + grads[1][name]) / 2
        if param.ndim > 1:
            grad = grad + config.weight_decay * param
        # The first step of Nesterov's momentum m: the gradient, and m times it once more.
        moved = param - lr * (1 + config.momentum) * grad
        torch.testing.assert_close(trained[name], moved.detach(), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(trained[name], param)
    for name in buffers[0]:
        mean = (buffers[0][name] + buffers[1][name]) / 2
        torch.testing.assert_close(trained[name], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOADERS)
def test_the_parts_of_a_batch_are_the_batch(name):
    if name == "dali" and dali_missing():
        pytest.skip(dali_missing())
    data = fastres.load_dataset("synthetic")
    whole = BatchSpec(data.test, data.mean, data.std, 48, 3, Augmentation(cutout=8), True)
    served = [
        next(iter(build_loader(name, part, torch.device("cpu"))))
        for part in (whole, *(Processes(rank, 3).share(whole) for rank in range(3)))
    ]
    for kind in range(2):
        parts = torch.cat([part[kind] for part in served[1:]])
        assert torch.equal(parts, served[0][kind])


def test_a_batch_that_cannot_be_split_is_one_sentence():
    data = fastres.load_dataset("synthetic")
    batches = BatchSpec(data.train, data.mean, data.std, 50, 0, Augmentation(), True)
    with pytest.raises(UsageError, match="50 images cannot be split over 3 processes evenly"):
        Processes(0, 3).share(batches)


def reasons(report):
    """Return the reason of every process from the report of torchrun, which ends with a rule."""
    assert report.rstrip().splitlines()[-1].strip("=") == ""
    return [line.partition(" : ")[2] for line in report.splitlines() if "traceback : " in line]


def test_torchrun_ends_with_the_sentence(tmp_path):
    command = ["-m", "fastres.train", *TINY, "--batch-size", "25", "--out", tmp_path / "run"]
    refused = torchrun(2, command)
    sentence = (
        "error: a batch of 25 images cannot be split over 2 processes evenly; choose a multiple "
        "with --batch-size"
    )
    assert refused.returncode == 1
    assert refused.stderr.count(sentence) == 2
    assert reasons(refused.stderr) == [sentence] * 2
    assert not (tmp_path / "run").exists()


LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.mark.parametrize(
    ("count", "number"), [(1, signal.SIGKILL), (2, signal.SIGKILL), (2, signal.SIGINT)]
)
def test_the_processes_save_and_end_with_torchrun(count, number, tmp_path):
    command = [*LAUNCHER, count, "-m", "fastres.train", *TINY, "--epochs", 100000]
    with start([*command, "--out", tmp_path / "run"]) as launcher:
        wait_for_epoch(launcher.stdout)
        ranks = children(launcher.pid)
        assert len(ranks) == count
        launcher.send_signal(number)
        try:
            # The end of the stream that all of them print to.
            printed, _ = launcher.communicate(timeout=60)
        finally:
            for rank in filter(is_running, ranks):
                os.kill(rank, signal.SIGKILL)
    assert "; go on with: python -m fastres.train --resume" in printed
    assert checkpoint.read(tmp_path / "run" / "last.safetensors")[1]["progress"]["step"] >= 4


def test_a_process_that_is_killed_ends_the_others_in_one_sentence(tmp_path):
    command = [*LAUNCHER, 2, "-m", "fastres.train", *TINY, "--epochs", 100000]
    with start([*command, "--out", tmp_path / "run"]) as launcher:
        wait_for_epoch(launcher.stdout)
        victim = children(launcher.pid)[1]
        os.kill(victim, signal.SIGKILL)
        _, report = launcher.communicate(timeout=60)
    assert report.count("Traceback") == 1  # torchrun's own
    assert f"Signal 9 (SIGKILL) received by PID {victim}" in reasons(report)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_parts_of_a_set_are_the_set(size):
    images = fastres.load_dataset("synthetic").test
    parts = [Processes(rank, size).share_of_set(images) for rank in range(size)]
    assert sum(len(part) for part in parts) == len(images)
    labels = [label for part in parts for label in part.labels.tolist()]
    assert labels == images.labels.tolist()


def test_alone_nothing_is_exchanged():
    values = torch.arange(3.0)
    assert ALONE.total(values) is values
    assert (ALONE.any(15), ALONE.any(None)) == (15, None)
