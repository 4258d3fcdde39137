"""Recipes: a named network is that network, and the first screen says what came from where."""

import functools
import json

import pytest
import torch

from fastres import train as train_command
from fastres.config import Config
from fastres.engine import checkpoint
from fastres.engine.console import RunConsole
from fastres.engine.run_dir import RunDir
from fastres.engine.runtime import Runtime
from fastres.engine.state import TrainingState
from fastres.engine.step import TrainStep
from fastres.engine.trainer import Trainer
from fastres.model.resnet import MODELS, create_model
from fastres.model.summary import summarize
from fastres.recipes import RECIPES, Recipe, from_recipe, origins, resolve
from tests.helpers.tiny_run import TINY_NET

DRY = ("--dataset", "synthetic", "--limit-train", "400", "--dry-run")


def dry_run(capsys, *arguments) -> str:
    assert train_command.main([*DRY, *arguments]) == 0
    return capsys.readouterr().out


@functools.cache
def num_params(model, width, shortcut):
    """Drawing the filters of one net many times is most of the work of comparing their number."""
    return summarize(create_model(model, width=width, shortcut=shortcut)).params


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_a_named_model_is_that_model_under_every_recipe(recipe, model):
    config = from_recipe(recipe, model)
    assert (config.model, config.width) == (model, 1.0)
    named = num_params(config.model, config.width, config.shortcut)
    assert named == num_params(model, 1.0, config.shortcut)


def test_the_small_net_is_resnet9_with_a_quarter_of_the_filters():
    small, narrow = (
        create_model("resnet9_small", seed=0),
        create_model("resnet9", width=0.25, seed=0),
    )
    assert small.state_dict().keys() == narrow.state_dict().keys()
    assert all(torch.equal(t, narrow.state_dict()[k]) for k, t in small.state_dict().items())


def test_the_default_net_and_its_options_are_those_of_before():
    config = from_recipe("quick")
    assert (config.model, config.optimizer, config.whiten) == ("resnet11", "muon", True)
    config = from_recipe("quick", "resnet9_small")
    assert (config.optimizer, config.lr, config.whiten) == ("sgd", 0.25, True)
    assert from_recipe("standard") == Config(
        recipe="standard", model="resnet20", epochs=65, batch_size=256, lr=0.4
    )


def test_what_suits_one_family_alone_is_left_to_it():
    assert not from_recipe("quick", "resnet20").whiten
    assert from_recipe("quick", "resnet20").lr == 0.2
    assert from_recipe("quick", "resnet18").lr == 0.1
    assert from_recipe("paper", "resnet18").shortcut == "A"
    assert from_recipe("paper", "resnet50").shortcut == "B"
    assert from_recipe("standard", "resnet110").lr == 0.2


def test_resnet20_by_name_has_its_parameters(capsys):
    screen = dry_run(capsys, "--model", "resnet20")
    assert "resnet20: 272,474 parameters" in screen
    assert "recipe quick for resnet20: lr 0.2" in screen


def test_the_first_screen_says_what_was_taken_from_where(capsys):
    words = ("--model", "resnet9_small", "--epochs", "3", "--flip", "none", "--threads", "1")
    lines = dry_run(capsys, *words).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("options"))
    recipe, of_model, given = (line.removeprefix("options").strip() for line in lines[first:][:3])
    assert recipe == "recipe quick: batch-size 128, warmup 0.2, label-smoothing 0.1, crop-padding 2"
    assert of_model == "recipe quick for resnet9_small: lr 0.25, whiten on"
    source, _, values = given.partition(": ")
    assert source == "the command line"
    wanted = {"dataset synthetic", "limit-train 400", "epochs 3", "flip none"}
    assert set(values.split(", ")) == wanted


def test_values_of_a_file_are_named_after_it():
    base = Config(model="resnet8", lr=0.3, epochs=2.0)
    layers = {"run/config.json": {"model": "resnet8", "lr": 0.3, "epochs": 2.0}}
    found = origins(base.replace(lr=0.4, threads=1), base, layers)
    assert found == {"run/config.json": {"epochs": 2.0}, "the command line": {"lr": 0.4}}


def test_the_papers_recipe_is_the_papers():
    config = from_recipe("paper")
    values = {
        "model": "resnet20", "shortcut": "A", "steps": 64_000, "batch_size": 128,
        "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4,
        "decay": "all", "schedule": "steps", "warmup": 0.0, "label_smoothing": 0.0, "ema": 0.0,
        "crop_padding": 4, "flip": "random", "cutout": 0, "whiten": False, "width": 1.0,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in values} == values


