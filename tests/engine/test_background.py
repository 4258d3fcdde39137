"""Files are written behind the training, in order, and of their moment; what fails ends the run."""

import threading

import pytest
import torch

from fastres.config import Config
from fastres.engine import checkpoint
from fastres.engine.background import BackgroundWriter
from fastres.engine.checkpoint import Snapshot
from fastres.engine.console import RunConsole
from fastres.engine.run_dir import RunDir
from fastres.engine.step import TrainStep
from fastres.engine.trainer import Trainer
from fastres.errors import FailureError

TIMEOUT = 30


@pytest.fixture
def trainer(tmp_path):
    config = Config(
        dataset="synthetic", limit_train=50, batch_size=10, model="resnet8", width=0.25,
        threads=1, shortcut="A", epochs=3.0, val=True,
    )  # fmt: skip
    folder = RunDir(tmp_path)
    folder.begin(config.to_json(), overwrite=False)
    return Trainer(config, folder, RunConsole(silent=True))


def epochs_on_disk(trainer):
    """Epochs of the checkpoint and of the metrics."""
    _, meta = checkpoint.read(trainer.last)
    return len(meta["progress"]["rows"]), len(
        trainer.folder.read_bytes("metrics.jsonl").splitlines()
    )


def failing():
    raise FailureError("cannot write x")


def test_one_write_follows_the_other():
    written, may_write = [], threading.Event()

    def slow():
        assert may_write.wait(TIMEOUT)
        written.append("slow")

    writer = BackgroundWriter()
    writer.submit(slow)
    assert not written
    may_write.set()
    writer.submit(lambda: written.append("quick"))
    writer.wait()
    assert written == ["slow", "quick"]
    writer.close()


@pytest.mark.parametrize("ask", [BackgroundWriter.wait, lambda writer: writer.submit(failing)])
def test_what_a_write_raised_is_raised_once_by_whoever_asks_next(ask):
    writer = BackgroundWriter()
    writer.submit(failing)
    with pytest.raises(FailureError, match="cannot write x"):
        ask(writer)
    writer.wait()
    writer.close()


def test_closing_waits_and_raises_nothing():
    written = []
    writer = BackgroundWriter()
    writer.submit(lambda: written.append(threading.current_thread()))
    writer.close()
    assert len(written) == 1
    assert not written[0].is_alive()
    writer = BackgroundWriter()
    writer.submit(failing)
    writer.close()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_snapshot_is_of_its_moment(layout, tmp_path):
    tensor = torch.randn(4, 3, 3, 3).contiguous(memory_format=layout)
    before, rows = tensor.clone(), [{"epoch": 1}]
    snapshot = checkpoint.snapshot({"w": tensor}, {"rows": rows})
    tensor.zero_()
    rows.append({"epoch": 2})
    snapshot.write(tmp_path / "x")
    tensors, meta = checkpoint.read(tmp_path / "x")
    assert torch.equal(tensors["w"], before)
    assert meta == {"rows": [{"epoch": 1}]}


def test_the_next_epoch_begins_before_the_files_are_written(trainer, monkeypatch):
    goes_on, prepared = threading.Event(), trainer.prepare()
    write, step = Snapshot.write, TrainStep.__call__

    def waiting_write(snapshot, path):
        assert goes_on.wait(TIMEOUT)
        write(snapshot, path)

    def telling_step(self, number, *batch):
        if number == prepared.steps_per_epoch:
            assert not trainer.last.exists()
            goes_on.set()
        step(self, number, *batch)

    monkeypatch.setattr(Snapshot, "write", waiting_write)
    monkeypatch.setattr(TrainStep, "__call__", telling_step)
    trainer.run(prepared, resume=False)
    assert epochs_on_disk(trainer) == (3, 3)


def test_who_follows_a_run_is_told_what_is_written(trainer):
    told = []
    trainer.after_epoch = lambda row: told.append((row["epoch"], *epochs_on_disk(trainer)))
    trainer.run(trainer.prepare(), resume=False)
    assert told == [(1, 1, 1), (2, 2, 2), (3, 3, 3)]


@pytest.mark.parametrize(
    ("name", "whole", "left"),
    [("best", 0, None), ("last", 1, (1, 1)), ("metrics.jsonl", 1, (2, 1))],
)
def test_a_disk_that_is_full_ends_the_run(name, whole, left, trainer, monkeypatch):
    """As many writes of a file succeed, then none: what is behind it is not written either."""
    replace_file, tries = checkpoint.replace_file, []

    def fill(path, content):
        if path.name.startswith(name):
            tries.append(path)
            if len(tries) > whole:
                raise FailureError(f"cannot write {path}: No space left on device")
        replace_file(path, content)

    monkeypatch.setattr("fastres.engine.checkpoint.replace_file", fill)
    monkeypatch.setattr("fastres.engine.run_dir.replace_file", fill)
    with pytest.raises(FailureError, match=rf"{name}.*: No space left on device"):
        trainer.run(trainer.prepare(), resume=False)
    assert (epochs_on_disk(trainer) if trainer.last.exists() else None) == left
    assert not (trainer.folder.path / "summary.json").exists()
