"""Nets that people have, three steps and an evaluation: by both doors as near to fp64 as by eager.

On a CPU the kernels are those in C++, or plain torch where there is no compiler for them: Triton's
interpreter would take minutes for a net.
"""

import pytest
import torch
from torch import Tensor, nn

from fastres.fusion.fuse import fuse
from fastres.kernels import dispatch
from tests.helpers.community_nets import (
    FULL_NETS,
    NETS,
    build_net,
    external_nets,
    reduced_nets,
)
from tests.helpers.interpreter import HAS_GPU
from tests.helpers.net_steps import check_steps, compiled

SMALL_NETS = {name: (build, 9) for name, build in NETS.items()} | reduced_nets()
LARGE_NETS = {name: (build, 32) for name, build in FULL_NETS.items()} | external_nets()
# One of each: basic blocks, bottlenecks, a bias before the norm.
IN_BRIEF = ("akamaster/A", "weiaicunzai/bottleneck", "chenyaofo/vgg")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


class NormInNCHW(nn.BatchNorm2d):
    """A norm that is left alone, on a CPU: over channels_last torch sums in float, not in double.

    With torch's, the running variance behind it is off by 2e-6 on one thread, with this by 4e-8.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.empty_like(x).copy_(super().forward(x.contiguous()))


@pytest.fixture(autouse=True)
def _quick_kernels(monkeypatch):
    torch.compiler.reset()
    if not HAS_GPU:
        monkeypatch.setattr(dispatch, "_triton_backend", lambda: None)


def check(model, dtype, size, batch=4, **backends):
    faster = {"fuse": fuse(model, verbose=False)}
    faster |= {name: compiled(model, **options) for name, options in backends.items()}
    check_steps(model, faster, dtype, batch, size, num_steps=3, evaluates=True)


@DTYPES
@pytest.mark.parametrize("name", IN_BRIEF)
def test_small_nets_are_as_right_as_eager(name, dtype):
    model, size = build_net(SMALL_NETS, name)
    check(model, dtype, size, backend={"rest": "aot_eager"})


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("name", sorted(SMALL_NETS.keys() - IN_BRIEF))
def test_other_small_nets_are_as_right_as_eager(name, dtype):
    model, size = build_net(SMALL_NETS, name)
    check(model, dtype, size, backend={"rest": "aot_eager"})


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("name", [*IN_BRIEF, "timm/resnet18d", "torchvision/mobilenet_v2"])
def test_nets_are_as_right_as_eager_with_inductor(name, dtype):
    model, size = build_net(SMALL_NETS, name)
    replayed = {"rest": "inductor", "mode": "reduce-overhead"}
    check(model, dtype, size, inductor={"rest": "inductor"}, replayed=replayed)


def _sizes_of(name: str) -> tuple[int, ...]:
    """The sides that a large net takes: some have a linear layer for maps of one size."""
    has_one_size = name.startswith("kuangliu/") or name == "chenyaofo/vgg11_bn"
    return (32, 33) if has_one_size else (32, 33, 224)


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name in LARGE_NETS for size in _sizes_of(name)]
)
def test_large_nets_are_as_right_as_eager(name, size, dtype):
    model, _ = build_net(LARGE_NETS, name)
    if (name, size, dtype, HAS_GPU) == ("torchvision/mobilenet_v2", 224, torch.float32, False):
        model.get_submodule("features.1.conv.0.1").__class__ = NormInNCHW
    check(model, dtype, size, backend={"rest": "aot_eager"})
