"""A whole study at the smallest size: what it writes, and that an interruption changes nothing."""

import csv
import json
import signal

import pytest
from PIL import Image

from fastres import __main__ as fastres_command
from fastres import study
from fastres.studies.degradation import FirstLayerGradient
from tests.helpers import data_fixtures

TABLES = ("epochs.csv", "layers.csv", "blocks.csv")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The options of a study of two nets on 24 images of noise."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 24), ("test", 6)):
        for number, pixels in enumerate(data_fixtures.images(count, seed=count)):
            folder = root / split / f"class{number % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return [
        *("degradation", "--depths", "8", "--width", "0.25", "--epochs", "2"),
        *("--batch-size", "8", "--dataset", "folder", "--data-dir", str(root), "--threads", "1"),
    ]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "whole"
    assert fastres_command.main(["study", *words, "--out", str(out)]) == 0
    return out


def table(out, name):
    return list(csv.DictReader((out / name).open()))


def test_a_study_leaves_tables_a_picture_and_its_runs(whole, words):
    epochs = table(whole, "epochs.csv")
    assert [(row["kind"], float(row["epoch"])) for row in epochs] == [
        (kind, epoch) for kind in ("plain", "residual") for epoch in (0, 1, 2)
    ]
    assert all(float(row["gradient_norm"]) > 0 for row in epochs)
    assert [row["train_error"] == "" for row in epochs] == [True, False, False] * 2
    for row in epochs:
        # 3 x 3 x 3 weights of each of 4 filters.
        assert float(row["gradient_norm"]) == pytest.approx(
            float(row["gradient_rms"]) * 108**0.5, rel=1e-9
        )
    assert [row["block"] for row in table(whole, "blocks.csv")] == [
        "layer1.0", "layer2.0", "layer3.0"
    ]  # fmt: skip
    assert len(table(whole, "layers.csv")) == 2 * 7
    assert (whole / "degradation.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((whole / "results.json").read_text())
    assert results["provenance"].keys() >= {"machine", "versions", "commit", "date", "command"}
    assert results["provenance"]["command"].startswith("python -m fastres.study degradation --d")
    assert [net["summary"]["model"] for net in results["nets"]] == ["plain8", "resnet8"]
    for net in results["nets"]:
        last, summary = net["rows"][-1], net["summary"]
        assert last["test_accuracy"] == summary["test_accuracy"]
        assert summary["command"] == results["provenance"]["command"]
        assert summary["seed"] == 0


@pytest.mark.parametrize("probe", [2, 5], ids=["in the first net", "in the second net"])
def test_a_study_that_was_interrupted_ends_as_if_it_had_not_been(
    probe, words, whole, tmp_path, monkeypatch, capfd
):
    """Each net measures its gradient three times; the signal comes after the first epoch of one."""
    out, calls = tmp_path / "cut", []
    measure = FirstLayerGradient.__call__

    def interrupted(self):
        calls.append(self)
        if len(calls) == probe:
            signal.raise_signal(signal.SIGINT)
        return measure(self)

    with monkeypatch.context() as patch:
        patch.setattr(FirstLayerGradient, "__call__", interrupted)
        assert study.main([*words, "--out", str(out)]) == 130
    assert f"study degradation --resume --out {out}" in capfd.readouterr().out
    ended = out / "nets" / "plain8-seed0.json"
    assert ended.exists() == (probe == 5)
    before = ended.read_bytes() if probe == 5 else None
    assert study.main(["degradation", "--resume", "--out", str(out)]) == 0
    # From its checkpoint: begun anew, the net would end in the same numbers.
    assert "last.safetensors after 1.00 of 2" in capfd.readouterr().out
    assert before in (None, ended.read_bytes())
    for name in TABLES:
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_what_is_there_is_neither_lost_nor_mixed(words, whole, capsys):
    """A folder in use is refused; a resumed study has one recipe; nothing is touched."""
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    out = ["--out", str(whole)]
    for more, sentence in (
        ([*words, *out], "already holds a study; continue it with --resume"),
        (["degradation", *out, "--resume", "--lr", "1"], "keeps its --lr of 0.05"),
        (["degradation", *out, "--resume", "--epochs", "9"], "keeps its --epochs of 2.0"),
        ([*words, "--out", str(whole / "nets" / "plain8-seed0")], "holds files of something else"),
        (["degradation", "--resume"], "--resume needs --out"),
    ):
        assert study.main(more) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--depths", "9"], "--depths must be of 8, 14, 20, 32, 44, 56, 110, got 9"),
        (["--depths"], "--depths and --seeds need at least one number each"),
        (["--seeds", "-1"], "--seeds must be between 0 and"),
        (["--epochs", "0"], "--epochs must be more than 0"),
        (["--batch-size", "25"], "batch size 25 is larger than the 24 training images"),
        (["--width", "1e-9"], "width must leave at least one filter"),
        (["--out", ""], "--out is empty"),
    ],
)
def test_a_bad_argument_is_one_sentence_and_leaves_nothing(more, sentence, words, tmp_path, capsys):
    out = tmp_path / "new"
    assert study.main([*words, "--out", str(out), *more]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_overwriting_leaves_nothing_of_the_study_before(words, tmp_path, capsys):
    out = tmp_path / "again"
    nets = out / "nets"
    (nets / "plain14-seed0").mkdir(parents=True)
    (out / "study.json").write_text('{"study": "degradation"}')
    (nets / "plain14-seed0.json").write_text("{}")
    (nets / "plain14-seed0" / "config.json").write_text("{}")
    (nets / "plain8-seed0.json").write_text("not of this study")
    (out / "notes.txt").write_text("mine")
    assert study.main([*words, "--epochs", "0.3", "--out", str(out), "--overwrite"]) == 0
    assert sorted(path.name for path in nets.iterdir()) == [
        "plain8-seed0", "plain8-seed0.json", "resnet8-seed0", "resnet8-seed0.json"
    ]  # fmt: skip
    assert (out / "notes.txt").read_text() == "mine"
