"""The kernels of the label-smoothed loss against `F.cross_entropy` and the fp64 reference."""

import pytest
import torch
import torch.nn.functional as F

from fastres.kernels import ops_head
from fastres.kernels.gpu import cross_entropy
from fastres.kernels.gpu.cross_entropy import smooth_cross_entropy_bwd, smooth_cross_entropy_fwd
from fastres.kernels.gpu.launch import recording
from fastres.kernels.ops_head import smooth_cross_entropy
from tests.helpers.head_cases import BF16, FP16, FP32, autocast, draw_labels, normal
from tests.helpers.interpreter import DEVICE, strict_memory  # noqa: F401
from tests.helpers.numerics import PooledErrorBound

pytestmark = pytest.mark.usefixtures("strict_memory")


@pytest.fixture(params=["plain", "triton"])
def backend(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(ops_head, "_find_kernels", lambda name, x: None)


def eager_loss(logits, labels, label_smoothing):
    with autocast(logits.dtype):
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def loss_step(way, logits, labels, smoothing, dloss=1.0):
    logits = logits.detach().clone().requires_grad_()
    loss = way(logits, labels, label_smoothing=smoothing)
    (dlogits,) = torch.autograd.grad(loss, logits, torch.full_like(loss, dloss))
    return loss, dlogits


LOSSES = {
    "ten classes": (5, 10, 0.1),
    "no smoothing": (5, 10, 0.0),
    "nothing but smoothing": (3, 7, 1.0),
    "several tiles": (19, 1000, 0.1),
    "one class": (2, 1, 0.2),
    "one image": (1, 100, 0.2),
}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient(name, dtype):
    """A loss is one number, so those of many batches are compared as one vector."""
    n, classes, smoothing = LOSSES[name]
    rows = {"got": [], "eager": [], "truth": []}
    bound = PooledErrorBound(dtype)
    for draw in range(12):
        logits, labels = 3 * normal(n, classes, seed=draw, dtype=dtype), draw_labels(n, classes)
        got = loss_step(smooth_cross_entropy, logits, labels, smoothing)
        eager = loss_step(eager_loss, logits, labels, smoothing)
        truth = loss_step(F.cross_entropy, logits.double(), labels, smoothing)
        assert got[0].dtype == eager[0].dtype == FP32
        assert got[1].dtype == eager[1].dtype == dtype
        bound.add("dlogits", got[1], [eager[1]], truth[1])
        for key, (loss, _) in zip(rows, (got, eager, truth), strict=True):
            rows[key].append(loss.detach())
    losses = PooledErrorBound(FP32)
    got, eager, truth = (torch.stack(values) for values in rows.values())
    losses.add("losses", got, [eager], truth)
    assert not [*losses.refused(), *bound.refused()]


def test_many_shares_are_added_in_several_rounds(monkeypatch):
    """More tiles than the adding program reads at once, the last one short."""
    monkeypatch.setattr(cross_entropy, "TILE", 32)
    monkeypatch.setattr(cross_entropy, "BLOCK", 64)
    logits, labels = normal(131, 10), draw_labels(131, 10)
    with recording() as launches:
        loss, _ = smooth_cross_entropy_fwd(logits, labels, 0.1)
    assert launches[1].args["num_shares"] == 66
    wanted = F.cross_entropy(logits.double(), labels, label_smoothing=0.1)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "row",
    [
        (1e30, -1e30, 0.0),
        (70000.0, 69999.0, 69998.0),
        (-torch.inf, 1.0, 2.0),
        (0.0, -torch.inf, 1.0),
        (torch.nan, 1.0, 2.0),
        (1.0, torch.nan, 2.0),
        (torch.inf, 1.0, 2.0),
        (-torch.inf, -torch.inf, -torch.inf),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_huge_and_infinite_logits_do_as_in_torch(row, smoothing):
    logits = torch.tensor([row, (0.5, 1.0, 2.0)], device=DEVICE)
    labels = torch.tensor([1, 2], device=DEVICE)
    got = loss_step(smooth_cross_entropy, logits, labels, smoothing)
    wanted = loss_step(F.cross_entropy, logits, labels, smoothing)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("label", [3, -1, -100, 2**40])
def test_a_label_that_is_no_class_makes_the_loss_nan(label):
    labels = torch.tensor([1, label], device=DEVICE)
    loss, dlogits = loss_step(smooth_cross_entropy, normal(2, 3), labels, 0.1)
    assert loss.isnan()
    assert dlogits[1].isnan().all()
    assert dlogits[0].isfinite().all()


@pytest.mark.usefixtures("backend")
def test_the_loss_scale_saves_gradients_from_underflow():
    """In fp16 a gradient under 6e-8 is 0, unless it is scaled before it is rounded."""
    logits = torch.tensor([[20.0, 0.0, 0.0]], device=DEVICE, dtype=FP16)
    labels = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    _, dlogits = loss_step(smooth_cross_entropy, logits, labels, 0.0, dloss=65536.0)
    _, wanted = loss_step(F.cross_entropy, logits.double(), labels, 0.0, dloss=65536.0)
    assert wanted[0, 1] / 65536 < 6e-8
    torch.testing.assert_close(dlogits.double()[:, 1:], wanted[:, 1:], rtol=2.0**-10, atol=0)


def test_refusals():
    x, logits, labels = normal(2, 5, 3, 3), normal(2, 4), draw_labels(2, 4)
    with pytest.raises(ValueError, match=r"label_smoothing must be 0 to 1, got 1\.5"):
        smooth_cross_entropy(logits, labels, 1.5)
    with pytest.raises(ValueError, match=r"labels must be \(2,\) int64, got \[2\] torch.int32"):
        smooth_cross_entropy(logits, labels.int())
    with pytest.raises(ValueError, match=r"logits must have shape \(N, classes\)"):
        smooth_cross_entropy(x, labels)
    with pytest.raises(ValueError, match="logits must be bfloat16, float16 or float32"):
        smooth_cross_entropy_fwd(logits.double(), labels, 0.1)
    with pytest.raises(ValueError, match=r"labels must be \(2,\) int64, got \[2\] torch.int32"):
        smooth_cross_entropy_fwd(logits, labels.int(), 0.1)
    with pytest.raises(ValueError, match="dloss must have shape"):
        smooth_cross_entropy_bwd(logits, logits, FP32)
