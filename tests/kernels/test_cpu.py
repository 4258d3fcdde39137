"""The CPU kernels: every step against the fp64 reference, and the modules on top."""

import itertools

import pytest
import torch

import fastres
from fastres.kernels import ops
from fastres.kernels.conv_types import DeferredGrad
from fastres.kernels.cpu import backend as cpu_backend
from fastres.kernels.cpu import build as cpu_build
from fastres.kernels.reference import backend as reference_backend
from tests.helpers.cpu_cases import (  # noqa: F401
    BF16,
    FP32,
    SHAPES,
    Case,
    cpu_route,
    has_cpu_kernels,
    state_of,
)
from tests.helpers.interpreter import strict_memory  # noqa: F401
from tests.helpers.numerics import assert_like_eager, away_from_ties, rms

pytestmark = pytest.mark.usefixtures("has_cpu_kernels", "strict_memory")


def three_ways(shape, dtype, compute):
    """compute(case, backend) by the CPU kernels, by plain torch, and in fp64."""
    case = Case(SHAPES[shape], dtype)
    return (
        compute(case, cpu_backend),
        compute(case, reference_backend),
        compute(case.double(), reference_backend),
    )


def check(names, results, dtype, keep=None):
    for name, ours, eager, truth in zip(names, *results, strict=True):
        kept = keep if keep is not None and truth.shape == keep.shape else None
        assert_like_eager(name, ours, eager, truth, dtype, kept)


SHAPES_AND_DTYPES = list(itertools.product(SHAPES, (BF16, FP32)))


@pytest.mark.parametrize("has_prologue", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), SHAPES_AND_DTYPES)
def test_convolution_and_statistics(shape, dtype, has_prologue):
    if has_prologue and SHAPES[shape][1] == 3:
        pytest.skip("a stem has no producer")
    results = three_ways(
        shape,
        dtype,
        lambda t, backend: backend.conv_bn(t.x, t.layer, t.scale_shift if has_prologue else None),
    )
    check(["y"], [result[:1] for result in results], dtype)
    # Statistics and what follows from them inherit the roundings of y.
    names = ("mean", "unbiased_var", "rstd", "scale_shift")
    check(names, [[getattr(result, name) for name in names] for result in results], dtype)
    assert results[0].y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("has_producer", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), SHAPES_AND_DTYPES)
def test_both_gradients(shape, dtype, has_producer):
    if has_producer and SHAPES[shape][1] == 3:
        pytest.skip("a stem has no producer")

    def gradients(t, backend):
        step = backend.conv_backward(
            DeferredGrad(t.g, t.y, t.coefficients),
            t.x,
            t.layer,
            producer=t.producer() if has_producer else None,
            producer_weight=t.scale_shift[0] if has_producer else None,
            shortcut=None if has_producer else t.shortcut,
            need_dx=True,
        )
        return step.dx, step.dw, *(step.producer[1:] if has_producer else [])

    keep = None
    if has_producer:
        t = Case(SHAPES[shape], dtype).double()
        z = t.x * t.scale_shift[0].view(1, -1, 1, 1) + t.scale_shift[1].view(1, -1, 1, 1)
        keep = away_from_ties(z, FP32)
    results = three_ways(shape, dtype, gradients)
    check(("dx", "dw", "dgamma", "dbeta")[: len(results[0])], results, dtype, keep)


