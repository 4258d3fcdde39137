"""Networks that are not ours: eager, torch.compile and fastres, in training and in inference.

    eager        plain torch: the baseline
    inductor     torch.compile(network)
    fastres      torch.compile(network, backend="fastres")
    fastres_all  the same with what it would leave to inductor, options={"fuse": "all"}
    fuse         fastres.fuse(network), not compiled

All take the same fixed batch through one process in turns, channels_last under bfloat16 autocast or
in float32; the allocator is set as `--fast` sets it, for all of them. Compiling takes a CPU 20 to
120 seconds a network, three times: there `-m slow` alone measures them, in up to an hour.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastres
from benchmarks.harness import error_bound
from benchmarks.harness.ablation import Unavailable, here, low_precision, why_not
from benchmarks.harness.records import BenchmarkInfo
from benchmarks.harness.scheduler import Prepared
from benchmarks.harness.step_check import without_tf32
from benchmarks.harness.timing import peak_bytes, wall_sample
from benchmarks.peers.community_nets import AkamasterResNet, KuangliuBasicBlock, KuangliuResNet
from fastres.engine import machine
from fastres.fusion import backend
from fastres.model.summary import summarize

__all__ = ["NETWORKS", "PROVIDERS", "Network", "prepare_inference", "prepare_training"]

DEVICE = here()
ON_GPU = DEVICE.type == "cuda"
_NUM_CLASSES = 10
# Seconds of a group, both compilations included. On a GPU it shares a budget with all suites.
_WANTED_S = 25.0 if ON_GPU else 300.0
_MARKS = [pytest.mark.full, pytest.mark.share(_WANTED_S), *([] if ON_GPU else [pytest.mark.slow])]

# What stands for a network in each provider's hands.
PROVIDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": lambda model: model,
    "inductor": lambda model: cast(nn.Module, torch.compile(model)),
    "fastres": lambda model: cast(nn.Module, torch.compile(model, backend=backend.fastres)),
    "fastres_all": lambda model: cast(
        nn.Module, torch.compile(model, backend=backend.fastres, options={"fuse": "all"})
    ),
    "fuse": lambda model: fastres.fuse(model, verbose=False),
}

_COMPILED = ("inductor", "fastres", "fastres_all")


@dataclass(frozen=True)
class Network:
    """A network and the batch that it is measured with.

    build: makes it; raises Unavailable without the package that it comes from. pixels: a side of
    the images. dtype: bfloat16 by autocast, or float32.
    """

    name: str
    build: Callable[[], nn.Module]
    batch_size: int
    pixels: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def reference_dtype(self) -> torch.dtype:
        """The dtype of what it is compared with."""
        return torch.float64 if self.dtype == torch.float32 else torch.float32

    def make(self) -> nn.Module:
        """The network in float32 on the CPU, from one seed, the same every time.

        Its norms are moved at random: one that is still the identity, or zero as the last of a
        block may be, hides what comes before it. Dropout drops nothing.
        """
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = self.build()
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.add_(0.5 * torch.rand_like(module.weight))
                    module.bias.add_(0.3 * torch.randn_like(module.bias))
                elif isinstance(module, nn.Dropout):
                    module.p = 0.0
        return model

    def batch(self) -> tuple[Tensor, Tensor]:
        """Images and labels on the CPU, the same for every provider."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch_size, 3, self.pixels, self.pixels)
        labels = torch.arange(self.batch_size) % _NUM_CLASSES
        return torch.randn(shape, generator=generator), labels


def _from_torchvision(name: str, **options: Any) -> nn.Module:
    from torchvision.models import get_model

    return get_model(name, weights=None, num_classes=_NUM_CLASSES, **options)


def _torchvision_resnet50() -> nn.Module:
    # With whole branches from the start, the gradients of 16 bits are nothing but rounding.
    return _from_torchvision("resnet50", zero_init_residual=True)


def _from_timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise Unavailable("timm is not installed") from None
    return timm.create_model(name, pretrained=False, num_classes=_NUM_CLASSES)


# What two cores do in a tenth to half a second, and what a GPU is filled by.
_CIFAR_SIZES = {"cpu": ((32, 32), (128, 32)), "cuda": ((512, 32), (512, 32))}[DEVICE.type]
_IMAGENET_SIZE = {"cpu": (16, 64), "cuda": (128, 224)}[DEVICE.type]
_KUANGLIU = functools.partial(KuangliuResNet, KuangliuBasicBlock, (2, 2, 2, 2))
_MOBILENET = functools.partial(_from_torchvision, "mobilenet_v2")
NETWORKS = (
    Network("kuangliu resnet18", _KUANGLIU, *_CIFAR_SIZES[0]),
    Network("akamaster resnet20", lambda: AkamasterResNet((3, 3, 3)), *_CIFAR_SIZES[1]),
    Network("torchvision resnet50", _torchvision_resnet50, *_IMAGENET_SIZE),
    Network("timm resnet18", lambda: _from_timm("resnet18"), *_IMAGENET_SIZE),
    Network("torchvision mobilenet_v2", _MOBILENET, *_IMAGENET_SIZE),
    Network("kuangliu resnet18 fp32", _KUANGLIU, *_CIFAR_SIZES[0], torch.float32),
    Network("torchvision mobilenet_v2 fp32", _MOBILENET, *_IMAGENET_SIZE, torch.float32),
)


