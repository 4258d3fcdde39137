"""Both gradients of a convolution in one launch: the results of eager and fp64, borders, traps."""

from dataclasses import replace

import pytest
import torch
import triton.language as tl

from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.conv_types import ConvBN, LayerState
from fastres.kernels.gpu import backend
from fastres.kernels.gpu import conv_backward as backward_module
from fastres.kernels.gpu.conv_backward import conv_gradients
from fastres.kernels.gpu.launch import recording
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.launch_rules import fused_config, im2col_config
from fastres.kernels.gpu.launch_table import assume_entries
from fastres.kernels.gpu.prologue import plain_arithmetic
from fastres.kernels.gpu.table_file import table_key
from fastres.kernels.reference import block as ref
from tests.helpers.interpreter import DEVICE, needs_gpu, strict_memory  # noqa: F401
from tests.helpers.kernel_cases import (
    channels_last,
    check_producer_grads,
    dgrad,
    make_tensors,
    pre_activation,
    wgrad,
)
from tests.helpers.numerics import assert_like_eager, away_from_ties

pytestmark = pytest.mark.usefixtures("strict_memory")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TALL = ConvConfig(16, 16, 16, num_warps=4, num_stages=1, form="fused", patch_h=4, grid_size=2)
FLAT = replace(TALL, patch_h=2, ahead=4, grid_size=3)

# Of patches of 4 x 2 and 2 x 2 pixels, 16 to a tile: whole tiles, and what hangs over each border.
SHAPES = {
    "whole": ConvShape(2, 16, 8, 16, 16),
    "odd height": ConvShape(2, 7, 8, 16, 16),
    "odd": ConvShape(3, 5, 9, 16, 16),
    "one pixel": ConvShape(3, 1, 1, 16, 16),
}

# name, dtype, what else: nothing, a shortcut or a producer; configuration
CASES = [
    ("whole", BF16, "producer", FLAT),
    ("whole", FP16, "shortcut", TALL),
    ("whole", BF16, "nothing", replace(FLAT, grid_size=1)),
    ("odd height", BF16, "shortcut", FLAT),
    ("odd height", FP16, "producer", TALL),
    ("odd", BF16, "producer", TALL),
    ("odd", BF16, "shortcut", replace(TALL, ahead=3)),
    ("one pixel", BF16, "producer", FLAT),
]


def tensors(shape, dtype, case):
    """Inputs whose x is what the producer's batch norm reads, where there is a producer."""
    t = make_tensors(shape, dtype)
    if case == "producer":
        t = t._replace(x=t.producer.y, scale_shift=t.producer.scale_shift)
    return t


def run(t, case, config, dw_dtype=None):
    return conv_gradients(
        t.dy,
        t.x,
        t.w,
        padding=1,
        shortcut=t.shortcut if case == "shortcut" else None,
        producer=t.producer if case == "producer" else None,
        producer_weight=t.producer_weight if case == "producer" else None,
        dw_dtype=dw_dtype,
        config=config,
    )


@pytest.mark.parametrize(("name", "dtype", "case", "config"), CASES)
def test_both_gradients(name, dtype, case, config):
    shape = SHAPES[name]
    t = tensors(shape, dtype, case)
    wide = t.double()
    with recording() as launches:
        dx, dw, grads = run(t, case, config)
    assert [launch.name for launch in launches] == ["conv_backward_kernel"]
    assert dw.is_contiguous(memory_format=torch.channels_last)
    activated = case == "producer"
    assert_like_eager(
        "dw", dw, wgrad(t, shape, activated, True), wgrad(wide, shape, activated, True)
    )
    eager, truth = (dgrad(v, shape, True, case == "shortcut") for v in (t, wide))
    if not activated:
        assert grads is None
        assert_like_eager("dx", dx, eager, truth)
        return
    z = pre_activation(wide)
    eager, truth = ref.relu_grad_ref(z.float(), eager), ref.relu_grad_ref(z, truth)
    assert_like_eager("g", dx, eager, truth, keep=away_from_ties(z, FP32))
    check_producer_grads(grads, dx, t)


@pytest.mark.parametrize("grid_size", [1, 3])
def test_dw_in_fp32_rounds_to_the_bf16_one(grid_size):
    t = tensors(SHAPES["odd"], BF16, "producer")
    config = replace(FLAT, grid_size=grid_size)
    dw = run(t, "producer", config, FP32).dw
    assert dw.dtype == FP32
    assert not torch.equal(dw, dw.to(BF16).float())
    assert torch.equal(dw.to(BF16), run(t, "producer", config).dw)


