"""Checkpoints whose hash is right and whose content no run writes: one sentence, exit code 1."""

import copy
import json
import math
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save

from fastres import create_model, evaluate
from fastres.config import Config, from_json
from fastres.engine import checkpoint
from fastres.engine.checkpoint_schema import read_training, read_weights
from fastres.engine.console import RunConsole
from fastres.engine.optim import Optimizer
from fastres.engine.run_dir import RunDir
from fastres.engine.state import TrainingState
from fastres.engine.trainer import Trainer
from fastres.errors import FailureError
from tests.helpers.tiny_run import TINY_NET, run_train

OPTIONS = (
    *("--dataset", "synthetic", "--limit-train", "40", "--batch-size", "9", "--epochs", "2"),
    *TINY_NET,
    *("--val", "--ema", "0.9"),
)
WRONG = (None, True, -3, 0.5, 10**400, math.nan, -math.inf, "x", [], {}, [[]], {"a": 1})


def forge(path, tensors, text):
    """Write a file with the right hash, whatever it holds."""
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    digest = checkpoint._digest(stored, text)
    header = {"format": checkpoint.FORMAT, "meta": text, "sha256": digest}
    path.write_bytes(save(stored, metadata=header))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run; tests write other content over its newest checkpoint."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert run_train(*OPTIONS, "--optimizer", "adamw", "--lr", "0.01", "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def whole(run):
    """What the checkpoint of the run holds: tensors, JSON."""
    return checkpoint.read(run / "last.safetensors")


@pytest.fixture
def use(run, whole, monkeypatch, capsys):
    """Resume from content and evaluate it; returns the two sentences, None where it was taken."""
    config = from_json((run / "config.json").read_bytes(), run)
    trainer = Trainer(config, RunDir(run), RunConsole(silent=True))
    prepared = trainer.prepare()
    # The images decide nothing here, and reading and evaluating them takes most of the time.
    monkeypatch.setattr("fastres.data.source.load_dataset", lambda *_, **__: trainer.data)
    monkeypatch.setattr("fastres.evaluate._evaluate", only_up_to_the_images(evaluate._evaluate))

    def used(tensors, meta, *, also_evaluate=True):
        forge(run / "last.safetensors", tensors, json.dumps(meta))
        resumed = None
        try:
            trainer._restore(prepared)
        except FailureError as error:
            resumed = str(error)
        if not also_evaluate:
            return resumed
        code = evaluate.main([str(run), "--checkpoint", "last"])
        evaluated = capsys.readouterr().err
        assert code == (1 if evaluated else 0)
        for sentence in filter(None, (resumed, evaluated.removesuffix("\n"))):
            assert "last.safetensors" in sentence
            assert "\n" not in sentence
            assert len(sentence) < 700
        return resumed, evaluated or None

    yield used
    prepared.close()
    checkpoint.write(run / "last.safetensors", *whole)


