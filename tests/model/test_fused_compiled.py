"""Eager, compiled and captured steps of a fused net agree; parity of ops and nets on a GPU.

What a CPU can show stands first: traced whole, on fake tensors, through torch.compile. The tests
marked `gpu` run on any machine that has one.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

from fastres.config import Config
from fastres.engine.runtime import Runtime
from fastres.engine.step import TrainStep
from fastres.fusion.fuse import fuse
from fastres.kernels.gpu import backend as gpu_backend
from fastres.model.resnet import create_model
from tests.helpers.community_nets import with_random_norms
from tests.helpers.interpreter import DEVICE, needs_gpu
from tests.helpers.property_cases import Case, LayerSize, judge
from tests.model.test_fused_nets import bottleneck_net, check_step

CUDA = torch.device("cuda")


def batch(number: int, size: int, device: torch.device, num_images: int = 16):
    generator = torch.Generator().manual_seed(number)
    images = torch.randn((num_images, 3, size, size), generator=generator)
    labels = torch.randint(0, 10, (num_images,), generator=generator)
    return images.to(device), labels.to(device)


def make_step(model: nn.Module, total_steps: int, **options) -> TrainStep:
    config = Config(model="resnet20", lr=0.05, warmup=0.0, schedule="constant")
    runtime = Runtime(**{"device": DEVICE, "channels_last": True} | options)
    model = copy.deepcopy(model).train()
    runtime.place(model)
    return TrainStep(model, config, runtime, total_steps)


def train(step: TrainStep, num_steps: int, size: int) -> torch.Tensor:
    """Losses of a few steps, (num_steps,), float64."""
    losses = []
    for number in range(num_steps):
        step.totals.values.zero_()
        step(number, *batch(number % 8, size, step.runtime.device))
        losses.append(step.totals.values[0] / 16)
    return torch.stack(losses).cpu()


@pytest.mark.parametrize("net", ["resnet20", "resnet18", "bottleneck"])
def test_a_whole_step_on_fake_tensors(net):
    """No op of a fused net looks at a value: the step can be traced, exported and captured."""
    model = bottleneck_net() if net == "bottleneck" else create_model(net)
    faster = fuse(model, verbose=False).train()
    with FakeTensorMode() as mode:
        state = {k: mode.from_tensor(v) for k, v in faster.state_dict(keep_vars=True).items()}
        images = torch.empty(4, 3, 32, 32)
        logits = torch.func.functional_call(faster, state, (images,))
        F.cross_entropy(logits, torch.zeros(4, dtype=torch.int64)).backward()
    assert logits.shape == (4, 10)
    for name, parameter in faster.named_parameters():
        assert state[name].grad.shape == parameter.shape, name


def test_compiled_graphs_hold_the_fused_ops():
    """Forward and backward: what autograd is told of the ops is traced into neither."""
    graphs = []

    def keep(graph, _inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    faster = fuse(create_model("resnet8", width=0.25, seed=0).to(DEVICE), verbose=False).train()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(faster, backend=backend, fullgraph=True)
    compiled(batch(0, 8, DEVICE)[0]).sum().backward()
    forward, backward = graphs
    for graph, half in ((forward, "fwd"), (backward, "bwd")):
        for op in ("conv_bn_relu", "residual_block", "pool_linear"):
            assert f"fastres.{op}_{half}.default" in graph
        assert not any("convolution" in target for target in graph)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_is_eager(backend):
    """In one graph, forward and backward; in fp64 the two differ by rounding alone."""
    torch.compiler.reset()
    model = with_random_norms(create_model("resnet8", width=0.25, seed=0)).double()
    faster = fuse(model, verbose=False).train()
    compiled = torch.compile(copy.deepcopy(faster), backend=backend, fullgraph=True)
    images, labels = batch(0, 8, DEVICE)
    results = []
    for net in (faster, compiled):
        logits = net(images.double())
        F.cross_entropy(logits, labels).backward()
        parameters = dict(net.named_parameters())
        grads = {name.removeprefix("_orig_mod."): p.grad for name, p in parameters.items()}
        results.append({"logits": logits, **grads})
    wanted, got = results
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=name)


OP_CASES = {
    "layer": Case("conv_bn_relu", (8, 3, 32, 32), (LayerSize(16, 3, 3),)),
    "wide layer": Case("conv_bn_relu", (4, 128, 16, 16), (LayerSize(256, 128, 3, 2),)),
    "no relu": Case("conv_bn_relu", (8, 17, 9, 7), (LayerSize(33, 17, 1, 2),), relu=False),
    "add": Case("residual_block", (8, 16, 16, 16), (LayerSize(33, 16, 3),), "given"),
    "folded": Case("conv_bn_folded", (8, 16, 16, 16), (LayerSize(33, 16, 3),), "given"),
    **{
        f"basic, {kind}": Case(
            "residual_block",
            (8, 16, 16, 15),
            (LayerSize(16, 16, 3), LayerSize(16, 16, 3)),
            kind,
            gaps=(8, 1),
        )
        for kind in ("none", "input", "given")
    },
    "basic, projected": Case(
        "residual_block",
        (8, 64, 16, 16),
        (LayerSize(128, 64, 3, 2), LayerSize(128, 128, 3)),
        "projected",
        LayerSize(128, 64, 1, 2),
    ),
    "bottleneck": Case(
        "residual_block",
        (8, 64, 8, 8),
        (LayerSize(16, 64, 1), LayerSize(16, 16, 3), LayerSize(64, 16, 1)),
        "input",
    ),
    "bottleneck, projected": Case(
        "residual_block",
        (8, 64, 8, 8),
        (LayerSize(32, 64, 1), LayerSize(32, 32, 3, 2), LayerSize(128, 32, 1)),
        "projected",
        LayerSize(128, 64, 1, 2),
    ),
}


@needs_gpu
@pytest.mark.parametrize("cudnn", [frozenset(), frozenset({"fprop", "dgrad", "wgrad"})])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", OP_CASES)
def test_an_op_is_as_right_as_eager_on_a_gpu(name, dtype, cudnn, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    case = Case(**{**vars(OP_CASES[name]), "dtype": dtype, "cudnn": cudnn})
    monkeypatch.setattr(gpu_backend, "conv_config", case.config)
    assert judge(case).refused() == []


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("net", ["resnet20", "resnet18", "torchvision resnet50"])
def test_a_net_is_as_right_as_eager_on_a_gpu(net, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    if net.startswith("torchvision"):
        models = pytest.importorskip("torchvision.models")
        torch.manual_seed(0)
        model, size = models.resnet50(num_classes=10), 64
    else:
        model, size = create_model(net, seed=0), 32
    check_step(with_random_norms(model), dtype, batch=8, size=size)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_captured_step_of_a_fused_net_is_the_eager_one(compiled, dtype):
    """Capture alone changes no bit; compiling reorders the arithmetic around the ops."""
    model = fuse(create_model("resnet20", seed=0), verbose=False)
    options = {"device": CUDA, "dtype": dtype, "route": "fused", "fused_optimizer": True}
    eager = make_step(model, 10, **options)
    replayed = make_step(model, 10, **options, graph=True, compiled=compiled)
    replayed.prepare(*batch(9, 32, CUDA))
    wanted, got = train(eager, 5, 32), train(replayed, 5, 32)
    if not compiled:
        assert torch.equal(got, wanted)
    assert got.tolist() == pytest.approx(
        wanted.tolist(), rel=2e-3 if dtype == torch.float32 else 2e-2
    )


@needs_gpu
def test_a_fused_net_compiles_in_one_graph_on_a_gpu():
    model = fuse(create_model("resnet20", seed=0), verbose=False).to(CUDA)
    images, labels = batch(0, 32, CUDA)
    with torch.autocast("cuda", torch.bfloat16):
        wanted = F.cross_entropy(copy.deepcopy(model)(images), labels)
        got = F.cross_entropy(torch.compile(model, fullgraph=True)(images), labels)
    got.backward()
    assert got.item() == pytest.approx(wanted.item(), rel=2e-2)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@needs_gpu
def test_200_steps_fused_and_eager_end_alike_on_a_gpu():
    """The loss curves, smoothed over 20 steps, differ by no more than two eager curves do."""
    model = create_model("resnet20", seed=0)
    options = {"device": CUDA, "dtype": torch.bfloat16, "fused_optimizer": True}

    def curve(net, scale=1.0):
        step = make_step(net, 200, **options)
        with torch.no_grad():
            # One unit roundoff of bf16 in the stem is the smallest change that a run can see.
            step.model.conv1.weight.mul_(scale)
        return train(step, 200, 32).unfold(0, 20, 20).mean(1)

    eager = [curve(model, 1 + units * 2.0**-8) for units in (0, 1, -1, 2, -2, 3, -3, 4, -4)]
    pairs = [(a - b).abs().max() for i, a in enumerate(eager) for b in eager[:i]]
    got = curve(fuse(model, verbose=False))
    assert eager[0][-1] < eager[0][0] / 2
    assert (got - eager[0]).abs().max() <= max(pairs)
