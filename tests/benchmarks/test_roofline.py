"""The roofline: bytes and operations are counted right, and the numbers belong to each other."""

import time

import pytest
import torch

from benchmarks.roofline import command, measure, profile_step, step_traffic, view
from benchmarks.roofline.peak_rates import conv_calls, distinct_layers
from fastres import create_model
from fastres.kernels.tools.networks import resnet20_convs
from fastres.model.resnet import BasicBlock
from fastres.model.summary import summarize
from tests.helpers.interpreter import HAS_GPU


class OneBlock(torch.nn.Module):
    """A stem that makes 16 channels of 3, and an identity block behind it."""

    def __init__(self, blocks: int):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 1, bias=False)
        self.blocks = torch.nn.Sequential(*(BasicBlock(16, 16, 1, "B") for _ in range(blocks)))

    def forward(self, x):
        return self.blocks(self.stem(x)).mean(dim=(2, 3))


def bytes_of_a_block(scheme):
    """What the second of two blocks adds, without its optimizer."""
    one, two = (step_traffic.count_step(OneBlock(n), 64, torch.bfloat16) for n in (1, 2))
    params = 2 * 16 * 16 * 9 + 4 * 16
    return two.bytes[scheme] - one.bytes[scheme] - 20 * params


def test_schemes_make_the_tensor_passes_of_the_design():
    one_pass = 64 * 16 * 32 * 32 * 2
    filters = 2 * 16 * 16 * 9 * 2
    assert bytes_of_a_block("fused") == 20 * one_pass + 3 * filters
    # Traced, so with filters and per-channel operands.
    assert bytes_of_a_block("eager") == pytest.approx(42 * one_pass, rel=0.01)


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "resnet50", "resnet9"])
def test_operations_are_those_of_the_summary_without_the_gradient_of_the_images(name):
    model = create_model(name)
    stem = next(layer for layer in summarize(model).layers if layer.kind == "Conv2d")
    expected = summarize(model).training_flops - 2 * stem.macs
    work = step_traffic.count_step(model, 2, torch.bfloat16)
    assert work.flops == 2 * expected
    assert work.fewest_bytes == work.bytes["fused"] < work.bytes["eager"]


def test_layers_know_their_shapes():
    layers = step_traffic.conv_layers(create_model("resnet20"))
    shapes = distinct_layers(layers)
    assert sum(count for _, count in shapes) == len(layers) == 21
    described = {conv.shape: conv.num_layers for conv in resnet20_convs(1)}
    assert {layer.shape: count for layer, count in shapes} == described
    assert [layer.needs_dgrad for layer in layers] == [False, *[True] * 20]
    assert layers[7].label == "3x3/2 16 -> 32, 32x32"


