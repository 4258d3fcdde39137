"""The registered ops: schema, fakes, autograd, numbers on all backends and both routes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastres.kernels import block as block_ops
from fastres.kernels import ops
from fastres.kernels.conv_types import ConvBN
from fastres.kernels.cpu import backend as cpu_backend
from fastres.kernels.cpu import build as cpu_build
from fastres.kernels.dispatch import force_backend
from fastres.kernels.gpu import backend as gpu_backend
from fastres.kernels.gpu.launch import recording
from fastres.kernels.reference import backend as reference_backend
from tests.helpers.interpreter import DEVICE, HAS_GPU
from tests.helpers.kernel_cases import TILES, channels_last
from tests.helpers.numerics import PooledErrorBound
from tests.helpers.property_cases import MOST_DRAWS


@pytest.fixture(params=["plain", "triton", "cudnn", "cpu"])
def backend(request, monkeypatch):
    """Plain torch; Triton kernels; torch convolutions with these around them; CPU kernels."""
    if request.param == "cpu" and (HAS_GPU or cpu_build.library() is None):
        pytest.skip(f"no CPU kernels: {cpu_build.unavailable() or 'the tests run on a GPU'}")
    route = "cudnn" if request.param == "cudnn" else "triton"
    config = replace(TILES, route=route)
    monkeypatch.setattr(gpu_backend, "conv_config", lambda *_, **__: config)
    others = {"plain": reference_backend, "cpu": cpu_backend}
    with force_backend(others.get(request.param, gpu_backend)):
        yield


@pytest.fixture
def plain():
    with force_backend(reference_backend):
        yield


def make_layer(k, c, r, stride, generator, dtype=torch.float32) -> ConvBN:
    def normal(*size):
        return torch.randn(size, generator=generator)

    w = channels_last(normal(k, c, r, r) / (c * r * r) ** 0.5, dtype)
    weight, bias = (1 + 0.1 * normal(k)).to(DEVICE), normal(k).to(DEVICE)
    return ConvBN(w, weight, bias, stride, r // 2)


def eager_conv_bn(x, layer: ConvBN):
    y = F.conv2d(x, layer.w, stride=layer.stride, padding=layer.padding)
    return F.batch_norm(y, None, None, layer.weight, layer.bias, True, 0.1, layer.eps)


def eager_block(x, layers, projection=None, residual=None, add_input=True, relu=True):
    z = x
    for layer in layers[:-1]:
        z = F.relu(eager_conv_bn(z, layer))
    z = eager_conv_bn(z, layers[-1])
    if projection is not None:
        z = z + eager_conv_bn(x, projection)
    elif residual is not None:
        z = z + residual
    elif add_input:
        z = z + x
    return F.relu(z) if relu else z


CASES = {
    "layer": ([(17, 16, 3, 2)], None, "none"),
    "layer + residual": ([(17, 16, 1, 1)], None, "given"),
    "basic": ([(16, 16, 3, 1), (16, 16, 3, 1)], None, "input"),
    "no shortcut": ([(16, 16, 3, 1), (16, 16, 3, 1)], None, "none"),
    "projected": ([(32, 16, 3, 2), (32, 32, 3, 1)], (32, 16, 1, 2), "none"),
    "bottleneck": ([(8, 16, 1, 1), (8, 8, 3, 1), (16, 8, 1, 1)], None, "input"),
}
NO_RELU = [f"{name}, no ReLU" for name in ("layer + residual", "basic", "projected")]
CASES |= {name: CASES[name.removesuffix(", no ReLU")] for name in NO_RELU}


class Case:
    """Inputs of one case in some dtype, and both ways through it."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, seed: int = 0):
        layers, projection, self.kind = CASES[name]
        self.relu = name not in NO_RELU
        generator = torch.Generator().manual_seed(seed)
        self.x = channels_last(torch.randn(2, 16, 6, 5, generator=generator), dtype)
        self.layers = [make_layer(*layer, generator, dtype) for layer in layers]
        self.projection = projection and make_layer(*projection, generator, dtype)
        self.residual = None
        if self.kind == "given":
            self.residual = channels_last(torch.randn(2, 17, 6, 5, generator=generator), dtype)

    def double(self) -> "Case":
        def widen(value):
            if isinstance(value, ConvBN):
                return ConvBN(*(t.double() for t in value[:3]), *value[3:])
            return value if value is None else value.double()

        wide = object.__new__(Case)
        wide.x, wide.residual = widen(self.x), widen(self.residual)
        wide.kind, wide.relu = self.kind, self.relu
        wide.layers = [widen(layer) for layer in self.layers]
        wide.projection = widen(self.projection)
        return wide

    def inputs(self) -> dict[str, torch.Tensor]:
        """All differentiable inputs by name."""
        named = {"x": self.x}
        if self.residual is not None:
            named["residual"] = self.residual
        layers = [*self.layers, self.projection] if self.projection else self.layers
        for i, layer in enumerate(layers):
            named |= {f"{field} {i}": getattr(layer, field) for field in ("w", "weight", "bias")}
        return named

    def options(self) -> dict[str, object]:
        """What a block is told beside x and layers."""
        return {
            "projection": self.projection,
            "residual": self.residual,
            "add_input": self.kind == "input",
            "relu": self.relu,
        }

    def step(self, block) -> dict[str, torch.Tensor]:
        """Output and every gradient of `block`."""
        inputs = self.inputs()
        for tensor in inputs.values():
            tensor.requires_grad_()
        out = block(self.x, self.layers, **self.options())
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        return {"out": out, **dict(zip(inputs, _grads(out, inputs, dout), strict=True))}