@pytest.mark.parametrize("shape", ["16 to 16", "stem", "stem, odd", "strided"])
def test_filter_gradient_alone_is_the_same(shape):
    t = Case(SHAPES[shape], BF16)
    dy = DeferredGrad(t.g, t.y, t.coefficients)
    alone, both = (
        cpu_backend.conv_backward(
            dy, t.x, t.layer, producer=None, producer_weight=None, shortcut=None, need_dx=need
        )
        for need in (False, True)
    )
    assert alone.dx is None
    # oneDNN, which a stem's dx needs, may add in another order.
    torch.testing.assert_close(alone.dw, both.dw, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shortcut", ["none", "given", "projected"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("shape", ["16 to 16, tail", "channels of no tile"])
def test_apply(shape, dtype, shortcut, relu):
    def apply(t, backend):
        state = state_of(t.y, t.out_scale_shift[0], t.out_scale_shift[1], t.out_scale_shift)
        residual = None if shortcut == "none" else t.residual
        scale_shift = t.coefficients[:2] if shortcut == "projected" else None
        return [backend.apply(state, residual, scale_shift, relu)]

    check(["out"], three_ways(shape, dtype, apply), dtype)


@pytest.mark.parametrize("mask", ["out", "y", "none"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("shape", ["32 to 32, odd", "channels of no tile"])
def test_reduce_and_its_coefficients(shape, dtype, mask):
    def reduce(t, backend):
        k = t.y.shape[1]
        mean, rstd = t.out_scale_shift[0], t.out_scale_shift[1].abs() + 0.5
        state = state_of(t.y, mean, rstd, t.out_scale_shift)
        projected = state_of(t.residual, mean + 1, rstd, t.out_scale_shift)
        told_by = {"out": t.residual, "y": t.out_scale_shift, "none": None}[mask]
        weight = t.coefficients[0]
        found = [t.g]
        for dy, *grads in backend.reduce(t.g, state, weight, told_by, projected, weight):
            found[0] = dy.g
            found += [dy.coefficients, *grads]
        assert found[1].shape == (3, k)
        return found

    keep = None
    if mask == "y":
        t = Case(SHAPES[shape], dtype).double()
        a, b = (v.view(1, -1, 1, 1) for v in t.out_scale_shift)
        keep = away_from_ties(t.y * a + b, FP32)
    results = three_ways(shape, dtype, reduce)
    names = ["g"] + ["coefficients", "dgamma", "dbeta"] * 2
    check(names, results, dtype, keep)


@pytest.mark.parametrize("mask", ["y", "none"])
def test_sums_over_many_pixels(mask):
    """Few numbers are added up in float: with those of a whole image this is 3 to 7, not 1 to 2."""
    generator = torch.Generator().manual_seed(0)
    dout, y = (
        torch.randn(2, 16, 112, 112, generator=generator).to(memory_format=torch.channels_last)
        for _ in range(2)
    )
    zeros, ones = torch.zeros(16), torch.ones(16)
    state = state_of(y, zeros, ones, torch.stack([ones, zeros]))
    told_by = state.scale_shift if mask == "y" else None
    _, dgamma, dbeta = cpu_backend.reduce(dout, state, ones, told_by, None, None)[0]
    g = dout.double() * (y > 0 if mask == "y" else 1)
    for grad, terms in ((dbeta, g), (dgamma, g * y)):
        size = rms(terms.square().sum((0, 2, 3)).sqrt())
        assert rms(grad - terms.sum((0, 2, 3))) < 2.5 * 2**-24 * size


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), SHAPES_AND_DTYPES)
def test_folded(shape, dtype, has_residual, relu):
    def folded(t, backend):
        residual = t.residual if has_residual else None
        return [backend.conv_folded(t.x, t.layer, t.out_scale_shift, residual, relu)]

    check(["out"], three_ways(shape, dtype, folded), dtype)


@pytest.mark.parametrize("shape", ["16 to 16", "channels of no tile"])
def test_variance_of_values_far_from_zero(shape):
    """E[y^2] - E[y]^2 would be wrong by 2**-24 * 100**2 / 0.1**2, six percent."""
    t = Case(SHAPES[shape], FP32)
    y = (100 + t.y * 0.1).to(memory_format=torch.channels_last)
    k = y.shape[1]
    stats = torch.empty(5, k)
    n, _, h, w = y.shape
    ones = torch.ones(k)
    cpu_build.call("bn_stats", y, ones, ones, 0.0, stats, n, h * w, k)
    truth = y.double().var((0, 2, 3))
    torch.testing.assert_close(stats[1].double(), truth, rtol=1e-4, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_come_through(value):
    t = Case(SHAPES["16 to 16"], BF16)
    t.x[1, 3, 2, 5] = value
    y = cpu_backend.conv_bn(t.x, t.layer, None)
    assert not y.y[1, :, 1:4, 4:7].isfinite().any()
    assert y.y[0].isfinite().all()
    assert not y.rstd.isfinite().all() or y.rstd.eq(0).any()
    out = cpu_backend.conv_folded(t.x, t.layer, t.out_scale_shift.abs() + 1, None, True)
    assert not out[1, :, 2, 5].isfinite().all()
    step = cpu_backend.conv_backward(
        DeferredGrad(t.g, t.y, t.coefficients),
        t.x,
        t.layer,
        producer=None,
        producer_weight=None,
        shortcut=None,
        need_dx=True,
    )
    assert not step.dw.isfinite().any(dim=0).all()


def test_two_runs_are_equal():
    t = Case(SHAPES["64 to 64"], BF16)

    def run():
        state = cpu_backend.conv_bn(t.x, t.layer, t.scale_shift)
        step = cpu_backend.conv_backward(
            DeferredGrad(t.g, state.y, t.coefficients),
            t.x,
            t.layer,
            producer=t.producer(),
            producer_weight=t.scale_shift[0],
            shortcut=None,
            need_dx=True,
        )
        return [*state, step.dx, step.dw, *step.producer[1:]]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_without_bf16_instructions_onednn_convolves(monkeypatch):
    monkeypatch.setattr(cpu_build, "has_fused_conv", lambda: False)
    results = three_ways(
        "16 to 16", BF16, lambda t, backend: backend.conv_bn(t.x, t.layer, t.scale_shift)
    )
    check(("y", "mean"), [result[:2] for result in results], BF16)


def train_once(model, images, labels, precision):
    model.zero_grad()
    with torch.autocast("cpu", dtype=BF16, enabled=precision == BF16):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    buffers = {k: v for k, v in model.named_buffers() if v.is_floating_point()}
    return {"loss": loss.detach(), **{k: p.grad for k, p in model.named_parameters()}, **buffers}


@pytest.mark.usefixtures("cpu_route")
@pytest.mark.parametrize("options", [{"name": "resnet8"}, {"name": "resnet50", "width": 0.25}])
@pytest.mark.parametrize("precision", [BF16, FP32])
def test_whole_networks(options, precision):
    """Loss, gradients and running statistics of a step, in the RMS norm, as near as eager's."""
    g = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=g).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (8,), generator=g)
    results = {}
    for way in ("fused", "eager", "truth"):
        model = fastres.create_model(**options, seed=0).to(memory_format=torch.channels_last)
        if way == "fused":
            model = fastres.fuse(model, verbose=False)
            assert ops.choose_backend(images) is cpu_backend
        exact = way == "truth"
        model = model.double() if exact else model
        batch = images.double() if exact else images
        results[way] = train_once(model, batch, labels, None if exact else precision)
    # Masks of elements near 0 differ between correct networks; their share grows with depth, so the
    # baseline is the whole gradient and not its largest element.
    for norm in (lambda r: torch.cat([t.flatten().double() for t in r]),):
        truth = norm(results["truth"].values())
        fused_error, eager_error = (
            rms(norm(results[way].values()) - truth) / rms(truth) for way in ("fused", "eager")
        )
        assert fused_error <= 1.25 * eager_error


