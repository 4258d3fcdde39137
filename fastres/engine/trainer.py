"""A whole run, from options to a summary; reads from top to bottom."""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fastres.config import Config, changed_options
from fastres.data.loaders import Batches, Loader, build_loader
from fastres.data.plan import Augmentation
from fastres.data.source import load_dataset, split_validation
from fastres.engine import checkpoint, machine
from fastres.engine.console import Screen
from fastres.engine.curves import draw_curves
from fastres.engine.distributed import ALONE, Processes
from fastres.engine.evaluation import Score, evaluate, evaluation_loader
from fastres.engine.run_dir import RunFolder, provenance
from fastres.engine.runtime import resolve_runtime
from fastres.engine.step import TrainStep
from fastres.errors import FailureError
from fastres.model.fuse import fuse
from fastres.model.resnet import create_model
from fastres.model.summary import ModelSummary, summarize
from fastres.model.whiten import whiten_stem

__all__ = ["Stopped", "Trainer", "count_steps"]


class Stopped(Exception):
    """The run was interrupted by a signal and has saved a checkpoint."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@dataclass
class Progress:
    """How far a run is, and what it has measured: the part of a checkpoint that is no tensor."""

    step: int = 0
    train_seconds: float = 0.0
    compile_seconds: float = 0.0
    epoch_seconds: float = 0.0
    first_step_seconds: float | None = None
    evaluation_rate: float = 0.0
    best_val_accuracy: float = -1.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    way: dict[str, Any] = field(default_factory=dict)


def count_steps(epochs: float, steps_per_epoch: int) -> int:
    """Return the steps of a run: begun ones count, those that a rounding error begins do not."""
    return max(1, math.ceil(round(epochs * steps_per_epoch, 6)))


class Trainer:
    """Reads the data and builds the network when constructed; then `prepare`, then `run`.

    Args:
        config: validated options.
        folder: the run folder, made by the caller.
        screen: where to report.
        processes: who trains the same network; the first of them writes the files.
    """

    def __init__(
        self, config: Config, folder: RunFolder, screen: Screen, processes: Processes = ALONE
    ):
        self.config, self.folder, self.screen = config, folder, screen
        self.processes = processes
        # A warning names an operation without a deterministic form. One is harmless here: max
        # pooling adds gradients in any order, and the windows of resnet9 do not overlap.
        torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = not config.deterministic
        # What one process downloads and decodes, the others find.
        with processes.main_first():
            self.data = load_dataset(config.dataset, config.data_dir)
        self._split()
        self.model = create_model(
            config.model,
            len(self.data.classes),
            width=config.width,
            shortcut=config.shortcut,
            seed=config.seed,
        )
        if config.whiten:
            whiten_stem(self.model, self.train_images.images, self.data.mean, self.data.std)
        self.runtime = resolve_runtime(config, self.model, processes)
        self.summary: ModelSummary = summarize(self.model)
        if self.runtime.route == "fused":
            self.model = fuse(self.model, verbose=False)
        self.progress = Progress()
        self.last = folder.file("last")
        self._signal: int | None = None

    def _split(self) -> None:
        """Cut the training images down and hold some out, the test set untouched."""
        train, limit = self.data.train, self.config.limit_train
        if limit is not None and limit < len(train):
            train = split_validation(train, limit, self.config.seed)[1]
        self.val_images = None
        if self.config.val:
            train, self.val_images = split_validation(train, len(train) // 10, self.config.seed)
        self.train_images = train

    def show_header(self) -> None:
        """Print the first screen: data, network, and what really runs."""
        num_val = len(self.val_images) if self.val_images is not None else 0
        self.screen.data(self.data, len(self.train_images), num_val)
        self.screen.model(self.config.model, self.summary)
        self.screen.runtime(self.runtime)

    def run(self, *, resume: bool) -> dict[str, Any]:
        """Train to the end and return the summary.

        Raises:
            Stopped: after a signal, with a checkpoint in the run folder.
            FailureError: when the loss is no longer finite, or a file cannot be read or written.
        """
        if resume:
            self._restore()
        self.screen.line("")
        with self._catching_signals():
            while self.progress.step < self.total_steps:
                number = self.processes.any(self._signal)
                if number is not None:
                    raise Stopped(number)
                self._train_epoch()
        summary = self._finish()
        for loader in (self.train_loader, *self.eval_loaders.values()):
            loader.close()
        return summary

    def prepare(self) -> None:
        """Build loaders and step; compile and capture before any loader starts.

        Raises:
            UsageError: for a batch larger than the training set, or a loader that is missing.
        """
        config, runtime = self.config, self.runtime
        augmentation = Augmentation(config.crop_padding, config.flip, config.cutout)
        batches = Batches(
            images=self.train_images,
            mean=self.data.mean,
            std=self.data.std,
            batch_size=config.batch_size,
            seed=config.seed,
            augmentation=augmentation,
            training=True,
        )
        batches = self.processes.share(batches)
        self.steps_per_epoch = len(batches)
        self.total_steps = count_steps(config.epochs, self.steps_per_epoch)
        runtime.place(self.model)
        self.model.train()
        self.step = TrainStep(self.model, config, runtime, self.total_steps, self.processes)
        shape = (batches.size, 3, 32, 32)
        started = time.perf_counter()
        self.step.prepare(
            torch.randn(shape, device=runtime.device),
            torch.zeros(batches.size, dtype=torch.int64, device=runtime.device),
        )
        self._wait()
        self.progress.compile_seconds = time.perf_counter() - started
        self.train_loader = build_loader(
            runtime.loader, batches, runtime.device, workers=config.workers
        )
        sets = {"val": self.val_images, "test": self.data.test}
        self.eval_loaders = {
            split: evaluation_loader(
                self.processes.share_of_set(images), self.data.mean, self.data.std, config, runtime
            )
            for split, images in sets.items()
            if images is not None
        }

    def _train_epoch(self) -> None:
        """Train to the end of the epoch, or of the run; evaluate, record and save."""
        progress = self.progress
        # How the steps were made; a run that goes on in another way is a mixture.
        progress.way = {
            key: value if progress.way.get(key, value) == value else "mixed"
            for key, value in self._way().items()
        }
        epoch, first = divmod(progress.step, self.steps_per_epoch)
        last = min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)
        batches = _Part(self.train_loader, epoch, first, last)
        started = time.perf_counter() - progress.epoch_seconds
        for images, labels in self.screen.progress(
            batches, f"epoch {epoch + 1}", self.config.batch_size
        ):
            self.step(progress.step, images, labels)
            progress.step += 1
            if progress.first_step_seconds is None:
                self._wait()
                progress.first_step_seconds = machine.process_seconds()
            number = self.processes.any(self._signal)
            if number is not None and progress.step < epoch * self.steps_per_epoch + last:
                progress.epoch_seconds = time.perf_counter() - started
                self._save()
                raise Stopped(number)
        self._wait()
        seconds = time.perf_counter() - started
        loss, accuracy, count = self.step.totals.read(self.processes)
        if not math.isfinite(loss):
            raise FailureError(
                f"the loss is {loss} in epoch {epoch + 1}: the run has diverged; lower --lr. "
                f"{self.folder.path} keeps the checkpoint of the epoch before, if there was one"
            )
        self.step.totals.values.zero_()
        progress.train_seconds += seconds
        progress.epoch_seconds = 0.0
        self._end_epoch(loss, accuracy, count / seconds)

    def _end_epoch(self, loss: float, accuracy: float, rate: float) -> None:
        progress = self.progress
        row: dict[str, Any] = {
            "epoch": round(progress.step / self.steps_per_epoch, 4),
            "train_loss": loss,
            "train_accuracy": accuracy,
        }
        scores = self._scores()
        for split, score in scores.items():
            row |= {f"{split}_loss": score.loss, f"{split}_accuracy": score.accuracy}
        row |= {"images_per_second": rate, "train_seconds": progress.train_seconds}
        progress.rows.append(row)
        self.screen.row(row)
        if self.processes.is_main:
            self.folder.write_metrics(progress.rows)
        if "val" in scores and scores["val"].accuracy > progress.best_val_accuracy:
            progress.best_val_accuracy = scores["val"].accuracy
            self._save_weights(self.folder.file("best"))
        self._save()

    def _scores(self) -> dict[str, Score]:
        """Evaluate on every held-out split, with the averaged weights where there are any."""
        started = time.perf_counter()
        with self.step.evaluated_weights():
            scores = {
                split: evaluate(self.model, loader, self.runtime, processes=self.processes)
                for split, loader in self.eval_loaders.items()
            }
        images = sum(score.images for score in scores.values())
        self.progress.evaluation_rate = images / (time.perf_counter() - started)
        return scores

    def _finish(self) -> dict[str, Any]:
        """Write weights, curves and summary."""
        self._save_weights(self.folder.file("model"))
        summary = self._summarize()
        if not self.processes.is_main:
            return summary
        title = f"{summary['model']} on {summary['dataset']}, {summary['epochs']:g} epochs"
        picture = draw_curves(
            self.progress.rows, title, label_smoothing=self.config.label_smoothing
        )
        checkpoint.replace_file(self.folder.path / "curves.png", picture)
        self.folder.write_json("summary.json", summary)
        return summary

    def _way(self) -> dict[str, Any]:
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

    def _summarize(self) -> dict[str, Any]:
        config, progress = self.config, self.progress
        final = progress.rows[-1]
        chosen = final
        if config.val:
            chosen = max(progress.rows, key=lambda row: row["val_accuracy"])
        images = self.total_steps * config.batch_size
        return {
            "dataset": self.data.name,
            "dataset_fingerprint": self.data.fingerprint,
            "train_images": len(self.train_images),
            "test_images": len(self.data.test),
            "model": config.model,
            "width": config.width,
            "parameters": self.summary.params,
            "recipe": config.recipe,
            "seed": config.seed,
            **(self._way() | progress.way),
            "batch_size": config.batch_size,
            "epochs": config.epochs,
            "test_accuracy": chosen["test_accuracy"],
            "test_loss": chosen["test_loss"],
            "val_accuracy": chosen.get("val_accuracy"),
            "checkpoint": self.folder.result().name,
            "train_seconds": round(progress.train_seconds, 3),
            "compile_seconds": round(progress.compile_seconds, 3),
            "first_step_seconds": progress.first_step_seconds,
            "peak_memory_mib": round(machine.peak_memory_mib(), 1),
            "images_per_second": round(images / progress.train_seconds, 1),
            "evaluation_images_per_second": round(progress.evaluation_rate, 1),
            **provenance(),
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

    def _save_weights(self, path: Any) -> None:
        with self.step.evaluated_weights():
            if self.processes.is_main:
                checkpoint.write(path, self.model.state_dict(), self._identity())

    def _save(self) -> None:
        meta = self._identity() | {"progress": vars(self.progress)}
        state = self.step.state_dict()
        if self.processes.is_main:
            checkpoint.write(self.last, state, meta)

    def _restore(self) -> None:
        tensors, meta = checkpoint.read(self.last)
        if meta.get("dataset_fingerprint") != self.data.fingerprint:
            raise FailureError(
                f"{self.last} was trained on other data ({meta.get('dataset')}) than "
                f"{self.data.source} holds; pass its --data-dir"
            )
        if changed := changed_options(meta["config"], self.config):
            raise FailureError(
                f"{self.last} is of a run with other options than its config.json names: "
                f"{', '.join(changed)}"
            )
        self.step.load_state_dict(tensors, self.last)
        self.progress = Progress(**meta["progress"])
        done = self.progress.step / self.steps_per_epoch
        self.screen.line(f"resume     {self.last} after {done:.2f} of {self.config.epochs:g}")

    def _wait(self) -> None:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize(self.runtime.device)

    @contextmanager
    def _catching_signals(self) -> Iterator[None]:
        """Turn the first Ctrl-C or SIGTERM into a save after the step; a second one kills."""
        trainer_process = os.getpid()

        def remember(number: int, _frame: object) -> None:
            # Ctrl-C reaches the loader's workers too, which inherit this; they end with the loader.
            if os.getpid() != trainer_process:
                return
            self._signal = number
            signal.signal(number, signal.SIG_DFL)
            # The handler may interrupt the console in the middle of a line, so it writes past it.
            os.write(2, b"stopping after this step; once more to stop at once\n")

        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, remember)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class _Part:
    """The batches `first` to `last` of an epoch, with a length for the progress bar."""

    loader: Loader
    epoch: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number, batch in enumerate(self.loader.serve(self.epoch, self.first), self.first + 1):
            yield batch
            # A whole epoch is walked past its last batch, so that the loader can wind up.
            if number == self.last < len(self.loader):
                return
