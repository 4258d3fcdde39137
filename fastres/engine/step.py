"""The training step: forward, loss, backward, update; eager, compiled, or as one CUDA graph.

Nothing in a step waits for the device: losses and hits are added up there, and the learning rate
and the weights of mixed images are tensors, so the whole step can be captured and replayed.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from fastres.config import Config
from fastres.data.augmentation import shrink
from fastres.data.plan import IMAGE_SIZE
from fastres.engine.checkpoint import check_tensors, load_weights, take_section
from fastres.engine.checkpoint_schema import check_values
from fastres.engine.distributed import ALONE, Processes
from fastres.engine.ema import WeightAverage
from fastres.engine.mixing import BatchMixing
from fastres.engine.optim import Optimizer, lr_factor
from fastres.engine.runtime import Runtime
from fastres.engine.step_kernels import (
    add_to_totals,
    compiles_kernels,
    compiling_kernels,
    copy_filters,
    has_step_kernels,
    own_counters,
)
from fastres.model.head import SmoothCrossEntropy
from fastres.model.running_stats import batched_running_stats

__all__ = ["Totals", "TrainStep"]

_WARMUP_STEPS = 3


class Totals:
    """Sums over an epoch that stay on the device until somebody asks.

    `values` holds the sum of losses, the number of right answers, of images, and of batches whose
    loss was not finite, in float64.

    Args:
        device: of what is added.
        one_launch: add in one kernel of our own.
    """

    def __init__(self, device: torch.device, *, one_launch: bool = False):
        self.values = torch.zeros(4, dtype=torch.float64, device=device)
        self._one_launch = one_launch

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: its mean loss, (B, classes) logits and (B,) labels.

        Of mixed images these are the labels with the larger share: a right answer is that one.
        """
        if self._one_launch:
            add_to_totals(self.values, loss, logits, labels)
            return
        right = (logits.argmax(dim=1) == labels).sum()
        count = torch.full_like(right, len(labels))
        # A finite number less itself is 0; a NaN or an infinity less itself is a NaN.
        lost = loss - loss != 0
        self.values += torch.stack(
            [loss.double() * len(labels), right.double(), count.double(), lost.double()]
        )

    def read(self, processes: Processes = ALONE) -> tuple[float, float, int]:
        """Wait for the device and return mean loss, accuracy in percent and number of images.

        Those of all processes together.
        """
        loss, right, count, _ = processes.total(self.values).tolist()
        return loss / max(count, 1), 100 * right / max(count, 1), int(count)

    def nonfinite_steps(self) -> int:
        """Wait for the device and return how many batches of this process had no finite loss."""
        return int(self.values[3])


