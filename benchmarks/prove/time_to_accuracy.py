"""How long until it is this accurate? `python -m benchmarks.prove.time_to_accuracy`.

Trains a recipe of fastres with n seeds in one process, counted as airbench counts: seconds of
whitening, training and the final evaluation, by CUDA events on a GPU and the wall clock on a CPU.
Decoding, uploading, compiling, capturing and a warm-up on random labels come before: on a GPU a
whole run, on a CPU a step of every size of images and an evaluation. Nothing is evaluated, written
or waited for in between.

    --peer airbench94_muon      a published speed recipe in turns with it, seed by seed
    --peer-runs 1               fewer seeds of the peer, which is slow on a CPU
    --set flip=random           changes an option of the recipe; may be repeated
    --ablate flip=random        adds a variant with other options, in turns too: commas between
                                options, repeated for more variants; all rows are then of the suite
                                recipe_ablation
    --goal 90.5                 also the share of runs that reached it, and a one-sided t-test of
                                whether the mean does: p is the chance of a mean this far above the
                                goal if the true one were at it

The last epoch counts, never the best one. Rows, of the suite `train`, are written after every run,
so that a command that is cut off loses nothing: medians with their spread, mean and standard
deviation of both, and how many times faster than the peer, turn by turn. Their sidecar holds every
run.

Exit codes: 0 measured, 1 failure, 2 bad use.
"""

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

import fastres
from benchmarks.harness.records import TimedRun
from benchmarks.harness.rows import RESULTS, Row, make_provenance, summarize, write_results
from benchmarks.harness.timing import Stopwatch
from benchmarks.peers.airbench94_muon import EPOCHS, Airbench94Muon
from fastres import host, strict_json
from fastres.cli import guarded
from fastres.config import Config, from_json, replaced, validate
from fastres.data.dataset import Dataset, ImageSet
from fastres.data.plan import IMAGE_SIZE
from fastres.engine import machine
from fastres.engine.console import RunConsole
from fastres.engine.run_dir import RunDir
from fastres.engine.trainer import PreparedRun, Trainer
from fastres.errors import UsageError
from fastres.model.resnet import network_of
from fastres.model.summary import summarize as summarize_model
from fastres.recipe_file import find_recipe
from fastres.recipes import resolve

__all__ = ["Contender", "main", "rows_of", "t_test"]

_SUITE, _ABLATION_SUITE = "train", "recipe_ablation"
_PEERS = ("airbench94_muon",)
# Options that rows tell in other words.
_TOLD = (
    *("model", "width", "epochs", "steps", "batch_size", "limit_train"),
    *("route", "amp", "channels_last", "loader"),
)


class Contender(Protocol):
    """Who is measured; case and provider are those of its rows.

    precision: what it computes in. images: that a run trains on, repeated ones too. gflop: of a
    training step, an image, in the mean over the run.
    """

    case: str
    provider: str
    precision: str
    images: int
    gflop: float

    def warm_up(self) -> None:
        """Compile what is left to compile, and touch all memory."""

    def run(self, seed: int) -> TimedRun:
        """Whiten, train and evaluate from a seed."""


class _RecipeRuns:
    """A recipe of fastres, prepared once; every seed restarts the same step."""

    def __init__(self, config: Config, changes: str = ""):
        self._trainer = Trainer(config, RunDir(Path("runs")), RunConsole(silent=True))
        trainer, runtime = self._trainer, self._trainer.runtime
        self._true_images = trainer.train_images
        # The step is prepared, and warmed up, on labels that say nothing of the images.
        labels = torch.randint(len(trainer.data.classes), (len(self._true_images),)).numpy()
        trainer.train_images = ImageSet(self._true_images.images, labels)
        self._run: PreparedRun = trainer.prepare()
        config = trainer.config
        layout = "channels_last" if runtime.channels_last else "nchw"
        self.provider = f"{runtime.route} {runtime.precision} {layout} {runtime.loader}"
        self.case = _case(
            trainer.data,
            len(self._true_images),
            f"{config.model} w{config.width:g} {config.recipe}",
            self._run.epochs,
            config.batch_size,
        )
        self.case += f", {changes}" if changes else ""
        self.precision: str = runtime.precision
        self.images = self._run.total_steps * config.batch_size
        self.gflop = _mean_training_flops(config, len(trainer.data.classes)) / 1e9

    def warm_up(self) -> None:
        run = self._run
        if self._trainer.runtime.device.type == "cuda":
            self._trainer.train_and_score(run)
            return
        # A step of every size of images, and the evaluation.
        images, labels = next(iter(run.train_loader.serve(0)))
        for step in (0, run.total_steps - 1):
            run.step(step, images, labels)
        self._trainer.train_and_score(replace(run, total_steps=1))

    def run(self, seed: int) -> TimedRun:
        self._run = self._trainer.restarted(self._run, seed)
        watch = Stopwatch(self._trainer.runtime.device)
        watch.mark()
        scores = self._trainer.train_and_score(self._run, after_training=watch.mark)
        watch.mark()
        return _timed(seed, scores["test"].accuracy, watch.seconds())


