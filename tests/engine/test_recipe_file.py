"""Recipes of users: a file is the same recipe as its table in recipes.py, or one clear sentence."""

import json

import pytest

from fastres import __main__ as fastres_command
from fastres import train
from fastres.config import Config
from fastres.errors import UsageError
from fastres.recipe_file import as_toml, find_recipe
from fastres.recipes import RECIPES, Recipe, resolve
from tests.helpers.tiny_run import TINY_NET

MINE = """base = "standard"
weight_decay = 1e-3
lr = 1          # for every network, whatever the base has for a family
[thin]
epochs = 2
[resnet9]
steps = 5
"""


def write(path, text):
    path.write_text(text)
    return str(path)


def config_of(path, model=None):
    return resolve(*find_recipe(path), model)[0]


@pytest.mark.parametrize("name", RECIPES)
def test_a_printed_recipe_is_that_recipe(name, tmp_path, capsys):
    """Printed as TOML, and again as JSON with the same values."""
    assert fastres_command.main(["recipe", name]) == 0
    printed = capsys.readouterr().out
    assert find_recipe(write(tmp_path / "my.toml", printed)) == ("my.toml", RECIPES[name])
    base = {} if RECIPES[name].base is None else {"base": RECIPES[name].base}
    values = base | RECIPES[name].common | RECIPES[name].by_family
    file = write(tmp_path / "my.json", json.dumps(values))
    assert find_recipe(file) == ("my.json", RECIPES[name])


def test_what_changes_a_recipe_comes_after_all_of_it(tmp_path):
    file = write(tmp_path / "mine.toml", MINE)
    name, recipe = find_recipe(file)
    common = {"weight_decay": 1e-3, "lr": 1.0}
    families = {"resnet9": {"steps": 5}, "thin": {"epochs": 2.0}}
    assert (name, recipe) == ("mine.toml", Recipe(common, families, "standard"))
    of_base = {"batch_size": 256, "schedule": "one-cycle", "warmup": 0.2}
    wanted = Config(recipe="mine.toml", epochs=2.0, weight_decay=1e-3, lr=1.0, **of_base)
    assert config_of(file) == wanted
    assert config_of(file, "resnet18").epochs == 65
    assert config_of(file, "resnet9").steps == 5
    assert find_recipe(write(tmp_path / "again.toml", as_toml(recipe)))[1] == recipe


def test_a_base_may_have_a_base(tmp_path):
    """`speed` changes `quick`, and a user's file changes both."""
    file = write(tmp_path / "mine.toml", 'base = "speed"\nlr = 0.3')
    speed = config_of("speed")
    assert config_of(file) == speed.replace(recipe="mine.toml", lr=0.3)
    assert (speed.model, speed.whiten, speed.epochs > config_of("quick").epochs) == (
        "resnet11",
        True,
        True,
    )
    layers = resolve(*find_recipe(file))[1]
    assert [source for source, options in layers.items() if options] == [
        "recipe quick",
        "recipe quick for resnet11",
        "recipe speed for resnet11",
        "recipe mine.toml",
    ]