def _grads(out, inputs, dout):
    return torch.autograd.grad(out, list(inputs.values()), dout)


def fused_block(x, layers, **shortcut):
    return ops.residual_block(x, layers, **shortcut)[0]


def assert_steps_like_eager(name: str, dtype: torch.dtype) -> None:
    """Output and gradients are as right as eager's, judged on as many draws as it takes.

    In one draw of tensors as small as these, eager may be exact by luck.
    """
    has_relu = name not in NO_RELU or len(CASES[name][0]) > 1
    bound = PooledErrorBound(dtype, has_relu=has_relu)
    for seed in range(MOST_DRAWS):
        got = Case(name, dtype, seed).step(fused_block)
        eager = Case(name, dtype, seed).step(eager_block)
        truth = Case(name, dtype, seed).double().step(eager_block)
        assert got["out"].is_contiguous(memory_format=torch.channels_last)
        for key, value in got.items():
            bound.add(key, value, [eager[key]], truth[key])
        if not bound.refused():
            break
    assert not bound.refused()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", CASES)
def test_output_and_every_gradient(name):
    assert_steps_like_eager(name, torch.float32)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ["basic", "projected"])
def test_output_and_every_gradient_in_bfloat16(name):
    """Gradients in fp32 inherit the network's roundings and are measured as bfloat16."""
    assert_steps_like_eager(name, torch.bfloat16)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", NO_RELU)
