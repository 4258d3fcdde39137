"""Basic blocks of inference in one CPU kernel."""

import pytest
import torch

import fastres
from fastres.kernels import ops
from fastres.kernels.cpu import backend as cpu_backend
from fastres.kernels.cpu import build as cpu_build
from tests.helpers.cpu_cases import BF16, Case, cpu_route, has_cpu_kernels  # noqa: F401
from tests.helpers.interpreter import strict_memory  # noqa: F401
from tests.helpers.numerics import assert_like_eager

pytestmark = pytest.mark.usefixtures("has_cpu_kernels", "strict_memory")

# (N, C, H, W, K, stride), shortcut: blocks of one kernel first, then of one a layer.
BLOCKS = {
    "16": ((3, 16, 6, 32, 16, 1), "input"),
    "32, tail": ((2, 32, 5, 19, 32, 1), "input"),
    "64, narrow": ((5, 64, 1, 9, 64, 1), "input"),
    "projected": ((3, 16, 6, 32, 32, 2), "projected"),
    "projected, tail": ((2, 32, 4, 22, 64, 2), "projected"),
    "projected, from more": ((2, 128, 2, 18, 64, 2), "projected"),
    "plain": ((2, 64, 3, 8, 32, 1), "none"),
    "plain, strided": ((3, 32, 6, 16, 16, 2), "none"),
    "channels of no tile": ((2, 5, 7, 9, 5, 1), "input"),
    "map too narrow": ((2, 16, 9, 7, 16, 1), "input"),
    "inner map too narrow": ((2, 16, 8, 14, 32, 2), "projected"),
    "projected at stride 1": ((2, 16, 5, 9, 32, 1), "projected"),
    "strided, odd": ((2, 16, 9, 8, 32, 2), "projected"),
    "deep": ((1, 64, 4, 16, 128, 2), "projected"),
    "no ReLU": ((2, 32, 5, 19, 32, 1), "input"),
}
BLOCKS_OF_ONE_KERNEL = list(BLOCKS)[:8]


class BlockCase:
    """Inputs of a basic block of inference."""

    def __init__(self, name):
        (n, c, h, w, k, stride), self.kind = BLOCKS[name]
        self.relu = name != "no ReLU"
        sizes = [(n, c, h, w, k, 3, stride), (n, k, 1, 1, k, 3, 1), (n, c, h, w, k, 1, stride)]
        if self.kind != "projected":
            sizes.pop()
        cases = [Case(size, BF16, seed) for seed, size in enumerate(sizes)]
        self.x = cases[0].x
        self.layers = [case.layer for case in cases]
        self.scale_shifts = [case.out_scale_shift for case in cases]

    def run(self):
        projection = self.layers[2] if self.kind == "projected" else None
        return ops.residual_block_folded(
            self.x,
            self.layers[:2],
            self.scale_shifts,
            projection=projection,
            add_input=self.kind == "input",
            relu=self.relu,
        )

    def layer_by_layer(self, convolve):
        """The same from `convolve(x, layer, scale_shift, residual, relu)`."""
        shortcut = {"input": self.x, "none": None}.get(self.kind)
        if self.kind == "projected":
            shortcut = convolve(self.x, self.layers[2], self.scale_shifts[2], None, False)
        inner = convolve(self.x, self.layers[0], self.scale_shifts[0], None, True)
        return convolve(inner, self.layers[1], self.scale_shifts[1], shortcut, self.relu)


@pytest.fixture
def called(monkeypatch):
    """Names of the kernels called, in order."""
    names = []
    call = cpu_build.call
    monkeypatch.setattr(
        cpu_build, "call", lambda name, *args: (names.append(name), call(name, *args))
    )
    return names


@pytest.mark.usefixtures("cpu_route")
@pytest.mark.parametrize("name", BLOCKS)
def test_a_folded_block_is_its_layers_bit_for_bit(name, called):
    t = BlockCase(name)
    out = t.run()
    if cpu_build.has_fused_conv():
        assert (called == ["block_folded"]) == (name in BLOCKS_OF_ONE_KERNEL)
    assert torch.equal(out, t.layer_by_layer(cpu_backend.conv_folded))
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("cpu_route")
def test_a_folded_block_of_other_layouts():
    """A view with gaps, filters and scale_shifts that are not dense: copied, not misread."""
    t = BlockCase("projected")
    wanted = t.run()
    n, c, h, w = t.x.shape
    wide = torch.zeros(n, 2 * c, h, w, dtype=BF16).to(memory_format=torch.channels_last)
    wide[:, :c] = t.x
    t.x = wide[:, :c]
    t.layers = [layer._replace(w=layer.w.contiguous()) for layer in t.layers]
    t.scale_shifts = [s.t().contiguous().t() for s in t.scale_shifts]
    assert torch.equal(t.run(), wanted)


