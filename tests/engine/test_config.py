"""Options: the same types and ranges for the command line, files and the API, and one sentence."""

import dataclasses
import json
import math
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from fastres import train
from fastres.config import Config, from_json, validate
from fastres.errors import UsageError
from fastres.model.resnet import MODELS, create_model
from fastres.recipes import RECIPES, from_recipe

FIELDS = [field.name for field in dataclasses.fields(Config)]
HINTS = get_type_hints(Config)
NUMBERS = [name for name, hint in HINTS.items() if {int, float} & {hint, *get_args(hint)}]
# Wrong for every option: no value of this kind is meant anywhere.
JUNK = [[], [1], {}, {"a": {"b": [None]}}, [[["x"]]], "\0", "no such word", -1, -0.5, 1e39, 10**400]
JUNK += [math.nan, math.inf, -math.inf]
# Right for some options, and then accepted by them alone.
TRICKY = [True, False, None, "", "1", "0.1", "true", 0, 1, 0.5, 1e5, 2**63, 10**30, "auto", "on"]
TAKE_ANY_TEXT = {"model", "data_dir"}


def as_json(name, value):
    return json.dumps({name: value}).encode()


def refused(name, value):
    try:
        validate(from_json(as_json(name, value), "c.json"))
    except UsageError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", FIELDS)
def test_junk_is_one_sentence_from_a_file_and_from_python(name):
    for value in JUNK:
        if isinstance(value, str) and name in TAKE_ANY_TEXT:
            continue
        if name == "limit_train" and value == 10**400:
            continue  # There are fewer images, so it does nothing.
        error = refused(name, value)
        assert error is not None, (name, value)
        assert error.startswith(f"c.json: option {name!r} must be "), error
        assert "\n" not in error
        assert len(error) < 250
        with pytest.raises(UsageError, match=f"^--{name.replace('_', '-')} must be "):
            validate(Config(**{name: value}))


@pytest.mark.parametrize("name", FIELDS)
def test_what_is_accepted_has_the_type_of_the_option(name):
    for value in TRICKY:
        if refused(name, value) is None:
            found = getattr(from_json(as_json(name, value), "c.json"), name)
            hint = HINTS[name]
            kinds = get_args(hint) if get_origin(hint) not in (None, Literal) else (hint,)
            assert any(
                found in get_args(kind) if get_origin(kind) is Literal else type(found) is kind
                for kind in kinds
            ), (name, value, found)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "-1", "1e39", "x", "", "[1]"])
def test_junk_on_the_command_line_is_exit_code_2(name, value, capsys):
    option = "--" + name.replace("_", "-")
    try:
        code = train.main(["--dry-run", f"{option}={value}"])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert option in error
    assert "Traceback" not in error


@pytest.mark.parametrize("text", [b'{"lr": 1e400}', b'{"lr": NaN}', b'{"lr": -Infinity}'])
def test_a_number_beyond_floats_is_named_with_its_file(text, tmp_path, capsys):
    (tmp_path / "c.json").write_bytes(text)
    assert train.main(["--dry-run", "--config", str(tmp_path / "c.json"), "--lr", "0.1"]) == 2
    error = capsys.readouterr().err
    assert "c.json: option 'lr' must be between 0 and 3.4e+38, got " in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("end", ["low", "high"])
def test_the_ends_of_a_range_are_what_they_say(name, end):
    ends = {
        "epochs": (None, 1e6), "batch_size": (1, 2**20), "eval_batch_size": (1, 2**20),
        "lr": (0, 3.4e38), "momentum": (0, 1), "bias_lr_scale": (0, 10**6), "muon_lr": (0, 3.4e38),
        "muon_momentum": (0, None), "weight_decay": (0, 3.4e38), "warmup": (0, 1),
        "label_smoothing": (0, 1), "ema": (0, None), "crop_padding": (0, 32), "cutout": (0, 32),
        "width": (None, 64), "seed": (0, 2**63 - 1), "threads": (1, 4096), "workers": (0, 256),
        "limit_train": (1, None), "steps": (1, 10**9), "mixup": (0, 1000), "cutmix": (0, 1000),
        "low_res": (8, 32), "low_res_share": (0, 1),
    }  # fmt: skip
    value = ends[name][end == "high"]
    if value is not None:
        assert refused(name, value) is None
        outside = value + 1 if end == "high" else value - 1
        assert refused(name, value * 1.001 if value > 1e30 else outside)
    else:
        inside = {"epochs": 0, "ema": 1, "width": 0}.get(name)
        assert inside is None or refused(name, inside)


def test_a_whole_number_for_a_rate_becomes_a_float():
    config = from_json(b'{"lr": 1, "epochs": 3}', "c.json")
    assert [type(config.lr), type(config.epochs)] == [float, float]
    assert from_json(json.dumps(config.to_json()).encode(), "c.json") == config


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_recipe_gives_reads_back(recipe):
    config = from_recipe(recipe)
    assert from_json(json.dumps(config.to_json()).encode(), "c.json") == validate(config) == config


def test_the_help_names_the_recipes(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"Hyper-parameters: {', '.join(RECIPES)}, or your own file" in words


@pytest.mark.parametrize(
    "name", ["", "a/b", "..\\b", "two words", "x\n", "\x1b[2J", "a" * 65, "a:b", "\ud800", "\u202e"]
)
def test_what_no_recipe_is_called(name):
    """It becomes part of the name of a folder and of lines on a terminal."""
    assert "1 to 64 letters, digits, " in refused("recipe", name)


def test_a_run_may_be_of_a_recipe_of_its_user():
    for name in ("my-recipe.toml", "나의_1.json", "a" * 64):
        assert refused("recipe", name) is None


@pytest.mark.parametrize("path", ["\0", "~\0/x", "\ud800", "~\ud800/x"])
def test_a_data_folder_that_no_system_can_name(path, tmp_path, capsys):
    (tmp_path / "c.json").write_text(json.dumps({"data_dir": path}))
    assert train.main(["--dry-run", "--config", str(tmp_path / "c.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--optimizer", "adamw", "--momentum", "1"), "less than 1 with --optimizer adamw"),
        (("--resume", "--out", "r", "--config", "c.json"), "--config does not go with --resume"),
        (("--width", "1e-9"), "width must leave at least one filter"),
        (("--epochs", "2", "--steps", "9"), "two lengths of one run; give one of them"),
    ],
)
def test_options_that_do_not_go_together(words, message, capsys):
    assert train.main(["--dry-run", "--dataset", "synthetic", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("model", MODELS)
def test_the_widest_net_that_may_be_asked_for_can_be_described(model):
    import torch

    with torch.device("meta"):
        assert create_model(model, width=64.0) is not None
