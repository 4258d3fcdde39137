"""What a trace of torch.fx freezes or loses unless it is kept from it."""

import contextlib
import copy
import io
import pickle
import random
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from fastres.fusion.fuse import fuse
from fastres.fusion.fused_module import FusedModule
from tests.model.test_side_exits import Block, Net, assert_equal, conv, images, made, step

pytestmark = pytest.mark.usefixtures("plain")


class Inner(Net):
    """A child with a flag and a tensor."""

    def __init__(self):
        super().__init__()
        self.flag, self.relus = True, [True, False]
        self.act = F.relu
        self.config = types.SimpleNamespace(scale=2.0)
        self.register_buffer("mask", torch.ones(4, 1, 1))

    def forward(self, x):
        z = self.act(self.layer1(x))
        return z * 2 if self.flag else z

    def helper(self, x):
        return F.relu(self.layer2(x))


class Double(torch.autograd.Function):
    """The identity, with another gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dout):
        return 2 * dout


# {name: (net, what is done to it afterwards)}: what is done must be seen.
CHANGES: dict[str, tuple[type[nn.Module], object]] = {}
# {name: net} whose forward no trace must fix as it was.
FORWARDS: dict[str, type[nn.Module]] = {}


def _kind(forward, **members) -> type[nn.Module]:
    class Outer(Inner):
        def __init__(self):
            super().__init__()
            self.inner, self.block = Inner(), Block()
            self.blocks = nn.ModuleList([self.block, self.inner])
            self.calls, self.seen, self.aux = 0, [], None

    return type(forward.__name__, (Outer,), {"forward": forward, "__module__": __name__, **members})


def changed_by(change, **members):
    """Add a forward to those that are changed after they are fused."""

    def add(forward):
        CHANGES[forward.__name__] = _kind(forward, **members), change
        return forward

    return add


def computes(forward):
    """Add a forward to those that a trace could get wrong."""
    FORWARDS[forward.__name__] = _kind(forward)
    return forward


def put(path: str, value):
    """What sets an attribute of a module inside a net."""

    def change(net):
        parent, _, name = path.rpartition(".")
        setattr(net.get_submodule(parent), name, value)

    return change


# Attributes that change.


@changed_by(put("flag", False))
def a_flag(self, x):
    z = F.relu(self.layer1(x))
    return z * 2 if self.flag else z


@changed_by(put("inner.flag", False))
def a_flag_of_a_child(self, x):
    return F.relu(self.layer2(self.inner(x)))


@changed_by(put("inner.flag", False))
def a_flag_of_a_child_that_the_parent_reads(self, x):
    z = F.relu(self.layer1(x))
    return z * 2 if self.inner.flag else z


@changed_by(put("inner.flag", False))
def a_child_called_past_its_hooks(self, x):
    return F.relu(self.layer2(self.inner.forward(x)))


@changed_by(lambda net: net.relus.append(True))
def a_list_that_grows(self, x):
    for has_relu in self.relus:
        x = self.layer1(x).relu() if has_relu else self.layer2(x)
    return x


@changed_by(put("act", F.gelu))
def a_function_as_an_attribute(self, x):
    return self.layer2(self.act(self.layer1(x)))


@changed_by(put("config", types.SimpleNamespace(scale=3.0)))
def a_configuration(self, x):
    return F.relu(self.layer1(x)) * self.config.scale


@changed_by(lambda net: setattr(net.config, "scale", 3.0))
def a_changed_configuration(self, x):
    return F.relu(self.layer1(x)) * self.config.scale


@changed_by(put("extra", nn.Sigmoid()))
def an_attribute_that_is_missing_at_first(self, x):
    z = F.relu(self.layer1(x))
    return self.extra(z) if hasattr(self, "extra") else z


@changed_by(put("aux", nn.Sigmoid()))
def a_child_that_is_none_at_first(self, x):
    z = F.relu(self.layer1(x))
    return z if self.aux is None else self.aux(z)


@changed_by(put("mask", None))
def a_buffer_that_is_taken_away(self, x):
    z = F.relu(self.layer1(x))
    return z if self.mask is None else z * self.mask * 2


@changed_by(put("conv3.stride", (2, 2)))
def an_attribute_of_a_convolution(self, x):
    z = F.relu(self.layer1(x))
    return F.conv2d(z, self.conv3.weight, None, self.conv3.stride)


@changed_by(lambda net: net.bn2.eval())
def the_mode_of_a_child(self, x):
    return F.dropout2d(F.relu(self.layer1(x)), 0.5, self.bn2.training)


@changed_by(lambda net: net.bn2.eval())
def branches_on_the_mode_of_a_child(self, x):
    z = F.relu(self.layer1(x))
    return z * 2 if self.bn2.training else z


@changed_by(lambda net: net.half().double())
def asks_its_parameters(self, x):
    return F.relu(self.layer1(x)).to(next(self.parameters()).dtype)


@changed_by(lambda net: net.float())
def the_dtype_of_its_parameters(self, x):
    return F.relu(self.layer1(x.to(next(self.parameters()).dtype)))


@changed_by(lambda net: net.blocks.append(nn.Sigmoid()))
def a_list_of_modules(self, x):
    for block in self.blocks:
        x = block(x)
    return x


@changed_by(lambda net: net.block.add_module("last", nn.Sigmoid()))
def children_of_a_child(self, x):
    z = F.relu(self.layer1(x))
    return self.block.last(z) if "last" in dict(self.block.named_children()) else z


def run_through_children(self, x):
    for child in self.children():
        x = child(x)
    return x


class Chain(nn.Module):
    """A list of children without a container."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = conv(), nn.BatchNorm2d(4), nn.ReLU()

    forward = run_through_children