# What is changed: the index of a layer and its fields, or a scale_shift.
UNFIT_LAYERS = {
    "inner channels": (1, {"w": torch.zeros(32, 16, 3, 3, dtype=BF16)}),
    "dtype": (0, {"w": torch.zeros(32, 16, 3, 3)}),
    "number": (0, {"w": torch.tensor(1.0, dtype=BF16)}),
    "channels of the projection": (2, {"w": torch.zeros(16, 16, 1, 1, dtype=BF16)}),
    "stride of the second": (1, {"stride": 2}),
    "stride of the projection": (2, {"stride": 1}),
    "padding of the first": (0, {"padding": 0}),
    "padding of the second": (1, {"padding": 0}),
    "padding of the projection": (2, {"padding": 1}),
}
UNFIT_SCALE_SHIFTS = {
    "fp64": torch.ones(2, 32, dtype=torch.float64),
    "too short": torch.ones(2, 16),
    "one row": torch.ones(32),
}


@pytest.mark.usefixtures("cpu_route")
@pytest.mark.parametrize("name", UNFIT_LAYERS)
def test_a_folded_block_whose_layers_do_not_fit_is_refused(name):
    index, change = UNFIT_LAYERS[name]
    t = BlockCase("projected")
    t.layers[index] = t.layers[index]._replace(**change)
    with pytest.raises((ValueError, RuntimeError)):
        t.run()


@pytest.mark.usefixtures("cpu_route")
@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("name", UNFIT_SCALE_SHIFTS)
def test_a_folded_block_whose_scale_and_shift_do_not_fit_is_refused(name, index):
    t = BlockCase("projected")
    t.scale_shifts[index] = UNFIT_SCALE_SHIFTS[name]
    with pytest.raises(ValueError, match="must"):
        t.run()


@pytest.mark.usefixtures("cpu_route")
@pytest.mark.parametrize("name", ["plain", "plain, strided"])
def test_an_input_that_is_no_shortcut_is_refused(name):
    t = BlockCase(name)
    t.kind = "input"
    with pytest.raises(ValueError, match="the shortcut must have shape"):
        t.run()


@pytest.mark.usefixtures("cpu_route")
def test_a_block_of_images_has_one_kernel_a_layer(called):
    """A stem's three channels are stored as four, which the kernel of a block does not know."""
    t = BlockCase("projected")
    first = Case((3, 3, 6, 32, 32, 3, 2), BF16)
    t.x, t.layers[0], t.kind = first.x, first.layer, "none"
    del t.layers[2], t.scale_shifts[2]
    out = t.run()
    assert "block_folded" not in called
    assert torch.equal(out, t.layer_by_layer(cpu_backend.conv_folded))


@pytest.mark.usefixtures("cpu_route")
def test_a_thread_takes_many_images():
    """Its scratch memory is used again, and what stood in it must not show."""
    t = BlockCase("projected")
    wanted = t.run()
    t.x = t.x.repeat(5, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(t.run(), wanted.repeat(5, 1, 1, 1))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("cpu_route")
@pytest.mark.parametrize("name", ["plain20", "resnet8"])
def test_evaluated_nets_have_blocks_of_one_kernel(name, called):
    model = fastres.create_model(name, seed=0).to(memory_format=torch.channels_last).eval()
    faster = fastres.fuse(model, verbose=False)
    images = torch.randn(3, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=BF16):
            got, eager = faster(images), model(images)
        truth = model.double()(images.double())
    assert_like_eager("logits", got, eager, truth, BF16)
    if cpu_build.has_fused_conv():
        assert called.count("block_folded") == {"plain20": 9, "resnet8": 3}[name]


@pytest.mark.usefixtures("cpu_route")
def test_results_lie_on_the_cpu_whatever_the_default_device():
    t = BlockCase("projected")
    wanted = t.run()
    layer = t.layers[1]._replace(w=t.layers[1].w.clone().requires_grad_())
    out, _ = ops.conv_bn_relu(wanted, layer)
    (grad,) = torch.autograd.grad(out.float().sum(), layer.w)
    with torch.device("meta"):
        assert torch.equal(t.run(), wanted)
        again, _ = ops.conv_bn_relu(wanted, layer)
        (grad_again,) = torch.autograd.grad(again.float().sum(), layer.w)
    assert torch.equal(again, out)
    assert torch.equal(grad_again, grad)


@pytest.mark.usefixtures("cpu_route")
def test_nan_comes_through_a_folded_block():
    for index in range(3):
        t = BlockCase("projected")
        t.scale_shifts[index][1, 3] = float("nan")
        assert t.run()[:, 3].isnan().all()
        assert index == 0 or t.run()[:, 4].isfinite().all()
