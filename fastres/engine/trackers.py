"""TensorBoard, Weights & Biases and MLflow, by option: they get what the run folder has.

None of them is needed, and none can end a run: what one of them raises is told of once, and the run
goes on without it. A resumed run adds to its TensorBoard folder; the others get a new run, unless
WANDB_RUN_ID and WANDB_RESUME, or MLFLOW_RUN_ID, name one. What they print goes to stderr.
"""

import importlib.util
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, Protocol

from fastres.config import Config, TrackerName
from fastres.engine.console import RunConsole
from fastres.engine.summary import MetricsRow, Summary
from fastres.engine.trainer import Trainer
from fastres.errors import UsageError

__all__ = ["Trackers"]


class Tracker(Protocol):
    """Somewhere that a run is followed."""

    def row(self, row: MetricsRow) -> None:
        """Take the numbers of an epoch."""

    def end(self, summary: Summary | None) -> None:
        """Take the summary; None of a run that did not finish."""


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _step(row: MetricsRow) -> int:
    """Return the number of an epoch; a part of one at the end of a run counts as one."""
    return math.ceil(row["epoch"])


class _TensorBoard:
    def __init__(self, config: Config, folder: Path, *, resume: bool):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.utils.tensorboard import SummaryWriter
        # A run that took the folder again hides what was there.
        purge = None if resume else 0
        self._writer = SummaryWriter(os.fspath(folder / "tensorboard"), purge_step=purge)
        options = "\n".join(f"    {name}: {value}" for name, value in config.to_json().items())
        self._writer.add_text("options", options)

    def row(self, row: MetricsRow) -> None:
        for name, value in _numbers(row).items():
            if name != "epoch":
                self._writer.add_scalar(name, value, _step(row))
        self._writer.flush()

    def end(self, summary: Summary | None) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, config: Config, folder: Path, *, resume: bool):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastres"),
            name=folder.name,
            dir=os.fspath(folder),
            config=config.to_json(),
        )

    def row(self, row: MetricsRow) -> None:
        self._run.log(_numbers(row))

    def end(self, summary: Summary | None) -> None:
        if summary is not None:
            self._run.summary.update(_numbers(summary))
        self._run.finish(exit_code=0 if summary is not None else 1)


class _Mlflow:
    def __init__(self, config: Config, folder: Path, *, resume: bool):
        # By default a server that does not answer is asked for minutes, while the run waits.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        import mlflow

        self._mlflow = mlflow
        if os.environ.keys().isdisjoint({"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"}):
            mlflow.set_experiment("fastres")
        mlflow.start_run(run_name=folder.name)
        try:
            mlflow.log_params(config.to_json())
        except BaseException:
            mlflow.end_run("FAILED")
            raise

    def row(self, row: MetricsRow) -> None:
        self._mlflow.log_metrics(_numbers(row), step=_step(row))

    def end(self, summary: Summary | None) -> None:
        if summary is not None:
            wanted = ("test_accuracy", "test_loss", "train_seconds", "images_per_second")
            self._mlflow.log_metrics({f"final_{k}": float(summary[k]) for k in wanted})  # type: ignore[literal-required]
        self._mlflow.end_run("FINISHED" if summary is not None else "FAILED")


_KINDS: dict[TrackerName, tuple[str, Callable[..., Tracker]]] = {
    "tensorboard": ("tensorboard", _TensorBoard),
    "wandb": ("wandb", _Wandb),
    "mlflow": ("mlflow", _Mlflow),
}


class Trackers:
    """Those that a run is followed by.

    Args:
        names: of them.
        console: where one that fails is told of.

    Raises:
        UsageError: for one that is not installed.
    """

    def __init__(self, names: Sequence[TrackerName], console: RunConsole):
        self._names, self._console = tuple(dict.fromkeys(names)), console
        for name in self._names:
            if name not in _KINDS:
                raise UsageError(f"unknown tracker {name!r}; there are {', '.join(_KINDS)}")
            package = _KINDS[name][0]
            spec = importlib.util.find_spec(package)
            # W&B leaves a folder `wandb` behind, which would pass for a package without files.
            if spec is None or spec.origin is None:
                raise UsageError(f"--track {name} needs {package}: pip install {package}")

    @contextmanager
    def following(self, trainer: Trainer, *, resume: bool) -> Iterator[None]:
        """Follow what `trainer` runs inside the context, from its start or resumed."""
        config, folder = trainer.config, trainer.folder.path
        alive: dict[str, Tracker] = {}

        def each(what: Callable[[Tracker], None]) -> None:
            for name, tracker in list(alive.items()):
                try:
                    with redirect_stdout(sys.stderr):
                        what(tracker)
                except Exception as error:
                    del alive[name]
                    self._lost(name, error)
                    # Or the next run of this process would find one that is still open.
                    with suppress(Exception), redirect_stdout(sys.stderr):
                        tracker.end(None)

        for name in self._names:
            try:
                with redirect_stdout(sys.stderr):
                    alive[name] = _KINDS[name][1](config, folder, resume=resume)
            except Exception as error:
                self._lost(name, error)
        trainer.after_epoch = lambda row: each(lambda tracker: tracker.row(row))
        trainer.after_run = lambda summary: each(lambda tracker: tracker.end(summary))
        try:
            yield
        except BaseException:
            each(lambda tracker: tracker.end(None))
            raise
        finally:
            trainer.after_epoch = None
            trainer.after_run = lambda summary: None

    def _lost(self, name: str, error: Exception) -> None:
        said = str(error).strip().split("\n")[0][:200]
        self._console.line(
            f"! {name} is left out from here on: {type(error).__name__}: {said}",
            style="bold yellow",
        )
