"""Every recipe trains and is evaluated on CIFAR-100 and on images of any size in folders."""

import json

import pytest
from PIL import Image

from fastres import evaluate
from fastres.engine import checkpoint
from fastres.recipes import RECIPES, from_recipe
from tests.helpers.data_fixtures import CIFAR100_BINARY, cifar_members, images, pack
from tests.helpers.tiny_run import run_train

CLASSES = ("кот", "dog", "eel")
# Of the recipe's own network: the narrowest that it can be, for two steps.
TINY = ("--threads", "1", "--batch-size", "10", "--steps", "2")
WIDTHS = {"resnet20": 0.25, "resnet18": 0.0625}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """{kind: folder}: 100 classes in CIFAR's archive; 3 classes of images that are not square."""
    root = tmp_path_factory.mktemp("data")
    pack(root / CIFAR100_BINARY.archive, cifar_members(CIFAR100_BINARY, per_file=100))
    for seed, name in enumerate(CLASSES):
        for split in ("train", "test"):
            (root / "images" / split / name).mkdir(parents=True)
            for number in range(5):
                image = Image.fromarray(images(1, seed)[0]).resize((20 + 9 * number, 50))
                image.save(root / "images" / split / name / f"{number}.png")
    return {"cifar100": root, "folder": root / "images"}


@pytest.mark.parametrize(("kind", "num_classes"), [("cifar100", 100), ("folder", 3)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_and_is_evaluated(recipe, kind, num_classes, data, tmp_path, capsys):
    model = from_recipe(recipe).model
    words = ["--recipe", recipe, "--width", WIDTHS.get(model, 0.25), "--data-dir", data[kind]]
    assert run_train(*words, *TINY, "--out", tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["model"], summary["recipe"]) == (model, recipe)
    weights, meta = checkpoint.read(tmp_path / "run" / "model.safetensors")
    assert len(weights["fc.weight"]) == len(meta["classes"]) == num_classes
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "run"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["dataset"].startswith(kind)
    assert result["images"] == summary["test_images"] == {100: 100, 3: 15}[num_classes]
    assert result["accuracy"] == pytest.approx(summary["test_accuracy"])
    assert result["loss"] == pytest.approx(summary["test_loss"], rel=1e-4)


def test_a_recipes_batch_that_a_folder_cannot_fill_is_named(data, tmp_path, capsys):
    words = ("--data-dir", data["folder"], "--out", tmp_path / "run")
    assert run_train("--recipe", "paper", "--model", "resnet8", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: batch size 128 is larger than the 15 training images; choose ")
    assert "--batch-size" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
