"""The suite of networks that are not ours: every provider is checked before it is timed."""

import sys
from functools import partial

import pytest
import torch

from benchmarks.peers.community_nets import KuangliuBasicBlock, KuangliuResNet
from benchmarks.suites import bench_networks
from benchmarks.suites.bench_networks import PROVIDERS, Network
from fastres.fusion import backend

pytestmark = pytest.mark.usefixtures("plain")
BUILD = partial(KuangliuResNet, KuangliuBasicBlock, (1, 1), widths=(8, 16))
TINY = Network("tiny", BUILD, batch_size=16, pixels=8)
PREPARE = {
    "training": bench_networks.prepare_training,
    "inference": bench_networks.prepare_inference,
}


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Leave inductor out, which takes half a minute; and whether this processor has bfloat16."""
    rewritten = partial(
        torch.compile, backend=backend.fastres, options={"rest": "eager", "fuse": "all"}
    )
    monkeypatch.setitem(PROVIDERS, "fastres", rewritten)
    monkeypatch.setattr(bench_networks, "low_precision", lambda device: "bf16")
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("what", PREPARE)
@pytest.mark.parametrize("provider", ["eager", "fastres", "fuse"])
def test_a_provider_that_computes_the_network_is_timed(provider, what):
    ready = PREPARE[what](TINY, provider)
    assert 0 < ready.sample() < 60
    assert (ready.info["suite"], ready.info["images"]) == ("networks", 16)
    assert ready.info["case"] == f"tiny, {what}, batch 16, 8 px"
    assert ready.info["choices"]["first call"].endswith(" s")


def scaled(model):
    """All logits are a fifth too large."""
    model.register_forward_hook(lambda module, inputs, logits: 1.2 * logits)
    return model


def without_gradient(model):
    """The loss is right, and one filter has no gradient."""
    model.layer2[0].conv2.weight.register_hook(torch.zeros_like)
    return model


@pytest.mark.parametrize(
    ("what", "wrong", "message"),
    [
        ("training", scaled, "first loss"),
        ("training", without_gradient, "is off by"),
        ("inference", scaled, "logits are off"),
    ],
)
def test_a_provider_that_computes_something_else_is_not(monkeypatch, what, wrong, message):
    monkeypatch.setitem(PROVIDERS, "wrong", wrong)
    with pytest.raises(AssertionError, match=message):
        PREPARE[what](TINY, "wrong")


def test_a_network_of_a_missing_package_is_unavailable(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    (network,) = (n for n in bench_networks.NETWORKS if n.name.startswith("timm"))
    with pytest.raises(bench_networks.Unavailable, match="timm is not installed"):
        network.make()