def _mean_training_flops(config: Config, num_classes: int) -> float:
    """Return the operations of a training step an image, in the mean over a run."""
    net = network_of(config, num_classes)
    small, full = (
        summarize_model(net, size).training_flops for size in (config.low_res, IMAGE_SIZE)
    )
    return config.low_res_share * small + (1 - config.low_res_share) * full


class _PeerRuns:
    """The peer, under the same clock."""

    def __init__(self, data: Dataset, device: torch.device, epochs: float):
        self._peer = peer = Airbench94Muon(data, device, epochs=epochs)
        self.provider = f"peer_airbench94_muon {peer.precision} channels_last"
        size = len(data.train)
        self.case = _case(data, size, "airbench94_muon", peer.epochs, peer.batch_size)
        self.precision = peer.precision
        self.images = peer.total_steps * peer.batch_size
        self.gflop = peer.training_flops / 1e9

    def warm_up(self) -> None:
        self._peer.warm_up()

    def run(self, seed: int) -> TimedRun:
        run = self._peer.run(seed)
        laps = [run["train_seconds"], run["seconds"] - run["train_seconds"]]
        return _timed(seed, run["test_accuracy"], laps)


def _timed(seed: int, accuracy: float, laps: Sequence[float]) -> TimedRun:
    return {
        "seed": seed,
        "test_accuracy": accuracy,
        "seconds": sum(laps),
        "train_seconds": laps[0],
    }


def _case(data: Dataset, images: int, what: str, epochs: float, batch_size: int) -> str:
    return f"{data.name} {images} {what} {epochs:g} epochs batch {batch_size}"


