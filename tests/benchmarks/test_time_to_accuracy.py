"""Time to accuracy: seeds restart one step exactly, rows survive a cut, p-values are right."""

import json

import pytest
import torch

from benchmarks.harness.rows import read_results
from benchmarks.prove import time_to_accuracy
from fastres.config import Config
from fastres.data.synthetic import synthetic_dataset
from fastres.engine import trainer as trainer_module
from fastres.engine.console import RunConsole
from fastres.engine.run_dir import RunDir
from fastres.engine.trainer import Trainer
from fastres.errors import UsageError
from fastres.recipes import from_recipe

TINY = {"model": "resnet8", "width": 0.25, "batch_size": 10, "epochs": 1.5, "threads": 1}


@pytest.fixture(autouse=True)
def _small_set(monkeypatch, plain):
    """Forty images, and what a run sets in torch is put back."""
    data = synthetic_dataset(40, 10)
    monkeypatch.setattr(trainer_module, "load_dataset", lambda *_: data)
    monkeypatch.setattr(time_to_accuracy.fastres, "load_dataset", lambda *_: data)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    yield
    torch.set_num_threads(threads)


def _trainer(tmp_path, seed, route):
    options = {"whiten": True, "ema": 0.5, "mixup": 1.0, "limit_train": 30, "loader": "resident"}
    config = Config(**TINY, **options, route=route, seed=seed, dataset="synthetic")
    return Trainer(config, RunDir(tmp_path / "none"), RunConsole(silent=True))


@pytest.mark.parametrize("route", ["eager", "fused"])
def test_a_restarted_run_is_that_of_its_seed(tmp_path, monkeypatch, route):
    """Bit for bit: weights, statistics, average and momenta; the route and the step are kept."""
    first = _trainer(tmp_path, 0, route)
    run = first.prepare()
    first.train_and_score(run)
    run = first.restarted(run, 1)
    marks = []
    scores = first.train_and_score(run, after_training=lambda: marks.append(run.state.step))
    assert marks == [run.total_steps] == [5]
    fresh = _trainer(tmp_path, 1, route)
    expected = fresh.prepare()
    assert fresh.train_and_score(expected) == scores
    states = expected.step.state_dict(), run.step.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert not (tmp_path / "none").exists()
    # Whitening is a part of what is timed, and comes before the first step.
    run, whitened = first.restarted(run, 1), []
    monkeypatch.setattr(trainer_module, "whiten_stem", lambda *_: whitened.append(run.state.step))
    first.train_and_score(run)
    assert whitened == [0]


# Quantiles of Student's t distribution: (values, goal below their mean by t standard errors, p).
@pytest.mark.parametrize(
    ("freedom", "t", "p"),
    [(1, 6.313752, 0.05), (2, 2.919986, 0.05), (3, 5.840909, 0.005), (19, 1.729133, 0.05),
     (20, -1.724718, 0.95), (199, 2.345232, 0.01)],
)  # fmt: skip
def test_the_t_test_knows_its_table(freedom, t, p):
    values = torch.linspace(-1, 1, freedom + 1, dtype=torch.float64)
    error = values.std().item() / (freedom + 1) ** 0.5
    found = time_to_accuracy.t_test((values + 90).tolist(), 90 - t * error)
    assert found == pytest.approx(p, rel=1e-4)
    assert time_to_accuracy.t_test([90.0], 80) is time_to_accuracy.t_test([90.0, 90.0], 80) is None


class _Peer:
    """Stands for the peer: a second a run, and 10, 11, 12 %."""

    case, provider, precision, images, gflop = "peer's case", "peer", "bf16", 100, 0.7

    def __init__(self, *_):
        self.seeds = []

    def warm_up(self):
        assert not self.seeds

    def run(self, seed):
        self.seeds.append(seed)
        return {"seed": seed, "test_accuracy": 10.0 + seed, "seconds": 1.0, "train_seconds": 0.9}


