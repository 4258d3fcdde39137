"""A whole run, from options to a summary; reads from top to bottom."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fastres import host
from fastres.config import Config, changed_options
from fastres.data.loaders import BatchSpec, Loader, build_loader
from fastres.data.plan import Augmentation
from fastres.data.source import (
    dataset_kind,
    load_dataset,
    named_data_folder,
    split_validation,
)
from fastres.engine import checkpoint, machine
from fastres.engine.background import BackgroundWriter
from fastres.engine.checkpoint import Snapshot
from fastres.engine.checkpoint_schema import check_progress, read_training
from fastres.engine.console import RunConsole
from fastres.engine.curves import draw_curves
from fastres.engine.distributed import ALONE, Processes
from fastres.engine.divergence import require_finite_scores, require_finite_state
from fastres.engine.evaluation import Score, compile_evaluation, evaluate, evaluation_loader
from fastres.engine.run_dir import RunDir
from fastres.engine.runtime import resolve_runtime
from fastres.engine.signals import Stopped, StopSignal
from fastres.engine.state import TrainingState
from fastres.engine.step import TrainStep
from fastres.engine.summary import ExecutionMode, MetricsRow, Summary, chosen_row
from fastres.errors import FailureError
from fastres.fusion.fuse import fuse
from fastres.model.resnet import network_of
from fastres.model.summary import ModelSummary, summarize
from fastres.model.whiten import whiten_stem

__all__ = ["PreparedRun", "Trainer", "count_steps"]


@dataclass
class PreparedRun:
    """What a run needs beside its network: compiled, captured, loaders open.

    Attributes:
        step: trains on one batch.
        train_loader: of this process's part of every batch.
        eval_loaders: {"val" or "test": loader}.
        total_steps: of the whole run.
        epochs: passes over the training set that these are.
        state: how far it is.
    """

    step: TrainStep
    train_loader: Loader
    eval_loaders: dict[str, Loader]
    total_steps: int
    epochs: float
    state: TrainingState

    @property
    def steps_per_epoch(self) -> int:
        """Return the batches of an epoch."""
        return len(self.train_loader)

    def close(self) -> None:
        """Release what the loaders hold."""
        for loader in (self.train_loader, *self.eval_loaders.values()):
            loader.close()


def count_steps(epochs: float, steps_per_epoch: int) -> int:
    """Return the steps of a run: begun ones count, those that a rounding error begins do not."""
    return max(1, math.ceil(round(epochs * steps_per_epoch, 6)))


class Trainer:
    """Reads the data and builds the network when constructed; then `prepare`, then `run`.

    Args:
        config: validated options; the attribute says instead of `auto` which data was found.
        folder: the run folder, made by the caller.
        console: where to report.
        processes: who trains the same network; the first of them writes the files.

    Attributes:
        command: the words that repeat the run, for its records.
        extra_metrics: called after every epoch; returns columns of `MetricsRow` for its row.
        after_epoch: called with that row in the process that writes the files, once they are
            written.
        after_run: called there with the summary.
    """

    def __init__(
        self, config: Config, folder: RunDir, console: RunConsole, processes: Processes = ALONE
    ):
        self.folder, self.console, self.processes = folder, console, processes
        self.command = ["python", "-m", "fastres.train", *sys.argv[1:]]
        self.extra_metrics: Callable[[], Mapping[str, float]] = dict
        self.after_epoch: Callable[[MetricsRow], None] | None = None
        self.after_run: Callable[[Summary], None] = lambda summary: None
        self._writer = BackgroundWriter()
        # What one process downloads and decodes, the others find.
        with processes.main_first():
            self.data = load_dataset(config.dataset, config.data_dir)
        # What `auto` found today, and where: a resumed run and an evaluation ask for that.
        kind = dataset_kind(self.data.name)
        folder_of_data = None if kind == "synthetic" else named_data_folder(config.data_dir)
        self.config = config.replace(dataset=kind, data_dir=folder_of_data or config.data_dir)
        self._split()
        self.model = self._initial_model()
        self.runtime = resolve_runtime(config, self.model, processes)
        self.model_summary: ModelSummary = summarize(self.model)
        if self.runtime.route == "fused":
            self.model = fuse(self.model, verbose=False)

    @property
    def last(self) -> Path:
        """Return the path of the checkpoint that a resumed run goes on from."""
        return self.folder.file("last")

    def _split(self) -> None:
        """Cut the training images down and hold some out, the test set untouched."""
        train, limit = self.data.train, self.config.limit_train
        if limit is not None and limit < len(train):
            train = split_validation(train, limit, self.config.seed)[1]
        self.val_images = None
        if self.config.val:
            train, self.val_images = split_validation(train, len(train) // 10, self.config.seed)
        self.train_images = train

    def _initial_model(self) -> nn.Module:
        """Return the plain network as its seed starts it."""
        config = self.config
        model = network_of(config, len(self.data.classes), seed=config.seed)
        self._whiten(model)
        if config.freeze_stem:
            model.get_parameter("conv1.weight").requires_grad_(False)
        return model

    def _whiten(self, model: nn.Module) -> None:
        if self.config.whiten:
            whiten_stem(model, self.train_images.images, self.data.mean, self.data.std)

    def show_header(self) -> None:
        """Print the first screen: data, network, and what really runs."""
        num_val = len(self.val_images) if self.val_images is not None else 0
        self.console.data(self.data, len(self.train_images), num_val)
        self.console.model(self.config.model, self.model_summary)
        self.console.runtime(self.runtime)

    def training_batches(self) -> BatchSpec:
        """Say which images this process trains on, batch by batch.

        Raises:
            UsageError: for a batch larger than the training set.
        """
        config = self.config
        batches = BatchSpec(
            images=self.train_images,
            mean=self.data.mean,
            std=self.data.std,
            batch_size=config.batch_size,
            seed=config.seed,
            augmentation=Augmentation(
                config.crop_padding, config.flip, config.cutout, config.trivial_augment
            ),
            training=True,
        )
        return self.processes.share(batches)

    def prepare(self) -> PreparedRun:
        """Build loaders and step; compile and capture before any loader starts.

        Raises:
            UsageError: for a batch larger than the training set, or a loader that is missing.
        """
        config, runtime = self.config, self.runtime
        runtime.configure_torch()
        batches = self.training_batches()
        total_steps = config.steps or count_steps(config.epochs, len(batches))
        runtime.place(self.model)
        self.model.train()
        step = TrainStep(self.model, config, runtime, total_steps, self.processes)
        shape = (batches.size, 3, 32, 32)
        started = time.perf_counter()
        step.prepare(
            torch.randn(shape, device=runtime.device),
            torch.zeros(batches.size, dtype=torch.int64, device=runtime.device),
        )
        for images in (self.val_images, self.data.test):
            if images is not None:
                num_images = len(self.processes.share_of_set(images))
                compile_evaluation(self.model, num_images, config, runtime, self.processes)
        self._wait()
        state = TrainingState(compile_seconds=time.perf_counter() - started)
        # Those that were asked for: the steps are rounded up to whole ones.
        epochs = config.epochs if config.steps is None else config.steps / len(batches)
        return PreparedRun(step, *self._loaders(batches), total_steps, epochs, state)

    def _loaders(self, batches: BatchSpec) -> tuple[Loader, dict[str, Loader]]:
        """Open the loaders of a run: to train with, and to evaluate each split with."""
        config, runtime = self.config, self.runtime
        loader = build_loader(runtime.loader, batches, runtime.device, workers=config.workers)
        sets = {"val": self.val_images, "test": self.data.test}
        eval_loaders = {
            split: evaluation_loader(
                self.processes.share_of_set(images), self.data.mean, self.data.std, config, runtime
            )
            for split, images in sets.items()
            if images is not None
        }
        return loader, eval_loaders

    def restarted(self, run: PreparedRun, seed: int) -> PreparedRun:
        """Return a run from another seed by the same step, compiled and captured as it is.

        It computes what a run prepared with that seed computes: weights, statistics, averages and
        the optimizer's state are set back in place, and images are split and served anew.
        The loaders of `run` are closed.
        """
        run.close()
        self.config = self.config.replace(seed=seed)
        run.step.reseed(seed)
        self._split()
        fresh = self._initial_model().state_dict()
        scaler = torch.amp.GradScaler(self.runtime.device.type).state_dict()
        start: dict[str, torch.Tensor] = {}
        for key, value in run.step.state_dict().items():
            section, _, name = key.partition(".")
            if section == "scaler":
                start[key] = torch.tensor(scaler[name])
            else:
                # Averages start as the weights do, momenta and sums at zero.
                start[key] = fresh[name] if name in fresh else torch.zeros_like(value)
        run.step.load_state_dict(start, self.last, first_step=True)
        loader, eval_loaders = self._loaders(self.training_batches())
        state = TrainingState(compile_seconds=run.state.compile_seconds)
        return replace(run, train_loader=loader, eval_loaders=eval_loaders, state=state)

    def train_and_score(
        self, run: PreparedRun, after_training: Callable[[], None] = lambda: None
    ) -> dict[str, Score]:
        """Whiten, train to the end and evaluate once: what a time to accuracy counts.

        Until the evaluation is over nothing is written, shown, evaluated or waited for, and a loss
        that is not finite ends nothing.

        Args:
            run: at its start.
            after_training: called between the last step and the evaluation.
        """
        self._whiten(self.model)
        # Or the first step would be waited for, to know when it ended.
        run.state.first_step_seconds = math.nan
        stop = StopSignal()
        for epoch in range(math.ceil(run.total_steps / run.steps_per_epoch)):
            self._train_steps(run, epoch, stop)
        after_training()
        return self._scores(run, stop)

    def run(self, prepared: PreparedRun, *, resume: bool) -> Summary:
        """Train to the end and return the summary.

        Raises:
            Stopped: after a signal, with a checkpoint in the run folder.
            FailureError: when a number of the run is no longer finite, or a file cannot be read or
                written.
        """
        if resume:
            self._restore(prepared)
        self.console.line("")
        stop = StopSignal()
        with stop.caught(), closing(prepared), closing(self._writer):
            try:
                while len(prepared.state.rows) * prepared.steps_per_epoch < prepared.total_steps:
                    self._train_epoch(prepared, stop)
            except Stopped:
                self._writer.wait()
                require_finite_state(prepared.step, prepared.state.step, self.last)
                state = self._state(prepared)
                if self.processes.is_main:
                    state.write(self.last)
                raise
            self._writer.wait()
            return self._finish(prepared)

    def _train_epoch(self, run: PreparedRun, stop: StopSignal) -> None:
        """Train to the end of the epoch, or of the run; evaluate, save and report.

        A resumed run may have none of the epoch's steps left to do, or only the evaluation.

        Raises:
            Stopped: between two steps or during the evaluation; the state is one to go on from.
        """
        state = run.state
        state.add_mode(self._execution_mode())
        started = self._train_steps(run, len(state.rows), stop)
        self._wait()
        state.epoch_seconds = time.perf_counter() - started
        # A run whose files cannot be written ends an epoch later, at the most.
        self._writer.wait()
        require_finite_state(run.step, state.step, self.last)
        loss, accuracy, count = run.step.totals.read(self.processes)
        scores = self._scores(run, stop)
        require_finite_scores(run.step, state.step, self.last, scores)
        rate = count / state.epoch_seconds
        state.train_seconds += state.epoch_seconds
        state.epoch_seconds = 0.0
        run.step.totals.values.zero_()
        self._end_epoch(run, loss, accuracy, rate, scores)

    def _train_steps(self, run: PreparedRun, epoch: int, stop: StopSignal) -> float:
        """Take the steps that are left of an epoch, or of the run, and return when it began."""
        state = run.state
        first = state.step - epoch * run.steps_per_epoch
        last = min(run.steps_per_epoch, run.total_steps - epoch * run.steps_per_epoch)
        batches = _EpochSlice(run.train_loader, epoch, first, last)
        started = time.perf_counter() - state.epoch_seconds
        self._heed(stop)
        for images, labels in self.console.progress(
            batches, f"epoch {epoch + 1}", self.config.batch_size
        ):
            run.step(state.step, images, labels)
            state.step += 1
            if state.first_step_seconds is None:
                self._wait()
                state.first_step_seconds = machine.process_seconds()
            state.epoch_seconds = time.perf_counter() - started
            self._heed(stop)
        return started

    def _heed(self, stop: StopSignal) -> None:
        """Raise Stopped, in all processes together, once one of them was asked to stop."""
        number = self.processes.any(stop.number)
        if number is not None:
            raise Stopped(number)

    def _end_epoch(
        self,
        run: PreparedRun,
        loss: float,
        accuracy: float,
        rate: float,
        scores: dict[str, Score],
    ) -> None:
        """Record the epoch; its files are written while the next one is trained."""
        state = run.state
        row: dict[str, float] = {
            "epoch": round(state.step / run.steps_per_epoch, 4),
            "train_loss": loss,
            "train_accuracy": accuracy,
        }
        for split, score in scores.items():
            row |= {f"{split}_loss": score.loss, f"{split}_accuracy": score.accuracy}
        row |= {"images_per_second": rate, "train_seconds": state.train_seconds}
        row |= self.extra_metrics()
        state.rows.append(cast(MetricsRow, row))
        files = {}
        if "val" in scores and scores["val"].accuracy > state.best_val_accuracy:
            state.best_val_accuracy = scores["val"].accuracy
            files["best"] = self._weights(run)
        files["last"] = self._state(run)
        if self.processes.is_main:
            self._writer.submit(partial(self._write_epoch, files, tuple(state.rows)))
            if self.after_epoch is not None:
                self._writer.wait()
                self.after_epoch(state.rows[-1])
        self.console.row(row)

    def _write_epoch(self, files: Mapping[str, Snapshot], rows: Sequence[MetricsRow]) -> None:
        """Write what a resumed run needs, then what people read; called in another thread."""
        for name, snapshot in files.items():
            snapshot.write(self.folder.file(name))
        self.folder.write_metrics(rows)

    def _scores(self, run: PreparedRun, stop: StopSignal) -> dict[str, Score]:
        """Evaluate on every held-out split, with the averaged weights where there are any.

        Several processes have no common moment to stop at before the end of the evaluation.
        """
        started = time.perf_counter()
        after_batch = (lambda: None) if self.processes.size > 1 else (lambda: self._heed(stop))
        with run.step.evaluated_weights():
            scores = {
                split: evaluate(
                    self.model,
                    loader,
                    self.runtime,
                    tta=self.config.tta,
                    processes=self.processes,
                    after_batch=after_batch,
                )
                for split, loader in run.eval_loaders.items()
            }
        images = sum(score.images for score in scores.values())
        run.state.evaluation_rate = images / (time.perf_counter() - started)
        return scores

    def _finish(self, run: PreparedRun) -> Summary:
        """Write weights, summary and curves."""
        weights, summary = self._weights(run), self._summarize(run)
        if not self.processes.is_main:
            return summary
        weights.write(self.folder.file("model"))
        self.folder.write_json("summary.json", summary)
        title = f"{summary['model']} on {summary['dataset']}, {summary['epochs']:g} epochs"
        picture = draw_curves(
            run.state.rows,
            title,
            label_smoothing=self.config.label_smoothing,
            mixed=self.config.mixup > 0 or self.config.cutmix > 0,
        )
        checkpoint.replace_file(self.folder.path / "curves.png", picture)
        self.after_run(summary)
        return summary

    def _execution_mode(self) -> ExecutionMode:
        """Return how this process trains, as the summary says it."""
        return {
            "fast": self.config.fast,
            "route": self.runtime.route,
            "loader": self.runtime.loader,
            "device": self.runtime.device.type,
            "precision": self.runtime.precision,
            "channels_last": self.runtime.channels_last,
            "graph": self.runtime.graph,
            "processes": self.processes.size,
        }

    def _summarize(self, run: PreparedRun) -> Summary:
        config, state = self.config, run.state
        chosen = chosen_row(state.rows)
        images = run.total_steps * config.batch_size
        mode = cast(ExecutionMode, self._execution_mode() | state.execution_mode)
        return {
            "dataset": self.data.name,
            "dataset_fingerprint": self.data.fingerprint,
            "train_images": len(self.train_images),
            "test_images": len(self.data.test),
            "model": config.model,
            "width": config.width,
            "parameters": self.model_summary.params,
            "recipe": config.recipe,
            "seed": config.seed,
            **mode,
            "batch_size": config.batch_size,
            "epochs": run.epochs,
            "tta": config.tta,
            "test_accuracy": chosen["test_accuracy"],
            "test_loss": chosen["test_loss"],
            "val_accuracy": chosen.get("val_accuracy"),
            "checkpoint": self.folder.result().name,
            "train_seconds": round(state.train_seconds, 3),
            "compile_seconds": round(state.compile_seconds, 3),
            "first_step_seconds": state.first_step_seconds,
            "peak_memory_mib": round(machine.peak_memory_mib(), 1),
            "images_per_second": round(images / state.train_seconds, 1),
            "evaluation_images_per_second": round(state.evaluation_rate, 1),
            **host.provenance(self.command),
        }

    def _identity(self) -> dict[str, Any]:
        """Return what any checkpoint says of its origin: options, data and how to normalise it."""
        return {
            "config": self.config.to_json(),
            "classes": list(self.data.classes),
            "dataset": self.data.name,
            "dataset_fingerprint": self.data.fingerprint,
            "mean": list(self.data.mean),
            "std": list(self.data.std),
        }

    def _weights(self, run: PreparedRun) -> Snapshot:
        with run.step.evaluated_weights():
            return checkpoint.snapshot(self.model.state_dict(), self._identity())

    def _state(self, run: PreparedRun) -> Snapshot:
        """Return what a resumed run needs; all processes call it."""
        meta = self._identity() | {"progress": run.state.to_json()}
        return checkpoint.snapshot(run.step.state_dict(), meta)

    def _restore(self, run: PreparedRun) -> None:
        if self.folder.has_only_begun():
            self.console.line(
                f"resume     {self.folder.path} has no checkpoint yet: from the start"
            )
            return
        tensors, meta = read_training(self.last)
        if meta["dataset_fingerprint"] != self.data.fingerprint:
            raise FailureError(
                f"{self.last} was trained on other data ({meta['dataset']}) than "
                f"{self.data.source}; pass its --data-dir"
            )
        # Its options may say `auto`, as they did before; its data is this data, as seen above.
        options = meta["config"] | {"dataset": self.config.dataset}
        if changed := changed_options(options, self.config):
            raise FailureError(
                f"{self.last} is of a run with other options than its config.json names: "
                f"{', '.join(changed)}"
            )
        check_progress(meta["progress"], run.steps_per_epoch, run.total_steps, self.last)
        run.state = TrainingState.from_json(meta["progress"])
        run.step.load_state_dict(tensors, self.last, first_step=run.state.step == 0)
        if run.state.rows and self.processes.is_main:
            # They are written after the checkpoint: a kill in between left them a row behind.
            self.folder.write_metrics(run.state.rows)
        done = run.state.step / run.steps_per_epoch
        self.console.line(f"resume     {self.last} after {done:.2f} of {run.epochs:g}")

    def _wait(self) -> None:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize(self.runtime.device)


@dataclass
class _EpochSlice:
    """The batches `first` to `last` of an epoch, with a length for the progress bar."""

    loader: Loader
    epoch: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self.first == self.last:
            return
        for number, batch in enumerate(self.loader.serve(self.epoch, self.first), self.first + 1):
            yield batch
            # A whole epoch is walked past its last batch, so that the loader can wind up.
            if number == self.last < len(self.loader):
                return