def test_without_a_base_there_are_the_defaults(tmp_path):
    assert config_of(write(tmp_path / "e.json", "{}")) == Config(recipe="e.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = ", "r.toml is not a TOML file: Invalid value (at "),
        ("lr = 1\nlr = 2", "r.toml is not a TOML file: Cannot overwrite a value"),
        ("\udcff", "r.toml is not a TOML file: 'utf-8' codec can't decode"),
        (
            "learning_rate = 1",
            "r.toml: unknown option 'learning_rate'; python -m fastres.train --help ",
        ),
        ("[wide]\nlrate = 1", "r.toml: [wide]: unknown option 'lrate'; similar: "),
        ('lr = "1"', "r.toml: option 'lr' must be a number, got '1'"),
        ("lr = nan", "r.toml: option 'lr' must be between 0 and 3.4e+38, got nan"),
        ("lr = 2026-01-01", "r.toml: option 'lr' must be a number, got datetime.date("),
        ("[thin]\nbatch_size = 0", "r.toml: [thin]: option 'batch_size' must be between 1 and "),
        ("nesterov = 1", "r.toml: option 'nesterov' must be true or false, got 1"),
        ("[resnet20]\nlr = 1", "r.toml: 'resnet20' is no family of networks; those are resnet9, "),
        ('[thin]\nmodel = "resnet8"', "r.toml: [thin] must not name a model, which decides the"),
        ('base = "fast"', "r.toml: base must be one of quick, speed, standard, paper, accurate, "),
        ("base = [1]", "speed, standard, paper, accurate, got [1]"),
        ("base = {a = 1}", "r.toml: base must be one of quick"),
        ('device = "cpu"', "r.toml: option 'device' is not of a recipe, which says how a network"),
        ("[deep]\nseed = 1", "r.toml: [deep]: option 'seed' is not of a recipe, which says how"),
        ('recipe = "x"', "r.toml: option 'recipe' is not of a recipe"),
        ("epochs = 1\nsteps = 1", "r.toml: give epochs or steps, not both"),
        ("wide = 1", "r.toml: 'wide' must be a table of options"),
        ("[[wide]]\nlr = 1", "r.toml: 'wide' must be a table of options"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_sentence(text, message, tmp_path, capsys):
    path = tmp_path / "r.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert train.main(["--dry-run", "--recipe", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fast", "unknown recipe 'fast'; the recipes are quick, speed, standard, paper, "),
        ("missing.toml", "cannot read the options in missing.toml: No such file or directory"),
        ("./quick", "the name of the recipe ./quick must end in .json or .toml"),
        ("two words.toml", "runs are named after their recipe, so the name of two words.toml must"),
        (f"{'a' * 60}.toml", "must be 1 to 64 letters, digits, '.', '_', '+' or '-'"),
        ("folder.toml", "cannot read the options in folder.toml: Is a directory"),
    ],
)
def test_what_names_no_recipe(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(UsageError) as raised:
        find_recipe(name)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must hold a JSON object"),
        ("{", "is not a JSON file"),
        ('{"lr": 1, "lr": 2}', "r.json is not a JSON file: 'lr' is there twice"),
        ('{"wide": {"lr": 1, "lr": 2}}', "'lr' is there twice"),
        # It would not undo the steps of the base, and TOML has no word for it.
        ('{"base": "paper", "steps": null}', "r.json: option 'steps' has no value; leave it out"),
        ('{"wide": {"data_fraction": null}}', r"\[wide\]: option 'data_fraction' has no value"),
        ('{"wide": null}', "'wide' must be a table of options"),
    ],
)
def test_json_that_is_no_recipe(text, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        find_recipe(write(tmp_path / "r.json", text))


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path):
    for name, text in (("r.toml", "lr = 0.5"), ("r.json", '{"lr": 0.5}')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert config_of(str(tmp_path / name)).lr == 0.5


def test_a_run_keeps_its_recipe_without_the_file(tmp_path, capsys):
    """The first screen names the sources, config.json holds all; a resumed run needs no file."""
    file, out = tmp_path / "mine.toml", tmp_path / "run"
    write(file, MINE)
    words = ["--dataset", "synthetic", "--limit-train", "40", "--batch-size", "20", *TINY_NET]
    words += ["--model", "resnet8", "--out", str(out)]
    assert train.main(["--recipe", str(file), *words]) == 0
    screen = capsys.readouterr().out
    lines = [line.removeprefix("options").strip() for line in screen.splitlines()]
    assert "recipe standard: schedule one-cycle, warmup 0.2" in lines
    assert "recipe mine.toml: weight-decay 0.001, lr 1" in lines
    assert "recipe mine.toml for resnet8: epochs 2" in lines
    file.unlink()
    config = json.loads((out / "config.json").read_text())
    summary = json.loads((out / "summary.json").read_text())
    assert config["recipe"] == summary["recipe"] == "mine.toml"
    assert (config["lr"], config["epochs"], summary["epochs"]) == (1.0, 2.0, 2.0)
    assert train.main(["--resume", "--out", str(out)]) == 0
    again = ["--config", str(out / "config.json"), "--out", str(tmp_path / "again"), "--dry-run"]
    assert train.main(again) == 0


def test_options_of_a_run_may_be_toml(tmp_path, capsys):
    words = ["--dataset", "synthetic", "--limit-train", "400", "--dry-run", "--config"]
    good = write(tmp_path / "c.toml", 'model = "resnet8"\nwidth = 0.5\nthreads = 1\n')
    assert train.main([*words, good]) == 0
    assert f"{good}: width 0.5, threads 1" in capsys.readouterr().out
    assert train.main([*words, write(tmp_path / "d.toml", "model = 1")]) == 2
    assert "d.toml: option 'model' must be text, got 1" in capsys.readouterr().err
