"""Networks whose values have other readers than the next layer: by both doors what eager computes.

Each trap is a forward of one tiny net and the number of its convolutions that run in ops, by `fuse`
and by the Dynamo backend: fused where that is right, and nowhere else.
"""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fastres.fusion.backend import fastres
from fastres.fusion.fuse import fuse
from tests.helpers.interpreter import DEVICE

pytestmark = pytest.mark.usefixtures("plain")


def conv(c=4, k=4, r=3, **options) -> nn.Conv2d:
    return nn.Conv2d(c, k, r, **{"padding": r // 2, "bias": False} | options)


class Net(nn.Module):
    """What the forwards below are made of."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = conv(), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = conv(r=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 3)
        self.identity, self.empty = nn.Identity(), nn.Sequential()
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.prelu = nn.PReLU()

    def layer1(self, x):
        return self.bn1(self.conv1(x))

    def layer2(self, x):
        return self.bn2(self.conv2(x))

    def layer3(self, x):
        return self.bn3(self.conv3(x))


class Block(Net):
    """A basic block."""

    def forward(self, x):
        return self.relu(self.layer2(self.relu(self.layer1(x))) + x)


# {name: (net, convolutions that fuse fuses, those that the backend does)}
TRAPS: dict[str, tuple[type[nn.Module], int, int]] = {}


def trap(by_fuse: int, by_backend: int | None = None, *, learns: bool = True):
    """Add a forward to the traps; one does not learn where eager's backward would refuse it."""

    def add(forward: Callable[..., object]):
        members = {"forward": forward, "__module__": __name__, "learns": learns}
        kind = type(forward.__name__, (Net,), members)
        TRAPS[forward.__name__] = kind, by_fuse, by_fuse if by_backend is None else by_backend
        return forward

    return add


# Values that are read twice.


@trap(2)
def auxiliary_head_before_relu(self, x):
    z = self.layer1(x)
    aux = self.head(z.mean((2, 3)))
    return self.layer2(F.relu(z)), aux


@trap(1)
def raw_output_of_a_convolution(self, x):
    y = self.conv1(x)
    return self.layer2(F.relu(self.bn1(y))), y


@trap(2)
def value_between_two_layers(self, x):
    inner = F.relu(self.layer1(x))
    return F.relu(self.layer2(inner) + x), inner


@trap(2)
def block_output_beside_the_logits(self, x):
    out = F.relu(self.layer2(F.relu(self.layer1(x))) + x)
    return {"features": [out], "logits": self.head(out.mean((2, 3)))}


@trap(1)
def sum_is_read_before_relu(self, x):
    z = self.layer1(x) + x
    return self.relu(z.clone()), z


@trap(2)
def both_sides_of_the_sum_are_read(self, x):
    s = self.layer3(x)
    z = self.layer1(x)
    return F.relu(z + s), z, s


@trap(2)
def projection_is_read_behind_the_sum(self, x):
    s = self.layer3(x)
    return F.relu(self.layer1(x) + s), s


# Values that are changed.


@trap(2)
def relu_in_place_on_a_value_used_before(self, x):
    z = self.layer1(x)
    aux = z.sigmoid()
    return self.layer2(self.relu(z)) + aux


@trap(2)
def relu_in_place_on_a_value_used_after(self, x):
    z = self.layer1(x)
    return self.layer2(F.relu(z, True)) + z


@trap(2, learns=False)
def input_changes_between_the_layers(self, x):
    x = x * 1
    out = F.relu(self.layer1(x))
    x.relu_()
    return F.relu(self.layer2(out) + x)


@trap(2, learns=False)
def input_changes_by_position_between_the_layers(self, x):
    x = x + 1
    out = F.relu(self.layer1(x))
    F.leaky_relu(x, 0.1, True)
    return F.relu(self.layer2(out) + x)


@trap(0, learns=False)
def input_changes_between_convolution_and_norm(self, x):
    x = x * 1
    y = self.conv1(x)
    x.relu_()
    return F.relu(self.bn1(y) + x)


@trap(1, learns=False)
def view_of_the_input_changes(self, x):
    x = x * 1
    v = x.view(-1)
    z = self.layer1(x)
    v.mul_(2)
    return F.relu(z + x)


@trap(2)
def shortcut_is_added_to_and_read_again(self, x):
    s = x * 1
    z = self.layer1(x)
    s += z
    return self.layer2(F.relu(s)), s


@trap(2)
def projected_shortcut_is_added_to_and_read_again(self, x):
    s = self.layer3(x)
    keep = s.view(-1)
    s += self.layer1(x)
    return F.relu(s), keep


@trap(2)
def normed_shortcut_is_added_to_and_read_again(self, x):
    s = self.layer3(x.detach() + 1)
    z = self.layer1(x)
    s.add_(z)
    return F.relu(s), s * 2


@trap(2)
def shortcut_changes_behind_the_sum(self, x):
    s = x * 1
    out = F.relu(self.layer2(F.relu(self.layer1(x))) + s)
    s.mul_(2)
    return out, s


@trap(1)
def norm_is_changed_in_place(self, x):
    z = self.layer1(x)
    z *= self.gain
    return F.hardtanh(z, -1.0, 1.0, True)


@trap(1)
def added_to_in_place_by_broadcasting(self, x):
    z = self.layer1(x)
    z += x.mean((2, 3), keepdim=True)
    return z.relu_()


@trap(1)
def mean_is_taken_before_a_change(self, x):
    out = F.relu(self.layer1(x)) * 1
    pooled = out.mean((2, 3))
    out.detach().zero_()
    return self.head(pooled), out


@trap(2)
def narrow_end_that_is_read_as_a_matrix(self, x):
    return self.layer3(F.relu(self.layer1(x))).view(x.shape[0], -1)


# Sums that are none.


@trap(1)
def sum_with_alpha(self, x):
    return F.relu(torch.add(self.layer1(x), x, alpha=2))


@trap(1)
def sum_with_a_number(self, x):
    return F.relu(self.layer1(x) + 1.5)


@trap(1)
def sum_with_itself(self, x):
    z = self.layer1(x)
    return F.relu(z + z)


@trap(1)
def difference(self, x):
    return F.relu(self.layer1(x) - x)


@trap(1)
def sum_of_another_dtype(self, x):
    return F.relu(self.layer1(x) + x.float())


@trap(1)
def sum_by_broadcasting(self, x):
    return F.relu(self.layer1(x[:1]) + x)


@trap(1)
def scaled_by_a_parameter(self, x):
    return F.relu(self.gain * self.layer1(x) + x)


@trap(2)
def sum_by_a_method(self, x):
    return self.layer2(self.layer1(x).relu()).add_(x).relu_()


# Shortcuts.


@trap(2)
def identity_as_shortcut(self, x):
    return self.relu(self.layer2(self.relu(self.layer1(x))) + self.identity(x))


@trap(2)
def empty_sequential_as_shortcut(self, x):
    return self.relu(self.layer2(self.relu(self.layer1(x))) + self.empty(x))


@trap(2)
def detached_shortcut(self, x):
    return F.relu(self.layer2(F.relu(self.layer1(x))) + x.detach())


@trap(3)
def projection_without_relu_behind(self, x):
    return self.layer2(F.relu(self.layer1(x))) + self.layer3(x)


@trap(3)
def projection_of_another_value(self, x):
    return F.relu(self.layer2(F.relu(self.layer1(x))) + self.layer3(x.detach()))


@trap(3)
def activation_that_is_no_relu(self, x):
    z = F.silu(self.layer1(x))
    z = F.relu6(self.layer2(z))
    return F.leaky_relu(self.layer3(z), 0.2) + self.prelu(z)


@trap(2)
def dropout_between(self, x):
    z = F.dropout2d(F.relu(self.layer1(x)), 0.5, self.training)
    return F.relu(self.layer2(z) + x)


# Modules that are called twice.


@trap(2)
def convolution_with_two_norms(self, x):
    return F.relu(self.bn1(self.conv1(x)) + self.bn2(self.conv1(x)))


@trap(0)
def layer_called_twice(self, x):
    return F.relu(self.layer1(F.relu(self.layer1(x))))


@trap(1, 1)
def norm_called_twice(self, x):
    return self.layer2(F.relu(self.bn1(self.conv1(x)) + self.bn1(self.conv3(x))))


# Parts in another mode: no trace goes through these; the backend's does.


@trap(0, 2)
def frozen_stem(self, x):
    with torch.no_grad():
        z = F.relu(self.layer1(x))
    return F.relu(self.layer2(z) + z)


@trap(0, 1)
def mode_changes_within_a_layer(self, x):
    with torch.no_grad():
        y = self.conv1(x)
    return self.layer2(F.relu(self.bn1(y)))


@trap(0, 2)
def mode_changes_within_a_block(self, x):
    with torch.no_grad():
        z = F.relu(self.layer1(x))
    return F.relu(self.layer2(z) + x)


@trap(0, 2)
def autocast_off_in_a_part(self, x):
    with torch.autocast(DEVICE.type, enabled=False):
        z = F.relu(self.layer1(x))
    return F.relu(self.layer2(z) + x)


@trap(0, 2)
def inference_mode_in_a_part(self, x):
    with torch.inference_mode():
        z = F.relu(self.layer3(x))
    return F.relu(self.layer2(z.clone()))


# Functions.


@trap(0, 2)
def functions_of_parameters(self, x):
    def layer(x, conv, bn):
        y = F.conv2d(x, conv.weight, padding=1)
        return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, True)

    return torch.relu(layer(layer(x, self.conv1, self.bn1).relu_(), self.conv2, self.bn2) + x)


@trap(1)
def norm_of_the_batch_alone(self, x):
    y = F.batch_norm(self.conv1(x), None, None, self.bn1.weight, self.bn1.bias, True)
    return self.layer2(F.relu(y))


@trap(0, 0, learns=False)
def a_filter_changes_within_a_layer(self, x):
    y = self.conv1(x)
    self.conv1.weight.mul_(1.5)
    return F.relu(self.bn1(y))


@trap(1, learns=False)
def a_buffer_changes_before_the_sum(self, x):
    total = self.bn3.running_mean.view(1, 4, 1, 1).expand_as(x)
    z = self.layer1(x)
    self.bn3.running_mean.add_(1)
    return F.relu(z + total)


@trap(1, 1)
def running_statistics_are_read_within_a_layer(self, x):
    z = self.layer1(x)
    before = self.bn1.running_mean * 1
    return self.layer2(F.relu(z)), before


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = kind()
        for name, parameter in net.named_parameters():
            if parameter.dim() == 1:
                nn.init.uniform_(parameter, 0.5, 1.5 if name.endswith("weight") else 0.8)
    return net.to(DEVICE).double()


def images(seed=0, n=2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, 6, 6, generator=generator, dtype=torch.float64).to(DEVICE)


def by_fuse(net: nn.Module) -> nn.Module:
    return fuse(net, verbose=False)


def by_backend(net: nn.Module, rest="eager", **options) -> nn.Module:
    torch.compiler.reset()
    return torch.compile(
        copy.deepcopy(net), backend=fastres, options={"fuse": "all", "rest": rest}, **options
    )


def step(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of a step."""
    net.zero_grad()
    learns = getattr(net, "learns", True)
    x = x.clone().requires_grad_(learns)
    torch.manual_seed(1)
    with torch.set_grad_enabled(learns):
        outputs = [leaf for leaf in tree_leaves(net(x)) if isinstance(leaf, Tensor)]
    loss = torch.zeros((), requires_grad=True)
    for i, out in enumerate(outputs):
        if out.requires_grad:
            weights = torch.arange(out.numel(), device=out.device, dtype=out.dtype)
            loss = loss + (out * torch.cos(weights + i).view(out.shape)).sum()
    loss.backward()
    names = [(name.replace("_orig_mod.", ""), p.grad) for name, p in net.named_parameters()]
    return {
        **{f"output {i}": out for i, out in enumerate(outputs)},
        "grad of input": x.grad,
        **{f"grad {name}": grad for name, grad in names},
        **{name.replace("_orig_mod.", ""): b.clone() for name, b in net.named_buffers()},
    }


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor], strides=True) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        if value is None:
            assert got[name] is None, name
            continue
        tolerance = 1e-9 if value.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance, msg=name)
        if strides and name.startswith("output"):
            assert got[name].stride() == value.stride(), name


def assert_computes(net: nn.Module, other: nn.Module) -> None:
    """Two steps of training, and one of evaluation with and without gradients."""
    for seed in range(2):
        assert_equal(step(other, images(seed)), step(net, images(seed)))
    net.eval()
    other.eval()
    assert_equal(step(other, images()), step(net, images()))
    with torch.no_grad():
        torch.testing.assert_close(other(images()), net(images()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", TRAPS)
def test_fused(name, in_ops):
    kind, num_fused, _ = TRAPS[name]
    net = made(kind)
    other = by_fuse(net)
    step(copy.deepcopy(other), images())
    assert sum(in_ops) == num_fused
    assert_computes(net, other)


# What the patterns make of these does not depend on where the graph is from.
ALIKE = {
    *("sum_with_a_number", "sum_with_itself", "difference", "scaled_by_a_parameter"),
    *("empty_sequential_as_shortcut", "detached_shortcut", "projection_without_relu_behind"),
    *(
        "block_output_beside_the_logits",
        "raw_output_of_a_convolution",
        "mean_is_taken_before_a_change",
    ),
    *(
        "sum_is_read_before_relu",
        "narrow_end_that_is_read_as_a_matrix",
        "view_of_the_input_changes",
    ),
    *(
        "projection_is_read_behind_the_sum",
        "norm_is_changed_in_place",
        "convolution_with_two_norms",
    ),
}


@pytest.mark.parametrize("name", sorted(TRAPS.keys() - ALIKE))
def test_compiled(name, in_ops):
    kind, _, num_fused = TRAPS[name]
    net = made(kind)
    other = by_backend(net)
    wanted = step(copy.deepcopy(net), images())
    assert_equal(step(other, images()), wanted)
    assert sum(in_ops) == num_fused


class OddLayers(nn.Module):
    """Convolutions and norms of every kind, side by side."""

    def __init__(self):
        super().__init__()
        bn = partial(nn.BatchNorm2d, 4)
        fused = {
            "bias": (conv(bias=True), bn()),
            "1x1 with a stride": (conv(r=1, stride=2), bn(eps=0.1, momentum=1.0)),
            "rectangle": (nn.Conv2d(4, 4, (1, 3), bias=False), bn()),
            "frozen parameters": (conv(bias=True).requires_grad_(False), bn()),
            "frozen norm": (conv(), bn().requires_grad_(False)),
        }
        plain = {
            "no parameters": (conv(), bn(affine=False)),
            "no statistics": (conv(), bn(track_running_stats=False)),
            "groups": (conv(groups=2), bn()),
            "depthwise": (conv(groups=4, bias=True), bn()),
            "dilation": (conv(dilation=2), bn()),
            "asymmetric": (nn.Conv2d(4, 4, (1, 3), padding=(0, 1)), bn()),
            "stride": (conv(stride=(1, 2)), bn()),
            "same": (conv(padding="same"), bn()),
            "reflect": (conv(padding_mode="reflect"), bn()),
            "group norm": (conv(), nn.GroupNorm(2, 4)),
            "synchronised": (conv(), nn.SyncBatchNorm(4).eval()),
            "evaluation": (conv(bias=True), bn().eval()),
            "transposed": (nn.ConvTranspose2d(4, 4, 3), bn()),
        }
        pairs = (fused | plain).values()
        self.pairs = nn.ModuleList([nn.Sequential(*pair, nn.ReLU()) for pair in pairs])
        self.num_fused = len(fused)
        # Dynamo divides by the number of batches in Python: its graph ends there.
        self.average = nn.Sequential(conv(), bn(momentum=None), nn.ReLU())
        self.one = nn.Sequential(nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), nn.ReLU())
        self.three = nn.Sequential(nn.Conv3d(4, 4, 1), nn.BatchNorm3d(4), nn.ReLU())

    def forward(self, x):
        outputs = [pair(x) for pair in self.pairs]
        outputs += [self.one(x.flatten(2)), self.three(x.unsqueeze(2))]
        return outputs, self.average(x)


@pytest.mark.parametrize("door", [by_fuse, by_backend])
def test_odd_layers(door, in_ops):
    net = made(OddLayers)
    other = door(net)
    for seed in range(3):
        assert_equal(step(other, images(seed)), step(net, images(seed)))
        if seed == 0:
            # The average by `fuse`, the reflected border by Dynamo, for which it is a call before.
            assert sum(in_ops) == net.num_fused + 1


class Flat(Block):
    """A block whose output is read as a matrix in the order of its memory."""

    order = (0, 1, 2, 3)

    def forward(self, x):
        out = super().forward(x)
        strides = torch.stack([out.mean() * out.stride(dim) for dim in range(4)])
        return out.permute(*self.order).view(x.shape[0], -1), out, strides


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("door", [by_fuse, partial(by_backend, rest="aot_eager")])
def test_a_layout_that_is_seen(door, layout, in_ops):
    net = made(Flat).to(memory_format=layout)
    if layout == torch.channels_last:
        net.order = (0, 2, 3, 1)
    other = door(net)
    x = images().contiguous(memory_format=layout)
    assert_equal(step(other, x), step(net, x))
    assert in_ops


class Asking(Net):
    """A net of all kinds of arguments and results."""

    def forward(self, x, others=(), scale=None, **options):
        z = F.relu(self.layer2(F.relu(self.layer1(x["image"]))))
        for other in others:
            z = z + other
        if scale is not None:
            z = z * scale
        return {"out": [z, None], "mean": (z.mean(), options.get("extra", 0) * z.sum(), "name")}


@pytest.mark.parametrize("door", [by_fuse, by_backend])
@pytest.mark.parametrize("given", [{}, {"scale": 2.0, "extra": 3}])
def test_arguments_and_results_of_every_kind(given, door):
    net = made(Asking)
    call = {"others": [images(3)], **given}
    results = []
    for each in (net, door(net)):
        wrapped = partial(each, **call)
        out = wrapped({"image": images()})
        results.append([out["out"][0], *out["mean"][:2], *each.buffers()])
        assert out["out"][1] is None
        assert out["mean"][2] == "name"
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


class TwoViews(Net):
    """A net of two inputs, of which it changes one."""

    def forward(self, x, y):
        z = F.relu(self.layer1(x))
        y.mul_(2)
        return F.relu(self.layer2(z) + x)


@pytest.mark.parametrize("door", [by_fuse, by_backend])
@torch.no_grad()
def test_two_views_of_one_tensor(door):
    net = made(TwoViews)
    results = []
    for each in (net, door(net)):
        base = images()
        results.append([each(base[:], base.view(-1)), base])
        results.append([each(images(), images(1)), base])
    torch.testing.assert_close(results[2:], results[:2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("door", [by_fuse, by_backend])
def test_a_gradient_of_gradients(door):
    net = made(Block)
    results = []
    for each in (net, door(net)):
        x = images().requires_grad_()
        (grad,) = torch.autograd.grad(each(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        results.append([grad, x.grad, *(p.grad for p in each.parameters() if p.grad is not None)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-7, atol=1e-7)


def test_modes_switch_and_norms_freeze_in_a_compiled_net(in_ops):
    net = made(Block)
    other = by_backend(net)
    runs = [lambda each: each.train(), lambda each: each.eval(), lambda each: each.train()]
    runs.append(lambda each: each.bn1.eval())
    runs.append(lambda each: each.conv1.requires_grad_(False))
    counts = []
    for prepare in runs:
        for each in (net, other):
            prepare(each)
        wanted = step(net, images())
        in_ops.clear()
        assert_equal(step(other, images()), wanted)
        counts.append(sum(in_ops))
    assert counts == [2, 0, 2, 1, 1]
    net.eval()
    other.eval()
    in_ops.clear()
    with torch.no_grad():
        torch.testing.assert_close(other(images()), net(images()), rtol=1e-9, atol=1e-9)
    assert sum(in_ops) == 2


@pytest.mark.parametrize("dynamic", [True, None])
def test_a_compiled_net_takes_any_batch(dynamic):
    compiled = []

    def backend(gm, example_inputs):
        compiled.append(gm)
        return fastres(gm, example_inputs, options={"fuse": "all", "rest": "eager"})

    net = made(Block)
    torch.compiler.reset()
    other = torch.compile(copy.deepcopy(net), backend=backend, dynamic=dynamic)
    for n in (2, 3, 5):
        x = images(n=n)
        assert_equal(step(other, x), step(net, x))
    assert len(compiled) <= 2


class Again(Net):
    """A net that computes parts of itself again for the backward pass."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x):
        z = checkpoint(self.first, x, use_reentrant=False)
        return self.layer1(checkpoint(self.second, z, use_reentrant=False))


def test_what_is_computed_again_moves_statistics_as_often_as_under_aot_eager(in_ops):
    """Once, where without a compiler the second forward moves them again."""
    net = made(Again)
    torch.compiler.reset()
    wanted = step(torch.compile(copy.deepcopy(net), backend="aot_eager"), images())
    assert_equal(step(by_backend(net, rest="aot_eager"), images()), wanted)
    assert in_ops
    assert wanted["first.bn1.num_batches_tracked"] == 1
    assert step(net, images())["first.bn1.num_batches_tracked"] == 2


class Two(nn.Module):
    """Two blocks."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()
        for block in (self.first, self.second):
            del block.conv3, block.bn3, block.head, block.gain, block.prelu

    def forward(self, x):
        return self.second(self.first(x))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("outside", ["compiled", "distributed"])
def test_distributed(outside, in_ops):
    distributed = torch.nn.parallel.DistributedDataParallel
    net = made(Two)
    wanted = step(copy.deepcopy(net), images())
    parallel = distributed(net) if outside == "compiled" else net
    torch.compiler.reset()
    other = torch.compile(parallel, backend=fastres, options={"fuse": "all", "rest": "eager"})
    other = distributed(other) if outside == "distributed" else other
    got = {name.replace("module.", ""): value for name, value in step(other, images()).items()}
    assert_equal(got, wanted)
    assert sum(in_ops) == 4