class _Run:
    """A provider of a network on the device, with the batch.

    The reference is NCHW, and in it nothing is autocast.
    """

    def __init__(self, network: Network, provider: str, dtype: torch.dtype, *, training: bool):
        is_reference = dtype == network.reference_dtype
        layout = torch.contiguous_format if is_reference else torch.channels_last
        self._is_low = dtype == torch.bfloat16
        wide = torch.float32 if self._is_low else dtype
        model = network.make().to(DEVICE, wide).to(memory_format=layout).train(training)
        images, labels = network.batch()
        self.images = images.to(DEVICE, wide, memory_format=layout)
        self.labels = labels.to(DEVICE)
        self.model = PROVIDERS[provider](model)
        self._optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.01, momentum=0.9, foreach=True
        )

    def train(self) -> Tensor:
        """One step: forward, cross entropy, backward, SGD; returns the loss."""
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self._is_low):
            loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def predict(self) -> Tensor:
        """Logits of the batch."""
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self._is_low):
            return self.model(self.images)

    def gradients(self) -> Tensor:
        """Those of the last step on the CPU, as one vector.

        The gradient of a bias is nothing but rounding where a norm follows: it has no scale alone.
        """
        return torch.cat([cast(Tensor, p.grad).flatten().cpu() for p in self.model.parameters()])


@functools.lru_cache(maxsize=1)
def _first_step(network: Network) -> tuple[float, Tensor, Tensor]:
    """Loss and gradients of the reference's first step, and gradients in the network's dtype."""
    with without_tf32():
        exact = _Run(network, "eager", network.reference_dtype, training=True)
        loss = exact.train().item()
    rounded = _Run(network, "eager", network.dtype, training=True)
    rounded.train()
    return loss, exact.gradients(), rounded.gradients()


@functools.lru_cache(maxsize=1)
def _logits(network: Network) -> Tensor:
    """Logits of the reference, on the CPU."""
    with without_tf32():
        return _Run(network, "eager", network.reference_dtype, training=False).predict().cpu()


def _start(network: Network, provider: str, *, training: bool) -> _Run:
    """Place a network in a provider's hands, where this machine has what it needs."""
    if low_precision(DEVICE) != "bf16":
        raise Unavailable("this GPU has no bfloat16 instructions")
    reason = why_not("compile", DEVICE) if provider in _COMPILED else None
    if reason:
        raise Unavailable(reason)
    machine.keep_freed_memory()
    torch.backends.cudnn.benchmark = True
    return _Run(network, provider, network.dtype, training=training)


def _timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The result of a first call, which compiles, on the CPU; and its seconds."""
    started = time.perf_counter()
    result = call().float().cpu()
    return result, time.perf_counter() - started


def _prepared(
    network: Network, call: Callable[[], Tensor], first_s: float, *, training: bool
) -> Prepared:
    summary = summarize(network.make(), network.pixels)
    flops = summary.training_flops if training else summary.forward_flops
    what = "training" if training else "inference"
    size = f"batch {network.batch_size}, {network.pixels} px"
    info: BenchmarkInfo = {
        "suite": "networks",
        "case": f"{network.name}, {what}, {size}",
        "images": network.batch_size,
        "flops": network.batch_size * flops,
        "dtype": "bf16" if network.dtype == torch.bfloat16 else "fp32",
        "clock": f"wall clock, one {'step' if training else 'batch'} of a fixed batch",
        "choices": {"first call": f"{first_s:.1f} s"},
        "peak_bytes": peak_bytes(call, DEVICE),
    }
    return Prepared(wall_sample(call, DEVICE), info)


def prepare_training(network: Network, provider: str) -> Prepared:
    """Train a first step and compare its loss and its gradients with the reference's.

    Of mobilenet_v2 the loss alone can tell: its first gradients are as far off in eager bfloat16 as
    they are large, so that the bound lets every one through.

    Raises:
        AssertionError: where one is further off than a route may be.
        Unavailable: where this machine cannot have the provider or the network.
    """
    run = _start(network, provider, training=True)
    loss, first_s = _timed(run.train)
    truth, exact, rounded = _first_step(network)
    if not abs(loss.item() - truth) <= error_bound.LOSS_BOUND * truth:
        raise AssertionError(f"{provider}: first loss {loss:.5f}, the reference's {truth:.5f}")
    error_bound.check(provider, [run.gradients()], [rounded], [exact], network.dtype)
    return _prepared(network, run.train, first_s, training=True)


def prepare_inference(network: Network, provider: str) -> Prepared:
    """Evaluate a first batch and compare its logits with the reference's.

    Raises:
        AssertionError: where they are further off than a route may be.
        Unavailable: where this machine cannot have the provider or the network.
    """
    run = _start(network, provider, training=False)
    logits, first_s = _timed(run.predict)
    error = error_bound.distance([logits], [_logits(network)])
    if not error <= error_bound.LOGITS_BOUND:
        raise AssertionError(f"{provider}: logits are off by {error:.2e} of their RMS")
    return _prepared(network, run.predict, first_s, training=False)


@contextmanager
def _forgetting_graphs(_providers: Sequence[str]) -> Iterator[None]:
    """Free what a group has compiled: networks of one class share Dynamo's list of graphs."""
    try:
        yield
    finally:
        torch._dynamo.reset()


_PARAMS: list[Any] = [pytest.param(n, id=n.name, marks=_MARKS) for n in NETWORKS]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("network", _PARAMS)
def bench_network_training(measure, network, provider):
    """One training step of somebody's network on a fixed batch."""
    measure(functools.partial(prepare_training, network), "eager", _forgetting_graphs)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("network", _PARAMS)
def bench_network_inference(measure, network, provider):
    """One batch through somebody's network in evaluation mode."""
    measure(functools.partial(prepare_inference, network), "eager", _forgetting_graphs)
