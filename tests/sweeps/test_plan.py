"""Which runs a sweep makes, from words of the command line."""

import pytest

from fastres.errors import UsageError
from fastres.sweeps.plan import Setting, parse_lists, parse_value, planned_runs, settings_of
from fastres.sweeps.search import Space, parse_spaces


def plan(*settings, seeds=(0,), recipe="quick", **common):
    return planned_runs([Setting(s) for s in settings], seeds, recipe=recipe, common=common)


def test_lists_make_every_combination():
    lists = parse_lists(["lr=0.1,0.2", "model=resnet8,resnet20", "flip=none"], "--set")
    assert lists == {"lr": [0.1, 0.2], "model": ["resnet8", "resnet20"], "flip": ["none"]}
    settings = settings_of(lists)
    assert len(settings) == 4
    assert settings[1].label == "lr=0.1, model=resnet20, flip=none"


@pytest.mark.parametrize("text", ["[1]", '{"a": 1}', "[" * 100_000, "1e", ""])
def test_what_is_no_plain_value_is_text(text):
    assert parse_value(text) == text


def test_runs_come_seed_by_seed_and_start_from_the_networks_own_recipe():
    models = ({"model": "resnet20"}, {"model": "resnet9"})
    runs = plan(*models, seeds=range(2), recipe="standard", epochs=3)
    assert [run.config.seed for run in runs] == [0, 0, 1, 1]
    assert [run.config.lr for run in runs[:2]] == [0.4, 0.5]
    assert {run.config.epochs for run in runs} == {3}


def test_a_length_in_epochs_takes_the_place_of_the_recipes_steps():
    [run] = plan({}, recipe="paper", epochs=3)
    assert (run.config.epochs, run.config.steps) == (3, None)


def test_recipes_are_compared():
    lengths = [run.config.epochs for run in plan({"recipe": "quick"}, {"recipe": "standard"})]
    assert lengths == [9, 65]


def test_names_are_file_names_and_differ():
    values = ("x" * 300, "x" * 301, "/a b", "/a_b", "/a/b")
    names = {Setting({"data_dir": value}).name for value in values}
    assert len(names) == len(values)
    assert all(len(name) <= 60 and "/" not in name for name in names)


def test_labels_of_close_numbers_differ():
    assert Setting({"lr": 0.1}).label == "lr=0.1"
    assert len({Setting({"lr": lr}).label for lr in (0.123456789, 0.12345678)}) == 2


def test_more_work_is_a_larger_batch_or_network():
    small, batch, deep = plan(
        {"model": "resnet8", "batch_size": 10},
        {"model": "resnet8", "batch_size": 20},
        {"model": "resnet14", "batch_size": 10},
    )
    assert batch.work == 2 * small.work
    assert deep.work > small.work


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lr"], "must be NAME=VALUE"),
        (["=1"], "must be NAME=VALUE"),
        (["lr=1", "lr=2"], "names lr twice"),
        (["lr=1,,2"], "empty value"),
    ],
)
def test_lists_of_something_else_are_named(words, message):
    with pytest.raises(UsageError, match=message):
        parse_lists(words, "--set")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"no_such": 1}, "unknown option 'no_such'"),
        ({"lr": "fast"}, "must be a number"),
        ({"seed": 3}, "seeds are given with --seeds"),
        ({"model": "resnet21"}, "resnet21"),
        ({"recipe": "slow"}, "unknown recipe 'slow'"),
        ({"epochs": 1, "steps": 2}, "two lengths"),
    ],
)
def test_wrong_options_are_named_before_anything_runs(options, message):
    with pytest.raises(UsageError, match=message):
        plan(options)
    with pytest.raises(UsageError, match=message):
        plan({}, **options)


def test_one_setting_twice_is_named():
    with pytest.raises(UsageError, match="are the same"):
        plan({"lr": 0.1}, {"lr": 0.1})


def test_spaces():
    found = parse_spaces(["lr=0.01..1:log", "crop-padding=2..4", "epochs=2..9", "flip=none,random"])
    assert found == {
        "lr": Space(0.01, 1.0, log=True),
        "crop_padding": Space(2, 4, whole=True),
        "epochs": Space(2, 9),
        "flip": Space(values=("none", "random")),
    }
    assert found["lr"].ends == (0.01, 1.0)
    assert found["crop_padding"].ends == (2, 4)
    assert found["flip"].ends == ("none", "random")


def test_a_proposed_number_is_what_its_label_says_and_within_its_space():
    assert Space(0, 1).rounded(0.12345678) == 0.123457
    assert Space(0, 0.12345678).rounded(0.12345678) == 0.12345678


@pytest.mark.parametrize("word", ["lr=2..1", "lr=1..1", "lr=0..1:log", "lr"])
def test_spaces_without_a_value_are_named(word):
    with pytest.raises(UsageError, match="--space 'lr"):
        parse_spaces([word])
