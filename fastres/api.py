"""Train, load, evaluate and predict from Python, as the commands do: `fastres.train(...)`, ...

Everything here prints nothing unless asked to, but for a bar on a terminal while data is downloaded
or decoded; raises the errors of `fastres.errors`; and returns what it made. As the commands do, it
sets torch's threads and determinism for the whole process.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from fastres.config import (
    Config,
    TrackerName,
    ViewsName,
    changed_options,
    checked_options,
    from_json,
    replaced,
    validate,
)
from fastres.data.dataset import Dataset
from fastres.data.evaluation_set import EvaluationSet
from fastres.engine.console import RunConsole
from fastres.engine.distributed import ALONE
from fastres.engine.launch import prepare_process, run_in_folder
from fastres.engine.run_dir import RunDir, default_folder
from fastres.engine.summary import MetricsRow, Summary
from fastres.engine.trackers import Trackers
from fastres.engine.trainer import Trainer
from fastres.errors import UsageError
from fastres.inference.evaluating import config_for, evaluate_network, placed
from fastres.inference.prediction import Prediction, predict
from fastres.inference.runs import read_metrics
from fastres.inference.scores import Evaluation
from fastres.inference.test_data import check_classes, evaluation_set_for
from fastres.inference.trained import TrainedNetwork, load
from fastres.recipe_file import find_recipe
from fastres.recipes import resolve

__all__ = [
    "Evaluation",
    "Prediction",
    "TrainResult",
    "TrainedNetwork",
    "evaluate",
    "load",
    "predict",
    "train",
]


@dataclass(frozen=True, eq=False)
class TrainResult:
    """A finished run.

    Attributes:
        network: the trained network with its classes and normalisation, as `load` returns it.
        rows: of its epochs, as in metrics.jsonl.
        summary: as in summary.json.
        folder: the run folder.
    """

    network: TrainedNetwork
    rows: list[MetricsRow]
    summary: Summary
    folder: Path

    @property
    def model(self) -> nn.Module:
        """Return the plain PyTorch network, in evaluation mode, on the CPU."""
        return self.network.model

    @property
    def accuracy(self) -> float:
        """Return the test accuracy in percent: of the last epoch, or of the best under `val`."""
        return self.summary["test_accuracy"]

    @property
    def paths(self) -> dict[str, Path]:
        """Return the files of the run: weights, config, metrics, summary, curves."""
        names = {
            "weights": self.summary["checkpoint"],
            "config": "config.json",
            "metrics": "metrics.jsonl",
            "summary": "summary.json",
            "curves": "curves.png",
        }
        return {what: self.folder / name for what, name in names.items()}


def train(
    config: Config | None = None,
    *,
    recipe: str | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    quiet: bool = True,
    track: Sequence[TrackerName] = (),
    **options: Any,
) -> TrainResult:
    """Train a network, as `python -m fastres.train` does with the same options.

    Args:
        config: all options; None takes those of `recipe`.
        recipe: of fastres, or a file of yours; default "quick".
        out: run folder; None makes a new one under runs/.
        overwrite: replace the run that is in `out`.
        resume: go on with the run in `out`, whose options it keeps.
        quiet: print nothing.
        track: "tensorboard", "wandb", "mlflow".
        **options: options of `fastres.train` by name, such as model="resnet20", epochs=2.

    Returns:
        The finished run. In a thread that is not the main one no signal is caught.

    Raises:
        UsageError: for an option that there is not, or a value that it may not have.
        FailureError: for data that cannot be read, and a run that diverges.
        fastres.engine.signals.Stopped: after Ctrl-C or SIGTERM, with a checkpoint in the folder.
    """
    if resume and (config is not None or recipe is not None or overwrite):
        raise UsageError("a resumed run keeps its options: leave out config, recipe and overwrite")
    options = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in options.items()}
    config = _resumed(out, options) if resume else _config(config, recipe, options)
    prepare_process(config)
    console = RunConsole(silent=quiet)
    folder = default_folder(config) if out is None else RunDir(Path(out))
    if not resume:
        folder.check_free(overwrite=overwrite)
    trackers = Trackers(track, console)
    trainer = Trainer(config, folder, console, ALONE)
    # Beside the record lies what repeats the run.
    trainer.command = ["python", "-m", "fastres.train", "--config", folder.options_file]
    trainer.show_header()
    summary = run_in_folder(
        trainer, folder, ALONE, resume=resume, overwrite=overwrite, trackers=trackers
    )
    rows: Any = read_metrics(os.fspath(folder.path))
    return TrainResult(load(folder.path), rows, summary, folder.path)


def _config(config: Config | None, recipe: str | None, options: dict[str, Any]) -> Config:
    if config is not None and recipe is not None:
        raise UsageError("config and recipe are two starts of one run; give one of them")
    if "epochs" in options and "steps" in options:
        raise UsageError("epochs and steps are two lengths of one run; give one of them")
    changes = checked_options(options, "fastres.train")
    if config is None:
        name, found = find_recipe(Config.recipe if recipe is None else recipe)
        config, _ = resolve(name, found, changes.get("model"))
    return validate(Config(**replaced(config.to_json(), changes)))


def _resumed(out: str | os.PathLike[str] | None, options: dict[str, Any]) -> Config:
    if out is None:
        raise UsageError("resume needs out, the folder of the run to go on with")
    folder = RunDir(Path(out))
    before = from_json(folder.read_bytes(folder.options_file), folder.path / folder.options_file)
    after = before.replace(**checked_options(options, "fastres.train"))
    if changed := changed_options(before.to_json(), after):
        raise UsageError(f"a resumed run keeps its {changed[0]} of {getattr(before, changed[0])}")
    return validate(after)


def evaluate(
    network: TrainedNetwork | str | os.PathLike[str],
    data: Dataset | EvaluationSet | str | os.PathLike[str] | None = None,
    *,
    tta: ViewsName | None = None,
    fast: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    batch_size: int = 1000,
) -> Evaluation:
    """Say how good a network is on labelled images.

    Args:
        network: what `load` returned, or what it takes.
        data: a dataset, whose test set is taken; a folder with one, or with a test set alone; None
            takes the test set of the data that the network was trained on.
        tta: test-time augmentation: "none", "flip", "multi"; None does as the network's run did.
        fast: by the fastest route of this machine; without it, eager float32.
        device: "auto", "cpu" or "cuda".
        batch_size: images a step; no accuracy depends on it.

    Raises:
        UsageError: for an option that has not a value it may or cannot be had here.
        FailureError: for data that cannot be read or has other classes.
    """
    network = network if isinstance(network, TrainedNetwork) else load(network)
    config = config_for(network, tta=tta, fast=fast, device=device, batch_size=batch_size)
    if isinstance(data, Dataset):
        data = EvaluationSet.of(data)
    if isinstance(data, EvaluationSet):
        check_classes(network, data)
    else:
        data = evaluation_set_for(network, None if data is None else os.fspath(data))
    model, runtime = placed(network, config)
    return evaluate_network(network, data, config, model, runtime)
