"""Whole networks: the ablation with data flowing, single steps and batches, cost curves.

`bench_ablation` is the comparison that a user would make: every provider is a process that trains
on real batches from its own loader, as it would be started by hand, and all of them take turns. The
peers read $FASTRES_DATA with torchvision. `pytest benchmarks/ -k cpu` repeats it on a CPU; there
torch.compile has an ablation of its own, `-m slow`, for the minutes that it compiles. Rows and
tables call the ablation a ladder: one change a rung, from the eager step to the fastest one.

`bench_step`, `bench_inference` and the curves take a fixed batch through one process, so that the
network alone is compared; the allocator is set as `--fast` sets it, for all of them.
"""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import fastres
from benchmarks.harness import ablation, error_bound
from benchmarks.harness.ablation import Unavailable, here
from benchmarks.harness.records import BenchmarkInfo
from benchmarks.harness.scheduler import Prepared
from benchmarks.harness.step_check import check_step, reference_loss
from benchmarks.harness.timing import peak_bytes, wall_sample
from benchmarks.harness.worker_pool import WorkerPool
from benchmarks.suites.ablation_cases import CASES, OFTEN, AblationCase, load_data
from fastres.engine import machine
from fastres.model.summary import summarize

DEVICE = here()
ON_GPU = DEVICE.type == "cuda"
_STEP_BATCHES = {
    "cpu": {"resnet20": (32, 128), "resnet18": (16,), "resnet50": (4,)},
    "cuda": {"resnet20": (128, 512, 1024), "resnet18": (128, 512), "resnet50": (128, 256)},
}[DEVICE.type]
_INFERENCE_BATCHES = {
    "cpu": {"resnet20": (32, 500), "resnet18": (32,), "resnet50": (8,)},
    "cuda": {"resnet20": (1, 512, 2048), "resnet18": (1, 512), "resnet50": (1, 512)},
}[DEVICE.type]
_CURVE_BATCHES = (32, 128, 512, 2048) if ON_GPU else (16, 64, 256)
_CURVE_DEPTHS = (20, 32, 44, 56, 110)
_DEPTH_BATCH = 512 if ON_GPU else 16
_CURVE_CONFIGURATIONS = ["eager", "amp", "graph", "fast"]
_STEP_S = 6.0
# Compiling a network takes up to a minute, on top of every other configuration.
_COMPILED = {("resnet20", 512), ("resnet18", 512), ("resnet50", 256)} if ON_GPU else set()


def _choice(case: AblationCase) -> list[pytest.MarkDecorator]:
    """The marks that decide when a ladder is measured."""
    if case.quick:
        return [pytest.mark.quick]
    return [pytest.mark.full, *([pytest.mark.slow] if case.slow else [])]


def _ablation_params() -> list:
    """Every provider of every ladder; --quick has a ladder of its own, the smallest."""
    params = []
    for case in CASES:
        marks = [pytest.mark.share(case.seconds), *_choice(case)]
        params += [
            pytest.param(case, provider, id=f"{case.name}-{provider}", marks=marks)
            for provider in case.providers
        ]
    return params


class _Ablation:
    """The providers of one ladder, a process each."""

    def __init__(self, case: AblationCase, data_dir: str | None):
        self.case = case
        self.pool = WorkerPool(
            lambda provider: case.command(provider, data_dir),
            case.steps,
            # Beside others max-autotune would time its candidates wrongly.
            at_once=case.device == "cuda" and not case.slow,
        )
        self.data = load_data(data_dir).name

    def prepare(self, provider: str) -> Prepared:
        """Wait for a provider and compare the loss of its first step."""
        worker = self.pool.worker(provider)
        case = self.case
        truth, loss = reference_loss(case.model, case.batch_size), worker.hello["loss"]
        if not abs(loss - truth) <= error_bound.LOSS_BOUND * truth:
            raise AssertionError(f"{provider}: first loss {loss:.5f}, the reference's {truth:.5f}")
        info: BenchmarkInfo = {
            "suite": "ladder",
            "case": f"{case.words}, {self.data}",
            "images": case.batch_size,
            "flops": case.batch_size * _flops(case.model, training=True),
            "dtype": worker.hello["dtype"],
            "clock": f"wall clock, {case.steps} steps a round with their loader, own process",
            "data": worker.hello["data"],
            "choices": worker.hello.get("choices", {}),
        }
        every = 1 if provider in OFTEN[case.device] else 3
        return Prepared(worker.sample, info, worker.close, every=every)


@functools.lru_cache
def _flops(model: str, *, training: bool) -> int:
    summary = summarize(fastres.create_model(model, 10))
    return summary.training_flops if training else summary.forward_flops


@pytest.mark.parametrize(("case", "provider"), _ablation_params())
def bench_ablation(measure, data_dir, case, provider):
    """Training with data flowing, against the scripts that people write."""
    group = _Ablation(case, data_dir)
    measure(group.prepare, "peer_fp32", group.pool.started)


