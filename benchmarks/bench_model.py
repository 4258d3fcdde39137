"""Whole networks: the ladder with data flowing, single steps and batches, cost curves.

`bench_ladder` is the comparison that a user would make: every provider is a process that trains on
real batches from its own loader, as it would be started by hand, and all of them take turns. The
peers read $FASTRES_DATA with torchvision. `pytest benchmarks/ -k cpu` repeats it on a CPU.

`bench_step`, `bench_inference` and the curves take a fixed batch through one process, so that the
network alone is compared; the allocator is set as `--fast` sets it, for all of them.
"""

import functools

import pytest
import torch
from torch import Tensor

import fastres
from benchmarks import ladder, referee
from benchmarks.lab import Prepared
from benchmarks.ladder import Unavailable, here, low_precision, why_not
from benchmarks.rounds import Fleet
from benchmarks.timing import peak_bytes, wall_sample
from fastres.data.dataset import Dataset
from fastres.engine import machine
from fastres.model.summary import summarize

DEVICE = here()
ON_GPU = DEVICE.type == "cuda"
PEERS = {
    "peer_fp32": "benchmarks.peers.eager_fp32",
    "peer_amp": "benchmarks.peers.eager_amp",
    "peer_compiled": "benchmarks.peers.compiled",
}
_QUICK_LADDER = ("peer_fp32", "fast")
# Each process takes seconds to start and a step of ResNet-18 seconds on a CPU.
_SHORT_LADDER = ("peer_fp32", "channels_last", "amp", "fused", "fast")
LADDER = (*PEERS, *ladder.RUNGS)
# (device, network): batch size, steps a round, seconds of the budget.
_LADDERS = {
    ("cpu", "resnet20"): (128, 4, 80.0),
    ("cpu", "resnet18"): (64, 1, 45.0),
    ("cuda", "resnet20"): (512, 40, 45.0),
    ("cuda", "resnet18"): (256, 20, 45.0),
}
# Batch size and steps a round of ResNet-20 where loaders are measured beside it.
FAST_STEPS = _LADDERS[DEVICE.type, "resnet20"][:2]
_STEP_BATCHES = {
    "cpu": {"resnet20": (32, 128), "resnet18": (16,), "resnet50": (4,)},
    "cuda": {"resnet20": (128, 512, 1024), "resnet18": (128, 512), "resnet50": (128, 256)},
}[DEVICE.type]
_INFERENCE_BATCHES = {
    "cpu": {"resnet20": (32, 500), "resnet18": (32,), "resnet50": (8,)},
    "cuda": {"resnet20": (1, 500, 2000), "resnet18": (1, 500), "resnet50": (1, 500)},
}[DEVICE.type]
_CURVE_BATCHES = (32, 128, 512, 2048) if ON_GPU else (16, 64, 256)
_CURVE_DEPTHS = (20, 32, 44, 56, 110)
_DEPTH_BATCH = 512 if ON_GPU else 16
_CURVE_RUNGS = ["eager", "amp", "graph", "fast"]
_STEP_S = 6.0
# Compiling a network takes up to a minute, on top of every other rung.
_COMPILED = {("resnet20", 512), ("resnet18", 512), ("resnet50", 256)} if ON_GPU else set()


def _ladder_params() -> list:
    """One ladder a device and network; the one of the quick run is the smallest."""
    params = []
    for (device, model), (batch, steps, seconds) in _LADDERS.items():
        marks = [pytest.mark.share(seconds), pytest.mark.full]
        params.append(
            pytest.param(device, model, batch, steps, id=f"{device} {model}", marks=marks)
        )
    marks = [pytest.mark.share(10.0)]
    params.append(pytest.param(DEVICE.type, "resnet8", 64, 2, id="resnet8", marks=marks))
    return params


def data_words(
    device: str, model: str, batch_size: int, steps: int, data_dir: str | None
) -> list[str]:
    """The command line that every provider of a ladder understands."""
    words = ["--device", device, "--model", model, "--batch-size", str(batch_size)]
    words += ["--rounds", str(steps)]
    return [*words, "--data-dir", data_dir] if data_dir else words


@functools.lru_cache(maxsize=1)
def load_data(data_dir: str | None) -> Dataset:
    """The dataset of all suites: that in `data_dir`, or the synthetic one."""
    return fastres.load_dataset("auto" if data_dir else "synthetic", data_dir)


