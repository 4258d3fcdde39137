"""Head and loss as ops and modules: registration, autograd, autocast, compilation, the nets."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastres.fusion.fuse import fuse
from fastres.kernels import ops_head
from fastres.kernels.gpu import cross_entropy
from fastres.kernels.gpu import pool_linear as pool_linear_kernels
from fastres.kernels.ops_head import pool_linear, smooth_cross_entropy
from fastres.model import head
from fastres.model.head import SmoothCrossEntropy, pool_classify
from fastres.model.resnet import create_model
from tests.helpers.head_cases import BF16, FP32, autocast, draw_labels, normal
from tests.helpers.interpreter import DEVICE, needs_gpu, strict_memory  # noqa: F401

pytestmark = pytest.mark.usefixtures("strict_memory")


@pytest.fixture(params=["plain", "triton"])
def backend(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(ops_head, "_find_kernels", lambda name, x: None)


@pytest.fixture
def plain(monkeypatch):
    """Use the ops, and compute them in plain torch: for fp64, and nets without the interpreter."""
    monkeypatch.setattr(ops_head, "_find_kernels", lambda name, x: None)
    monkeypatch.setattr(head, "is_worth_an_op", lambda x: True)


@pytest.mark.parametrize("wide", [torch.float64, FP32], ids=["plain", "kernels"])
def test_opcheck(wide):
    ops = torch.ops.fastres
    x, weight = normal(2, 3, 2, 2).to(wide), normal(4, 3).to(wide)
    bias, labels = normal(4).to(wide), draw_labels(2, 4)
    for given in (bias.clone().requires_grad_(), None):
        arguments = (x.clone().requires_grad_(), weight.clone().requires_grad_(), given)
        torch.library.opcheck(ops.pool_linear_fwd.default, arguments)
    logits, pooled = ops.pool_linear_fwd(x, weight, bias)
    torch.library.opcheck(ops.pool_linear_bwd.default, (logits, pooled, weight, 2, 2))
    arguments = (logits.clone().requires_grad_(), labels, 0.1)
    torch.library.opcheck(ops.smooth_cross_entropy_fwd.default, arguments)
    loss, grad = ops.smooth_cross_entropy_fwd(logits, labels, 0.1)
    for dtype in {wide, BF16}:
        torch.library.opcheck(ops.smooth_cross_entropy_bwd.default, (loss, grad, dtype))


@pytest.mark.usefixtures("plain")
def test_gradcheck_of_the_references():
    x, weight, bias = (
        t.double().requires_grad_() for t in (normal(2, 3, 2, 3), normal(4, 3), normal(4))
    )
    torch.autograd.gradcheck(pool_linear, (x, weight, bias))
    logits = normal(3, 4).double().requires_grad_()
    torch.autograd.gradcheck(lambda z: smooth_cross_entropy(z, draw_labels(3, 4), 0.1), logits)


def calls_of(run):
    """Names of the operators that `run` calls."""
    with torch.profiler.profile() as profile:
        run()
    return {event.key for event in profile.key_averages()}


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("training", [True, False])
def test_the_fused_net_has_the_fused_head(training):
    model = create_model("resnet8", seed=0).double().to(DEVICE).train(training)
    faster = fuse(model, verbose=False)
    assert list(faster.state_dict()) == list(model.state_dict())
    x = normal(2, 3, 8, 8).double()
    assert "fastres::pool_linear_fwd" in calls_of(lambda: faster(x))
    torch.testing.assert_close(faster(x), model(x), rtol=1e-9, atol=1e-9)


def test_modules_are_torchs_own_where_no_kernel_runs():
    x, fc = normal(2, 16, 3, 3).double(), nn.Linear(16, 5, device=DEVICE).double()
    logits, labels = normal(2, 5).double(), draw_labels(2, 5)
    loss = SmoothCrossEntropy(0.1)
    calls = calls_of(lambda: (pool_classify(x, fc), loss(logits, labels)))
    assert not [name for name in calls if name.startswith("fastres::")]
    assert torch.equal(pool_classify(x, fc), fc(x.mean((2, 3))))
    assert torch.equal(loss(logits, labels), F.cross_entropy(logits, labels, label_smoothing=0.1))
    on_kernels = calls_of(
        lambda: (pool_classify(x.float(), fc.float()), loss(logits.float(), labels))
    )
    assert {"fastres::pool_linear_fwd", "fastres::smooth_cross_entropy_fwd"} <= on_kernels


@pytest.mark.usefixtures("plain")
def test_a_classifier_that_is_seen_or_replaced_is_called_itself():
    class Scaled(nn.Linear):
        def forward(self, pooled):
            return 2 * super().forward(pooled)

    x = normal(2, 16, 3, 3)
    fc = nn.Linear(16, 5, device=DEVICE)
    wanted = fc(x.mean((2, 3)))
    torch.testing.assert_close(pool_classify(x, fc), wanted)
    scaled = Scaled(16, 5, device=DEVICE)
    scaled.load_state_dict(fc.state_dict())
    torch.testing.assert_close(pool_classify(x, scaled), 2 * wanted)
    seen = []
    fc.register_forward_hook(lambda *_: seen.append(True))
    torch.testing.assert_close(pool_classify(x, fc), wanted)
    assert seen


@pytest.mark.usefixtures("plain")
def test_torchvisions_head_is_fused_where_it_is_a_global_mean():
    resnet = pytest.importorskip("torchvision.models.resnet")
    torch.manual_seed(0)
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)
    model = model.double().to(DEVICE).eval()
    x = normal(2, 3, 32, 32).double()
    with torch.no_grad():
        for pool, is_fused in (
            (nn.AdaptiveAvgPool2d((1, 1)), True),
            (nn.AdaptiveAvgPool2d(1), True),
            (nn.AdaptiveMaxPool2d(1), False),
        ):
            model.avgpool = pool
            faster = fuse(model, verbose=False)
            assert ("fastres::pool_linear_fwd" in calls_of(lambda net=faster: net(x))) == is_fused
            torch.testing.assert_close(faster(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_autocast_rounds_the_logits_alone(dtype):
    """An x in fp32 under autocast, as a fallback leaves it, or in bf16; the loss is fp32."""
    x, fc = normal(2, 16, 3, 3, dtype=dtype), nn.Linear(16, 5, device=DEVICE)
    labels = draw_labels(2, 5)
    with autocast(BF16):
        got, eager = pool_classify(x, fc), fc(x.mean((2, 3)))
        loss = SmoothCrossEntropy(0.1)(got, labels)
    assert got.dtype == eager.dtype == BF16
    assert loss.dtype == FP32
    loss.backward()
    assert fc.weight.grad.dtype == FP32
    truth = F.linear(x.double().mean((2, 3)), fc.weight.double(), fc.bias.double())
    torch.testing.assert_close(got.double(), truth, rtol=2.0**-8, atol=2.0**-16)
    wanted = nn.CrossEntropyLoss(label_smoothing=0.1)(got.double(), labels)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)


def train_head(x, fc, labels, way):
    """Loss and gradients through head and loss, `way` being pool_classify or its compiled form."""
    fc.zero_grad()
    leaf = x.detach().requires_grad_()
    with autocast(x.dtype):
        loss = SmoothCrossEntropy(0.1)(way(leaf, fc), labels)
    loss.backward()
    return loss.detach(), leaf.grad, fc.weight.grad, fc.bias.grad


@pytest.mark.usefixtures("backend")
def test_compiled_in_one_graph():
    x, fc = normal(2, 16, 3, 3, dtype=BF16), nn.Linear(16, 5, device=DEVICE)
    labels = draw_labels(2, 5)
    eager = [t.clone() for t in train_head(x, fc, labels, pool_classify)]
    compiled = torch.compile(pool_classify, backend="aot_eager", fullgraph=True)
    for a, b in zip(eager, train_head(x, fc, labels, compiled), strict=True):
        assert torch.equal(a, b)


@needs_gpu
def test_compiled_and_captured_on_a_gpu():
    x, fc = normal(512, 64, 8, 8, dtype=BF16), nn.Linear(64, 10, device=DEVICE)
    labels = draw_labels(512, 10)
    eager = [t.clone() for t in train_head(x, fc, labels, pool_classify)]
    compiled = torch.compile(pool_classify, fullgraph=True)
    for a, b in zip(eager, train_head(x, fc, labels, compiled), strict=True):
        assert torch.equal(a, b)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        train_head(x, fc, labels, pool_classify)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train_head(x, fc, labels, pool_classify)
    for t in captured:
        t.fill_(torch.nan)
    graph.replay()
    for a, b in zip(eager, captured, strict=True):
        assert torch.equal(a, b)


def test_two_runs_are_bit_equal():
    """Every sum is made by one program in fixed order: nothing is added atomically."""
    fc, labels = nn.Linear(17, 11, device=DEVICE), draw_labels(6, 11)
    x = normal(6, 17, 3, 3, dtype=BF16)
    first, second = ([t.clone() for t in train_head(x, fc, labels, pool_classify)] for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for module in (pool_linear_kernels, cross_entropy):
        assert "atomic" not in Path(module.__file__).read_text()
