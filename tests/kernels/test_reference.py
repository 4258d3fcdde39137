"""The plain-torch reference against torch's own modules and autograd, in fp64."""

import pytest
import torch
import torch.nn.functional as F

from fastres.kernels import block as block_ops
from fastres.kernels import ops
from fastres.kernels.block import Block
from fastres.kernels.conv_types import ConvBN
from fastres.kernels.dispatch import force_backend
from fastres.kernels.reference import backend as reference_backend
from fastres.kernels.reference import block as ref

FP64 = {"dtype": torch.float64}
# Both sides compute in fp64: only the order of operations differs, over some hundred terms.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def make_layer(k: int, c: int, r: int = 3, stride: int = 1) -> ConvBN:
    return ConvBN(
        torch.randn(k, c, r, r, **FP64) / (c * r * r) ** 0.5,
        torch.rand(k, **FP64) + 0.5,
        torch.randn(k, **FP64),
        stride,
        r // 2,
    )


def eager_layer(x: torch.Tensor, layer: ConvBN, *, training: bool = True) -> torch.Tensor:
    y = F.conv2d(x, layer.w, stride=layer.stride, padding=layer.padding)
    return F.batch_norm(y, None, None, layer.weight, layer.bias, training, 0.0, layer.eps)


def eager_block(
    x: torch.Tensor, layers: list[ConvBN], projection: ConvBN | None = None
) -> torch.Tensor:
    out = x
    for layer in layers[:-1]:
        out = eager_layer(out, layer).relu()
    shortcut = x if projection is None else eager_layer(x, projection)
    return (eager_layer(out, layers[-1]) + shortcut).relu()


def with_grad(layer: ConvBN) -> ConvBN:
    leaves = (t.clone().requires_grad_() for t in layer[:3])
    return ConvBN(*leaves, *layer[3:])


BLOCKS = {
    "basic": lambda: ([make_layer(4, 4), make_layer(4, 4)], None),
    "basic, projected": lambda: (
        [make_layer(6, 4, stride=2), make_layer(6, 6)],
        make_layer(6, 4, 1, stride=2),
    ),
    "bottleneck": lambda: ([make_layer(2, 4, 1), make_layer(2, 2), make_layer(4, 2, 1)], None),
    "bottleneck, projected": lambda: (
        [make_layer(3, 4, 1), make_layer(3, 3, stride=2), make_layer(8, 3, 1)],
        make_layer(8, 4, 1, stride=2),
    ),
}


def forward_and_backward(block: Block, x, residual, dout):
    """A block by the steps in plain torch, gradients derived by hand."""
    out, states = block_ops.forward(block, x, residual, reference_backend)
    mask = None if block.shortcut == "none" else out
    return out, block_ops.backward(block, dout, x, mask, states, reference_backend, need_dx=True)


@pytest.mark.parametrize("kind", BLOCKS)
def test_block_equals_autograd(kind):
    torch.manual_seed(0)
    layers, projection = BLOCKS[kind]()
    x = torch.randn(2, 4, 5, 5, **FP64, requires_grad=True)
    leaves = [with_grad(layer) for layer in layers]
    projected = None if projection is None else with_grad(projection)
    expected = eager_block(x, leaves, projected)
    dout = torch.randn_like(expected)
    expected.backward(dout)

    block = Block(layers, projection, "input" if projection is None else "projected")
    out, grads = forward_and_backward(block, x.detach(), None, dout)
    torch.testing.assert_close(out, expected.detach(), **CLOSE)
    torch.testing.assert_close(grads.dx, x.grad, **CLOSE)
    if projected is not None:
        leaves.append(projected)
    for leaf, got in zip(leaves, grads.layers, strict=True):
        torch.testing.assert_close(got.dw, leaf.w.grad, **CLOSE)
        torch.testing.assert_close(got.dgamma, leaf.weight.grad, **CLOSE)
        torch.testing.assert_close(got.dbeta, leaf.bias.grad, **CLOSE)


