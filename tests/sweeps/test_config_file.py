"""A sweep as a file, and the command line behind it."""

import json

import pytest

from fastres import sweep
from fastres.sweeps.config_file import words_of_file

FILE = """
seeds = 5
recipe = "standard"
fast = true
engine = "submitit-local"

[set]
lr = [0.1, 0.2]
model = ["resnet20", "resnet32"]
nesterov = false
data_dir = "my images"

[engine_option]
timeout_min = 60
"""


def parsed(tmp_path, *words, name="sweep.toml", text=FILE):
    file = tmp_path / name
    file.write_text(text)
    return sweep._parsed([*words, str(file)])


def test_it_says_what_words_say(tmp_path):
    found = parsed(tmp_path)
    assert (found.seeds, found.recipe, found.fast) == (5, "standard", True)
    assert (found.engine, found.engine_option) == ("submitit-local", ("timeout_min=60",))
    assert found.set == (
        "lr=0.1,0.2", "model=resnet20,resnet32", "nesterov=false", "data_dir=my images"
    )  # fmt: skip
    whole = {"seeds": 2, "search": 4, "set": {"val": True}, "space": {"lr": "0.1..1:log"}}
    found = parsed(tmp_path, name="sweep.json", text=json.dumps(whole))
    assert (found.seeds, found.search, found.set) == (2, 4, ("val=true",))
    assert found.space == ("lr=0.1..1:log",)


def test_the_command_line_has_the_last_word(tmp_path):
    found = parsed(tmp_path, "--no-fast", "--seeds", "1", "--set", "lr=0.3", "--set", "epochs=2")
    assert (found.seeds, found.fast, found.recipe) == (1, False, "standard")
    assert "lr=0.1,0.2" not in found.set
    assert {"lr=0.3", "epochs=2", "model=resnet20,resnet32"} < set(found.set)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sets = 1", "unknown option 'sets'"),
        ("resume = true", "unknown option 'resume'"),
        ('set = ["lr=0.1"]', "set must be a table"),
        ("seeds = [1, 2]", "seeds must be one value"),
        ("[fast]\nlr = 1", "fast must be one value"),
        ("seeds =", "is not a TOML file"),
        ("recipe = 2026-01-01", "recipe must be one value"),
        ("[set]\nlr = [[1]]", "[set] lr must be one value"),
        ("[set]\nno_such = 1", "no_such"),
        ("seeds = 1.5", "seeds"),
    ],
)
def test_what_it_may_not_say(text, message, tmp_path, capsys):
    file = tmp_path / "sweep.toml"
    file.write_text(text)
    assert call(str(file), "--out", str(tmp_path / "out")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_resumed_sweep_takes_none(tmp_path, capsys):
    out = tmp_path / "sweep"
    (out / "runs").mkdir(parents=True)
    recorded = {k: v for k, v in vars(sweep.SweepOptions()).items() if k not in sweep._NOT_RECORDED}
    (out / "sweep.json").write_text(json.dumps({"fastres sweep": 1, **recorded}))
    assert call("sweep.toml", "--resume", "--out", str(out)) == 2
    assert "leave out the config file" in capsys.readouterr().err
    assert call(str(tmp_path / "none.toml")) == 2
    assert "cannot read the options" in capsys.readouterr().err


def call(*words):
    try:
        return sweep.main(list(words))
    except SystemExit as exit:
        return exit.code


def test_names_with_dashes_are_the_same(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text("[set]\nbatch-size = [64, 128]\n")
    given = {"set": ("batch-size=32",), "space": (), "engine_option": ()}
    assert words_of_file(str(file), {"set"}, given) == []
