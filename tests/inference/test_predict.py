"""What a network says of images: the same as its evaluation, in every format, file by file."""

import csv
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import fastres
from fastres import predict
from fastres.data.source import load_dataset
from fastres.engine import checkpoint
from fastres.engine.views import further_views
from fastres.errors import FailureError, UsageError
from fastres.inference import images
from fastres.inference.trained import load


def files_of(folder):
    return sorted(path for path in folder.rglob("*.png"))


def expected(network, pixels, tta="none"):
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (network.mean, network.std))
    x = (x - mean) / std
    with torch.no_grad():
        views = {"none": [x], "flip": [x, x.flip(3)], "multi": [x, *further_views(x).split(1)]}[tta]
        weights = {1: [1.0], 2: [0.5, 0.5], 6: [0.25, 0.25, *[0.125] * 4]}[len(views)]
        return sum(w * network.model(v).softmax(1)[0] for w, v in zip(weights, views, strict=True))


@pytest.mark.parametrize("tta", ["none", "flip", "multi"])
def test_probabilities_are_those_of_the_network(tta, run, data):
    network = load(run)
    path = files_of(data)[5]
    [found] = fastres.predict(network, path, tta=tta)
    wanted = expected(network, np.asarray(Image.open(path).convert("RGB")), tta)
    order = wanted.argsort(descending=True)
    assert found.classes == tuple(network.classes[k] for k in order.tolist())
    assert found.probabilities == pytest.approx(wanted[order].tolist(), abs=1e-5)


def test_a_prediction_depends_on_its_image_alone(run, data):
    files = files_of(data)
    together = fastres.predict(run, files, tta="multi", batch_size=7)
    alone = [fastres.predict(run, file, tta="multi")[0] for file in files[:9]]
    for one, other in zip(alone, together, strict=False):
        assert one.classes == other.classes
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_predictions_are_those_that_evaluation_counts(run, data):
    dataset = load_dataset("folder", data)
    found = fastres.predict(run, list(dataset.test.images), tta="none", top=1)
    right = sum(
        one.classes[0] == dataset.classes[label]
        for one, label in zip(found, dataset.test.labels.tolist(), strict=True)
    )
    evaluation = fastres.evaluate(run, dataset, tta="none")
    assert evaluation.accuracy == pytest.approx(100 * right / len(found))


def test_folders_are_walked_and_other_files_passed_over(run, data, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    first = files_of(data)[0]
    for name in ("a/b/z.png", "a/y.PNG", "a/.hidden.png", "a/notes.txt"):
        shutil.copy(first, tmp_path / name)
    found = fastres.predict(run, [tmp_path])
    assert [one.image for one in found] == [str(tmp_path / "a/y.PNG"), str(tmp_path / "a/b/z.png")]


def test_any_picture_is_resized_as_in_training(run, tmp_path):
    big = Image.effect_noise((640, 480), 80).convert("RGB")
    big.save(tmp_path / "big.png")
    [by_file] = fastres.predict(run, tmp_path / "big.png")
    [by_picture] = fastres.predict(run, big)
    [by_array] = fastres.predict(run, np.asarray(big))
    assert by_file.probabilities == by_picture.probabilities == by_array.probabilities
    assert by_picture.image is None


@pytest.mark.parametrize("kind", ["turned", "16-bit", "alpha"])
def test_a_picture_is_converted_as_its_file_is(kind, run, tmp_path):
    noise = np.random.default_rng(0).integers(0, 65536, (40, 30), dtype=np.uint16)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture = {
        "turned": Image.fromarray((noise >> 8).astype(np.uint8)).convert("RGB"),
        "16-bit": Image.fromarray(noise),
        "alpha": Image.fromarray((noise >> 8).astype(np.uint8)).convert("RGBA"),
    }[kind]
    picture.save(tmp_path / "x.png", **({"exif": exif} if kind == "turned" else {}))
    [by_file] = fastres.predict(run, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as opened:
        [by_picture] = fastres.predict(run, opened)
    assert by_file.classes == by_picture.classes
    assert by_file.probabilities == by_picture.probabilities
    if kind == "turned":
        [as_stored] = fastres.predict(run, np.asarray(picture))
        assert as_stored.probabilities != by_file.probabilities


def test_several_images_come_as_a_list_an_array_or_one_by_one(run, data):
    pixels = load_dataset("folder", data).test.images
    listed = fastres.predict(run, list(pixels))
    assert len(listed) == len(pixels)
    assert fastres.predict(run, pixels) == listed
    assert len(fastres.predict(run, data.rglob("*.png"))) == len(files_of(data))
    assert fastres.predict(run, []) == []


def test_decoding_is_a_few_batches_ahead_and_no_more(monkeypatch):
    decoded = []
    monkeypatch.setattr(images, "_decode", decoded.append)
    batches = images.decoded_batches(list("abcdefghij"), 2)
    assert decoded == []
    next(batches)
    assert len(decoded) <= images.AHEAD + 1
    assert len(list(batches)) == 4
    assert [len(part) for part in decoded] == [2] * 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.png", "there is no image or folder"),
        ([np.zeros((4, 4), dtype=np.float32)], "must be uint8"),
        (np.zeros((4, 4, 2), dtype=np.uint8), "must be uint8"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "must be uint8"),
        ([1], "must be a path, a PIL image or an array"),
        (1, "must be a path, a PIL image or an array"),
        (["x.png", np.zeros((4, 4), dtype=np.uint8)], "all paths, or all PIL"),
    ],
)
def test_what_is_no_image_is_named(given, message, run):
    with pytest.raises(UsageError, match=message):
        fastres.predict(run, given)


