"""Filters in fp32 beside activations in a lower precision: copies, gradients, derivatives."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad

from fastres.kernels import ops
from fastres.kernels.dispatch import force_backend
from fastres.kernels.filter_copies import FilterCopies
from fastres.kernels.gpu import backend as gpu_backend
from fastres.kernels.gpu.conv_wgrad import conv_wgrad
from fastres.kernels.reference import backend as reference_backend
from fastres.kernels.reference.block import conv_wgrad_ref
from tests.helpers.kernel_cases import SHAPES, TILES, channels_last, make_tensors
from tests.helpers.numerics import assert_like_eager, largest, rms
from tests.kernels.test_ops import Case, eager_block, fused_block

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(params=["plain", "triton", "cudnn"])
def backend(request, monkeypatch):
    route = "cudnn" if request.param == "cudnn" else "triton"
    monkeypatch.setattr(gpu_backend, "conv_config", lambda *_, **__: replace(TILES, route=route))
    with force_backend(reference_backend if request.param == "plain" else gpu_backend):
        yield request.param


def wide_case(name="projected", dtype=BF16) -> Case:
    """Activations in `dtype`, filters in fp32 that `dtype` does not hold exactly."""
    case = Case(name, dtype)
    generator = torch.Generator().manual_seed(7)

    def widen(layer):
        w = torch.randn(layer.w.shape, generator=generator) / layer.w[0].numel() ** 0.5
        return layer._replace(w=channels_last(w))

    case.layers = [widen(layer) for layer in case.layers]
    case.projection = case.projection and widen(case.projection)
    return case


def narrow_case(wide: Case) -> Case:
    """The same with the filters rounded by the caller."""

    def narrow(layer):
        return layer._replace(w=layer.w.detach().to(wide.x.dtype))

    case = wide_case()
    case.x, case.residual = wide.x.detach(), wide.residual
    case.layers = [narrow(layer) for layer in wide.layers]
    case.projection = wide.projection and narrow(wide.projection)
    return case


def all_layers(case: Case):
    return [*case.layers, *([case.projection] if case.projection else [])]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_step_is_that_of_rounded_filters(dtype):
    """And what it returns for the filters is no rounder than what it returns for rounded ones."""
    wide = wide_case(dtype=dtype)
    got, wanted = wide.step(fused_block), narrow_case(wide).step(fused_block)
    for name, value in got.items():
        is_filter = name.startswith("w ")
        assert value.dtype == (torch.float32 if is_filter else wanted[name].dtype), name
        assert torch.equal(value.to(wanted[name].dtype), wanted[name]), name


@pytest.mark.parametrize("split_k", [1, 3])
def test_filter_gradients_are_sums_in_fp32(split_k):
    """As right as an fp32 convolution of the same bf16 operands, which eager rounds to bf16."""
    shape = SHAPES["3x3, stride 2"]
    t = make_tensors(shape, BF16)
    config = replace(TILES, split_k=split_k)
    options = {"stride": 2, "padding": 1}
    got = conv_wgrad(t.x, t.dy.g, (3, 3), **options, dw_dtype=torch.float32, config=config)
    eager = conv_wgrad_ref(t.x.float(), t.dy.g.float(), (3, 3), **options)
    truth = conv_wgrad_ref(t.x.double(), t.dy.g.double(), (3, 3), **options)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert_like_eager("dw", got, eager, truth, torch.float32)


def test_filter_gradients_of_a_block_are_nearer_to_the_truth(backend):
    """Than eager's, which are rounded to bf16 on their way to the parameter."""
    if backend != "triton":
        pytest.skip("torch's convolutions round their results")
    case = wide_case("layer")
    narrow = narrow_case(case)
    got, eager = case.step(fused_block)["w 0"], narrow.step(eager_block)["w 0"]
    truth = narrow.double().step(eager_block)["w 0"]
    for norm in (rms, largest):
        assert norm(got.double() - truth) < 0.9 * norm(eager.double() - truth)


@pytest.mark.usefixtures("backend")
def test_copies_are_read_and_made_again_when_their_filters_change():
    case = wide_case()
    copies = FilterCopies([layer.w for layer in all_layers(case)], BF16)
    wanted = case.step(fused_block)
    with copies.in_use():
        got = case.step(fused_block)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)

    # Nothing but the filters' version tells that they have changed.
    with torch.no_grad():
        case.layers[0].w.mul_(-1.5)
    wanted = case.step(fused_block)
    with copies.in_use():
        got = case.step(fused_block)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)

    # And a copy that is fresh is what the ops compute with, forward and backward.
    copies.of(case.layers[0].w).zero_()
    with copies.in_use():
        zeroed = case.step(fused_block)
    assert not torch.equal(zeroed["out"], wanted["out"])
    assert zeroed["x"].isfinite().all()
    assert not torch.equal(zeroed["x"], wanted["x"])


