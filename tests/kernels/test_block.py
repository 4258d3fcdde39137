"""A residual block on the GPU back end: as right as eager, and within its byte budget."""

import pytest
import torch

from fastres.kernels import block as block_ops
from fastres.kernels.block import Block
from fastres.kernels.conv_types import ConvBN, ConvBNGrads
from fastres.kernels.gpu import backend as gpu_backend
from fastres.kernels.gpu import counters, last_program
from fastres.kernels.gpu.launch import recording
from fastres.kernels.gpu.launch_table import force_pdl, uses_pdl
from fastres.kernels.reference import backend as reference_backend
from fastres.kernels.tools.networks import NamedConv, resnet18_convs, resnet20_convs
from tests.helpers.interpreter import DEVICE, needs_gpu, strict_memory  # noqa: F401
from tests.helpers.kernel_cases import TILES, channels_last
from tests.helpers.numerics import assert_like_eager


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


def widen(block: Block) -> Block:
    layers = [ConvBN(*(t.double() for t in layer[:3]), *layer[3:]) for layer in block.all_layers]
    projection = layers.pop() if block.projection is not None else None
    return block._replace(layers=layers, projection=projection)


def step(block: Block, x, dout, backend):
    """Output, gradient of x, and those of every layer, the projection's last."""
    out, states = block_ops.forward(block, x, None, backend)
    dout = out if dout is None else dout
    grads = block_ops.backward(block, dout, x, out, states, backend, need_dx=True)
    return out, grads.dx, grads.layers


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
def test_block(name, dtype, monkeypatch):
    """Output and every gradient; eager is the reference itself in the test's dtype."""
    monkeypatch.setattr(gpu_backend, "conv_config", lambda *_, **__: TILES)
    size, layer_sizes, projection_size = BLOCKS[name]
    generator = torch.Generator().manual_seed(0)
    x = channels_last(torch.randn(size, generator=generator), dtype)
    layers = [make_layer(*layer, dtype, generator) for layer in layer_sizes]
    projection = projection_size and make_layer(*projection_size, dtype, generator)
    block = Block(layers, projection, "projected" if projection else "input")

    shape = block_ops.forward(block, x, None, reference_backend)[0].shape
    dout = channels_last(torch.randn(shape, generator=generator), dtype)
    out, dx, got = step(block, x, dout, gpu_backend)
    eager_out, eager_dx, eager = step(block, x, dout, reference_backend)
    true_out, true_dx, truth = step(widen(block), x.double(), dout.double(), reference_backend)
    assert_like_eager("out", out, eager_out, true_out)
    assert_like_eager("dx", dx, eager_dx, true_dx)
    assert len(got) == len(block.all_layers)
    for i, grads in enumerate(zip(got, eager, truth, strict=True)):
        for field, *tensors in zip(ConvBNGrads._fields, *grads, strict=True):
            assert_like_eager(f"layer {i} {field}", *tensors, dtype)


@needs_gpu
def test_block_replays_as_a_cuda_graph():
    """Nothing in a launcher waits for the GPU or depends on values: a block can be captured."""
    generator = torch.Generator().manual_seed(0)
    layers = [make_layer(64, 64, 3, 1, torch.bfloat16, generator) for _ in range(2)]
    x = channels_last(torch.randn((16, 64, 32, 32), generator=generator), torch.bfloat16)

    def run():
        return step(Block(layers, shortcut="input"), x, None, gpu_backend)[:2]

    expected = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    for got, wanted in zip(captured, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@needs_gpu
@pytest.mark.parametrize("captured", [False, True])
def test_programmatic_dependent_launch_changes_no_bit(captured):
    """Over several blocks in a row, so that kernels follow each other and memory is used again."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a GPU of the Hopper generation or later")
    generator = torch.Generator().manual_seed(0)
    layers = [make_layer(16, 16, 3, 1, torch.bfloat16, generator) for _ in range(2)]
    x = channels_last(torch.randn((64, 16, 32, 32), generator=generator), torch.bfloat16)

    def run():
        results, source = [], x
        for _ in range(4):
            out, dx, grads = step(Block(layers, shortcut="input"), source, None, gpu_backend)
            results += [out, dx, *(t for layer in grads for t in layer)]
            source = out
        return results

    def replayed():
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run()
        for _ in range(20):
            graph.replay()
        return results

    with force_pdl(False):
        expected = run()
    with force_pdl(True):
        assert uses_pdl(DEVICE)
        got = (replayed if captured else run)()
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


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
    """Tensor passes of the kernels, filters and per-channel numbers apart.

    25 where each product has a launch and forms its operands; 20 where both gradients share one;
    where operands are stored, more, and cuDNN's passes for dw come on top.
    """
    shape = plain_stages()[name].shape
    passes = 20 if shape.K == 16 else 25 if shape.K < 128 else 26
    vectors = (meta(shape.K, dtype=torch.float32), meta(shape.K, dtype=torch.float32))
    layers = [ConvBN(meta(shape.K, shape.C, 3, 3), *vectors, 1, 1)] * 2
    x = meta(shape.N, shape.C, shape.H, shape.W)
    with recording() as launches:
        step(Block(layers, shortcut="input"), x, None, gpu_backend)
    activations = [
        tensor
        for launch in launches
        for tensor in launch.tensors.values()
        if tensor.shape == x.shape
    ]
    assert len(activations) == passes
    total = sum(launch.traffic.bytes for launch in launches)
    # Read by four products, and written by two where those are not cuDNN's.
    filters = (6 if shape.K < 128 else 4) * layers[0].w.numel() * 2
    rest = total - passes * x.numel() * 2 - filters
    # Partials of statistics, of sums and of split filter gradients, those of groups among them.
    assert 0 < rest <= 0.16 * passes * x.numel() * 2


@pytest.mark.usefixtures("strict_memory")
@pytest.mark.parametrize(
    ("size", "layer_sizes", "projection_size"),
    [
        ((8, 16, 16, 8), [(16, 16, 3, 1), (16, 16, 3, 1)], None),
        ((5, 16, 9, 8), [(32, 16, 3, 2), (32, 32, 3, 1)], (32, 16, 1, 2)),
        ((3, 64, 8, 8), [(64, 64, 3, 1), (64, 64, 3, 1)], None),
    ],
)
def test_launches_of_a_stream_share_its_counters_and_leave_zeros(
    size, layer_sizes, projection_size, monkeypatch
):
    """In the forms that the rules choose; a launch that counts twice has counters for each."""
    generator = torch.Generator().manual_seed(0)
    x = channels_last(torch.randn(size, generator=generator), torch.bfloat16)
    layers = [make_layer(*layer, x.dtype, generator) for layer in layer_sizes]
    projection = projection_size and make_layer(*projection_size, x.dtype, generator)
    block = Block(layers, projection, "projected" if projection else "input")
    expected = step(block, x, None, gpu_backend)

    monkeypatch.setattr(counters, "BUFFER_SIZE", 24)
    monkeypatch.setattr(counters, "_of_stream", {})
    next_of_stream = counters._next_of_stream
    monkeypatch.setattr(
        last_program, "zero_counters", lambda like, count: next_of_stream(like.device, 0, count)
    )
    out, dx, grads = step(block, x, None, gpu_backend)
    (slices,) = counters._of_stream.values()
    assert slices.used > 0
    assert not slices.buffer.any()
    torch.testing.assert_close(out, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(dx, expected[1], rtol=0, atol=0)
    for got, want in zip(grads, expected[2], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
