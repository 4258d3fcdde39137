"""From Python: the same results as the commands, errors as exceptions, nothing printed."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import get_args

import pytest
import torch

import fastres
import fastres.predict
import fastres.train
from fastres.config import Config, TrackerName
from fastres.engine import trackers
from fastres.errors import UsageError
from tests.helpers.data_fixtures import image_folder
from tests.helpers.tiny_run import TINY, run_train

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {
    "model": "resnet8", "width": 0.25, "shortcut": "A", "whiten": False, "threads": 1,
    "dataset": "synthetic", "limit_train": 100, "batch_size": 10, "epochs": 2,
}  # fmt: skip


def test_a_run_is_that_of_the_command(tmp_path, capsys):
    found = fastres.train(out=tmp_path / "api", **OPTIONS)
    assert capsys.readouterr().out == ""
    assert run_train(*TINY, "--epochs", "2", "--out", tmp_path / "command") == 0
    command = fastres.load(tmp_path / "command")
    for (key, ours), theirs in zip(
        found.model.state_dict().items(), command.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), key
    assert found.folder == tmp_path / "api"
    assert len(found.rows) == 2
    assert found.accuracy == found.summary["test_accuracy"] == found.rows[-1]["test_accuracy"]
    assert not found.model.training
    assert set(found.paths) == {"weights", "config", "metrics", "summary", "curves"}
    assert all(path.parent == found.folder and path.is_file() for path in found.paths.values())


def test_a_record_names_what_repeats_the_run(tmp_path):
    found = fastres.train(out=tmp_path / "api", **OPTIONS)
    assert found.summary["command"] == "python -m fastres.train --config config.json"
    assert run_train("--config", found.paths["config"], "--out", tmp_path / "again") == 0
    again = fastres.load(tmp_path / "again").model.state_dict()
    for key, value in found.model.state_dict().items():
        assert torch.equal(value, again[key]), key


def test_evaluate_and_predict_follow(tmp_path):
    found = fastres.train(out=tmp_path / "run", **OPTIONS)
    evaluation = fastres.evaluate(found.network)
    assert evaluation.accuracy == pytest.approx(found.accuracy)
    data = fastres.load_dataset("synthetic")
    [prediction] = fastres.predict(found.network, data.test.images[0], top=1)
    assert prediction.classes[0] in data.classes
    # The network is where it was.
    assert next(found.model.parameters()).device.type == "cpu"
    assert next(found.model.parameters()).is_contiguous()


def test_a_config_and_options_beside_it(tmp_path):
    config = Config(**OPTIONS)
    found = fastres.train(config, epochs=1, out=tmp_path / "run")
    assert found.summary["epochs"] == 1


def test_epochs_take_the_place_of_the_steps_of_a_config(tmp_path):
    config = Config(**OPTIONS).replace(steps=3)
    assert fastres.train(config, out=tmp_path / "steps").summary["epochs"] == 0.3
    assert fastres.train(config, epochs=1, out=tmp_path / "epochs").summary["epochs"] == 1


def test_paths_are_paths_or_text(tmp_path):
    root = image_folder(tmp_path / "data", ("cat", "dog"), per_class=10)
    options = OPTIONS | {"dataset": "folder", "limit_train": None, "epochs": 1}
    found = fastres.train(data_dir=root, out=str(tmp_path / "run"), **options)
    assert found.network.classes == ("cat", "dog")
    assert found.network.config.data_dir == str(root)


def test_a_run_is_gone_on_with(tmp_path):
    fastres.train(out=tmp_path / "run", **OPTIONS)
    again = fastres.train(out=tmp_path / "run", resume=True)
    assert len(again.rows) == 2
    with pytest.raises(UsageError, match="keeps its lr"):
        fastres.train(out=tmp_path / "run", resume=True, lr=3.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"no_such": 1}, "unknown option 'no_such'"),
        ({"lr": -1}, "must be between 0 and"),
        ({"config": Config(), "recipe": "quick"}, "give one of them"),
        ({"epochs": 1, "steps": 1}, "two lengths of one run"),
        ({"resume": True}, "resume needs out"),
        ({"resume": True, "config": Config()}, "a resumed run keeps its options"),
        ({"resume": True, "recipe": "quick"}, "a resumed run keeps its options"),
        ({"recipe": "no such"}, "unknown recipe"),
        ({"track": ["nothing"]}, "unknown tracker"),
    ],
)
def test_wrong_use_is_an_exception(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        fastres.train(**options)


def test_a_run_that_is_there_stays(tmp_path):
    fastres.train(out=tmp_path / "run", **OPTIONS)
    with pytest.raises(UsageError, match="already holds a run"):
        fastres.train(out=tmp_path / "run", **OPTIONS)


def test_it_runs_in_a_thread(tmp_path):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(fastres.train(out=tmp_path / "run", **OPTIONS))
    )
    thread.start()
    thread.join()
    assert len(results) == 1


@pytest.mark.parametrize("module", ["fastres.predict", "fastres.__main__", "fastres.api"])
def test_only_the_api_loads_torch(module):
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str(module == "fastres.api"), done.stderr


def test_commands_are_modules_and_functions():
    assert callable(fastres.train)
    assert callable(fastres.train.main)
    assert callable(fastres.evaluate)
    assert callable(fastres.predict)


# Trackers


class Recorded:
    def __init__(self, config, folder, *, resume, fails=""):
        self.rows, self.summary, self.fails = [], "not ended", fails

    def row(self, row):
        if self.fails:
            raise RuntimeError(self.fails)
        self.rows.append(row)

    def end(self, summary):
        self.summary = summary


def test_every_tracker_can_be_named():
    assert get_args(TrackerName) == tuple(trackers._KINDS)


def test_a_tracker_gets_rows_and_summary(tmp_path, monkeypatch):
    made = []

    def make(*words, **options):
        made.append(Recorded(*words, **options))
        return made[-1]

    monkeypatch.setitem(trackers._KINDS, "wandb", ("json", make))
    found = fastres.train(out=tmp_path / "run", track=["wandb"], **OPTIONS)
    [tracker] = made
    assert tracker.rows == found.rows
    assert tracker.summary == found.summary


def test_a_tracker_that_fails_ends_no_run(tmp_path, monkeypatch, capsys):
    made = []

    def make(*words, **options):
        made.append(Recorded(*words, **options, fails="no network\nmore"))
        return made[-1]

    monkeypatch.setitem(trackers._KINDS, "mlflow", ("json", make))
    found = fastres.train(out=tmp_path / "run", track=["mlflow"], quiet=False, **OPTIONS)
    assert len(found.rows) == 2
    printed = capsys.readouterr().out
    # Closed as a run that failed: MLflow starts no other while one is open.
    assert made[0].summary is None
    assert printed.count("! mlflow is left out from here on: RuntimeError: no network\n") == 1


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = fastres.train(out=tmp_path / "run", track=["tensorboard"], **OPTIONS)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    seen = [event.value for event in events.Scalars("test_accuracy")]
    assert seen == pytest.approx([row["test_accuracy"] for row in found.rows])


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    found = fastres.train(out=tmp_path / "run", track=["mlflow"], **OPTIONS)
    [run] = mlflow.search_runs(experiment_names=["fastres"], output_format="list")
    assert run.data.metrics["final_test_accuracy"] == pytest.approx(found.accuracy)
