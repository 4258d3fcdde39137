"""A run that diverges ends with one sentence, and its last good checkpoint stays as it was."""

import json
import math
import os
import shutil
import signal

import pytest
import torch

from fastres import evaluate
from fastres.config import Config
from fastres.engine import checkpoint
from fastres.engine.divergence import require_finite_scores, require_finite_state
from fastres.engine.evaluation import Score
from fastres.engine.runtime import Runtime
from fastres.engine.step import Totals, TrainStep
from fastres.errors import FailureError
from fastres.model.resnet import create_model
from tests.helpers import poison_one_process
from tests.helpers.data_fixtures import image_folder
from tests.helpers.ranks import by_ranks
from tests.helpers.tiny_run import TINY_NET, run_train

# Four steps an epoch.
TINY = (
    *(*TINY_NET, "--batch-size", "10", "--epochs", "2"),
    *("--lr", "0.1", "--warmup", "0", "--schedule", "constant"),
)
NONFINITE = [math.nan, math.inf, -math.inf]
COMPUTE = TrainStep.__call__


def content(run):
    return {path.name: path.read_bytes() for path in run.iterdir()}


def after_step(patch, number, act):
    """Call `act(step)` after training step `number` (0-based)."""

    def poisoned(self, step, images, labels):
        COMPUTE(self, step, images, labels)
        if step == number:
            act(self)

    patch.setattr(TrainStep, "__call__", poisoned)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """40 images to train on and 40 to test on."""
    return image_folder(tmp_path_factory.mktemp("data"), per_class=20)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Stopped after 5 of 8 steps in two epochs: a folder with a checkpoint, for reading alone."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        after_step(patch, 4, lambda step: os.kill(os.getpid(), signal.SIGINT))
        assert run_train(*TINY, "--data-dir", data, "--ema", "0.9", "--out", out) == 130
    return out


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


@pytest.mark.parametrize("extra", [(), ("--fast", "--amp", "off"), ("--ema", "0.9", "--whiten")])
def test_a_rate_far_too_high_is_a_failure_and_nothing_is_saved(extra, data, tmp_path, capsys):
    """One step, whose own loss is finite."""
    out = tmp_path / "run"
    options = ("--data-dir", data, "--epochs", "0.25", "--lr", "1e12", *extra)
    assert run_train(*TINY, *options, "--out", out) == 1
    assert capsys.readouterr().err == (
        "error: the test loss is nan after step 1 of 1, at a learning rate of 1e+12: the run has "
        "diverged; lower --lr (nothing was saved)\n"
    )
    assert content(out).keys() == {"config.json"}


def state_of(step, name):
    section, _, key = name.partition(".")
    return {
        "model": step.model.state_dict,
        "average": lambda: step.average.average,
        "optimizer": step.optimizer.state_dict,
    }[section]()[key]


@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize(
    "name",
    [
        "model.layer2.0.conv1.weight",
        "model.bn1.bias",
        "model.bn1.running_var",
        "average.fc.weight",
        "optimizer.conv1.weight.momentum_buffer",
    ],
)
def test_a_number_that_is_not_finite_never_reaches_a_file(name, value, copied, capsys, monkeypatch):
    """After the last step of the epoch, when its losses were all finite."""
    before = content(copied)
    after_step(monkeypatch, 7, lambda step: state_of(step, name).view(-1)[-1].fill_(value))
    assert run_train("--resume", "--out", copied) == 1
    assert capsys.readouterr().err == (
        f"error: {name} is not finite after step 8 of 8, at a learning rate of 0.1: the run has "
        f"diverged; lower --lr ({copied}/last.safetensors is still the checkpoint of before)\n"
    )
    assert content(copied) == before


@pytest.mark.parametrize("split", ["test", "val"])
def test_weights_that_overflow_in_the_evaluation_are_not_saved(
    split, data, tmp_path, capsys, monkeypatch
):
    """They are finite, and so are the losses; the scores are not."""
    out, extra = tmp_path / "run", ("--val", "--batch-size", "9") if split == "val" else ()
    with monkeypatch.context() as patch:
        after_step(patch, 4, lambda step: os.kill(os.getpid(), signal.SIGINT))
        assert run_train(*TINY, "--data-dir", data, *extra, "--out", out) == 130
    before = content(out)
    huge = torch.finfo(torch.float32).max
    after_step(monkeypatch, 7, lambda step: step.model.fc.weight.detach().fill_(huge))
    assert run_train("--resume", "--out", out) == 1
    assert f"the {split} loss is nan after step 8 of " in capsys.readouterr().err
    assert content(out) == before


@pytest.mark.parametrize("route", ["eager", "fused"])
@pytest.mark.parametrize("value", NONFINITE)
def test_the_step_that_lost_the_loss_is_named(route, value, copied, plain, capsys, monkeypatch):
    def poisoned(self, step, images, labels):
        COMPUTE(self, step, images * value if step == 5 else images, labels)

    before = content(copied)
    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    assert run_train("--resume", "--out", copied, "--route", route) == 1
    assert "the loss is not finite in step 6 of 8, at a" in capsys.readouterr().err
    assert content(copied) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("lost", ["loss", "weights"])
def test_a_signal_saves_no_nan(number, lost, copied, capsys, monkeypatch):
    def poisoned(self, step, images, labels):
        COMPUTE(self, step, images * math.nan if lost == "loss" else images, labels)
        with torch.no_grad():
            self.model.fc.weight.fill_(math.nan)
        os.kill(os.getpid(), number)

    before = content(copied)
    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    assert run_train("--resume", "--out", copied) == 1
    error = capsys.readouterr().err
    assert "is not finite" in error
    assert "step 6 of 8" in error
    assert "last.safetensors is still the checkpoint of before" in error
    assert content(copied) == before