def _refuse(provider: str, device: str, model: str) -> None:
    """Raise Unavailable where a provider of a ladder cannot be had."""
    if model == "resnet8" and provider not in _QUICK_LADDER:
        raise Unavailable("the quick ladder has two rungs")
    if (device, model) == ("cpu", "resnet18") and provider not in _SHORT_LADDER:
        raise Unavailable("the ladder of ResNet-18 is short on a CPU, for the time that it takes")
    if provider == "peer_compiled":
        reason = why_not("compile", torch.device(device))
        if reason:
            raise Unavailable(reason)
    if device == "cuda" and not ON_GPU:
        raise Unavailable("needs an NVIDIA GPU")
    if device == "cpu" and ON_GPU:
        raise Unavailable("hide the GPU with CUDA_VISIBLE_DEVICES= to see the CPU's ladder")
    if provider in ladder.RUNGS:
        ladder.make_config(provider, torch.device(device))
    elif provider != "peer_fp32" and device == "cpu":
        low_precision(torch.device(device))


@functools.lru_cache(maxsize=4)
def _reference_loss(model: str, batch_size: int) -> float:
    """Loss of the eager float32 network on the batch that every provider starts with."""
    images, labels = ladder.fixed_batch(batch_size)
    with torch.no_grad():
        logits = fastres.create_model(model, 10, seed=0).train()(images)
    return torch.nn.functional.cross_entropy(logits, labels).item()


class _Ladder:
    """The providers of one ladder, a process each."""

    def __init__(self, device: str, model: str, batch_size: int, steps: int, data_dir: str | None):
        self.device, self.model, self.batch_size, self.steps = device, model, batch_size, steps
        self.words = data_words(device, model, batch_size, steps, data_dir)
        self.fleet = Fleet(self._command, steps)
        self.data = load_data(data_dir).name

    def _command(self, provider: str) -> tuple[str, list[str]]:
        _refuse(provider, self.device, self.model)
        if provider in PEERS:
            return PEERS[provider], self.words
        return "benchmarks.ladder_worker", ["--rung", provider, *self.words]

    def prepare(self, provider: str) -> Prepared:
        """Wait for a provider and compare the loss of its first step."""
        worker = self.fleet.worker(provider)
        truth, loss = _reference_loss(self.model, self.batch_size), worker.hello["loss"]
        if not abs(loss - truth) <= referee.LOSS_BOUND * truth:
            raise AssertionError(f"{provider}: first loss {loss:.5f}, the reference's {truth:.5f}")
        info = {
            "suite": "ladder",
            "case": f"{self.device} {self.model} batch {self.batch_size}, {self.data}",
            "images": self.batch_size,
            "flops": self.batch_size * _flops(self.model, training=True),
            "dtype": worker.hello["dtype"],
            "clock": f"wall clock, {self.steps} steps a round with their loader, own process",
            "data": worker.hello["data"],
            "choices": worker.hello.get("choices", {}),
        }
        return Prepared(worker.sample, info, worker.close)


@functools.lru_cache
def _flops(model: str, *, training: bool) -> int:
    summary = summarize(fastres.create_model(model, 10))
    return summary.training_flops if training else summary.forward_flops


@pytest.mark.parametrize("provider", LADDER)
@pytest.mark.parametrize(("device", "model", "batch_size", "steps"), _ladder_params())
def bench_ladder(measure, data_dir, device, model, batch_size, steps, provider):
    """Training with data flowing, against the scripts that people write."""
    group = _Ladder(device, model, batch_size, steps, data_dir)
    measure(group.prepare, "peer_fp32", group.fleet.started)


def _update(model_name: str, batch_size: int, rung: ladder.Rung) -> list[Tensor]:
    """By how much the first step moved every parameter, on the CPU."""
    start = fastres.create_model(model_name, 10, seed=0)
    return [
        after.detach().cpu().double() - before.detach().double()
        for after, before in zip(rung.model.parameters(), start.parameters(), strict=True)
    ]


@functools.lru_cache(maxsize=2)
def _reference_update(rung: str, model: str, batch_size: int) -> list[Tensor]:
    """The update of plain eager torch: in float32 the truth, in 16 bits the yardstick."""
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        return _update(model, batch_size, ladder.build(rung, model, batch_size, DEVICE))
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