def test_without_a_relu_out_may_be_changed_in_place_before_backward(name):
    case = Case(name)
    wanted = Case(name).step(fused_block)
    # Doubled and halved again, so that every gradient is the same bit for bit.
    got = case.step(lambda *args, **options: fused_block(*args, **options).mul_(2).mul_(0.5))
    for key, value in got.items():
        assert torch.equal(value, wanted[key]), key


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("relu", [True, False])
def test_layer_and_its_statistics(relu):
    case = Case("layer")
    layer = case.layers[0]
    out, (stats,) = ops.conv_bn_relu(case.x, layer, relu=relu)
    y = F.conv2d(case.x.double(), layer.w.double(), stride=2, padding=1)
    torch.testing.assert_close(stats.mean.double(), y.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.unbiased_var.double(), y.var((0, 2, 3)), rtol=1e-5, atol=0)
    z = eager_conv_bn(case.x, layer)
    torch.testing.assert_close(out, z.relu() if relu else z, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("backend")
def test_folded_layer():
    case = Case("layer + residual")
    layer = case.layers[0]
    scale_shift = torch.stack([layer.weight, layer.bias])
    a, b = scale_shift.view(2, 1, -1, 1, 1)
    z = F.conv2d(case.x, layer.w) * a + b
    for residual, relu in ((case.residual, True), (None, False)):
        out = ops.conv_bn_folded(case.x, layer, scale_shift, residual=residual, relu=relu)
        wanted = z if residual is None else (z + residual).relu()
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    "name", ["basic", "no shortcut", "projected", "bottleneck", "projected, no ReLU"]
)
def test_folded_block(name):
    case = Case(name)
    layers = [*case.layers, case.projection] if case.projection else case.layers
    scale_shifts = [torch.stack([layer.weight, layer.bias]) for layer in layers]

    def folded(x, layer):
        a, b = (v.view(1, -1, 1, 1) for v in (layer.weight, layer.bias))
        return F.conv2d(x, layer.w, stride=layer.stride, padding=layer.padding) * a + b

    out = ops.residual_block_folded(
        case.x,
        case.layers,
        scale_shifts,
        projection=case.projection,
        add_input=case.kind == "input",
        relu=case.relu,
    )
    z = case.x
    for layer in case.layers[:-1]:
        z = folded(z, layer).relu()
    z = folded(z, case.layers[-1])
    if case.projection is not None:
        z = z + folded(case.x, case.projection)
    z = z + case.x if case.kind == "input" else z
    wanted = z.relu() if case.relu else z
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("plain")
def test_a_folded_block_needs_a_scale_and_shift_for_every_layer():
    case = Case("projected")
    scale_shifts = [torch.stack([layer.weight, layer.bias]) for layer in case.layers]
    with pytest.raises(ValueError, match="got 2 scale_shifts for 3 layers"):
        ops.residual_block_folded(case.x, case.layers, scale_shifts, projection=case.projection)
    with pytest.raises(ValueError, match="got 0 scale_shifts for 0 layers"):
        ops.residual_block_folded(case.x, [], [])


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("op", "name", "shortcut"),
    [
        ("conv_bn_relu", "layer", "none"),
        ("residual_block", "layer + residual", "given"),
        ("residual_block", "layer + residual, no ReLU", "given"),
        ("residual_block", "projected", "projected"),
    ],
)
def test_opcheck(op, name, shortcut):
    case = Case(name).double()
    layers = [*case.layers, case.projection] if case.projection else case.layers
    params = [t.requires_grad_() for layer in layers for t in layer[:3]]
    geometry = [number for layer in layers for number in (layer.stride, layer.padding)]
    eps = [layer.eps for layer in layers]
    arguments = (params, geometry, eps, shortcut, case.relu)
    forward = getattr(torch.ops.fastres, f"{op}_fwd").default
    torch.library.opcheck(forward, (case.x.requires_grad_(), case.residual, *arguments))
    with torch.no_grad():
        out, saved = forward(case.x, case.residual, *arguments)
    backward = getattr(torch.ops.fastres, f"{op}_bwd").default
    mask = out if case.relu and shortcut != "none" else None
    detached = [t.detach() for t in params]
    for need_dx in (True, False):
        torch.library.opcheck(
            backward,
            (out, case.x.detach(), mask, detached, saved, *arguments[1:], need_dx),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.usefixtures("plain")
def test_opcheck_folded():
    case = Case("layer + residual").double()
    scale_shift = torch.stack([case.layers[0].weight, case.layers[0].bias])
    torch.library.opcheck(
        torch.ops.fastres.conv_bn_folded.default,
        (case.x, case.layers[0].w, scale_shift, case.residual, 1, 0, True),
    )


def test_one_shortcut_at_most():
    case = Case("projected")
    with pytest.raises(ValueError, match="at most one"):
        ops.residual_block(case.x, case.layers, projection=case.projection, residual=case.x)


@pytest.mark.parametrize(("width", "passes"), [(16, 20), (64, 25)])
def test_tensor_passes_of_a_basic_block(width, passes):
    """Counted from what the launches of the registered op declare, at batch 512."""

    def meta(*size, dtype=torch.float32):
        layout = torch.channels_last if len(size) == 4 else torch.contiguous_format
        return torch.empty(size, dtype=dtype, device="meta", memory_format=layout)

    x = meta(512, width, 32, 32, dtype=torch.bfloat16)
    w = meta(width, width, 3, 3, dtype=torch.bfloat16)
    layers = [ConvBN(w, meta(width), meta(width), 1, 1)] * 2
    block = block_ops.Block(layers, shortcut="input")
    with recording() as launches:
        out, states = block_ops.forward(block, x, None, gpu_backend)
        block_ops.backward(block, out, x, out, states, gpu_backend, need_dx=True)
    operands = [tensor for launch in launches for tensor in launch.tensors.values()]
    assert sum(t.shape == x.shape for t in operands) == passes
