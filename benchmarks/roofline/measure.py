"""A training step, and what this machine can do at most, measured in turns.

The step is the one that `fastres.train --fast` would run here. Peak rates are copy bandwidth,
matrix products and every convolution of the network alone. The floor of the step is the larger of
two times: the fewest bytes at the bandwidth of a large copy, and all operations at the rate of a
large matrix product.
"""

from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.harness.rows import Row, summarize

if TYPE_CHECKING:
    import torch
    from torch import nn

    from benchmarks.roofline.step_traffic import StepWork, TracedConv
    from fastres.config import Config
    from fastres.engine.runtime import Runtime

__all__ = ["ConvTime", "Roofline", "measure", "rows_of_roofline"]


@dataclass
class ConvTime:
    """The products of all layers of one shape: {fprop, dgrad, wgrad: seconds a round}."""

    layer: "TracedConv"
    count: int
    times: dict[str, list[float]] = field(default_factory=dict)

    def seconds(self) -> float:
        """Return the time of all layers of this shape, forward and backward."""
        return self.count * sum(median(times) for times in self.times.values())


@dataclass
class Roofline:
    """All that was measured and counted.

    Attributes:
        case: model, batch size, precision and threads in words.
        route: what computed the step.
        copies: {what was copied: bytes/s, one a round}.
        products: {dtype: operations/s, one a round}.
        convs: one entry a shape.
        step: seconds of the whole training step, one a round.
        work: bytes and operations of the step.
        profile: {category: share of the step's time}.
    """

    case: str
    dtype: str
    route: str
    batch_size: int
    work: "StepWork"
    copies: dict[str, list[float]]
    products: dict[str, list[float]]
    convs: list[ConvTime]
    step: list[float]
    profile: dict[str, float]

    @property
    def bandwidth(self) -> float:
        """Bytes/s of a copy that no cache can hold."""
        return median(self.copies["large"])

    @property
    def arithmetic(self) -> float:
        """Operations/s of a matrix product in the precision of the step."""
        return median(self.products[self.dtype])

    @property
    def memory_seconds(self) -> float:
        """Time of the fewest bytes at the bandwidth of a copy."""
        return self.work.fewest_bytes / self.bandwidth

    @property
    def arithmetic_seconds(self) -> float:
        """Time of all operations at the rate of a matrix product."""
        return self.work.flops / self.arithmetic

    @property
    def floor(self) -> float:
        """Seconds under which no step can be, with perfect overlap of memory and arithmetic."""
        return max(self.memory_seconds, self.arithmetic_seconds)

    @property
    def convolutions(self) -> float:
        """Seconds of all convolutions alone, forward and backward: per shape, then added up."""
        return sum(conv.seconds() for conv in self.convs)

    @property
    def over_convolutions(self) -> list[float]:
        """Time of the step over that of its convolutions alone, one a round."""
        return [seconds / self.convolutions for seconds in self.step]


