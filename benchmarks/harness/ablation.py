"""The ladder from today's eager step to the fastest one, one change a configuration.

    eager          float32, NCHW: the reference
    channels_last  + NHWC
    amp            + bfloat16 activations and filters
    compile        + torch.compile
    fused          amp with fused blocks instead of torch.compile
    graph          fused + the step as one CUDA graph
    fast           what `--fast` chooses on this machine

`fast_uncompiled` stands beside `fast` on a GPU, where that has torch.compile around the fused
kernels: the same with `--compile off`.

What is timed is what trains: every configuration is a Config, resolved by the engine, in its
TrainStep.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fastres
from fastres import host
from fastres.config import Config
from fastres.engine import machine
from fastres.engine.runtime import Runtime, resolve_runtime
from fastres.engine.step import TrainStep
from fastres.errors import UsageError

__all__ = [
    "CONFIGURATIONS",
    "Configuration",
    "Unavailable",
    "assemble",
    "build",
    "build_inference",
    "fixed_batch",
    "here",
    "low_precision",
    "make_config",
    "place",
    "why_not",
]

CONFIGURATIONS = (
    *("eager", "channels_last", "amp", "compile", "fused", "graph"),
    *("fast", "fast_uncompiled"),
)
# Long enough that no measurement reaches its end, where the schedule is over.
_TOTAL_STEPS = 10**6


class Unavailable(Exception):
    """A provider that this machine, or this run, cannot have; the message says why."""


def here() -> torch.device:
    """The device that measurements run on: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def low_precision(device: torch.device) -> str:
    """The 16-bit type of this machine as the option `amp` spells it.

    Raises:
        Unavailable: on a CPU without bfloat16 instructions, where it would be emulated.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if host.bf16_instructions() is None:
        raise Unavailable("this processor has no bfloat16 instructions")
    return "bf16"


def why_not(configuration: str, device: torch.device) -> str | None:
    """Say why a configuration cannot be had on `device`, or return None."""
    if configuration == "graph" and device.type != "cuda":
        return "CUDA graphs need an NVIDIA GPU"
    if configuration == "fast_uncompiled" and device.type != "cuda":
        return "on a CPU --fast compiles nothing: it is `fast`"
    if configuration == "compile" and machine.cxx_compiler() is None:
        return "torch.compile needs a C++ compiler"
    return None


def make_config(configuration: str, device: torch.device, **options: Any) -> Config:
    """Return the options that a configuration stands for, changed by `options`.

    Raises:
        Unavailable: see `why_not` and `low_precision`.
    """
    reason = why_not(configuration, device)
    if reason:
        raise Unavailable(reason)
    if configuration == "fast":
        changes: dict[str, Any] = {"fast": True}
    elif configuration == "fast_uncompiled":
        changes = {"fast": True, "compile": "off"}
    else:
        changes = {"channels_last": "off" if configuration == "eager" else "on"}
        if configuration not in ("eager", "channels_last") and "amp" not in options:
            changes["amp"] = low_precision(device)
        routes = {"compile": "compile", "fused": "fused", "graph": "fused"}
        changes["route"] = routes.get(configuration, "eager")
        changes["graph"] = "on" if configuration == "graph" else "off"
    defaults = Config(device=device.type, schedule="constant", warmup=0.0)  # type: ignore[arg-type]
    return defaults.replace(**(changes | options))


@dataclass
class Configuration:
    """A network with its training step, ready to be timed.

    Attributes:
        model: the network, placed.
        step: its TrainStep.
        runtime: what the configuration came to.
        batch: images and labels of the fixed batch.
        loss: of the first step on that batch, once `build` has trained it.
    """

    model: nn.Module
    step: TrainStep
    runtime: Runtime
    batch: tuple[Tensor, Tensor]
    loss: float = math.nan
    _done: int = field(default=0)

    def train(self) -> None:
        """Train one step on the fixed batch."""
        self.step(self._done, *self.batch)
        self._done += 1

    def train_on(self, images: Tensor, labels: Tensor) -> None:
        """Train one step on a batch of a loader."""
        self.step(self._done, images, labels)
        self._done += 1


def fixed_batch(batch_size: int, num_classes: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images and labels on the CPU; every provider starts with those of seed 0."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn((batch_size, 3, 32, 32), generator=generator)
    return images, torch.arange(batch_size) % num_classes


def place(config: Config, num_classes: int = 10) -> tuple[nn.Module, Runtime]:
    """Build the network of `config` as the trainer does: resolved, fused, placed.

    Raises:
        Unavailable: when this machine cannot have it.
    """
    model = fastres.create_model(config.model, num_classes, seed=config.seed)
    try:
        runtime = resolve_runtime(config, model)
    except UsageError as error:
        raise Unavailable(str(error)) from None
    if runtime.route == "fused":
        model = fastres.fuse(model, verbose=False)
    runtime.configure_torch()
    runtime.place(model)
    return model, runtime


def assemble(
    configuration: str,
    model_name: str,
    batch_size: int,
    device: torch.device,
    num_classes: int = 10,
    total_steps: int = _TOTAL_STEPS,
    **options: Any,
) -> Configuration:
    """Build a configuration, compiled and captured as far as it is, before its first step.

    Further options are those of `Config`.

    Raises:
        Unavailable: when this machine cannot have it.
    """
    config = make_config(configuration, device, model=model_name, batch_size=batch_size, **options)
    model, runtime = place(config, num_classes)
    model.train()
    step = TrainStep(model, config, runtime, total_steps)
    images, labels = fixed_batch(batch_size, num_classes)
    images = images.to(device, memory_format=runtime.memory_format)
    labels = labels.to(device)
    step.prepare(images, labels)
    return Configuration(model, step, runtime, (images, labels))


def build(
    configuration: str,
    model_name: str,
    batch_size: int,
    device: torch.device,
    num_classes: int = 10,
    **options: Any,
) -> Configuration:
    """Assemble a configuration and train its first step, on the fixed batch.

    Raises:
        Unavailable: when this machine cannot have it.
    """
    built = assemble(configuration, model_name, batch_size, device, num_classes, **options)
    built.train()
    built.loss = built.step.totals.read()[0]
    return built


def build_inference(
    configuration: str,
    model_name: str,
    batch_size: int,
    device: torch.device,
    *,
    mode: str | None = None,
    **options: Any,
) -> tuple[Callable[[], Tensor], Runtime]:
    """Return a function that evaluates the fixed batch and gives its logits, and how it does.

    `mode` is torch.compile's; further options are those of `Config`.

    Raises:
        Unavailable: when this machine cannot have it.
    """
    net, runtime = place(make_config(configuration, device, model=model_name, **options))
    forward = torch.compile(net.eval(), mode=mode) if runtime.compiled else net.eval()
    images = fixed_batch(batch_size)[0].to(device, memory_format=runtime.memory_format)

    @torch.no_grad()
    def predict() -> Tensor:
        with runtime.autocast():
            return forward(images)

    return predict, runtime
