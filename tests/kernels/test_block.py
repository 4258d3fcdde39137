"""A residual block chained from the kernels: as right as eager, and within its byte budget."""

from typing import NamedTuple

import pytest
import torch

from fastres.kernels.conv_shape import NamedConv, resnet18_convs, resnet20_convs
from fastres.kernels.gpu.batchnorm_bwd import bn_backward_finalize, bn_backward_reduce
from fastres.kernels.gpu.batchnorm_fwd import BNForward, bn_apply, bn_finalize
from fastres.kernels.gpu.checks import BNInput, FoldedGrad
from fastres.kernels.gpu.conv_dgrad import conv_dgrad
from fastres.kernels.gpu.conv_fprop import conv_fprop
from fastres.kernels.gpu.conv_wgrad import conv_wgrad
from fastres.kernels.gpu.launch import recording
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.reference import block as ref
from fastres.kernels.reference.block import BlockGrads, ConvBN, ConvBNGrads
from tests.helpers.interpreter import DEVICE, needs_gpu, strict_memory  # noqa: F401
from tests.helpers.kernel_cases import TILES, channels_last
from tests.helpers.numerics import assert_like_eager


class Layer(NamedTuple):
    """One layer of a chained block: raw output and folded batch norm."""

    y: torch.Tensor
    bn: BNForward


def run_layer(x, layer: ConvBN, fold, config: ConvConfig | None) -> Layer:
    y, stats = conv_fprop(
        x,
        layer.w,
        stride=layer.stride,
        padding=layer.padding,
        scale_shift=fold,
        store_stats=True,
        config=config,
    )
    return Layer(y, bn_finalize(stats, layer.weight, layer.bias, eps=layer.eps))


def block_forward(x, layers: list[ConvBN], projection: ConvBN | None, config=None):
    done: list[Layer] = []
    for layer in layers:
        inside = bool(done)
        fold = done[-1].bn.scale_shift if inside else None
        done.append(run_layer(done[-1].y if inside else x, layer, fold, config))
    last, shortcut = done[-1], None
    if projection is None:
        out = bn_apply(last.y, last.bn.scale_shift, residual=x)
    else:
        shortcut = run_layer(x, projection, None, config)
        out = bn_apply(
            last.y,
            last.bn.scale_shift,
            residual=shortcut.y,
            residual_scale_shift=shortcut.bn.scale_shift,
        )
    return out, done, shortcut


def block_backward(dout, x, out, done, shortcut, layers, projection, config=None) -> BlockGrads:
    g, sums = bn_backward_reduce(
        dout,
        done[-1].y,
        done[-1].bn.mean,
        out=out,
        y_shortcut=None if shortcut is None else shortcut.y,
        mean_shortcut=None if shortcut is None else shortcut.bn.mean,
    )
    dshortcut, projection_grads = g, None
    size = tuple(x.shape[2:])
    if shortcut is not None:
        dy, bn_grads = fold_grad(g, sums.g, sums.gy_shortcut, shortcut, projection)
        options = {"stride": projection.stride, "padding": projection.padding, "config": config}
        dshortcut, _ = conv_dgrad(dy, projection.w, size, **options)
        dw = conv_wgrad(x, dy, tuple(projection.w.shape[2:]), **options)
        projection_grads = ConvBNGrads(dw, bn_grads.dgamma, bn_grads.dbeta)
    grads: list[ConvBNGrads] = []
    for i in reversed(range(len(layers))):
        layer = layers[i]
        options = {"stride": layer.stride, "padding": layer.padding, "config": config}
        dy, bn_grads = fold_grad(g, sums.g, sums.gy, done[i], layer)
        before = done[i - 1] if i else None
        dw = conv_wgrad(
            before.y if before else x,
            dy,
            tuple(layer.w.shape[2:]),
            scale_shift=before.bn.scale_shift if before else None,
            **options,
        )
        grads.insert(0, ConvBNGrads(dw, bn_grads.dgamma, bn_grads.dbeta))
        if before:
            bn_input = BNInput(before.y, before.bn.mean, before.bn.scale_shift)
            g, sums = conv_dgrad(
                dy, layer.w, tuple(before.y.shape[2:]), bn_input=bn_input, **options
            )
        else:
            g, _ = conv_dgrad(dy, layer.w, size, shortcut=dshortcut, **options)
    return BlockGrads(g, grads, projection_grads)


def fold_grad(g, sum_g, sum_gy, done: Layer, layer: ConvBN):
    count = done.y.numel() // done.y.shape[1]
    grads = bn_backward_finalize(sum_g, sum_gy, done.bn.mean, done.bn.rstd, layer.weight, count)
    return FoldedGrad(g, done.y, grads.coefficients), grads