def test_the_command_measures_in_turns_and_loses_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(time_to_accuracy, "_PeerRuns", _Peer)
    words = [f"--set={k}={v}" for k, v in (TINY | {"route": "eager", "amp": "off"}).items()]
    words += ["--recipe", "quick", "--runs", "3", "--goal", "10.5", "--out", str(tmp_path)]
    words += ["--ablate", "flip=none", "--peer", "airbench94_muon"]
    real, count = time_to_accuracy._RecipeRuns.run, []

    def run(self, seed):
        count.append(seed)
        if len(count) == 5:
            raise UsageError("cut off")
        return real(self, seed)

    monkeypatch.setattr(time_to_accuracy._RecipeRuns, "run", run)
    assert time_to_accuracy.main(words) == 2
    files = sorted(path.name for path in tmp_path.iterdir())
    assert [name.rpartition(".")[2] for name in files] == ["csv", "json"]
    results = read_results(tmp_path)
    rows = {(row.case, row.metric): row for row, _ in results}
    plain, changed, peer = dict.fromkeys(case for case, _ in rows)
    assert plain == "synthetic 40 resnet8 w0.25 quick 1.5 epochs batch 10, threads=1"
    assert changed == f"{plain}, flip=none"
    assert {row.suite for row, _ in results} == {"recipe_ablation"}
    # Two whole turns, and the third began with the peer.
    assert [rows[case, "seconds"].n for case in (plain, changed, peer)] == [2, 2, 3]
    assert rows[peer, "share_at_10.5"].median == pytest.approx(200 / 3, rel=1e-4)
    # t = 0.5 / (1 / sqrt 3) of 2 degrees of freedom: (1 - t / sqrt(2 + t^2)) / 2.
    assert rows[peer, "p_mean_above_10.5"].median == pytest.approx(0.238884, rel=1e-4)
    assert len(results[0][1]["runs"]["peer's case: peer"]) == 3
    mean = rows[peer, "test_accuracy_mean"], rows[peer, "test_accuracy_sd"]
    assert [row.median for row in mean] == [11, 1]
    ratio = rows[plain, "speed_against_peer_airbench94_muon"]
    assert ratio.high == pytest.approx(1 / rows[plain, "seconds"].low, rel=1e-4)
    assert rows[plain, "train_seconds"].high < rows[plain, "seconds"].high
    assert results[0][1]["seeds"] == [0, 1, 2]
    assert json.loads((tmp_path / files[1]).read_text())["commit"]
    capsys.readouterr()
    assert time_to_accuracy.main([*words, "--ablate", "no_such=1"]) == 2
    assert "unknown option 'no_such'" in capsys.readouterr().err
    assert time_to_accuracy.main([*words, "--set", "flip"]) == 2
    assert "--set takes NAME=VALUE, got 'flip'" in capsys.readouterr().err


def test_a_slow_peer_takes_part_in_the_first_turns_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(time_to_accuracy, "_PeerRuns", _Peer)
    words = [f"--set={k}={v}" for k, v in (TINY | {"route": "eager", "amp": "off"}).items()]
    words += ["--runs", "3", "--out", str(tmp_path), "--peer", "airbench94_muon"]
    assert time_to_accuracy.main([*words, "--peer-runs", "1"]) == 0
    results = read_results(tmp_path)
    assert {row.suite for row, _ in results} == {"train"}
    counts = {(row.case, row.metric): row.n for row, _ in results}
    plain, peer = dict.fromkeys(case for case, _ in counts)
    assert (counts[plain, "seconds"], counts[peer, "seconds"]) == (3, 1)
    assert counts[plain, "speed_against_peer_airbench94_muon"] == 1
    capsys.readouterr()
    for number in ("0", "4"):
        assert time_to_accuracy.main([*words, "--peer-runs", number]) == 2
        assert f"between 1 and --runs, got {number}" in capsys.readouterr().err


def test_changes_are_of_the_recipe_of_the_changed_network(tmp_path):
    def changed(recipe, *words):
        return time_to_accuracy._changed(
            recipe, {"dataset": "synthetic"}, time_to_accuracy._values(words, "--set")
        )

    quick = changed("quick", "flip=random", "model=resnet9")
    assert (quick.flip, quick.lr, quick.dataset) == ("random", 0.25, "synthetic")
    assert (changed("speed").batch_size, changed("speed").fast) == (512, True)
    # A length in epochs takes the place of one in steps, and the other way round.
    assert (changed("paper", "epochs=5").steps, changed("paper", "epochs=5").epochs) == (None, 5)
    assert changed("quick", "steps=7").steps == 7
    mine = tmp_path / "mine.toml"
    mine.write_text('base = "speed"\nlr = 0.5')
    assert (changed(str(mine)).lr, changed(str(mine)).recipe) == (0.5, "mine.toml")


def test_a_peer_is_not_compared_on_less_than_the_whole_set(capsys):
    words = ["--set", "limit_train=20", "--peer", "airbench94_muon"]
    assert time_to_accuracy.main(words) == 2
    assert "--peer trains on the whole set: leave out limit_train" in capsys.readouterr().err


def test_arithmetic_is_the_mean_over_image_sizes():
    """Of a net whose layers but the last cost what their pixels do."""
    whole = from_recipe("quick", "resnet8")
    half = whole.replace(low_res=16, low_res_share=0.5)
    ratio = time_to_accuracy._mean_training_flops(half, 10)
    ratio /= time_to_accuracy._mean_training_flops(whole, 10)
    assert ratio == pytest.approx((1 + 1 / 4) / 2, rel=1e-3)
