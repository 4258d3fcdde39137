"""The roofline: bytes and operations are counted right, and the numbers belong to each other."""

import time

import pytest
import torch

from benchmarks.roofline import measure, profile_step, step_traffic, view
from benchmarks.roofline.peak_rates import conv_calls, distinct_layers
from fastres import create_model
from fastres.kernels import block as block_ops
from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.gpu import backend as gpu_backend
from fastres.kernels.gpu.launch import recording
from fastres.kernels.reference.block import ConvBN
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
    """What the second of two blocks adds, without its parameters."""
    one, two = (step_traffic.count_step(OneBlock(n), 8, torch.bfloat16) for n in (1, 2))
    filters, params = 2 * 16 * 16 * 9, 2 * 16 * 16 * 9 + 4 * 16
    return two.bytes[scheme] - one.bytes[scheme] - 3 * 2 * filters - 20 * params


def test_schemes_make_the_passes_of_the_design():
    one_pass = 8 * 16 * 32 * 32 * 2
    assert bytes_of_a_block("fused") == 25 * one_pass
    assert bytes_of_a_block("least") == 23 * one_pass
    assert bytes_of_a_block("compile") == 30 * one_pass
    # Traced, so with the per-channel operands; the filters of `eager` are counted by the trace.
    assert bytes_of_a_block("eager") == pytest.approx(42 * one_pass, rel=0.01)


def test_the_fused_scheme_is_what_the_launches_declare():
    x = torch.empty(
        (64, 16, 32, 32),
        dtype=torch.bfloat16,
        device="meta",
        memory_format=torch.channels_last,
    )
    w = torch.empty(
        (16, 16, 3, 3), dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last
    )
    vector = torch.empty(16, device="meta")
    block = block_ops.Chain([ConvBN(w, vector, vector, 1, 1)] * 2, shortcut="input")
    with recording() as launches:
        out, states = block_ops.forward(block, x, None, gpu_backend)
        block_ops.backward(block, out, x, out, states, gpu_backend, need_dx=True)
    declared = sum(launch.traffic.bytes for launch in launches)
    counted = 25 * x.numel() * 2
    # The rest are partial sums of statistics and split filter gradients.
    assert counted < declared < 1.15 * counted


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "resnet50", "resnet9"])
def test_operations_are_those_of_the_summary_without_the_gradient_of_the_images(name):
    model = create_model(name)
    stem = next(layer for layer in summarize(model).layers if layer.kind == "Conv2d")
    expected = summarize(model).training_flops - 2 * stem.macs
    work = step_traffic.count_step(model, 2, torch.bfloat16)
    assert work.flops == 2 * expected
    assert work.bytes["least"] < work.bytes["fused"] < work.bytes["compile"] < work.bytes["eager"]


def test_layers_know_their_shapes():
    layers = step_traffic.conv_layers(create_model("resnet20"))
    shapes = distinct_layers(layers)
    assert sum(count for _, count in shapes) == len(layers) == 21
    for layer, _ in shapes:
        (channels, side, _), outputs = layer.inputs, layer.outputs
        shape = ConvShape(
            4, side, side, channels, outputs[0], layer.kernel, layer.kernel, layer.stride,
            layer.padding,
        )  # fmt: skip
        assert (shape.P, shape.flops) == (outputs[1], 4 * layer.flops)


def test_calls_are_the_products_of_the_layer():
    (layer, _), (inner, _) = distinct_layers(step_traffic.conv_layers(create_model("resnet20")))[:2]
    options = (2, torch.float32, torch.device("cpu"), torch.channels_last)
    assert set(conv_calls(layer, *options)) == {"fprop", "wgrad"}
    calls = conv_calls(inner, *options)
    assert calls["fprop"]().shape == (2, *inner.outputs)
    dx, no_dw, _ = calls["dgrad"]()
    no_dx, dw, _ = calls["wgrad"]()
    assert dx.shape == (2, *inner.inputs)
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
        ("_EagerChainBackward", "fused operators"),
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
        assert measure.main([*options, "--out", str(plot), "--results", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(before)
    printed = capsys.readouterr().out
    for text in ("Ceilings", "step / convolutions alone", "Where the step goes", "resnet8 batch 4"):
        assert text in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    (path,) = tmp_path.glob("roofline_*.csv")
    assert "step_over_convolutions" in path.read_text()
    assert measure.main([*options, "--out", str(tmp_path / "roofline.jpg")]) == 2
    assert measure.main([*options, "--results", str(tmp_path / "nowhere")]) == 2
    assert measure.main(["--seconds", "0"]) == 2


def test_the_numbers_belong_to_each_other():
    layer = step_traffic.conv_layers(create_model("resnet8"))[1]
    conv = measure.ConvTime(layer, 3, {"fprop": [1.0, 2.0, 9.0], "dgrad": [2.0], "wgrad": [3.0]})
    assert conv.seconds() == 3 * (2 + 2 + 3)
    result = measure.Roofline(
        case="resnet8 batch 4, fp32",
        dtype="fp32",
        route="eager",
        batch_size=4,
        work=step_traffic.StepWork(
            600, dict.fromkeys(("eager", "compile", "fused", "least"), 80), {}, 9
        ),
        copies={"large": [8.0, 4.0, 8.0], "activation": [99.0]},
        products={"fp32": [50.0], "bf16": [100.0]},
        convs=[conv],
        step=[42.0, 63.0, 21.0],
        profile={"convolutions": 0.75, profile_step.OUTSIDE: 0.25},
    )
    assert result.memory_seconds() == 10
    assert result.arithmetic_seconds == result.floor == 12
    assert result.over_convolutions == [2, 3, 1]
    rows = {(row.suite, row.metric): row for row in measure.rows_of_roofline(result)}
    assert rows["roofline", "step_over_convolutions"].median == 2
    assert rows["roofline", "floor"].median == 12_000
    assert rows["roofline", "floor_share"].median == pytest.approx(100 * 12 / 42, rel=1e-5)
    assert rows["convolutions", "dgrad"].median == pytest.approx(
        layer.flops * 4 / 2 / 1e9, rel=1e-5
    )
    assert rows["profile", "convolutions"].median == 75
    assert any("2.000 (1.000 to 3.000)" in line for line in view.verdict(result))
