"""Operands that kernels would misread are refused; gradients that never come are no error."""

import pytest
import torch

from fastres.kernels import block as block_ops
from fastres.kernels import ops
from fastres.kernels.conv_types import ConvBN
from fastres.kernels.cpu import backend as cpu_backend
from fastres.kernels.cpu import build as cpu_build
from fastres.kernels.dispatch import force_backend
from fastres.kernels.gpu import backend as gpu_backend
from fastres.kernels.reference import backend as reference_backend
from tests.helpers.interpreter import DEVICE

K, C = 8, 4


@pytest.fixture(params=["plain", "triton", "cpu"], autouse=True)
def _backend(request):
    backend = {"plain": reference_backend, "triton": gpu_backend, "cpu": cpu_backend}[request.param]
    if backend is cpu_backend and (DEVICE.type != "cpu" or cpu_build.library() is None):
        pytest.skip(f"no CPU kernels: {cpu_build.unavailable() or 'the tests run on a GPU'}")
    with force_backend(backend):
        yield


def layer(**parts) -> ConvBN:
    made = {"w": torch.ones(K, C, 3, 3), "weight": torch.ones(K), "bias": torch.zeros(K)} | parts
    return ConvBN(*(made[name].to(DEVICE) for name in ("w", "weight", "bias")), 1, 1)


def x(**options) -> torch.Tensor:
    values = torch.randn(2, C, 5, 5, generator=torch.Generator().manual_seed(0))
    return values.to(DEVICE).contiguous(memory_format=torch.channels_last).to(**options)


WRONG_LAYERS = {
    "channels": {"w": torch.ones(K, C + 1, 3, 3)},
    "w of another dtype": {"w": torch.ones(K, C, 3, 3, dtype=torch.bfloat16)},
    "short weight": {"weight": torch.ones(K - 1)},
    "weight of another dtype": {"weight": torch.ones(K, dtype=torch.float64)},
    "bias of two dimensions": {"bias": torch.zeros(K, 1)},
}


@pytest.mark.parametrize("name", WRONG_LAYERS)
def test_a_layer_that_does_not_fit_is_refused(name):
    wrong = ConvBN(*(WRONG_LAYERS[name].get(f, getattr(layer(), f)) for f in ConvBN._fields[:3]))
    good = layer(w=torch.ones(C, C, 3, 3), weight=torch.ones(C), bias=torch.zeros(C))
    for run in (
        lambda: ops.conv_bn_relu(x(), wrong),
        lambda: ops.residual_block(x(), [good, wrong], add_input=False),
        lambda: ops.residual_block(x(), [layer()], projection=wrong),
    ):
        with pytest.raises(ValueError, match="must"):
            run()


@pytest.mark.parametrize(
    "wrong",
    [torch.ones(2, K, 1, 1), torch.ones(2, K, 5, 5, dtype=torch.bfloat16)],
    ids=["size", "dtype"],
)
def test_a_shortcut_that_does_not_fit_is_refused(wrong):
    wrong = wrong.to(DEVICE)
    scale_shift = torch.ones(2, K, device=DEVICE)
    for run in (
        lambda: ops.residual_block(x(), [layer()], residual=wrong),
        lambda: ops.conv_bn_folded(x(), layer(), scale_shift, residual=wrong),
    ):
        with pytest.raises(ValueError, match="shortcut"):
            run()


def test_operands_on_two_devices_are_refused():
    elsewhere = layer()._replace(bias=torch.zeros(K, device="meta"))
    with pytest.raises(ValueError, match="on meta"):
        block_ops.check_layer(x(), elsewhere)
    with pytest.raises(ValueError, match="on meta"):
        block_ops.check_shortcut(torch.ones(2, K, 5, 5, device="meta"), x(), (2, K, 5, 5))


@pytest.mark.parametrize("size", [(2, K - 1), (3, K), (2 * K,)])
def test_a_scale_and_shift_that_do_not_fit_are_refused(size):
    with pytest.raises(ValueError, match="scale_shift"):
        ops.conv_bn_folded(x(), layer(), torch.ones(size, device=DEVICE))


def test_a_scale_and_shift_may_be_a_view():
    scale_shift = torch.randn(K, 2, generator=torch.Generator().manual_seed(1)).to(DEVICE).t()
    got, wanted = (
        ops.conv_bn_folded(x(), layer(), values)
        for values in (scale_shift, scale_shift.contiguous())
    )
    assert torch.equal(got, wanted)


class Blocked(torch.autograd.Function):
    """The identity, whose gradient is none."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_no_gradient_of_the_output_is_none_of_the_inputs():
    made = layer()
    inputs = [x().requires_grad_(), *(t.requires_grad_() for t in made[:3])]
    Blocked.apply(ops.conv_bn_relu(inputs[0], made)[0]).sum().backward()
    assert [t.grad for t in inputs] == [None] * 4