def test_calls_are_the_products_of_the_layer():
    (layer, _), (inner, _) = distinct_layers(step_traffic.conv_layers(create_model("resnet20")))[:2]
    options = (2, torch.float32, torch.device("cpu"), torch.channels_last)
    assert set(conv_calls(layer, *options)) == {"fprop", "wgrad"}
    calls, size = conv_calls(inner, *options), (2, 16, 32, 32)
    assert calls["fprop"]().shape == size
    dx, no_dw, _ = calls["dgrad"]()
    no_dx, dw, _ = calls["wgrad"]()
    assert dx.shape == size
    assert dw.shape == (16, 16, 3, 3)
    assert no_dw is None
    assert no_dx is None


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::convolution_backward", "convolutions"),
        ("aten::native_batch_norm", "batch norm"),
        ("aten::threshold_backward", "ReLU"),
        ("aten::clamp_min", "ReLU"),
        ("aten::_fused_sgd_", "optimizer"),
        ("aten::_to_copy", "casts and copies"),
        ("aten::addmm", "head and loss"),
        ("aten::add_", "add"),
        ("aten::empty", "other"),
        ("fastres::residual_block_fwd", "fused operators"),
        ("_EagerBlockBackward", "fused operators"),
    ],
)
def test_operators_have_a_category(name, category):
    assert step_traffic.category_of_operator(name) == category
    assert category in step_traffic.CATEGORIES


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolutions"),
        ("void cudnn::ops::nchwToNhwcKernel<float>", "casts and copies"),
        ("_conv_dgrad_kernel", "convolutions"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NHWC", "batch norm"),
        ("triton_red_fused__native_batch_norm_legit_functional_relu_3", "batch norm"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::threshold_kernel", "ReLU"),
        ("void at::native::multi_tensor_apply_kernel<FusedSgdMathFunctor>", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "casts and copies"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>", "add"),
    ],
)
def test_gpu_kernels_have_a_category(name, category):
    assert profile_step.category_of_kernel(name) == category


def test_a_profile_adds_up_to_the_step():
    device = torch.device("cuda" if HAS_GPU else "cpu")
    conv = torch.nn.Conv2d(32, 32, 3, device=device)
    x = torch.randn(256, 32, 32, 32, device=device)
    shares = profile_step.profile_step(lambda: conv(x), device, num_steps=3)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["convolutions"] > 0.5
    idle = profile_step.profile_step(lambda: (conv(x), time.sleep(0.5)), device, num_steps=1)
    assert idle[profile_step.OUTSIDE] > 0.5


def test_the_command_measures_shows_draws_and_records(tmp_path, capsys):
    before = torch.get_num_threads()
    plot = tmp_path / "roofline.png"
    options = ["--model", "resnet8", "--batch-size", "4", "--seconds", "1", "--dtype", "fp32"]
    try:
        assert command.main([*options, "--out", str(plot), "--results", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(before)
    printed = capsys.readouterr().out
    for text in (
        "Peak rates",
        "step / convolutions alone",
        "Where the step goes",
        "resnet8 batch 4",
    ):
        assert text in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    (path,) = tmp_path.glob("roofline_*.csv")
    assert "step_over_convolutions" in path.read_text()
    assert command.main([*options, "--out", str(tmp_path / "roofline.jpg")]) == 2
    assert command.main([*options, "--results", str(tmp_path / "nowhere")]) == 2
    assert command.main(["--seconds", "0"]) == 2


def test_the_numbers_belong_to_each_other():
    layer = step_traffic.conv_layers(create_model("resnet8"))[1]
    conv = measure.ConvTime(layer, 3, {"fprop": [1.0, 2.0, 9.0], "dgrad": [2.0], "wgrad": [3.0]})
    assert conv.seconds() == 3 * (2 + 2 + 3)
    result = measure.Roofline(
        case="resnet8 batch 4, fp32",
        dtype="fp32",
        route="eager",
        batch_size=4,
        work=step_traffic.StepWork(600, {"eager": 90, "fused": 80}, {}),
        copies={"large": [8.0, 4.0, 8.0], "activation": [99.0]},
        products={"fp32": [50.0], "bf16": [100.0]},
        convs=[conv],
        step=[42.0, 63.0, 21.0],
        profile={"convolutions": 0.75, profile_step.OUTSIDE: 0.25},
    )
    assert result.memory_seconds == 10
    assert result.arithmetic_seconds == result.floor == 12
    assert result.over_convolutions == [2, 3, 1]
    rows = {(row.suite, row.metric): row for row in measure.rows_of_roofline(result)}
    assert rows["roofline", "step_over_convolutions"].median == 2
    assert rows["roofline", "floor"].median == 12_000
    assert rows["roofline", "floor_share"].median == pytest.approx(100 * 12 / 42, rel=1e-5)
    assert rows["convolutions", "dgrad"].median == pytest.approx(
        layer.shape.flops * 4 / 2 / 1e9, rel=1e-5
    )
    assert rows["profile", "convolutions"].median == 75
    assert any("2.000 (1.000 to 3.000)" in line for line in view.verdict(result))