def test_copies_follow_versions_and_addresses():
    w = channels_last(torch.randn(8, 4, 3, 3))
    odd = [torch.zeros(8, 4, 3, 3), torch.zeros(8), channels_last(torch.zeros(8, 4, 3, 3), BF16)]
    copies = FilterCopies([w, *odd], BF16)
    assert [copies.of(t) for t in odd] == [None] * 3
    copy = copies.of(w)
    assert copy.stride() == w.stride()
    assert torch.equal(copy, w.to(BF16))

    w.add_(1)
    assert not torch.equal(copies.of(w), w.to(BF16))
    copies.refresh()
    assert torch.equal(copies.of(w), w.to(BF16))

    # A kernel that changes both says so; one that found the copy stale may have left it so.
    copy.zero_()
    version = w._version
    copies.note_joint_update([w])
    assert w._version > version
    assert copies.read(w).abs().max() == 0
    w.add_(1)
    copies.note_joint_update([w])
    assert torch.equal(copies.read(w), w.to(BF16))

    old = w.detach()
    w.data = channels_last(torch.randn(8, 4, 3, 3))
    assert copies.read(old) is None
    assert copies.read(w) is None


def test_copies_of_another_precision_are_not_used():
    case = wide_case("layer", FP16)
    copies = FilterCopies([case.layers[0].w], BF16)
    copies.of(case.layers[0].w).zero_()
    with copies.in_use(), force_backend(reference_backend):
        assert case.step(fused_block)["out"].abs().max() > 0


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("order", ["reverse", "forward"])
def test_derivatives_are_those_of_rounded_filters(order):
    """Where autograd has to follow, the rounding is an operation of the graph."""

    def rounded_outside(x, layers, **shortcut):
        rounded = [layer._replace(w=layer.w.to(x.dtype)) for layer in layers]
        if shortcut["projection"] is not None:
            projection = shortcut["projection"]
            shortcut["projection"] = projection._replace(w=projection.w.to(x.dtype))
        return fused_block(x, rounded, **shortcut)

    def derivative(block):
        case = wide_case()
        first = case.layers[0].w.requires_grad_()
        copies = FilterCopies([layer.w for layer in all_layers(case)], BF16)
        options = {"projection": case.projection, "residual": None, "add_input": False}
        if order == "forward":
            with forward_ad.dual_level():
                w = forward_ad.make_dual(first, torch.ones_like(first))
                layers = [case.layers[0]._replace(w=w), case.layers[1]]
                return forward_ad.unpack_dual(block(case.x, layers, **options)).tangent
        out = block(case.x, case.layers, **options).float()
        # No copy may take the place of an operation that autograd follows.
        with copies.in_use():
            (dw,) = torch.autograd.grad(out.square().sum(), first, create_graph=True)
        assert dw.dtype == torch.float32
        return torch.autograd.grad(dw.square().sum(), first)[0]

    got, wanted = derivative(fused_block), derivative(rounded_outside)
    assert got.abs().max() > 0
    # Two roundings of one filter add their gradients in fp32, one rounding its two in bf16.
    torch.testing.assert_close(got, wanted, rtol=2**-7, atol=2**-8 * wanted.abs().max().item())


@pytest.mark.usefixtures("plain")
def test_opcheck():
    case = wide_case()
    params = [t.requires_grad_() for layer in all_layers(case) for t in layer[:3]]
    geometry = [number for layer in all_layers(case) for number in (layer.stride, layer.padding)]
    arguments = (params, geometry, [1e-5] * 3, "projected", True)
    forward = torch.ops.fastres.residual_block_fwd.default
    torch.library.opcheck(forward, (case.x.requires_grad_(), None, *arguments))
    with torch.no_grad():
        out, saved = forward(case.x, None, *arguments)
    torch.library.opcheck(
        torch.ops.fastres.residual_block_bwd.default,
        (out, case.x.detach(), out, [t.detach() for t in params], saved, *arguments[1:], True),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_filters_of_an_unrelated_precision_are_refused():
    case = wide_case("layer", BF16)
    layer = case.layers[0]
    for dtype in (FP16, torch.float64):
        with pytest.raises(ValueError, match="w must be"):
            ops.conv_bn_relu(case.x, layer._replace(w=layer.w.to(dtype)))
    with pytest.raises(ValueError, match="w must be"):
        ops.conv_bn_relu(case.x.float(), layer._replace(w=layer.w.to(BF16)))