def t_test(values: Sequence[float], goal: float) -> float | None:
    """Return the one-sided p-value of Student's t-test that the true mean is above `goal`.

    The integral of the distribution is its finite series for whole degrees of freedom (Abramowitz
    and Stegun 1964, 26.7.3 and 26.7.4).

    Args:
        values: of independent runs.
        goal: what the mean is compared with.

    Returns:
        The chance of a mean at least as high if the true one were `goal`; None for fewer than two
        values, or where all are equal.
    """
    if len(values) < 2 or (spread := statistics.stdev(values)) == 0:
        return None
    t = (statistics.mean(values) - goal) / (spread / math.sqrt(len(values)))
    freedom = len(values) - 1
    angle = math.atan(t / math.sqrt(freedom))
    cosine, is_odd = math.cos(angle), freedom % 2
    term = total = cosine if is_odd else 1.0
    for k in range(3 if is_odd else 2, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    if is_odd:
        total = (angle + math.sin(angle) * (total if freedom > 1 else 0.0)) * 2 / math.pi
    else:
        total *= math.sin(angle)
    # `total` is the chance of |T| <= t with the sign of t.
    return min(max((1 - total) / 2, 0.0), 1.0)


def rows_of(
    who: Contender,
    runs: Sequence[TimedRun],
    goal: float | None = None,
    rival: Sequence[TimedRun] = (),
    suite: str = _SUITE,
) -> list[Row]:
    """Return the rows of one contender's runs.

    Args:
        who: ran.
        runs: at least one.
        goal: in percent, for the share of runs at it or above.
        rival: the peer's runs of the same turns, for the ratio of seconds.
        suite: of the rows.
    """

    def row(metric: str, unit: str, values: Sequence[float]) -> Row:
        return summarize(suite, who.case, who.provider, metric, unit, values)

    def single(metric: str, unit: str, value: float) -> Row:
        return replace(row(metric, unit, [value]), n=len(runs))

    accuracies = [run["test_accuracy"] for run in runs]
    seconds = [run["seconds"] for run in runs]
    rows = [
        row("test_accuracy", "%", accuracies),
        row("seconds", "s", seconds),
        row("train_seconds", "s", [run["train_seconds"] for run in runs]),
        row("images_per_second", "images/s", [who.images / run["train_seconds"] for run in runs]),
        single("training_arithmetic_per_image", "GFLOP", who.gflop),
    ]
    for metric, unit, values in (("test_accuracy", "%", accuracies), ("seconds", "s", seconds)):
        rows.append(single(f"{metric}_mean", unit, statistics.mean(values)))
        if len(values) > 1:
            rows.append(single(f"{metric}_sd", unit, statistics.stdev(values)))
    if goal is not None:
        reached = [accuracy >= goal for accuracy in accuracies]
        rows.append(single(f"share_at_{goal:g}", "%", 100 * statistics.mean(reached)))
        p = t_test(accuracies, goal)
        if p is not None:
            rows.append(single(f"p_mean_above_{goal:g}", "1", p))
    pairs = list(zip(seconds, rival, strict=False))
    if pairs:
        ratios = [other["seconds"] / own for own, other in pairs]
        rows.append(row("speed_against_peer_airbench94_muon", "x", ratios))
    return rows


def _statement(runs: Sequence[TimedRun], goal: float | None) -> str:
    """Say what the runs of a contender show."""

    def spread(values: Sequence[float], digits: int) -> str:
        sd = f"{statistics.stdev(values):.{digits}f}" if len(values) > 1 else "unknown"
        return f"{statistics.mean(values):.{digits}f} (sd {sd})"

    accuracies = [run["test_accuracy"] for run in runs]
    seconds = [run["seconds"] for run in runs]
    text = f"{spread(accuracies, 3)} % in {spread(seconds, 3)} s, n = {len(runs)}"
    if goal is None:
        return text
    share = sum(accuracy >= goal for accuracy in accuracies)
    mean = statistics.mean(accuracies)
    text += f"; {share} of {len(runs)} runs at {goal:g} % or above"
    text += f", their mean is {'' if mean >= goal else 'not '}there"
    p = t_test(accuracies, goal)
    return text + (f" (one-sided t-test: p = {p:.2g})" if p is not None else "")


def _values(words: Sequence[str], option: str) -> dict[str, Any]:
    """Return {option of a recipe: value} of words `name=value`, later ones before earlier.

    Raises:
        UsageError: for a word of another form.
    """
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise UsageError(f"{option} takes NAME=VALUE, got {word!r}")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        values = replaced(values, {name.strip().replace("-", "_"): value})
    return values


def _changed(recipe: str, source: Mapping[str, Any], changes: Mapping[str, Any]) -> Config:
    """Return the options of a recipe on a data set, with changes; it goes by the changed network.

    Raises:
        UsageError: for an unknown recipe or option, or a value that it may not have.
    """
    model = changes.get("model")
    base = resolve(*find_recipe(recipe), None if model is None else str(model))[0]
    # Whatever is left open has the recipe's value already.
    options = {name: value for name, value in base.to_json().items() if value is not None}
    given = replaced(options, {"fast": True, **source, **changes})
    return validate(from_json(strict_json.dumps(given).encode(), "--set and --ablate"))


def _changes(words: Sequence[str]) -> str:
    """Name the changed options that neither the case nor the provider of a row tells anyway."""
    return ", ".join(w for w in words if w.partition("=")[0].replace("-", "_") not in _TOLD)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prove.time_to_accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--recipe", default="speed", help="of fastres, or a file of yours; default speed")
    add("--runs", type=int, help="seeds; default: 20 on a GPU, 3 on a CPU")
    add("--seed", type=int, default=0, help="the first of them; default 0")
    add("--goal", type=float, help="test accuracy in percent")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="change the recipe")
    add("--ablate", action="append", default=[], metavar="NAME=VALUE,...", help="add a variant")
    add("--peer", choices=_PEERS, help="run it in turns with the recipe")
    add("--peer-runs", type=int, metavar="N", help="seeds of the peer; default: those of --runs")
    add("--peer-epochs", type=float, default=EPOCHS, help=f"of the peer; default {EPOCHS:g}")
    default = os.environ.get("FASTRES_DATA")
    add("--data-dir", default=default, help="images; default: $FASTRES_DATA, else synthetic ones")
    add("--out", type=Path, default=RESULTS, help="folder for rows; default benchmarks/results")
    options = parser.parse_args(argv)
    if options.runs is None:
        options.runs = 20 if torch.cuda.is_available() else 3
    if options.runs < 1:
        raise UsageError(f"--runs must be at least 1, got {options.runs}")
    if options.peer_runs is None:
        options.peer_runs = options.runs
    if not 1 <= options.peer_runs <= options.runs:
        raise UsageError(f"--peer-runs must be between 1 and --runs, got {options.peer_runs}")
    return options