@pytest.mark.usefixtures("cpu_route")
def test_the_eager_call_equals_the_registered_op(monkeypatch):
    model = fastres.fuse(fastres.create_model("resnet8", seed=0), verbose=False)
    model.to(memory_format=torch.channels_last)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 4])
    eager = train_once(model, images, labels, BF16)
    model = fastres.fuse(fastres.create_model("resnet8", seed=0), verbose=False)
    model.to(memory_format=torch.channels_last)
    monkeypatch.setattr(ops, "eager_backend", lambda *_: None)
    registered = train_once(model, images, labels, BF16)
    for name, value in eager.items():
        assert torch.equal(value, registered[name]), name


@pytest.mark.usefixtures("cpu_route")
def test_evaluation_folds_the_batch_norm():
    model = fastres.create_model("resnet8", seed=0).to(memory_format=torch.channels_last)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    ways = {"fused": fastres.fuse(model, verbose=False), "eager": model, "truth": model}
    outputs = {}
    for way, net in ways.items():
        net = net.eval().double() if way == "truth" else net.eval()
        batch = images.double() if way == "truth" else images
        with torch.no_grad(), torch.autocast("cpu", dtype=BF16, enabled=way != "truth"):
            outputs[way] = net(batch)
    assert_like_eager("logits", outputs["fused"], outputs["eager"], outputs["truth"], BF16)