CHANGES["children"] = Chain, lambda net: net.add_module("last", nn.Sigmoid())


@changed_by(lambda net: setattr(net.block, "relu", nn.GELU()))
def a_shared_activation(self, x):
    return self.relu(self.layer2(self.block.relu(self.layer1(x))))


def share_relu(self):
    type(self).__mro__[1].__init__(self)
    self.block.relu = self.relu


CHANGES["a_shared_activation"][0].__init__ = share_relu


@changed_by(put("block", nn.Sigmoid()))
def a_child(self, x):
    return self.layer2(F.relu(self.layer1(self.block(x))))


@changed_by(put("conv2", nn.Identity()))
def a_convolution_becomes_nothing(self, x):
    return F.relu(self.layer2(F.relu(self.layer1(x))) + x)


@changed_by(put("conv2", nn.Sequential(conv(), nn.Sigmoid()).double()))
def a_convolution_becomes_several(self, x):
    return F.relu(self.layer2(F.relu(self.layer1(x))) + x)


@changed_by(put("conv2", conv(padding="same").double()))
def a_convolution_of_another_padding(self, x):
    return F.relu(self.layer2(F.relu(self.layer1(x))) + x)


@changed_by(put("bn2", nn.Identity()))
def a_norm_becomes_nothing(self, x):
    return F.relu(self.layer2(F.relu(self.layer1(x))) + x)


def pool_less(net):
    net.pool.output_size = 2
    net.head = nn.Identity()


class Pooled(Net):
    """A net with a pool."""

    def __init__(self):
        super().__init__()
        self.pool, self.flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()

    def forward(self, x):
        return self.head(self.flat(self.pool(F.relu(self.layer1(x)))))


CHANGES["an_attribute_of_the_pool"] = Pooled, pool_less


@changed_by(put("head", nn.Identity()))
def the_classifier_becomes_nothing(self, x):
    return self.head(F.relu(self.layer1(x)).mean((2, 3)))


@changed_by(lambda net: net.conv1.register_forward_hook(lambda _m, _x, out: out * 2))
def hooked_convolution(self, x):
    return self.block(self.relu(self.layer1(x)))


@changed_by(lambda net: net.bn1.register_forward_hook(lambda _m, _x, out: out * 2))
def hooked_norm(self, x):
    return self.block(self.relu(self.layer1(x)))


@changed_by(lambda net: net.block.register_forward_pre_hook(lambda _m, x: x[0] * 2))
def hooked_block(self, x):
    return self.block(self.relu(self.layer1(x)))


@changed_by(lambda net: net.identity.register_forward_hook(lambda _m, _x, out: out * 2))
def hooked_identity(self, x):
    return self.relu(self.layer2(self.relu(self.layer1(x))) + self.identity(x))


def double_its_gradient(net):
    net.block.relu = net.inner.relu = nn.ReLU()
    net.inner.relu.register_full_backward_hook(lambda _m, dx, _dy: (dx[0] * 2,))


@changed_by(double_its_gradient)
def hooked_activation(self, x):
    return self.block(F.relu(self.inner.relu(self.layer1(x).clone()).clone()))


@changed_by(lambda net: setattr(net.inner, "forward", lambda x: x * 2))
def a_replaced_forward(self, x):
    return self.layer2(F.relu(self.layer1(self.inner(x))))


@changed_by(lambda net: setattr(net.inner, "helper", lambda x: x * 2))
def a_replaced_method(self, x):
    return self.layer2(F.relu(self.layer1(self.inner.helper(x))))


@changed_by(lambda net: setattr(net, "layer1", lambda x: x * 2))
def a_replaced_method_of_its_own(self, x):
    return self.layer2(F.relu(self.layer1(x)))


# What decides while it runs.