@pytest.mark.parametrize("config", [TALL, FLAT])
def test_padding_stays_zero_although_shifts_are_not(config):
    """Filters, activations and gradients of ones: results count what lies inside a 5 x 4 image."""
    t = make_tensors(ConvShape(1, 5, 4, 16, 16), BF16)
    zeros = channels_last(torch.zeros(1, 16, 5, 4), BF16)
    coefficients = torch.stack([torch.zeros(16), torch.zeros(16), torch.ones(16)]).to(DEVICE)
    dy = t.dy._replace(g=zeros, y=zeros, coefficients=coefficients)
    stats = torch.cat([t.producer.stats[:3], torch.ones(2, 16, device=DEVICE)])
    t = t._replace(dy=dy, x=zeros, w=torch.ones_like(t.w), producer=LayerState(zeros, stats))
    dx, dw, _ = run(t, "producer", config)
    rows = torch.tensor([2.0, 3.0, 3.0, 3.0, 2.0], device=DEVICE)
    columns = torch.tensor([2.0, 3.0, 3.0, 2.0], device=DEVICE)
    expected = 16 * torch.outer(rows, columns)
    torch.testing.assert_close(dx[0, 0].float(), expected, rtol=0, atol=0)
    taps = torch.outer(torch.tensor([4.0, 5.0, 4.0]), torch.tensor([3.0, 4.0, 3.0])).to(DEVICE)
    torch.testing.assert_close(dw[0, 0].float(), taps, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nan_and_inf_come_through_and_stay_in_their_image(poison):
    shape = SHAPES["whole"]
    t = tensors(shape, BF16, "producer")
    t.x[1, 0, 3, 2] = t.dy.g[1, 2, 3, 2] = poison
    dx, dw, grads = run(t, "producer", FLAT)
    expected = ref.relu_grad_ref(pre_activation(t), dgrad(t, shape, True, False))
    assert (~dx.isfinite() >= ~expected.isfinite()).all()
    assert dx[0].isfinite().all()
    assert (~dw.isfinite() >= ~wgrad(t, shape, True, True).isfinite()).all()
    assert not grads.dbeta.isfinite().all()


def test_64_bit_offsets_and_the_order_of_loads_give_the_same_bits(monkeypatch):
    t = tensors(SHAPES["odd"], BF16, "producer")

    def flat(config):
        dx, dw, grads = run(t, "producer", config)
        return dx, dw, grads.dy.coefficients, grads.dgamma, grads.dbeta

    expected = flat(TALL)
    others = [flat(TALL), flat(replace(TALL, ahead=6))]
    monkeypatch.setattr(backward_module, "index_dtype", lambda *tensors: tl.int64)
    for other in (*others, flat(TALL)):
        for a, b in zip(expected, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_what_one_launch_cannot_compute_takes_two():
    t = make_tensors(SHAPES["whole"], BF16)
    producer = {"producer": t.producer, "producer_weight": t.producer_weight}
    both = {"shortcut": t.shortcut, **producer}
    assert conv_gradients(t.dy, t.x, t.w, padding=1, config=TALL, **both) is None
    strips = replace(TALL, form="strip")
    assert conv_gradients(t.dy, t.x, t.w, padding=1, config=strips) is None
    for shape, dtype in (
        (ConvShape(1, 4, 4, 32, 32), BF16),
        (ConvShape(1, 4, 4, 16, 16, stride=2), BF16),
        (ConvShape(1, 4, 4, 16, 16), FP32),
    ):
        t = make_tensors(shape, dtype)
        options = {"stride": shape.stride, "padding": 1, "config": TALL}
        assert conv_gradients(t.dy, t.x, t.w, **options) is None
        assert fused_config(shape, dtype) is None


def test_operands_that_do_not_fit_are_refused():
    t = make_tensors(SHAPES["whole"], BF16)
    with pytest.raises(ValueError, match="dy must have shape"):
        conv_gradients(t.dy, t.x[:1], t.w, padding=1, config=TALL)
    with pytest.raises(ValueError, match="shortcut must have dtype"):
        conv_gradients(t.dy, t.x, t.w, padding=1, shortcut=t.shortcut.float(), config=TALL)
    with pytest.raises(ValueError, match="give both of producer and producer_weight"):
        conv_gradients(t.dy, t.x, t.w, padding=1, producer=t.producer, config=TALL)
    with pytest.raises(ValueError, match="w must have 16 input channels"):
        conv_gradients(
            t.dy,
            t.x,
            t.w[:, :8].contiguous(memory_format=torch.channels_last),
            padding=1,
            config=TALL,
        )


@pytest.mark.parametrize("has_producer", [True, False])
def test_the_launch_table_chooses_it(has_producer):
    shape = SHAPES["whole"]
    t = tensors(shape, BF16, "producer" if has_producer else "shortcut")
    layer = ConvBN(t.w, *torch.ones(2, 16, device=DEVICE), padding=1)
    options = {
        "producer": t.producer if has_producer else None,
        "producer_weight": t.producer_weight if has_producer else None,
        "shortcut": None if has_producer else t.shortcut,
        "need_dx": True,
    }
    results, names = [], []
    for config in (TALL, im2col_config("dgrad", shape, BF16)):
        with assume_entries({table_key("dgrad", shape, BF16): config}), recording() as launches:
            results.append(backend.conv_backward(t.dy, t.x, layer, **options))
        names.append([launch.name for launch in launches])
    assert names[0] == ["conv_backward_kernel"]
    assert "conv_dgrad_kernel" in names[1]
    for one, other in zip(results[0][:2], results[1][:2], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    with assume_entries({table_key("dgrad", shape, BF16): TALL}), recording() as launches:
        backend.conv_backward(t.dy, t.x, layer, **options | {"need_dx": False})
    assert "conv_backward_kernel" not in [launch.name for launch in launches]


@needs_gpu
@pytest.mark.parametrize("case", ["producer", "shortcut", "nothing"])
def test_packed_and_plain_arithmetic_agree_bit_for_bit(case):
    shape = ConvShape(16, 32, 32, 16, 16)
    t = tensors(shape, BF16, case)
    config = fused_config(shape, BF16)
    packed = run(t, case, config)
    with plain_arithmetic():
        plain = run(t, case, config)
    compared = [(packed.dx, plain.dx), (packed.dw, plain.dw)]
    if case == "producer":
        compared.append((packed.producer.dy.coefficients, plain.producer.dy.coefficients))
        compared += zip(packed.producer[1:], plain.producer[1:], strict=True)
    for a, b in compared:
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    truth = wgrad(t.double(), shape, case == "producer", True)
    assert_like_eager("dw", packed.dw, wgrad(t, shape, case == "producer", True), truth)