def _contenders(options: argparse.Namespace) -> list[Contender]:
    """The recipe, its variants, and the peer, each ready to run."""
    source = {"data_dir": options.data_dir} if options.data_dir else {"dataset": "synthetic"}
    plain = _values(options.set, "--set")
    base = _changed(options.recipe, source, plain)
    if options.peer and base.limit_train is not None:
        raise UsageError("--peer trains on the whole set: leave out limit_train")
    found: list[Contender] = [_RecipeRuns(base, _changes(options.set))]
    for text in options.ablate:
        words = [word.strip() for word in text.split(",")]
        variant = _changed(options.recipe, source, replaced(plain, _values(words, "--ablate")))
        found.append(_RecipeRuns(variant, _changes([*options.set, *words])))
    if options.peer:
        data = fastres.load_dataset(base.dataset, base.data_dir)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        found.append(_PeerRuns(data, device, options.peer_epochs))
    return found


def _run(argv: Sequence[str]) -> int:
    options = _parse(argv)
    machine.keep_freed_memory()
    torch.set_num_threads(host.usable_cores())
    contenders = _contenders(options)
    suite = _ABLATION_SUITE if options.ablate else _SUITE
    precisions = "-".join(sorted({who.precision for who in contenders}))
    words = ["python", "-m", "benchmarks.prove.time_to_accuracy", *argv]
    provenance = make_provenance(precisions, words)
    provenance["threads"] = torch.get_num_threads()
    provenance["clock"] = ["whitening, training and final evaluation, warm-up excluded"]
    for who in contenders:
        print(f"{who.case}: {who.provider}, {who.gflop:.3f} GFLOP an image", flush=True)
        who.warm_up()
    options.out.mkdir(parents=True, exist_ok=True)
    runs: list[list[TimedRun]] = [[] for _ in contenders]
    path = None
    for turn in range(options.runs):
        seed = options.seed + turn
        is_peer_out = options.peer and turn >= options.peer_runs
        count = len(contenders) - 1 if is_peer_out else len(contenders)
        # Whoever begins a turn changes, so that a machine which slows down slows all of them.
        for number in (n % count for n in range(turn, turn + count)):
            who, run = contenders[number], contenders[number].run(seed)
            runs[number].append(run)
            print(
                f"seed {seed}  {run['test_accuracy']:6.2f} %  {run['seconds']:9.3f} s  {who.case}",
                flush=True,
            )
            provenance["seeds"] = list(range(options.seed, seed + 1))
            provenance["runs"] = {
                f"{who.case}: {who.provider}": done
                for who, done in zip(contenders, runs, strict=True)
            }
            rival = runs[-1] if options.peer else ()
            rows = [
                row
                for who, done in zip(contenders, runs, strict=True)
                if done
                for row in rows_of(who, done, options.goal, () if done is rival else rival, suite)
            ]
            what = "train_seconds" if suite == _SUITE else suite
            path = write_results(what, rows, provenance, options.out, path)
    for who, done in zip(contenders, runs, strict=True):
        print(f"{who.case}: {_statement(done, options.goal)}", flush=True)
    print(path, flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _run(arguments), debug=False)


if __name__ == "__main__":
    sys.exit(main())
