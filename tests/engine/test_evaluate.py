"""Evaluating somebody's run: what its files decide, which data is used, and what does not fit."""

import json
import math
import os
import shutil

import pytest

from fastres import evaluate, train
from fastres.data import source
from fastres.data.dataset import class_difference
from fastres.data.source import DATASET_NAMES, dataset_kind
from fastres.engine import checkpoint
from fastres.host import cache_folder
from fastres.inference import evaluating
from tests.helpers.data_fixtures import image_folder
from tests.helpers.tiny_run import TINY_NET, run_train

TINY = (*TINY_NET, "--batch-size", "10", "--epochs", "2")
CLASSES = ("cat", "dog", "eel")


def change(run, **options):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | options))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, in whose data folder `auto` looks."""
    monkeypatch.setenv("FASTRES_CACHE", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("data") / "mine", CLASSES, per_class=10)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run on a folder that `auto` found, for reading alone."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert run_train(*TINY, "--data-dir", data, "--out", out) == 0
    return out


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


STRANGE = {
    "workers": 256, "threads": 4096, "loader": "dali", "device": "cuda", "eval_batch_size": 1,
    "amp": "fp16", "channels_last": "on", "route": "compile", "compile": "on", "graph": "on",
    "fast": True, "dataset": "cifar10", "lr": 1e400, "seed": math.nan, "epochs": {"a": []},
    "recipe": "../..", "no such option": [1],
}  # fmt: skip


@pytest.mark.parametrize("name", [*STRANGE, "all"])
def test_a_strangers_config_decides_nothing_but_the_network(name, copied, data, monkeypatch):
    change(copied, **(STRANGE if name == "all" else {name: STRANGE[name]}))
    configs = []
    build = evaluating.evaluation_loader

    def seen(images, mean, std, config, runtime):
        configs.append((config, runtime))
        return build(images, mean, std, config, runtime)

    monkeypatch.setattr(evaluating, "evaluation_loader", seen)
    assert evaluate.main([str(copied), "--data-dir", str(data)]) == 0
    [(config, runtime)] = configs
    assert (config.workers, config.threads, config.eval_batch_size) == (None, None, 1000)
    assert (runtime.loader, runtime.route, runtime.precision) == ("torch", "eager", "fp32")
    assert not runtime.channels_last


def test_a_run_is_evaluated_on_its_own_data(run, capsys):
    assert evaluate.main([str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dataset"].startswith("folder")


def test_nothing_is_downloaded_into_a_folder_of_the_file(copied, tmp_path, capsys, monkeypatch):
    (tmp_path / "etc").mkdir()
    tensors, meta = checkpoint.read(copied / "model.safetensors")
    checkpoint.write(copied / "model.safetensors", tensors, meta | {"dataset": "cifar10"})
    change(copied, data_dir=str(tmp_path / "etc"), dataset="cifar10")
    fetched = []
    monkeypatch.setattr(source, "download_cifar", lambda *words: fetched.append(words))
    assert evaluate.main([str(copied)]) == 1
    error = capsys.readouterr().err
    assert f"there is no CIFAR-10 in {tmp_path / 'etc'}" in error
    assert f"the run was trained on '{tmp_path / 'etc'}': give where its data is now" in error
    assert error.count("\n") == 1
    assert fetched == []
    assert list((tmp_path / "etc").iterdir()) == []


def test_a_network_of_any_size_is_refused_before_it_is_allocated(copied, data, capsys):
    """At this width its weights take 385 GB."""
    change(copied, model="resnet50", width=64.0)
    assert evaluate.main([str(copied), "--data-dir", str(data)]) == 1
    assert "is a checkpoint of another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [{"model": "x"}, {"width": math.nan}, {"width": 65}, {"model": None}, {"shortcut": "C"}],
)
def test_what_decides_the_network_is_checked(options, copied, data, capsys):
    change(copied, **options)
    assert evaluate.main([str(copied), "--data-dir", str(data)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_the_machines_part_is_on_the_command_line(run, data, capsys):
    words = ["--data-dir", str(data), "--threads", "1", "--loader", "torch", "--workers", "0"]
    assert evaluate.main([str(run), *words]) == 0
    assert "1 threads" in capsys.readouterr().out
    assert evaluate.main([str(run), "--workers", "257"]) == 2
    assert "--workers must be between 0 and 256, got 257" in capsys.readouterr().err


# What `auto` turned out to be


def test_a_run_writes_which_data_auto_found(run):
    assert json.loads((run / "config.json").read_text())["dataset"] == "folder"
    for name in ("last", "model"):
        meta = checkpoint.read(run / f"{name}.safetensors")[1]
        assert (meta["config"]["dataset"], meta["dataset"]) == ("folder", "folder-mine")


@pytest.mark.parametrize("old", [False, True])
def test_data_that_appears_later_changes_nothing(old, tmp_path, cache, capsys):
    """The run fell back to the synthetic set; `auto` would now find a folder of images."""
    out = tmp_path / "run"
    words = ("--limit-train", "20", "--epochs", "1", "--out", out)
    assert run_train(*TINY, *words) == 0
    assert json.loads((out / "config.json").read_text())["dataset"] == "synthetic"
    if old:
        change(out, dataset="auto")
        for name in ("last", "model"):
            tensors, meta = checkpoint.read(out / f"{name}.safetensors")
            meta["config"]["dataset"] = "auto"
            checkpoint.write(out / f"{name}.safetensors", tensors, meta)
    image_folder(cache / "data", CLASSES)
    capsys.readouterr()
    assert run_train("--resume", "--out", out) == 0
    said = "the dataset is synthetic, as the checkpoint names it: config.json says auto"
    assert (said in capsys.readouterr().out) is old
    assert evaluate.main([str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dataset"] == "synthetic"


def test_data_that_is_gone_is_one_sentence(copied, tmp_path, cache, capsys):
    change(copied, data_dir=str(tmp_path / "gone"))
    assert run_train("--resume", "--out", copied) == 2
    error = capsys.readouterr().err
    assert error == f"error: the data folder {tmp_path / 'gone'} does not exist\n"
    change(copied, data_dir=None)
    for command in (["--resume", "--out", str(copied)], [str(copied)]):
        main = train.main if "--resume" in command else evaluate.main
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "is not an image folder" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((kind, kind) for kind in DATASET_NAMES[1:]),
        ("cifar10-jpeg", "folder"),
        ("cifar10-custom", "cifar10"),
        ("cifar100-custom", "cifar100"),
        ("folder-x", "folder"),
    ],
)
def test_every_name_in_a_record_leads_back_to_its_kind(name, kind):
    assert dataset_kind(name) == kind


# Data that does not fit


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("cat", "dog"), "it was trained on 3 classes, and there are 2 here"),
        (("cat", "dog", "fox"), "other classes: label 2 was 'eel' in training, and is 'fox' here"),
        (("ant", "cat", "dog"), "other classes: label 0 was 'cat' in training, and is 'ant' here"),
    ],
)
def test_other_classes_are_named(classes, message, run, tmp_path, capsys):
    other = image_folder(tmp_path / "other", classes)
    assert evaluate.main([str(run), "--data-dir", str(other)]) == 1
    error = capsys.readouterr().err
    assert f"model.safetensors, trained on folder-mine, does not fit image folder {other}" in error
    assert error.endswith(message + "\n")
    assert error.count("\n") == 1


def test_the_order_of_classes_and_the_kind_of_data_are_named(copied, data, capsys):
    tensors, meta = checkpoint.read(copied / "model.safetensors")
    meta["classes"] = ["cat", "eel", "dog"]
    checkpoint.write(copied / "model.safetensors", tensors, meta)
    assert evaluate.main([str(copied), "--data-dir", str(data)]) == 1
    assert capsys.readouterr().err.endswith(
        "the same classes in another order: label 1 was 'eel' in training, and is 'dog' here\n"
    )
    assert evaluate.main([str(copied), "--dataset", "synthetic"]) == 1
    error = capsys.readouterr().err
    assert "trained on folder-mine, does not fit the synthetic set, drawn by fastres" in error
    assert "it was trained on 3 classes, and there are 10 here" in error


def test_equal_classes_do_not_differ():
    assert class_difference(list(CLASSES), CLASSES) is None


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_fifo_in_place_of_a_file_is_not_waited_for(name, copied, capsys):
    (copied / name).unlink()
    os.mkfifo(copied / name)
    assert evaluate.main([str(copied)]) == 1
    assert capsys.readouterr().err == f"error: cannot read {copied / name}: it is a FIFO\n"


def test_a_name_in_a_file_writes_no_line_of_its_own(copied, capsys):
    change(copied, data_dir="a\x1b[31m\nerror: fake")
    assert evaluate.main([str(copied)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "\x1b" not in error


def test_the_data_folder_of_the_environment_is_remembered(data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setenv("FASTRES_DATA", str(data))
    assert run_train(*TINY, "--out", out) == 0
    assert json.loads((out / "config.json").read_text())["data_dir"] == str(data)
    monkeypatch.delenv("FASTRES_DATA")
    assert evaluate.main([str(out)]) == 0
    assert run_train("--resume", "--out", out) == 0


def test_statistics_that_no_run_has_are_named(copied, capsys):
    path = copied / "model.safetensors"
    tensors, meta = checkpoint.read(path)
    tensors["bn1.running_var"][0] = -1
    checkpoint.write(path, tensors, meta)
    assert evaluate.main([str(copied)]) == 1
    assert "holds what no run writes: a -1.0 in bn1.running_var" in capsys.readouterr().err
