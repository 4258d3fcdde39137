"""Test sets that come alone: class folders, a test/ folder, pairs of arrays."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import fastres
from fastres import evaluate
from fastres.config import Config
from fastres.data.evaluation_set import load_evaluation_set
from fastres.data.source import load_dataset
from fastres.errors import FailureError, UsageError
from fastres.inference import test_data
from tests.helpers.data_fixtures import CIFAR10_BINARY, cifar_members, image_folder, unpack


def test_class_folders_alone_are_a_test_set(run, data, tmp_path, capsys):
    shutil.copytree(data / "test", tmp_path / "other")
    found = load_evaluation_set("folder", tmp_path / "other")
    wanted = load_dataset("folder", data).test
    assert found.classes == ("cat", "dog", "eel")
    assert np.array_equal(found.images.images, wanted.images)
    assert np.array_equal(found.images.labels, wanted.labels)
    assert found.name == "folder-other"
    assert evaluate.main([str(run), "--data-dir", str(tmp_path / "other"), "--json"]) == 0
    printed = capsys.readouterr()
    assert "without a training set" in printed.err
    assert "other data" not in printed.err
    own = evaluate.main([str(run), "--json"])
    assert own == 0
    again = json.loads(capsys.readouterr().out)
    assert again["accuracy"] == json.loads(printed.out)["accuracy"]


def test_a_test_folder_without_training_images_is_one_too(data, tmp_path):
    shutil.copytree(data / "test", tmp_path / "test")
    found = load_evaluation_set("auto", tmp_path)
    assert len(found.images) == len(load_dataset("folder", data).test)


def test_a_whole_dataset_is_taken_as_before(data):
    found = load_evaluation_set("folder", data)
    assert found.fingerprint == load_dataset("folder", data).fingerprint


def test_folders_without_images_are_no_test_set(tmp_path):
    (tmp_path / "mnist" / "raw").mkdir(parents=True)
    (tmp_path / "mnist" / "raw" / "images.gz").write_bytes(b"")
    with pytest.raises(UsageError, match="is not an image folder"):
        load_evaluation_set("folder", tmp_path)


def arrays(folder, images, labels, name="cifar10.1_v6"):
    np.save(folder / f"{name}_data.npy", images)
    np.save(folder / f"{name}_labels.npy", labels)


def test_a_pair_of_arrays_is_a_test_set(run, tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    arrays(tmp_path, images, np.arange(7, dtype=np.int32) % 3)
    found = load_evaluation_set("cifar10", tmp_path)
    assert (found.name, found.classes) == ("cifar10.1_v6", None)
    assert found.images.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert evaluate.main([str(run), "--data-dir", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 7


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 32, 32, 3), dtype=np.float32), np.zeros(2, dtype=int), "must be uint8"),
        (np.zeros((2, 16, 16, 3), dtype=np.uint8), np.zeros(2, dtype=int), "must be uint8"),
        (np.zeros((2, 32, 32, 3), dtype=np.uint8), np.zeros(3, dtype=int), "must be 2 whole"),
        (np.zeros((2, 32, 32, 3), dtype=np.uint8), np.zeros(2), "must be 2 whole numbers"),
    ],
)
def test_arrays_of_something_else_are_named(images, labels, message, tmp_path):
    arrays(tmp_path, images, labels)
    with pytest.raises(FailureError, match=message):
        load_evaluation_set("auto", tmp_path)


def test_a_pickle_in_an_array_is_not_run(tmp_path):
    arrays(tmp_path, np.array([{"a": 1}], dtype=object), np.zeros(1, dtype=int))
    with pytest.raises(FailureError, match="is no readable array"):
        load_evaluation_set("auto", tmp_path)


def test_a_broken_array_is_named(tmp_path):
    arrays(tmp_path, np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1, int))
    path = tmp_path / "cifar10.1_v6_data.npy"
    header = path.read_bytes()[:128]
    for content in (b"", b"no array", header, header.replace(b"}", b"(")):
        path.write_bytes(content)
        with pytest.raises(FailureError, match="is no readable array"):
            load_evaluation_set("auto", tmp_path)


def test_a_dataset_comes_before_arrays_beside_it(tmp_path):
    unpack(tmp_path, cifar_members(CIFAR10_BINARY))
    arrays(tmp_path, np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1, int))
    found = load_evaluation_set("cifar10", tmp_path)
    assert found.fingerprint is not None
    assert len(found.images) == 20


def test_the_environment_names_no_other_test_set(tmp_path, monkeypatch):
    arrays(tmp_path, np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1, int))
    monkeypatch.setenv("FASTRES_DATA", str(tmp_path))
    assert load_evaluation_set("synthetic", None).name == "synthetic"


def test_several_pairs_are_not_guessed_among(tmp_path):
    for name in ("v4", "v6"):
        arrays(tmp_path, np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1, int), name)
    with pytest.raises(FailureError, match="several test sets"):
        load_evaluation_set("auto", tmp_path)


def test_a_label_that_the_network_has_not_is_named(run, tmp_path, capsys):
    arrays(tmp_path, np.zeros((2, 32, 32, 3), np.uint8), np.array([0, 3]))
    assert evaluate.main([str(run), "--data-dir", str(tmp_path)]) == 1
    assert "has the label 3" in capsys.readouterr().err


def test_a_dataset_of_other_classes_is_refused(run, tmp_path):
    other = load_dataset("folder", image_folder(tmp_path / "other", ("cat", "dog", "fox")))
    with pytest.raises(FailureError, match="label 2 was 'eel' in training, and is 'fox' here"):
        fastres.evaluate(run, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tta": "mirror"}, "tta must be one of none"), ({"batch_size": 0}, "batch-size must be")],
)
def test_wrong_options_are_named(options, message, run):
    with pytest.raises(UsageError, match=message):
        fastres.evaluate(run, **options)


def test_a_folder_for_the_results_is_made_first(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(evaluate, "_evaluate", None)
    assert evaluate.main([str(run), "--out", str(tmp_path / "file")]) == 1
    assert "cannot make" in capsys.readouterr().err


def test_what_is_written(run, tmp_path):
    out = tmp_path / "evaluation"
    assert evaluate.main([str(run), "--out", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {
        "evaluation.json", "classes.csv", "confusion.csv", "confusion.png", "calibration.png",
        "mistakes.png",
    }  # fmt: skip
    found = json.loads((out / "evaluation.json").read_text())
    low, high = found["accuracy_interval_95"]
    assert low <= found["accuracy"] <= high
    for name in ("confusion.png", "calibration.png", "mistakes.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_results_need_a_named_folder(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main([str(run), "--out", ""]) == 2
    assert "--out is empty" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_is_downloaded_into_a_folder_that_was_named(tmp_path, monkeypatch):
    """CIFAR's accuracy would pass for that of the user's own images."""
    asked = []

    def loaded(kind, data_dir, *, download, may_be_alone):
        asked.append((kind, download))
        raise FailureError("none here")

    monkeypatch.setattr(test_data, "load_evaluation_set", loaded)
    network = SimpleNamespace(dataset="cifar10", config=Config())
    for words in ((str(tmp_path),), (str(tmp_path), "auto"), (str(tmp_path), "cifar10"), ()):
        with pytest.raises(FailureError):
            test_data.evaluation_set_for(network, *words)
    assert asked == [("cifar10", False), ("auto", False), ("cifar10", True), ("cifar10", True)]
