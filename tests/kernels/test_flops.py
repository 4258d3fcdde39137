"""FlopCounterMode counts a fused op as the plain modules that it stands for."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fastres.fusion.fuse import fuse
from fastres.kernels import ops
from fastres.kernels.ops_head import pool_linear
from fastres.model.resnet import create_model
from tests.helpers.interpreter import DEVICE
from tests.kernels.test_ops import CASES, Case, eager_block


def count(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_every_op_has_a_formula():
    names = {
        name.removeprefix("fastres::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fastres::")
    }
    counted = {op.__name__ for op in flop_registry if str(op).startswith("fastres.")}
    assert names == counted
    assert len(names) == 9


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("wants_dx", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_blocks(name, wants_dx):
    def run(block):
        case = Case(name)
        for tensor in case.inputs().values():
            tensor.requires_grad_(wants_dx or tensor is not case.x)
        block(case.x, case.layers, **case.options()).sum().backward()

    fused = count(lambda: run(lambda *args, **kwargs: ops.residual_block(*args, **kwargs)[0]))
    assert fused == count(lambda: run(eager_block)) > 0


@pytest.mark.usefixtures("plain")
def test_head_and_inference():
    x = torch.randn(3, 5, 4, 2, device=DEVICE, requires_grad=True)
    weight = torch.randn(7, 5, device=DEVICE, requires_grad=True)
    fused = count(lambda: pool_linear(x, weight).sum().backward())
    assert fused == count(lambda: F.linear(x.mean((2, 3)), weight).sum().backward()) > 0
    case = Case("projected")
    layer = case.layers[0]
    folded = count(lambda: ops.conv_bn_folded(case.x, layer, torch.ones(2, 32, device=DEVICE)))
    assert folded == count(lambda: F.conv2d(case.x, layer.w, stride=2, padding=1)) > 0


@pytest.mark.parametrize("training", [True, False])
def test_nets(training):
    """On every route: the counter watches modules too, and those run themselves."""
    net = create_model("resnet8", width=0.5, seed=0).to(DEVICE).train(training)
    x = torch.randn(2, 3, 16, 16, device=DEVICE)

    def run(net):
        with torch.set_grad_enabled(training):
            out = net(x)
        if training:
            out.sum().backward()

    fused = fuse(net, verbose=False)
    assert count(lambda: run(fused)) == count(lambda: run(copy.deepcopy(net))) > 0