@pytest.mark.parametrize(
    ("model", "rates"),
    [
        ("resnet20", {0: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 1e-3, 63_999: 1e-3}),
        ("resnet110", {0: 0.01, 399: 0.01, 400: 0.1, 31_999: 0.1, 32_000: 0.01, 48_000: 1e-3}),
    ],
)
def test_the_papers_rates_change_at_its_steps(model, rates):
    config = from_recipe("paper", model)
    step = TrainStep(torch.nn.Linear(1, 1), config, Runtime(torch.device("cpu")), config.steps)
    assert {number: step.learning_rate(number) for number in rates} == pytest.approx(rates)


def test_the_last_word_on_the_length_counts():
    """Epochs that are asked for take the place of a recipe's steps, wherever they are asked for."""
    own = Recipe({"epochs": 3.0}, {"thin": {"steps": 7}}, base="paper")
    assert resolve("own", own, "resnet18")[0].steps is None
    assert resolve("own", own, "resnet20")[0].steps == 7
    of_wide = Recipe({"steps": 5}, {"wide": {"epochs": 3.0}})
    assert resolve("own", of_wide, "resnet18")[0].steps is None


def test_a_run_takes_the_steps_that_it_is_told(tmp_path, capsys):
    words = ["--recipe", "paper", "--limit-train", "100", "--batch-size", "10", *TINY_NET]
    words += ["--dataset", "synthetic", "--model", "resnet8"]
    for length, steps, epochs in ((["--steps", "12"], 12, 1.2), (["--epochs", "0.3"], 3, 0.3)):
        out = tmp_path / length[0]
        assert train_command.main([*words, *length, "--out", str(out)]) == 0
        _, meta = checkpoint.read(out / "last.safetensors")
        assert meta["progress"]["step"] == steps
        assert json.loads((out / "summary.json").read_text())["epochs"] == epochs
        assert f"{length[0][2:]} {length[1]}" in capsys.readouterr().out
    assert train_command.main(["--resume", "--out", str(out), "--steps", "4"]) == 2
    assert "a resumed run keeps its --steps of None" in capsys.readouterr().err


def test_a_files_width_stays_with_its_model(tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model": "resnet9", "width": 0.25}))
    narrow = summarize(create_model("resnet9_small")).params
    assert f"resnet9: {narrow:,} parameters" in dry_run(capsys, "--config", str(file))
    other = dry_run(capsys, "--config", str(file), "--model", "resnet20")
    assert "resnet20: 272,474 parameters" in other
    asked = dry_run(capsys, "--config", str(file), "--model", "resnet20", "--width", "0.5")
    assert "resnet20: 272,474 parameters" not in asked


def test_the_state_in_a_checkpoint_reads_as_it_always_did():
    old = {"step": 3, "rows": [], "best_val_accuracy": -1.0, "way": {"route": "eager"}}
    state = TrainingState.from_json(old)
    assert state.execution_mode == {"route": "eager"}
    state.add_mode({"route": "fused"})
    assert state.to_json()["way"] == {"route": "mixed"}
    assert TrainingState.from_json(state.to_json()) == state


def test_a_trainer_changes_nothing_global_until_it_prepares(tmp_path):
    config = Config(
        dataset="synthetic", limit_train=40, batch_size=8, model="resnet8", width=0.25,
        threads=1, deterministic=True, shortcut="A",
    )  # fmt: skip
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(2)
    try:
        trainer = Trainer(config, RunDir(tmp_path), RunConsole(silent=True))
        assert torch.get_num_threads() == 2
        assert not torch.are_deterministic_algorithms_enabled()
        trainer.prepare().close()
        assert torch.get_num_threads() == 1
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


def test_a_frozen_stem_stays_whitened_and_everything_else_moves(tmp_path):
    config = Config(
        dataset="synthetic", limit_train=40, batch_size=8, model="resnet11", width=0.25,
        threads=1, epochs=1.0, whiten=True, freeze_stem=True, optimizer="muon", fast=True,
    )  # fmt: skip
    trainer = Trainer(config, RunDir(tmp_path), RunConsole(silent=True))
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.run(trainer.prepare(), resume=False)
    same = {n for n, p in trainer.model.named_parameters() if torch.equal(p, start[n])}
    assert same == {"conv1.weight"}
    drawn = create_model("resnet11", width=0.25, seed=config.seed)
    assert not torch.equal(start["conv1.weight"], drawn.conv1.weight)