@computes
def asks_for_the_mode(self, x):
    return F.relu(self.layer1(x)) if self.training else self.layer2(x)


@computes
def asks_for_gradients(self, x):
    return F.relu(self.layer1(x)) if torch.is_grad_enabled() else self.layer2(x)


@computes
def draws_from_python(self, x):
    return self.layer2(F.relu(self.layer1(x))) if random.random() < 0.5 else self.layer1(x)


@computes
def draws_from_numpy(self, x):
    return self.layer2(F.relu(self.layer1(x))) if np.random.rand() < 0.5 else self.layer1(x)


@computes
def draws_from_torch(self, x):
    return F.relu(self.layer1(x)) * torch.rand((), dtype=x.dtype)


@computes
def draws_like_its_input(self, x):
    return F.relu(self.layer1(x)) + torch.randn_like(self.head.weight[0, :1])


@computes
def draws_from_a_seed(self, x):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        noise = torch.rand_like(x[0, 0, 0])
    return F.relu(self.layer1(x)) * noise


@computes
def counts_its_calls(self, x):
    self.calls += 1
    return F.relu(self.layer1(x)) * self.calls


@computes
def keeps_a_list_of_values(self, x):
    z = F.relu(self.layer1(x))
    self.seen.append(z.detach())
    return F.relu(self.layer2(z)) + self.seen[0]


@computes
def counts_in_a_list(self, x):
    self.seen.append(1)
    return F.relu(self.layer1(x))


@computes
def prints(self, x):
    print("called")
    return F.relu(self.layer1(x))


KEPT: list[Tensor] = []


@computes
def keeps_values_elsewhere(self, x):
    z = F.relu(self.layer1(x))
    KEPT.append(z.detach())
    return F.relu(self.layer2(z)) * (KEPT[-1] if KEPT else 0)


@computes
def tries_first(self, x):
    try:
        n = len(x) if x.sum() != 0 else 0
    except Exception:
        n = -1
    with contextlib.suppress(Exception):
        n += x.shape[0] if x.shape[0] > 1 else 7
    return F.relu(self.layer1(x)) * n


@computes
def asks_for_a_shape(self, x):
    n, _, height, width = x.shape
    z = F.relu(self.layer1(x))
    return z.reshape(n, -1) if height == width else z


@computes
def asks_whether_it_is_a_tensor(self, x):
    return F.relu(self.layer1(x)) if isinstance(x, Tensor) else self.layer2(x[0])


@computes
def makes_modules(self, x):
    return nn.Sequential(nn.Dropout(0.0), nn.ReLU())(self.layer1(x))


@computes
def changes_its_input(self, x):
    x = x * 1
    keep = x.view(-1)
    x += 1
    x *= 2
    x[:, 0] = 0
    return F.relu(self.layer1(x.clone())), keep


@computes
def changes_data(self, x):
    z = F.relu(self.layer1(x))
    y = z.detach().clone()
    y.data = y.data * 2
    y.tag = 1
    return F.relu(self.layer2(z)) * y


@computes
def runs_a_part_of_itself_again(self, x):
    z = checkpoint(self.block, F.relu(self.layer1(x)), use_reentrant=True)
    return checkpoint(self.inner, z, use_reentrant=False)


@computes
def runs_its_blocks_again(self, x):
    return checkpoint_sequential(nn.Sequential(*self.blocks), 2, x, use_reentrant=False)


@computes
def a_gradient_of_its_own(self, x):
    return self.block(F.relu(Double.apply(self.layer1(x))))


@computes
def without_gradients(self, x):
    with torch.no_grad():
        z = self.block(x)
    with torch.set_grad_enabled(False):
        z = self.inner(z)
    return self.layer1(F.relu(z))


@computes
def in_inference_mode(self, x):
    with torch.inference_mode():
        z = self.block(x)
    return F.relu(self.layer1(z.clone()))


@computes
def keyword_arguments(self, x, scale=1.0, mask=None, **options):
    if mask is not None:
        x = x * mask
    extra = options.get("extra")
    z = F.relu(self.layer1(x)) * scale
    return z if extra is None else z + extra


@computes
def further_arguments(self, x, *others):
    z = F.relu(self.layer1(x))
    for other in others:
        z = z + other
    return z


@computes
def asks_of_itself(self, x):
    return F.relu(self.layer1(x)) * len(self._modules) * len(vars(self)["_parameters"])


def same(net: nn.Module, other: nn.Module) -> None:
    """Whether two nets compute the same, with gradients and without, in one mode."""
    for seed in (1, 2, 3):
        results = []
        for each in (net, other):
            random.seed(seed)
            np.random.seed(seed)
            each.learns = seed < 3
            results.append(step(each, images(seed)))
        assert_equal(results[1], results[0])