@pytest.mark.parametrize("value", NONFINITE)
def test_a_checkpoint_holds_finite_numbers_alone(value, tmp_path, monkeypatch):
    path = tmp_path / "last.safetensors"
    checkpoint.write(path, {"model.weight": torch.ones(3)}, {"loss": 1.0})
    before = path.read_bytes()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        bad = torch.tensor([0, value, 1], dtype=dtype)
        with pytest.raises(FailureError, match=r"not written: model\.b is not finite"):
            checkpoint.write(path, {"model.a": torch.ones(2), "model.b": bad}, {})
    with pytest.raises(FailureError, match="a record is not written"):
        checkpoint.write(path, {"model.weight": torch.ones(3)}, {"loss": value})
    assert path.read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "first_nonfinite", lambda _: None)
        checkpoint.write(path, {"model.b": bad}, {})
    with pytest.raises(FailureError, match=r"had diverged: model\.b is not finite"):
        checkpoint.read(path)


def test_weights_of_a_diverged_run_are_neither_evaluated_nor_resumed(
    copied, data, capsys, monkeypatch
):
    """Files of versions that wrote them."""
    tensors, meta = checkpoint.read(copied / "last.safetensors")
    tensors["model.conv1.weight"][0] = math.nan
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "first_nonfinite", lambda _: None)
        checkpoint.write(copied / "last.safetensors", tensors, meta)
    for command in (evaluate.main, lambda words: run_train("--resume", "--out", *words)):
        assert command([str(copied), "--data-dir", str(data)]) == 1
        error = capsys.readouterr().err
        assert error.endswith("of a run that had diverged: model.conv1.weight is not finite\n")
        assert error.count("\n") == 1


@pytest.mark.parametrize("options", [(), ("--json",), ("--tta", "flip")])
def test_an_evaluation_without_a_finite_loss_is_a_failure(options, copied, data, capsys):
    tensors, meta = checkpoint.read(copied / "last.safetensors")
    tensors["average.fc.weight"][:] = torch.finfo(torch.float32).max
    checkpoint.write(copied / "last.safetensors", tensors, meta)
    assert evaluate.main([str(copied), "--data-dir", str(data), *options]) == 1
    printed = capsys.readouterr()
    assert "error: the loss on the test images is nan: " in printed.err
    assert "%" not in printed.out


def test_totals_count_every_loss_that_is_not_finite():
    totals = Totals(torch.device("cpu"))
    logits, labels = torch.eye(4), torch.arange(4)
    for loss in (1.0, math.inf, 3e38, math.nan, -math.inf, 0.0):
        totals.add(torch.tensor(loss), logits, labels)
    assert totals.nonfinite_steps() == 3
    assert totals.read()[1:] == (100.0, 24)


def step_in_fp16(scale):
    config = Config(model="resnet8", width=0.25, shortcut="A", lr=0.1, batch_size=4, warmup=0.0)
    model = create_model(config.model, width=config.width, shortcut="A", seed=0).train()
    step = TrainStep(model, config, Runtime(torch.device("cpu"), torch.float16), total_steps=10)
    step.scaler.load_state_dict(step.scaler.state_dict() | {"scale": scale})
    rng = torch.Generator().manual_seed(0)
    step(0, torch.randn(4, 3, 32, 32, generator=rng), torch.arange(4))
    return step


def test_an_overflow_that_the_loss_scaler_skips_is_no_divergence(tmp_path):
    step = step_in_fp16(2.0**40)
    start = create_model("resnet8", width=0.25, shortcut="A", seed=0)
    for name, param in step.model.named_parameters():
        assert torch.equal(param, start.get_parameter(name)), name
    assert step.scaler.get_scale() == 2.0**39
    require_finite_state(step, 1, tmp_path / "last")


def test_a_loss_scale_that_falls_for_ever_is(tmp_path):
    step = step_in_fp16(2.0**-20)
    with pytest.raises(FailureError, match="overflow in fp16 at a loss scale of 9"):
        require_finite_state(step, 1, tmp_path / "last")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_are_looked_at(value, tmp_path):
    step = step_in_fp16(1.0)
    scores = {"test": Score(1.0, 10.0, 10)}
    require_finite_scores(step, 1, tmp_path / "last", scores)
    scores["val"] = Score(value, 10.0, 10)
    with pytest.raises(FailureError, match=f"the val loss is {value} after step 1 of 10"):
        require_finite_scores(step, 1, tmp_path / "last", scores)


def test_no_process_waits_for_one_that_diverged(data, tmp_path):
    """Each ends by itself: nobody is there to end the others, as torchrun would."""
    out = tmp_path / "run"
    words = (*TINY, "--data-dir", data, "--device", "cpu", "--out", out)
    done = by_ranks(2, tmp_path / "streams", *words, program=poison_one_process.main)
    assert done.codes == [1, 1]
    assert done.stderr.count("the loss is not finite in step 3 of 8") == 2
    assert "step 4" not in done.stderr
    assert content(out).keys() == {"config.json"}


def test_no_record_of_a_run_holds_a_nan(run):
    for name, text in content(run).items():
        if name.endswith(("json", "jsonl")):
            for line in text.decode().splitlines() if name.endswith("l") else [text]:
                json.loads(line, parse_constant=pytest.fail)