def make_layer(k, c, r, stride, dtype, generator) -> ConvBN:
    def normal(*size):
        return torch.randn(size, generator=generator)

    w = channels_last(normal(k, c, r, r) / (c * r * r) ** 0.5, dtype)
    weight, bias = (1 + 0.1 * normal(k)).to(DEVICE), normal(k).to(DEVICE)
    return ConvBN(w, weight, bias, stride, r // 2)


# x, (k, c, r, stride) of every layer, of the projection
BLOCKS = {
    "basic": ((2, 16, 6, 5), [(16, 16, 3, 1), (16, 16, 3, 1)], None),
    "basic, projected": ((2, 5, 7, 6), [(17, 5, 3, 2), (17, 17, 3, 1)], (17, 5, 1, 2)),
    "bottleneck, projected": (
        (2, 8, 6, 6),
        [(4, 8, 1, 1), (4, 4, 3, 2), (16, 4, 1, 1)],
        (16, 8, 1, 2),
    ),
}


def widen(layer: ConvBN) -> ConvBN:
    return ConvBN(*(t.double() for t in layer[:3]), *layer[3:])


@pytest.mark.usefixtures("strict_memory")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("basic", torch.float32),
        ("basic", torch.bfloat16),
        ("basic, projected", torch.float32),
        ("bottleneck, projected", torch.bfloat16),
    ],
)
def test_block(name, dtype):
    """Output and every gradient; eager is the reference itself in the test's dtype."""
    size, layer_sizes, projection_size = BLOCKS[name]
    generator = torch.Generator().manual_seed(0)
    x = channels_last(torch.randn(size, generator=generator), dtype)
    layers = [make_layer(*layer, dtype, generator) for layer in layer_sizes]
    projection = projection_size and make_layer(*projection_size, dtype, generator)

    out, done, shortcut = block_forward(x, layers, projection, TILES)
    dout = channels_last(torch.randn(out.shape, generator=generator), dtype)
    got = block_backward(dout, x, out, done, shortcut, layers, projection, TILES)

    eager_out, saved = ref.residual_block_ref(x, layers, projection)
    eager = ref.residual_block_backward_ref(dout, saved, layers, projection)
    wide_layers, wide_projection = [widen(t) for t in layers], projection and widen(projection)
    true_out, saved = ref.residual_block_ref(x.double(), wide_layers, wide_projection)
    truth = ref.residual_block_backward_ref(dout.double(), saved, wide_layers, wide_projection)
    assert_like_eager("out", out, eager_out, true_out)
    assert_like_eager("dx", got.dx, eager.dx, truth.dx)
    names = [f"layer {i}" for i in range(len(layers))] + ["projection"]
    everything = zip(
        names,
        [*got.layers, got.projection],
        [*eager.layers, eager.projection],
        [*truth.layers, truth.projection],
        strict=True,
    )
    for layer, *grads in everything:
        if grads[0] is not None:
            for field, *tensors in zip(ConvBNGrads._fields, *grads, strict=True):
                assert_like_eager(f"{layer} {field}", *tensors, dtype)


@needs_gpu
def test_block_replays_as_a_cuda_graph():
    """Nothing in a launcher waits for the GPU or depends on values: a block can be captured."""
    generator = torch.Generator().manual_seed(0)
    layers = [make_layer(64, 64, 3, 1, torch.bfloat16, generator) for _ in range(2)]
    x = channels_last(torch.randn((16, 64, 32, 32), generator=generator), torch.bfloat16)

    def step():
        out, done, _ = block_forward(x, layers, None)
        return out, block_backward(out, x, out, done, None, layers, None).dx

    expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for got, wanted in zip(captured, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def meta(*size, dtype=torch.bfloat16):
    memory_format = torch.channels_last if len(size) == 4 else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format)


def plain_stages() -> dict[str, NamedConv]:
    nets = {"resnet20": resnet20_convs(512), "resnet18": resnet18_convs(512)}
    return {
        f"{net} {conv.name}": conv
        for net, convs in nets.items()
        for conv in convs
        if conv.shape.C == conv.shape.K
    }


@pytest.mark.parametrize("name", plain_stages())
def test_byte_budget_of_a_basic_block(name):
    """At most 25 passes over an activation, filters and per-channel numbers apart."""
    shape = plain_stages()[name].shape
    vectors = (meta(shape.K, dtype=torch.float32), meta(shape.K, dtype=torch.float32))
    layers = [ConvBN(meta(shape.K, shape.C, 3, 3), *vectors, 1, 1)] * 2
    x = meta(shape.N, shape.C, shape.H, shape.W)
    with recording() as launches:
        out, done, _ = block_forward(x, layers, None)
        block_backward(out, x, out, done, None, layers, None)
    activations = [
        argument
        for launch in launches
        for argument in launch.args.values()
        if isinstance(argument, torch.Tensor) and argument.shape == x.shape
    ]
    assert len(activations) == 25
    total = sum(launch.traffic.bytes for launch in launches)
    filters = 6 * layers[0].w.numel() * 2
    rest = total - 25 * x.numel() * 2 - filters
    # Partials of statistics, of sums and of split filter gradients.
    assert 0 < rest <= 0.12 * 25 * x.numel() * 2