def _prepare_step(suite: str, model: str, batch_size: int, provider: str) -> Prepared:
    reason = ablation.why_not(provider, DEVICE)
    # On a GPU --fast compiles around the fused ops too, which is measured in the same few cases.
    is_compiled = (model, batch_size) in _COMPILED or not ON_GPU
    if provider in ("compile", "fast_uncompiled") and (model, batch_size) not in _COMPILED:
        where = "a few cases" if ON_GPU else "the ladder"
        reason = reason or f"compiled in {where} alone, for the time that it takes"
    if reason:
        raise Unavailable(reason)
    machine.keep_freed_memory()
    options: dict[str, Any] = {} if is_compiled else {"compile": "off"}
    built = ablation.build(provider, model, batch_size, DEVICE, **options)
    check_step(provider, model, batch_size, built.runtime, built.loss, built.model.parameters())
    info: BenchmarkInfo = {
        "suite": suite,
        "case": f"{model} batch {batch_size}",
        "images": batch_size,
        "flops": batch_size * _flops(model, training=True),
        "dtype": built.runtime.precision,
        "clock": "wall clock, one step on a fixed batch",
        "choices": {setting.name: setting.value for setting in built.runtime.settings},
    }
    # A replayed graph allocates nothing.
    if not built.runtime.graph:
        info["peak_bytes"] = peak_bytes(built.train, DEVICE)
    return Prepared(wall_sample(built.train, DEVICE), info)


def _sized_params(batches: dict[str, tuple[int, ...]]) -> list:
    """One case a network and batch size; the smallest one is all of --quick."""
    params = []
    for model, sizes in batches.items():
        for batch in sizes:
            marks = [pytest.mark.share(_STEP_S)]
            if (model, batch) != ("resnet20", sizes[0]):
                marks.append(pytest.mark.full)
            params.append(pytest.param(model, batch, id=f"{model} batch {batch}", marks=marks))
    return params


@pytest.mark.parametrize("provider", ablation.CONFIGURATIONS)
@pytest.mark.parametrize(("model", "batch_size"), _sized_params(_STEP_BATCHES))
def bench_step(measure, model, batch_size, provider):
    """One training step on a fixed batch, one change each."""
    measure(functools.partial(_prepare_step, "step", model, batch_size), "eager")


@pytest.mark.full
@pytest.mark.share(4.0)
@pytest.mark.parametrize("provider", _CURVE_CONFIGURATIONS)
@pytest.mark.parametrize("batch_size", _CURVE_BATCHES)
def bench_batch_curve(measure, batch_size, provider):
    """What an image costs as the batch grows: ResNet-20."""
    measure(functools.partial(_prepare_step, "batch curve", "resnet20", batch_size), "eager")


@pytest.mark.full
@pytest.mark.share(4.0)
@pytest.mark.parametrize("provider", _CURVE_CONFIGURATIONS)
@pytest.mark.parametrize("depth", _CURVE_DEPTHS)
def bench_depth_curve(measure, depth, provider):
    """What an image costs as the network deepens, from 20 to 110 layers."""
    prepare = functools.partial(_prepare_step, "depth curve", f"resnet{depth}", _DEPTH_BATCH)
    measure(prepare, "eager")


@functools.lru_cache(maxsize=1)
def _logits(model: str, batch_size: int) -> list[Tensor]:
    """Logits of the float32 network on the batch that every provider starts with."""
    net = fastres.create_model(model, 10, seed=0).to(DEVICE).eval()
    with torch.no_grad():
        return [net(ablation.fixed_batch(batch_size)[0].to(DEVICE)).cpu()]


def _prepare_inference(model: str, batch_size: int, provider: str) -> Prepared:
    if provider in ("compile", "max_autotune") and (not ON_GPU or batch_size != 512):
        raise Unavailable("compiled at batch 512 on a GPU alone, for the time that it takes")
    options: dict[str, Any] = {}
    if batch_size != 512 and ON_GPU:
        options["compile"] = "off"
    configuration = provider
    if provider == "max_autotune":
        configuration, options["mode"] = "compile", "max-autotune"
    machine.keep_freed_memory()
    predict, runtime = ablation.build_inference(configuration, model, batch_size, DEVICE, **options)
    error = error_bound.distance([predict().cpu().float()], _logits(model, batch_size))
    if not error <= error_bound.LOGITS_BOUND:
        raise AssertionError(f"{provider}: logits are off by {error:.2e} of their RMS")
    info: BenchmarkInfo = {
        "suite": "inference",
        "case": f"{model} batch {batch_size}",
        "images": batch_size,
        "flops": batch_size * _flops(model, training=False),
        "dtype": runtime.precision,
        "peak_bytes": peak_bytes(predict, DEVICE),
        "clock": "wall clock, one batch",
    }
    return Prepared(wall_sample(predict, DEVICE), info)


@pytest.mark.parametrize(
    "provider",
    [
        *(name for name in ablation.CONFIGURATIONS if name not in ("graph", "fast_uncompiled")),
        pytest.param("max_autotune", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("model", "batch_size"), _sized_params(_INFERENCE_BATCHES))
def bench_inference(measure, model, batch_size, provider):
    """One batch through the network in evaluation mode; fused folds batch norm away."""
    measure(functools.partial(_prepare_inference, model, batch_size), "eager")