class OneLayer(torch.autograd.Function):
    """relu(bn(conv(x)) + residual) and its hand-derived gradients, for gradcheck."""

    @staticmethod
    def forward(ctx, x, w, weight, bias, residual, stride):
        layer = ConvBN(w, weight, bias, stride, w.shape[2] // 2)
        ctx.block = Block([layer], shortcut="none" if residual is None else "given")
        ctx.x = x
        ctx.out, ctx.states = block_ops.forward(ctx.block, x, residual, reference_backend)
        return ctx.out

    @staticmethod
    def backward(ctx, dout):
        mask = None if ctx.block.shortcut == "none" else ctx.out
        grads = block_ops.backward(
            ctx.block, dout, ctx.x, mask, ctx.states, reference_backend, need_dx=True
        )
        return grads.dx, *grads.layers[0], grads.dresidual, None


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("has_residual", [False, True])
def test_gradcheck(stride, has_residual):
    torch.manual_seed(1)
    layer = with_grad(make_layer(2, 3, stride=stride))
    x = torch.randn(2, 3, 4, 5, **FP64, requires_grad=True)
    residual = None
    if has_residual:
        shape = ref.conv_ref(x, layer.w, stride=stride, padding=1).shape
        residual = torch.randn(shape, **FP64, requires_grad=True)
    inputs = (x, *layer[:3], residual, stride)
    assert torch.autograd.gradcheck(OneLayer.apply, inputs)


def test_forward_references_are_differentiable():
    torch.manual_seed(2)
    layer = with_grad(make_layer(2, 3))
    x = torch.randn(2, 3, 4, 4, **FP64, requires_grad=True)

    def forward(x, *leaves):
        block = Block([ConvBN(*leaves, 1, 1)])
        return block_ops.forward(block, x, None, reference_backend)[0]

    assert torch.autograd.gradcheck(forward, (x, *layer[:3]))


def test_merged_statistics_equal_two_passes_where_sums_of_squares_fail():
    torch.manual_seed(3)
    y = (1e4 + 1e-2 * torch.randn(4, 3, 6, 6)).double()
    pixels = y.permute(1, 0, 2, 3).reshape(3, -1)
    tiles = pixels.split(10, dim=1)
    count = torch.tensor([t.shape[1] for t in tiles], **FP64)
    mean = torch.stack([t.mean(1) for t in tiles], dim=1)
    m2 = torch.stack([(t - t.mean(1, keepdim=True)).square().sum(1) for t in tiles], dim=1)
    merged_mean, merged_var = ref.merge_stats_ref(count, mean, m2)
    stats = ref.bn_stats_ref(y)
    torch.testing.assert_close(merged_mean, stats.mean, **CLOSE)
    torch.testing.assert_close(merged_var, stats.var, rtol=1e-9, atol=0)
    single = pixels.float()
    naive = single.square().mean(1) - single.mean(1).square()
    assert (naive.double() - stats.var).abs().max() > stats.var.max()


def test_single_precision_reference_keeps_an_offset_from_the_variance():
    torch.manual_seed(4)
    y = 100 + 1e-2 * torch.randn(4, 3, 6, 6)
    truth = y.double().var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(ref.bn_stats_ref(y).var.double(), truth, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["basic", "bottleneck, projected"])
def test_folded_block_equals_eval_mode(kind):
    torch.manual_seed(5)
    layers, projection = BLOCKS[kind]()
    x = torch.randn(2, 4, 5, 5, **FP64)

    def running(layer):
        return torch.randn_like(layer.bias), torch.rand_like(layer.bias) + 0.1

    def scale_shift_of(layer, mean, var):
        return ref.bn_fold_ref(mean, (var + layer.eps).rsqrt(), layer.weight, layer.bias)

    def eager(x, layer, mean, var):
        y = F.conv2d(x, layer.w, stride=layer.stride, padding=layer.padding)
        return F.batch_norm(y, mean, var, layer.weight, layer.bias, False, 0.0, layer.eps)

    buffers = [running(layer) for layer in layers]
    expected = x
    for layer, stats in zip(layers[:-1], buffers[:-1], strict=True):
        expected = eager(expected, layer, *stats).relu()
    shortcut = x
    scale_shifts = [scale_shift_of(layer, *b) for layer, b in zip(layers, buffers, strict=True)]
    if projection is not None:
        stats = running(projection)
        shortcut = eager(x, projection, *stats)
        scale_shifts.append(scale_shift_of(projection, *stats))
    expected = (eager(expected, layers[-1], *buffers[-1]) + shortcut).relu()
    with force_backend(reference_backend):
        out = ops.residual_block_folded(x, layers, scale_shifts, projection=projection)
    torch.testing.assert_close(out, expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_keeps_storage_and_statistics_apart(dtype):
    torch.manual_seed(6)
    x = torch.randn(2, 4, 5, 5).to(dtype).to(memory_format=torch.channels_last)
    layer = ConvBN(torch.randn(4, 4, 3, 3).to(dtype), torch.ones(4), torch.zeros(4), 1, 1)
    block = Block([layer])
    out, (state,) = block_ops.forward(block, x, None, reference_backend)
    grads = block_ops.backward(
        block, torch.ones_like(x), x, None, [state], reference_backend, need_dx=True
    )
    (of_layer,) = grads.layers
    assert out.dtype == state.y.dtype == grads.dx.dtype == of_layer.dw.dtype == dtype
    assert {t.dtype for t in (*state[1:], *of_layer[1:])} == {torch.float32}
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_nan_passes_the_relu_and_its_gradient_as_in_torch():
    z = torch.tensor([-1.0, 0.0, 1.0, torch.nan, torch.inf], requires_grad=True)
    out = z.relu()
    out.backward(torch.ones_like(z))
    ab = torch.tensor([[1.0], [0.0]])
    applied = ref.bn_apply_ref(z.detach().view(1, 1, 1, -1), ab)
    torch.testing.assert_close(applied.flatten(), out.detach(), equal_nan=True, rtol=0, atol=0)
    got = ref.relu_grad_ref(out.detach(), torch.ones(5))
    torch.testing.assert_close(got, z.grad, rtol=0, atol=0)


def test_one_value_a_channel_is_refused():
    with pytest.raises(ValueError, match="more than 1 value"):
        ref.bn_stats_ref(torch.randn(1, 4, 1, 1))
