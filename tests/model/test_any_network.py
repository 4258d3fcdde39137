"""Nets that people have, by both doors: all that can be fused runs in the ops, and nothing changes.

In fp64 the ops are computed in plain torch, so that what differs from eager by more than a few
roundings is wrong: a ReLU left out, two layers exchanged, a running mean without the bias. The
roundings of the kernels are measured in test_any_network_rounding.py.
"""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx, nn

from fastres.fusion.backend import fastres, find_in_graphs
from fastres.fusion.functional import fused_block
from fastres.fusion.fuse import fuse
from tests.helpers.community_nets import (
    FULL_NETS,
    NETS,
    build_net,
    convs_before_norms,
    external_nets,
    reduced_nets,
)
from tests.helpers.net_steps import assert_same_counts, descend, evaluate, images, step
from tests.helpers.recorded_ops import RecordedOps, recorded_ops

# Of all convolutions that a norm follows, those that stay as they are. Where norms come first, the
# stem's output is what the first block adds: two read it, and no op returns it beside its norm.
LEFT_ALONE = {"kuangliu/preact": {"conv1"}, "kuangliu/preact_resnet18": {"conv1"}}

# Each with an odd side: where a map is halved, the ops must round as torch does.
SMALL_NETS = {
    **{name: (build, 9) for name, build in NETS.items()},
    **{name: (build, pixels + 1) for name, (build, pixels) in reduced_nets().items()},
}
LARGE_NETS = {
    **{name: (build, 33) for name, build in FULL_NETS.items()},
    **{name: (build, pixels + 1) for name, (build, pixels) in external_nets().items()},
}

# In these blocks are more or wider than in another net of the list, and all else is alike.
ALIKE = {
    *("torchvision/resnet34", "torchvision/resnet101", "torchvision/wide_resnet50_2"),
    *("timm/resnet18", "timm/resnet50", "timm/wide_resnet50_2", "timm/resnext50_32x4d"),
    "timm/seresnet50",
}


@pytest.fixture
def ops() -> Iterator[RecordedOps]:
    with recorded_ops() as recorded:
        yield recorded


@pytest.mark.parametrize("name", SMALL_NETS)
def test_fuse_computes_what_eager_does(name, ops):
    model, size = build_net(SMALL_NETS, name)
    check(name, model.double(), fuse(model.double(), verbose=False), ops, size)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in ALIKE else n for n in SMALL_NETS],
)
def test_the_backend_computes_what_eager_does(name, ops):
    model, size = build_net(SMALL_NETS, name)
    check(name, model.double(), by_backend(model.double(), "eager"), ops, size)


@pytest.mark.parametrize("name", ["kuangliu/basic", "chenyaofo/vgg", "timm/resnetv2_50"])
def test_an_evaluation_with_gradients_is_eager(name, ops):
    """No op has gradients there: other programs run, or other graphs."""
    model, size = build_net(SMALL_NETS, name)
    x = images(2, size, seed=0).double()
    eager = step_with_images(model.double().eval(), x, torch.float64)
    for faster in (fuse(model, verbose=False), by_backend(model, "eager")):
        check_close(step_with_images(faster, x, torch.float64), eager)
        assert not ops.take_names(faster)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE_NETS)
def test_fuse_computes_what_eager_does_in_full_size(name, ops):
    model, size = build_net(LARGE_NETS, name)
    check(name, model.double(), fuse(model.double(), verbose=False), ops, size)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE_NETS)
def test_the_backend_computes_what_eager_does_in_full_size(name, ops):
    model, size = build_net(LARGE_NETS, name)
    check(name, model.double(), by_backend(model.double(), "aot_eager"), ops, size)


def by_backend(model: nn.Module, rest: str) -> nn.Module:
    """A copy that `torch.compile` runs by fastres' backend, all of whose matches are rewritten."""

    def rewrite(gm: fx.GraphModule, example_inputs):
        all_found = [found for _, found in find_in_graphs(gm, example_inputs, "all")]
        run = fastres(gm, example_inputs, options={"fuse": "all", "rest": rest})
        graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
        calls = [node for graph in graphs for node in graph.nodes if node.target is fused_block]
        assert len(calls) == sum(len(found.matches) for found in all_found)
        return run

    torch.compiler.reset()
    faster = copy.deepcopy(model)
    faster.compile(backend=rewrite)
    return faster


def check(name: str, model: nn.Module, faster: nn.Module, ops: RecordedOps, size: int) -> None:
    """Three steps and an evaluation compute what eager does, and all that can be fused in the ops.

    The evaluation finds the running statistics that the steps have moved.
    """
    # Where a map is one pixel, norms of two images would blow up the last digits of fp64.
    x = images(4, size, seed=0).double()
    before_norms = set(convs_before_norms(model, x))
    for training, run in ((True, step_with_images),) * 3 + ((False, evaluate),):
        eager, got = (run(net.train(training), x, torch.float64) for net in (model, faster))
        check_close(got, eager)
        assert before_norms - ops.take_names(faster) == LEFT_ALONE.get(name, set())
        if training:
            descend(model, [faster])
    assert_same_counts(faster, model)


def step_with_images(net: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """A step in which the images want a gradient too."""
    x = x.clone().requires_grad_()
    return {**step(net, x, dtype), "grad of images": x.grad}


def check_close(got: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
    """Every tensor is eager's, up to roundings of fp64."""
    assert got.keys() == eager.keys()
    for name, value in eager.items():
        # The gradient of a bias before a norm is 0, or noise: it has no scale of its own.
        allowed = 1e-9 * max(value.abs().max().item(), 1e-3)
        error = (got[name] - value).abs().max().item()
        assert error <= allowed, f"{name}: {error:.1e} from eager's, allowed {allowed:.1e}"