def test_a_file_that_is_no_image_is_named(run, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(FailureError, match=r"x\.png is not an image"):
        fastres.predict(run, tmp_path / "x.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "top must be at least 1"),
        ({"tta": "mirror"}, "tta must be one of none, flip, multi"),
        ({"batch_size": 0}, "batch-size must be between 1"),
        ({"device": "tpu"}, "device must be one of auto"),
    ],
)
def test_wrong_options_are_named(options, message, run, data):
    with pytest.raises(UsageError, match=message):
        fastres.predict(run, files_of(data)[0], **options)


def test_an_overflow_is_no_prediction(run, data, tmp_path):
    tensors, meta = checkpoint.read(run / "model.safetensors")
    tensors["fc.weight"][:] = torch.finfo(torch.float32).max
    checkpoint.write(tmp_path / "net.safetensors", tensors, meta)
    with pytest.raises(FailureError, match="a probability is not a number: the weights in"):
        fastres.predict(tmp_path / "net.safetensors", files_of(data)[0])


# The command


def test_json_is_one_document(run, data, capsys):
    files = [str(path) for path in files_of(data)[:3]]
    assert predict.main([str(run), *files, "--json", "--top", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["image"] for one in found] == files
    assert all(len(one["predictions"]) == 2 for one in found)


def test_csv_has_a_row_an_image(run, data, capsys):
    assert predict.main([str(run), str(data / "test"), "--csv", "--top", "9"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == len(files_of(data / "test"))
    total = sum(float(rows[0][f"probability_{k}"]) for k in (1, 2, 3))
    assert total == pytest.approx(1, abs=1e-5)


def test_the_table_has_a_line_an_image(run, data, capsys):
    files = [str(path) for path in files_of(data)[:4]]
    assert predict.main([str(run), *files, "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == files
    assert all(line.count(" %") == 2 for line in lines)
    assert len({len(line) for line in lines}) == 1


def test_options_may_stand_before_the_images(run, data, capsys):
    assert predict.main(["--json", str(run), "--top", "1", str(files_of(data)[0])]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1


def test_a_name_of_a_file_writes_no_line_of_its_own(run, tmp_path, capsys):
    (tmp_path / "a\nerror: \x1b[31m.png").write_bytes(b"no picture")
    assert predict.main([str(run), str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "\x1b" not in error


def test_a_broken_image_stops_no_other(run, data, tmp_path, capsys):
    shutil.copy(files_of(data)[0], tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    shutil.copy(files_of(data)[1], tmp_path / "c.png")
    assert predict.main([str(run), str(tmp_path), "--json"]) == 1
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)) == 2
    assert printed.err.count("\n") == 1
    assert "b.png is not an image" in printed.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "x.png", "--json", "--csv"], "--json and --csv are two formats"),
        (["nowhere", "FILE"], "there is no run and no checkpoint at nowhere"),
        (["", "FILE"], "the name of the run is empty"),
        (["RUN", ""], "the name of an image or folder is empty"),
        (["RUN", "nowhere.png"], "there is no image or folder at nowhere.png"),
        (["RUN", "EMPTY"], "holds no image (.png"),
        (["RUN", "FILE", "--batch-size", "0"], "--batch-size must be between 1"),
        (["RUN", "FILE", "--top", "0"], "top must be at least 1"),
    ],
)
def test_wrong_use_is_one_sentence(words, message, run, data, tmp_path, capsys):
    known = {"RUN": str(run), "FILE": str(files_of(data)[0]), "EMPTY": str(tmp_path)}
    assert predict.main([known.get(word, word) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_torch_compile_is_not_imported(run, data):
    image = files_of(data)[0]
    code = (
        "import sys; from fastres import predict; predict.main(sys.argv[1:]); "
        "print('torch._dynamo' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, run, image], check=True, capture_output=True, text=True
    )
    table, imported = found.stdout.splitlines()
    assert image.name in table
    assert imported == "False"


def test_a_checkpoint_alone_is_enough(run, data, tmp_path):
    shutil.copy(run / "model.safetensors", tmp_path / "net.safetensors")
    file = files_of(data)[0]
    with pytest.raises(UsageError, match="has no checkpoint 'best'"):
        fastres.load(tmp_path / "net.safetensors", "best")
    by_file = fastres.predict(tmp_path / "net.safetensors", file)
    assert by_file == fastres.predict(run, file)