def _named(sections: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{s}.{k}": v for s, tensors in sections.items() for k, v in tensors.items()}


class TrainStep:
    """One step of training; calling it advances the model in place.

    Args:
        model: the network, on its device, in training mode.
        config: optimizer, schedule and loss.
        runtime: route, precision, layout and graph.
        total_steps: length of the run, for the schedule.
        processes: who trains the same network on other parts of each batch.

    Attributes:
        optimizer: its state.
        totals: loss and accuracy since they were last set to zero.
        average: moving average of the weights, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        runtime: Runtime,
        total_steps: int,
        processes: Processes = ALONE,
    ):
        self.model = model
        self.processes = processes
        self.config = config
        self.runtime = runtime
        self.total_steps = total_steps
        has_kernels = has_step_kernels(runtime)
        self._copies = copy_filters(model, runtime)
        self.optimizer = Optimizer(
            model,
            config,
            dtype=runtime.dtype,
            fused=runtime.fused_optimizer,
            one_launch=has_kernels,
            copies=self._copies,
        )
        self.totals = Totals(runtime.device, one_launch=has_kernels)
        self.average = WeightAverage(model, config.ema) if config.ema else None
        mixes = config.mixup > 0 or config.cutmix > 0
        self._mixing = BatchMixing(config, runtime.device) if mixes else None
        self.scaler = torch.amp.GradScaler(
            runtime.device.type, enabled=runtime.dtype == torch.float16
        )
        # A shape of its own for every size of images, none of them unknown.
        self._forward = torch.compile(model, dynamic=False) if runtime.compiled else model
        loss = SmoothCrossEntropy if runtime.route == "fused" else nn.CrossEntropyLoss
        self._loss = loss(label_smoothing=config.label_smoothing)
        # One for each size of images.
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._inputs: tuple[Tensor, Tensor] | None = None
        # Where backward gets none to start from, torch makes one in every step.
        self._grad_of_loss = torch.ones((), device=runtime.device)
        # The graphs' kernels count in them, so they live as long as the graphs.
        self._counters: list[Tensor] = []

    def __call__(self, step: int, images: Tensor, labels: Tensor) -> None:
        """Train on one batch.

        Args:
            step: 0-based number of the step in the whole run.
            images: (B, 3, 32, 32) float32, normalised; this process's part of the batch.
            labels: (B,) int64.
        """
        self.optimizer.set_lr_factor(self._lr_factor(step))
        if self._mixing is not None:
            self._mixing.set_step(step)
        self._refresh_copies()
        size = self._image_size(step)
        if self._inputs is not None:
            self._inputs[0].copy_(images)
            self._inputs[1].copy_(labels)
            self._graphs[size].replay()
        else:
            images = images.contiguous(memory_format=self.runtime.memory_format)
            self._compute(images, labels, size)
        if self.average is not None:
            self.average.update(step)

    def reseed(self, seed: int) -> None:
        """Draw from another seed from here on; what is captured stays."""
        self.config = self.config.replace(seed=seed)
        if self._mixing is not None:
            self._mixing.config = self.config

    @property
    def input_dtype(self) -> torch.dtype:
        """Return what images are on their way into a graph, in the copy that they take anyway.

        They are rounded there where nothing mixes or shrinks them first.
        """
        is_last = self._mixing is None and self._image_sizes() == [IMAGE_SIZE]
        return self.runtime.dtype if self._copies is not None and is_last else torch.float32

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step `step` (0-based)."""
        return self.config.lr * self._lr_factor(step)

    def _lr_factor(self, step: int) -> float:
        config = self.config
        return lr_factor(config.schedule, self._progress(step), config.warmup, config.warmup_shape)

    def _progress(self, step: int) -> float:
        # That of the middle of the step: neither the first nor the last one is wasted at zero.
        return (step + 0.5) / self.total_steps

    def _image_size(self, step: int) -> int:
        """Return the side in pixels of the images of step `step` (0-based)."""
        is_early = self._progress(step) < self.config.low_res_share
        return self.config.low_res if is_early else IMAGE_SIZE

    def _image_sizes(self) -> list[int]:
        """Return the sizes of all steps, in their order."""
        return list(dict.fromkeys(self._image_size(step) for step in (0, self.total_steps - 1)))

    def _compute(self, images: Tensor, labels: Tensor, size: int) -> None:
        """Mix, shrink, forward, backward, update: everything that a graph captures."""
        mixing = self._mixing
        if mixing is not None:
            images = mixing.images(images)
        with self._copies.in_use() if self._copies is not None else nullcontext():
            if size != IMAGE_SIZE:
                images = shrink(images, size)
            with self.runtime.autocast(), batched_running_stats():
                logits = self._forward(images)
                if mixing is None:
                    loss = self._loss(logits, labels)
                else:
                    loss = mixing.loss(self._loss, logits, labels)
            self.scaler.scale(loss).backward(self._grad_of_loss)
        self.processes.average(self.model)
        for rule in self.optimizer.rules:
            self.scaler.step(rule)
        self.scaler.update()
        self._refresh_copies()
        for rule in self.optimizer.rules:
            rule.zero_grad(set_to_none=True)
        answers = labels if mixing is None else mixing.main_labels(labels)
        self.totals.add(loss.detach(), logits.detach(), answers)

    def _refresh_copies(self) -> None:
        """Round the filters that anybody but the optimizer's own kernel has changed."""
        if self._copies is not None:
            self._copies.refresh()

    def prepare(self, images: Tensor, labels: Tensor) -> None:
        """Compile and capture on a batch of the real shape, and leave no trace in the model.

        Weights, statistics, optimizer state, scaler and totals are afterwards what they were.
        """
        runtime = self.runtime
        compiles = compiles_kernels(runtime)
        if not (runtime.compiled or runtime.graph or compiles):
            return
        with self._preserved():
            images = images.contiguous(memory_format=runtime.memory_format)
            if runtime.graph:
                images, labels = images.to(self.input_dtype, copy=True), labels.clone()
            sizes = self._image_sizes()
            if compiles:
                # The steps behind it would have one compiled after the other.
                with compiling_kernels(self.processes.local_size):
                    for size in sizes:
                        self._compute(images, labels, size)
            if runtime.graph:
                self._graphs = {size: self._captured(images, labels, size) for size in sizes}
                self._inputs = images, labels
            elif runtime.compiled:
                for size in sizes:
                    self._compute(images, labels, size)

    def _captured(self, images: Tensor, labels: Tensor, size: int) -> torch.cuda.CUDAGraph:
        """Return the step on these two tensors as a graph."""
        device = self.runtime.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(_WARMUP_STEPS):
                self._compute(images, labels, size)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with own_counters(device) as counters, torch.cuda.graph(graph):
            self._compute(images, labels, size)
        self._counters.append(counters)
        return graph

    def evaluated_weights(self) -> AbstractContextManager[None]:
        """Return the context in which the model holds the weights to evaluate: the average's."""
        return self.average.applied() if self.average is not None else nullcontext()

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that a resumed run needs as named tensors, not copied.

        All processes call it together, and each gets the state of all.
        """
        sections: dict[str, Mapping[str, Tensor]] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.average if self.average is not None else {},
            # The count of lost batches is 0 in whatever is saved.
            "totals": {"values": self.processes.total(self.totals.values)[:3]},
            "scaler": {
                name: torch.tensor(value) for name, value in self.scaler.state_dict().items()
            },
        }
        return _named(sections)

    def load_state_dict(
        self, tensors: dict[str, Tensor], source: Path, *, first_step: bool = False
    ) -> None:
        """Go on from what `state_dict` returned, before the first step or after one.

        Raises:
            FailureError: when it is of another model or optimizer, or holds what training cannot
                go on from; then nothing has changed.
        """
        check_tensors(tensors, self._layout(tensors, first_step=first_step), source)
        check_values(tensors, source)
        load_weights(self.model, take_section(tensors, "model"), source)
        self.optimizer.load_state_dict(take_section(tensors, "optimizer"))
        average = take_section(tensors, "average")
        if self.average is not None:
            self.average.load(average)
        self.totals.values.zero_()
        if self.processes.is_main:
            self.totals.values[:3].copy_(take_section(tensors, "totals")["values"])
        scaler = {k: v.item() for k, v in take_section(tensors, "scaler").items()}
        if scaler:
            self.scaler.load_state_dict(scaler)

    def _layout(self, saved: Mapping[str, Tensor], *, first_step: bool) -> dict[str, Tensor]:
        """Return names, shapes and dtypes that `saved` must have to be a state of this step."""
        scaler = torch.amp.GradScaler("cpu").state_dict()
        sections: dict[str, Mapping[str, Tensor]] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.layout(),
            "average": self.average.average if self.average is not None else {},
            "totals": {"values": self.totals.values[:3]},
            "scaler": {name: torch.tensor(value) for name, value in scaler.items()},
        }
        if not take_section(saved, "scaler"):
            del sections["scaler"]
        # Torch makes the state of an optimizer in its first step, and a loss scaler may skip some.
        if not take_section(saved, "optimizer") and (first_step or "scaler" in sections):
            del sections["optimizer"]
        return _named(sections)

    @contextmanager
    def _preserved(self) -> Iterator[None]:
        """Undo in place what steps inside the context do to the state of the run.

        Optimizer state that came up inside stays allocated, since a graph points at it, and is set
        to zero: the value with which both SGD's momentum and Adam's averages start.
        """
        weights = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        states = {k: v.clone() for k, v in self.optimizer.state_dict().items()}
        scaler = self.scaler.state_dict()
        yield
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                value.copy_(weights[name])
            for name, value in self.optimizer.state_dict().items():
                value.copy_(states[name]) if name in states else value.zero_()
            self.totals.values.zero_()
        if scaler:
            self.scaler.load_state_dict(scaler)