# Of these forwards there is no graph, and all layers are their own.
NO_GRAPH = {
    *("a_configuration", "a_changed_configuration", "branches_on_the_mode_of_a_child"),
    *("asks_its_parameters", "the_dtype_of_its_parameters"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name, in_ops):
    kind, change = CHANGES[name]
    net = made(kind)
    other = fuse(net, verbose=False)
    before = step(copy.deepcopy(net), images())
    assert_equal(step(copy.deepcopy(other), images()), before)
    assert bool(in_ops) == (name not in NO_GRAPH)
    for each in (net, other):
        change(each)
    got, wanted = (step(each, images()) for each in (other, net))
    # Where a part of it now runs as before, a layout that was nobody's concern may be seen.
    assert_equal(got, wanted, strides=False)


@pytest.mark.parametrize("name", FORWARDS)
def test_a_forward_decides_when_it_runs(name, capsys):
    net = made(FORWARDS[name])
    states = [random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()]
    other = fuse(net, verbose=False)
    now = [random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()]
    assert now == states
    assert (other.seen, other.calls, capsys.readouterr().out) == ([], 0, "")
    KEPT.clear()
    same(net, other)
    for each in (net, other):
        each.eval()
    same(net, other)
    # Nothing that a forward leaves behind is left out.
    assert len(other.seen) == len(net.seen)
    assert len(KEPT) in (0, 12)
    assert capsys.readouterr().out in ("", 12 * "called\n")


@pytest.mark.parametrize("name", ["keyword_arguments", "further_arguments"])
def test_arguments_that_may_be_left_out(name, in_ops):
    net = made(FORWARDS[name])
    other = fuse(net, verbose=False)
    for given in ((images(),), (images(), images(1)), (images(),)):
        torch.testing.assert_close(other(*given), net(*given), rtol=1e-9, atol=1e-9)
    assert in_ops


# What is done with a fused net.


def saved(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def changed_and_pickled(net):
    """With other norms, where nothing matches any longer."""
    net.bn1 = net.bn2 = nn.InstanceNorm2d(4)
    return pickle.loads(pickle.dumps(net))


def tied(net):
    net.conv2.weight = net.conv1.weight
    net.bn2 = net.bn1
    return net


def loaded(net):
    other = Block().double()
    other.load_state_dict({name: value * 0.5 for name, value in net.state_dict().items()})
    net.load_state_dict(other.state_dict(), assign=True)
    return net


def symbolically_traced(net):
    return torch.fx.symbolic_trace(net)


def a_child_alone(net):
    return nn.Sequential(net.conv1, net.bn1, nn.Sigmoid())


def in_a_sequence_with_itself(net):
    return nn.Sequential(net, nn.Dropout2d(0.0), net)


USES = [copy.deepcopy, copy.copy, saved, changed_and_pickled, tied, loaded, symbolically_traced]
USES += [a_child_alone, in_a_sequence_with_itself]


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_a_use_of_a_fused_net(use):
    results = []
    net = made(Block)
    fused = fuse(net, verbose=False)
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in net.named_modules()]
    for each in (net, fused):
        used = use(each)
        if use in (copy.deepcopy, saved, tied, loaded):
            assert type(used) is type(each)
        results.append(step(used, images()))
    assert_equal(results[1], results[0])


def test_a_fused_net_that_is_fused_again_and_a_net_around_fused_ones():
    layer = nn.Sequential(conv(r=1), nn.BatchNorm2d(4))
    net = made(lambda: nn.Sequential(Block(), Inner(), layer, nn.ReLU()))
    once = fuse(net, verbose=False)
    twice = fuse(once, verbose=False)
    kinds = [type(module) for module in once.modules()]
    assert [type(module) for module in twice.modules()] == kinds
    around = fuse(nn.Sequential(once[0], nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), verbose=False)
    assert [isinstance(module, FusedModule) for module in around] == [True, False, False]
    assert_equal(step(twice, images()), step(net, images()))


@pytest.mark.parametrize("to", [lambda net: net.half(), lambda net: net.to(torch.bfloat16)])
def test_a_fused_net_in_another_dtype(to):
    net = made(Block)
    outputs = [to(each)(images().to(each.conv1.weight.dtype)) for each in (net, fuse(net))]
    assert outputs[0].dtype == outputs[1].dtype != torch.float64
    torch.testing.assert_close(*outputs, rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@torch.no_grad()
def test_a_fused_net_is_recorded_as_the_plain_one():
    net = made(Block).eval()
    fused = fuse(net, verbose=False)
    recorded = [torch.jit.trace(fused, images()), torch.export.export(fused, (images(),)).module()]
    for each in recorded:
        torch.testing.assert_close(each(images(1)), net(images(1)), rtol=1e-9, atol=1e-9)