def only_up_to_the_images(command):
    one_image = [torch.zeros(1, 10)], [torch.zeros(1, dtype=torch.int64)]

    def shortened(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            name = "fastres.inference.evaluating.log_probs_of_set"
            patch.setattr(name, lambda *_, **__: one_image)
            return command(*arguments)

    return shortened


def places(value, path=()):
    """Every place in a JSON value: the keys that lead there."""
    inside = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        inside = enumerate(value[:1])
    for key, entry in inside:
        yield (*path, key)
        yield from places(entry, (*path, key))


def parent(meta, path):
    for key in path[:-1]:
        meta = meta[key]
    return meta


def is_plausible(path, before, value):
    """Whether a run might have written this value there."""
    if path[-1] == "first_step_seconds" and value is None:
        return True
    if isinstance(value, bool) or isinstance(before, bool):
        return type(before) is type(value)
    if isinstance(before, int | float) and isinstance(value, int | float):
        whole = path[-1] == "step" or not isinstance(before, float)
        if whole and not isinstance(value, int):
            return False
        # Rounding may take a loss below zero, and an accuracy begins at -1: none yet.
        return (-1e15 if "loss" in str(path[-1]) else -1) <= value <= 1e15
    return type(before) is type(value)


def test_the_content_of_a_run_is_taken(use, whole):
    assert use(*whole) == (None, None)


def test_every_field_with_every_wrong_value(use, whole):
    tensors, meta = whole
    for path in places(meta):
        before = parent(meta, path)[path[-1]]
        for value in WRONG[:4] if path[0] == "config" else WRONG:
            changed = copy.deepcopy(meta)
            parent(changed, path)[path[-1]] = value
            resumed, evaluated = use(tensors, changed)
            if path[0] != "config" and not is_plausible(path, before, value):
                assert resumed, (path, value)
                assert evaluated, (path, value)


def test_every_field_missing_and_one_too_many(use, whole):
    tensors, meta = whole
    optional = {*asdict(TrainingState()), "way"} - {"step", "rows", "train_seconds"}
    for path in places(meta):
        if path[0] == "config":
            continue
        changed = copy.deepcopy(meta)
        del parent(changed, path)[path[-1]]
        answers = use(tensors, changed)
        # A class is for evaluation to miss; a row is one that a stopped run has not written yet.
        unseen = path in [("classes", 0), ("progress", "rows", 0)]
        if path[-1] not in optional and "way" not in path and not unseen:
            assert answers[0], path
        if path in [("classes", 0), ("mean",), ("mean", 0), ("progress", "rows")]:
            assert answers[1], path
    for path in [(), ("config",), ("progress",), ("progress", "rows", 0), ("progress", "way")]:
        changed = copy.deepcopy(meta)
        parent(changed, (*path, "surplus"))["surplus"] = 1
        answers = use(tensors, changed)
        assert all(answers), path
        assert "surplus" in answers[0]


@pytest.mark.parametrize("meta", [None, 0, "text", [], {}, [{}]])
def test_json_that_is_no_object(meta, use, whole):
    assert all(use(whole[0], meta))


def test_every_tensor_dropped_renamed_reshaped_and_recast(use, whole):
    tensors, meta = whole
    for name, tensor in tensors.items():
        rest = {key: value for key, value in tensors.items() if key != name}
        changed = {
            "dropped": rest,
            "renamed": rest | {name + "x": tensor},
            "reshaped": rest | {name: tensor.new_zeros((*tensor.shape, 2))},
            "recast": rest | {name: tensor.to(torch.complex64)},
            "emptied": rest | {name: tensor.new_zeros(0)},
        }
        for what, content in changed.items():
            assert use(content, meta, also_evaluate=False), (name, what)
            if name.startswith(("model", "average")) and what in ("dropped", "recast"):
                assert all(use(content, meta)), (name, what)


def test_whole_sections_dropped_and_added(use, whole):
    tensors, meta = whole
    for section in ("model", "optimizer", "average", "totals"):
        rest = {k: v for k, v in tensors.items() if not k.startswith(section)}
        assert use(rest, meta)[0], section
        if section in ("model", "average"):
            assert use(rest, meta)[1], section
    for name in ("", "model", "surplus.weight", "model.", "optimizer.", "optimizer.x", "scaler.x"):
        assert use(tensors | {name: torch.zeros(1)}, meta)[0], name
    assert all(use({}, meta))


def test_numbers_from_which_training_only_diverges(use, whole):
    tensors, meta = whole
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            for value in (math.nan, math.inf):
                changed = tensors | {name: torch.full_like(tensor, value)}
                assert name in use(changed, meta, also_evaluate=False)
        if name.endswith((".step", ".exp_avg_sq", ".running_var", ".values")):
            changed = tensors | {name: torch.full_like(tensor, -1)}
            assert name in use(changed, meta, also_evaluate=False)


@pytest.mark.parametrize("change", [{"step": 9}, {"step": 3}, {"rows": []}, {"train_seconds": 0}])
def test_progress_that_is_not_that_of_the_run(change, use, whole):
    tensors, meta = whole
    answer, _ = use(tensors, meta | {"progress": meta["progress"] | change})
    assert "of 8 steps with" in answer


@pytest.mark.parametrize("change", [{"step": 0, "rows": []}, {"step": 4}, {"step": 7}])
def test_progress_of_a_run_that_was_stopped(change, use, whole):
    """Before the first step, after the last one of an epoch and before its evaluation, between."""
    tensors, meta = whole
    rows = {"rows": meta["progress"]["rows"][: 1 if change["step"] == 7 else 0]}
    assert use(tensors, meta | {"progress": meta["progress"] | rows | change}) == (None, None)
    without = {k: v for k, v in tensors.items() if not k.startswith("optimizer")}
    answer = use(without, meta | {"progress": meta["progress"] | rows | change})[0]
    assert (answer is None) == (change["step"] == 0)


def test_weights_alone_are_evaluated_and_not_resumed(run, use, whole):
    resumed, evaluated = use(*checkpoint.read(run / "model.safetensors"))
    assert "weights alone" in resumed
    assert evaluated is None


def test_the_commands_say_one_sentence(run, whole, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "last.safetensors"
    tensors, meta = whole
    checkpoint.write(path, tensors, meta | {"mean": "grey"})
    assert run_train("--resume", "--out", tmp_path / "run") == 1
    assert evaluate.main([str(tmp_path / "run"), "--checkpoint", "last"]) == 1
    sentence = f"{path} holds what no run writes: meta.mean must be a list of 3, got 'grey'"
    assert capsys.readouterr().err == f"error: {sentence}\n" * 2


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, "{", ""])
def test_json_that_python_cannot_read(text, tmp_path):
    path = tmp_path / "last.safetensors"
    forge(path, {"x": torch.zeros(1)}, text)
    for read in (read_training, read_weights):
        with pytest.raises(FailureError, match="no readable checkpoint"):
            read(path)


def test_every_field_of_the_state_has_its_check(whole):
    assert whole[1]["progress"].keys() == TrainingState().to_json().keys()
    assert json.loads(json.dumps(whole[1])) == whole[1]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("change", [{}, {"momentum": 0.0}, {"optimizer": "adamw"}])
def test_the_layout_is_that_of_torchs_own_state(change, fused):
    model = create_model("resnet8", width=0.25, shortcut="A")
    optimizer = Optimizer(model, Config(**change), fused=fused)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.rules[0].step()
    checkpoint.check_tensors(optimizer.state_dict(), optimizer.layout(), "x")