def measure(config: "Config", seconds: float) -> Roofline:
    """Measure a step of `config` and this machine's peak rates, about `seconds` long."""
    import torch

    import fastres
    from benchmarks.harness import timing
    from benchmarks.roofline import peak_rates
    from benchmarks.roofline.profile_step import profile_step
    from benchmarks.roofline.step_traffic import conv_layers, count_step
    from fastres.engine.runtime import resolve_runtime

    model = fastres.create_model(config.model, seed=config.seed)
    runtime = resolve_runtime(config, model)
    # As the trainer does, for the step and for its convolutions alone.
    runtime.configure_torch()
    device, dtype = runtime.device, runtime.dtype
    work = count_step(model, config.batch_size, dtype)
    layers = peak_rates.distinct_layers(conv_layers(model))
    convs = [ConvTime(layer, count) for layer, count in layers]
    step = _make_step(model, config, runtime)
    calls: dict[str, Any] = {}
    for conv in convs:
        arguments = (conv.layer, config.batch_size, dtype, device, runtime.memory_format)
        for op, call in peak_rates.conv_calls(*arguments).items():
            calls[f"{op} {conv.layer.name}"] = call
    largest = max(layer.shape.num_y for layer, _ in layers) * config.batch_size * dtype.itemsize
    sizes = {"large": None, "activation": largest}
    copies = {name: peak_rates.copy_call(device, size) for name, size in sizes.items()}
    kinds = dict.fromkeys((dtype, torch.float32, torch.bfloat16))
    products = {_name(kind): peak_rates.matmul_call(device, kind) for kind in kinds}
    calls |= {f"copy {name}": call for name, (call, _) in copies.items()}
    calls |= {f"product {name}": call for name, (call, _) in products.items()}
    samples = {name: peak_rates.sample_of(call, device) for name, call in calls.items()}
    samples["step"] = timing.wall_sample(step, device)
    for sample in samples.values():
        sample()
    times = timing.interleave(samples, seconds, min_rounds=5, max_rounds=15, limit_s=1.5 * seconds)
    for conv in convs:
        for op in peak_rates.CONV_OPS:
            if f"{op} {conv.layer.name}" in times:
                conv.times[op] = times[f"{op} {conv.layer.name}"]
    return Roofline(
        case=_case(config, runtime),
        dtype=runtime.precision,
        route=runtime.route,
        batch_size=config.batch_size,
        work=work,
        copies={k: [num / t for t in times[f"copy {k}"]] for k, (_, num) in copies.items()},
        products={k: [num / t for t in times[f"product {k}"]] for k, (_, num) in products.items()},
        convs=convs,
        step=times["step"],
        profile=profile_step(step, device, num_steps=3),
    )


def _name(dtype: "torch.dtype") -> str:
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[str(dtype)[6:]]


def _case(config: "Config", runtime: "Runtime") -> str:
    import torch

    case = f"{config.model} batch {config.batch_size}, {runtime.precision}"
    if runtime.device.type == "cpu":
        case += f", {torch.get_num_threads()} threads"
    return case


def _make_step(model: "nn.Module", config: "Config", runtime: "Runtime") -> Any:
    """Return a function that trains one step as the trainer does, on a batch that stays."""
    import torch

    import fastres
    from fastres.engine.step import TrainStep

    if runtime.route == "fused":
        model = fastres.fuse(model, verbose=False)
    runtime.place(model)
    model.train()
    train_step = TrainStep(model, config, runtime, total_steps=10**6)
    images = torch.randn(config.batch_size, 3, 32, 32, device=runtime.device)
    images = images.contiguous(memory_format=runtime.memory_format)
    labels = torch.arange(config.batch_size, device=runtime.device) % 10
    train_step.prepare(images, labels)
    # The rate stays near zero: the batch is always the same, and its loss should stay finite.
    return lambda: train_step(0, images, labels)


def rows_of_roofline(result: Roofline) -> list[Row]:
    """Return peak rates, convolutions, step and profile as rows."""
    case, rows = result.case, []
    for name, rates in result.copies.items():
        values = [rate / 1e9 for rate in rates]
        rows.append(summarize("ceilings", f"copy, {name}", "torch", "bandwidth", "GB/s", values))
    for name, rates in result.products.items():
        values = [rate / 1e9 for rate in rates]
        what = f"matrix product, {name}"
        rows.append(summarize("ceilings", what, "torch", "arithmetic", "GFLOP/s", values))
    for conv in result.convs:
        work = conv.layer.shape.flops * result.batch_size
        for op, times in conv.times.items():
            values = [work / t / 1e9 for t in times]
            what = f"{case}, {conv.layer.label}"
            rows.append(summarize("convolutions", what, "torch", op, "GFLOP/s", values))
    step_ms = [1e3 * t for t in result.step]
    shares = [100 * result.floor / t for t in result.step]
    metrics = {
        ("step", "ms"): step_ms,
        ("floor", "ms"): [1e3 * result.floor],
        ("floor_share", "%"): shares,
        ("convolutions_alone", "ms"): [1e3 * result.convolutions],
        ("step_over_convolutions", "x"): result.over_convolutions,
    }
    for (metric, unit), values in metrics.items():
        rows.append(summarize("roofline", case, result.route, metric, unit, values))
    for category, share in result.profile.items():
        rows.append(summarize("profile", case, result.route, category, "%", [100 * share]))
    return rows