def _check_step(name: str, model: str, batch_size: int, rung: ladder.Rung) -> None:
    """Raise AssertionError unless the first step has the loss and the update of the reference."""
    loss = _reference_loss(model, batch_size)
    if not abs(rung.loss - loss) <= referee.LOSS_BOUND * loss:
        raise AssertionError(f"{name}: first loss {rung.loss:.5f}, the reference has {loss:.5f}")
    update = _update(model, batch_size, rung)
    truth = _reference_update("eager", model, batch_size)
    if rung.runtime.dtype == torch.float32 and not ON_GPU:
        error = referee.distance(update, truth)
        if not error <= referee.FP32_BOUND:
            raise AssertionError(f"{name} is off by {error:.2e} of the update")
    elif name != "amp":
        # On a GPU float32 convolutions round to TF32, which is finer than the yardstick too.
        yardstick = _reference_update("amp", model, batch_size)
        referee.check(name, update, yardstick, truth, rung.runtime.dtype)


def _prepare_step(suite: str, model: str, batch_size: int, provider: str) -> Prepared:
    if provider == "compile" and (model, batch_size) not in _COMPILED:
        where = "a few cases" if ON_GPU else "the ladder"
        raise Unavailable(f"compiled in {where} alone, for the time that it takes")
    machine.keep_freed_memory()
    rung = ladder.build(provider, model, batch_size, DEVICE)
    _check_step(provider, model, batch_size, rung)
    info = {
        "suite": suite,
        "case": f"{model} batch {batch_size}",
        "images": batch_size,
        "flops": batch_size * _flops(model, training=True),
        "dtype": rung.runtime.precision,
        "peak_bytes": peak_bytes(rung.train, DEVICE),
        "clock": "wall clock, one step on a fixed batch",
        "choices": {choice.piece: choice.value for choice in rung.runtime.choices},
    }
    return Prepared(wall_sample(rung.train, DEVICE), info)


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


@pytest.mark.parametrize("provider", ladder.RUNGS)
@pytest.mark.parametrize(("model", "batch_size"), _sized_params(_STEP_BATCHES))
def bench_step(measure, model, batch_size, provider):
    """One training step on a fixed batch, one change a rung."""
    measure(functools.partial(_prepare_step, "step", model, batch_size), "eager")


@pytest.mark.full
@pytest.mark.share(4.0)
@pytest.mark.parametrize("provider", _CURVE_RUNGS)
@pytest.mark.parametrize("batch_size", _CURVE_BATCHES)
def bench_batch_curve(measure, batch_size, provider):
    """What an image costs as the batch grows: ResNet-20."""
    measure(functools.partial(_prepare_step, "batch curve", "resnet20", batch_size), "eager")


@pytest.mark.full
@pytest.mark.share(4.0)
@pytest.mark.parametrize("provider", _CURVE_RUNGS)
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
        return [net(ladder.fixed_batch(batch_size)[0].to(DEVICE)).cpu()]


def _prepare_inference(model: str, batch_size: int, provider: str) -> Prepared:
    config = ladder.make_config(provider, DEVICE, model=model)
    if provider == "compile" and (not ON_GPU or batch_size != 500):
        raise Unavailable("compiled at batch 500 on a GPU alone, for the time that it takes")
    machine.keep_freed_memory()
    net, runtime = ladder.place(config)
    forward = torch.compile(net.eval()) if runtime.compiled else net.eval()
    images = ladder.fixed_batch(batch_size)[0].to(DEVICE, memory_format=runtime.memory_format)

    @torch.no_grad()
    def predict() -> Tensor:
        with runtime.autocast():
            return forward(images)

    error = referee.distance([predict().cpu().float()], _logits(model, batch_size))
    if not error <= referee.LOGITS_BOUND:
        raise AssertionError(f"{provider}: logits are off by {error:.2e} of their RMS")
    info = {
        "suite": "inference",
        "case": f"{model} batch {batch_size}",
        "images": batch_size,
        "flops": batch_size * _flops(model, training=False),
        "dtype": runtime.precision,
        "peak_bytes": peak_bytes(predict, DEVICE),
        "clock": "wall clock, one batch",
    }
    return Prepared(wall_sample(predict, DEVICE), info)


@pytest.mark.parametrize("provider", [rung for rung in ladder.RUNGS if rung != "graph"])
@pytest.mark.parametrize(("model", "batch_size"), _sized_params(_INFERENCE_BATCHES))
def bench_inference(measure, model, batch_size, provider):
    """One batch through the network in evaluation mode; fused folds batch norm away."""
    measure(functools.partial(_prepare_inference, model, batch_size), "eager")
