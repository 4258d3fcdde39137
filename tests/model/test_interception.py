"""Whatever stands between the call of a module and its computation is met by a fused net as well.

Each case does one thing to a plain net and to its fused form, or with them: the results are the
same to the last bit, because the fused form calls its modules too. Before and after it runs fused.
"""

import copy
import io
import pickle
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastres.fusion.fuse import fuse
from fastres.kernels import ops
from fastres.model import resnet
from fastres.model.resnet import create_model
from tests.helpers.interpreter import DEVICE

pytestmark = [
    pytest.mark.usefixtures("plain"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def randn(*size, seed=0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


# Drawn here: under a transform of torch.func nothing may be drawn.
IMAGES = randn(4, 3, 16, 16)


def images() -> torch.Tensor:
    return IMAGES.clone()


def fastres_net() -> nn.Module:
    return create_model("resnet8", width=0.25, seed=0).to(DEVICE)


def torchvision_net() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4).to(DEVICE)


def sequential() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(DEVICE)


NETS = [fastres_net, torchvision_net, sequential]


class Counted:
    """Counts the calls of the fused ops."""

    def __init__(self, monkeypatch):
        self.calls = 0
        for name in ("conv_bn_relu", "residual_block", "conv_bn_folded", "residual_block_folded"):
            monkeypatch.setattr(ops, name, self._count(getattr(ops, name)))

    def _count(self, function):
        def counted(*args, **kwargs):
            self.calls += 1
            return function(*args, **kwargs)

        return counted

    def during(self, function) -> int:
        before = self.calls
        function()
        return self.calls - before


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


# What is done with a net: each function returns what the net computed, or how it was recorded.


def tangents(net):
    with torch.no_grad(), forward_ad.dual_level():
        return forward_ad.unpack_dual(net(forward_ad.make_dual(images(), images().flip(3))))


def tangents_with_gradients(net):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(net(forward_ad.make_dual(images(), images().flip(3))))


def subclass(net):
    class Tagged(torch.Tensor):
        pass

    return net(images().as_subclass(Tagged)).as_subclass(torch.Tensor)


def subclass_of_a_parameter(net):
    class Tagged(torch.Tensor):
        pass

    params = {name: p.detach().as_subclass(Tagged) for name, p in net.named_parameters()}
    out = torch.func.functional_call(net, params, (images(),))
    assert isinstance(out, Tagged)
    return out.as_subclass(torch.Tensor)


def state(net):
    """Parameters, and buffers that a training step may change in place."""
    return (
        {name: p.detach() for name, p in net.named_parameters()},
        {name: b.clone() for name, b in net.named_buffers()},
    )


def functional_loss(net):
    params, buffers = state(net)

    def loss(params):
        own = {name: b.clone() for name, b in buffers.items()}
        return torch.func.functional_call(net, (params, own), (images(),)).square().sum()

    return loss, params


def func_grad(net):
    loss, params = functional_loss(net)
    return torch.func.grad(loss)(params)


def func_jvp(net):
    loss, params = functional_loss(net)
    return torch.func.jvp(loss, (params,), (params,))


def func_hessian_vector_product(net):
    loss, params = functional_loss(net)
    return torch.func.jvp(torch.func.grad(loss), (params,), (params,))


def func_ensemble(net):
    nets = [copy.deepcopy(net), copy.deepcopy(net)]
    with torch.no_grad():
        for p in nets[1].parameters():
            p.mul_(1.5)
    params, buffers = torch.func.stack_module_state(nets)

    def member(params, buffers):
        return torch.func.functional_call(net, (params, buffers), (images(),))

    return torch.vmap(member)(params, buffers)


def func_vmap_of_images(net):
    return torch.vmap(net.eval(), randomness="error")(torch.stack([images(), -images()]))


def func_jacfwd(net):
    return torch.func.jacfwd(lambda scale: net.eval()(scale * images()))(
        torch.ones((), device=DEVICE)
    )


def fx_trace(net):
    traced = torch.fx.symbolic_trace(net)
    return [(node.op, str(node.target)) for node in traced.graph.nodes], traced(images())


def feature_extractor(net):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    names = extraction.get_graph_node_names(net)
    return names, extraction.create_feature_extractor(net, names[0][1:4])(images())


def quantize_fx(net):
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    prepared = quantize_fx.prepare_fx(net.eval(), get_default_qconfig_mapping("x86"), (images(),))
    out = prepared(images())
    return out, quantize_fx.convert_fx(prepared.cpu())(images().cpu())


def quantize_eager(net):
    from torch.ao.quantization import get_default_qconfig, prepare

    net.eval().qconfig = get_default_qconfig("x86")
    prepared = prepare(net)
    out = prepared(images())
    return out, [observer for observer in prepared.state_dict() if "min_val" in observer]


def make_fx_graph(net):
    with torch.no_grad():
        return [str(node.target) for node in make_fx(net)(images()).graph.nodes]


def jit_trace(net):
    traced = torch.jit.trace(net, images(), check_trace=False)
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    return kinds, traced(images())


def export_graph(net):
    program = torch.export.export(net.eval(), (images(),))
    return [str(node.target) for node in program.graph.nodes], program.module()(images())


def export_graph_strictly(net):
    program = torch.export.export(net.eval(), (images(),), strict=True)
    return [str(node.target) for node in program.graph.nodes]


def onnx_by_tracing(net):
    onnx = pytest.importorskip("onnx")
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(net.eval(), (images(),), file, dynamo=False)
    return Counter(node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node)


def onnx_by_export(net):
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(net.eval(), (images(),), dynamo=True, verbose=False)
    return Counter(node.op_type for node in program.model.graph)


def flops(net):
    with FlopCounterMode(display=False) as counter:
        net(images()).sum().backward()
    # The first part of a name is the class of the whole net.
    return sorted(
        (name.partition(".")[2], str(op), count)
        for name, counts in counter.get_flop_counts().items()
        for op, count in counts.items()
    )


def hooks_on_all(register):
    def run(net):
        if "backward" in register.__name__ and hasattr(net, "maxpool"):
            pytest.skip("torch refuses backward hooks beside torchvision's additions in place")
        seen = []
        handle = register(lambda module, *_: seen.append(type(module)._get_name(module)))
        try:
            net(images()).square().sum().backward()
        finally:
            handle.remove()
        return sorted(name.removeprefix("Fused").removeprefix("Torchvision") for name in seen)

    run.__name__ = register.__name__
    return run


def hook_that_changes(net):
    def double(module, args, out):
        return 2 * out if isinstance(module, nn.Conv2d) else None

    handle = torch_module.register_module_forward_hook(double)
    try:
        return net(images())
    finally:
        handle.remove()


class DoubleConvolutions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return 2 * out if func is F.conv2d else out


class DoubleConvolutionsBelow(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return 2 * out if func is torch.ops.aten.convolution.default else out


def dispatch_mode(net):
    with DoubleConvolutionsBelow():
        return net(images())


def function_mode(net):
    with DoubleConvolutions():
        return net(images())


def replaced_function(owner, name):
    """A run in which a function of torch is replaced by one that computes something else."""

    def run(net):
        original = getattr(owner, name)
        is_own = name in vars(owner)

        def replacement(*args, **kwargs):
            out = original(*args, **kwargs)
            return out if out is None else 1.5 * out

        setattr(owner, name, replacement)
        try:
            return net(images())
        finally:
            if is_own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)

    run.__name__ = f"{owner.__name__}.{name}"
    return run


REGISTER = [
    torch_module.register_module_forward_pre_hook,
    torch_module.register_module_forward_hook,
    torch_module.register_module_full_backward_pre_hook,
    torch_module.register_module_full_backward_hook,
]
REPLACED = [
    (nn.Conv2d, "forward"),
    (nn.Conv2d, "_conv_forward"),
    (nn.modules.batchnorm._BatchNorm, "forward"),
    (nn.ReLU, "forward"),
    (nn.Module, "__call__"),
    (nn.Module, "_call_impl"),
    (nn.Module, "_wrapped_call_impl"),
    *((kind, "__call__") for kind in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Sequential)),
    (nn.BatchNorm2d, "_call_impl"),
    (nn.Sequential, "forward"),
    (torch, "batch_norm"),
    (torch, "relu"),
    (F, "conv2d"),
    (F, "batch_norm"),
    (F, "relu"),
    (F, "linear"),
]
USES = [
    tangents,
    tangents_with_gradients,
    subclass,
    subclass_of_a_parameter,
    func_grad,
    func_jvp,
    func_hessian_vector_product,
    func_ensemble,
    func_vmap_of_images,
    func_jacfwd,
    fx_trace,
    feature_extractor,
    quantize_fx,
    quantize_eager,
    make_fx_graph,
    jit_trace,
    export_graph,
    export_graph_strictly,
    onnx_by_tracing,
    onnx_by_export,
    flops,
    hook_that_changes,
    function_mode,
    dispatch_mode,
    *(hooks_on_all(register) for register in REGISTER),
    *(replaced_function(*function) for function in REPLACED),
]


def assert_same(got, wanted) -> None:
    """Two structures of tensors, numbers and names are equal."""
    leaves, structure = tree_flatten(got)
    wanted_leaves, wanted_structure = tree_flatten(wanted)
    assert structure == wanted_structure
    for leaf, wanted_leaf in zip(leaves, wanted_leaves, strict=True):
        if isinstance(leaf, torch.Tensor):
            torch.testing.assert_close(leaf, wanted_leaf, rtol=0, atol=0)
        else:
            assert leaf == wanted_leaf


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize("use", USES, ids=[use.__name__ for use in USES])
def test_a_use_meets_the_plain_modules(use, make, counted):
    plain = make()
    fused = fuse(plain, verbose=False)
    ordinary = copy.deepcopy(fused)
    assert counted.during(lambda: ordinary(images())) > 0
    wanted, got = [], []
    assert counted.during(lambda: got.append(use(copy.deepcopy(fused)))) == 0
    wanted.append(use(copy.deepcopy(plain)))
    assert_same(got, wanted)
    assert counted.during(lambda: ordinary(images())) > 0


# What is done to a module of a net; each changes what it computes.


def first(net, kind):
    return next(module for module in net.modules() if isinstance(module, kind))


def own_method(kind, name):
    def change(net):
        module = first(net, kind)
        original = getattr(module, name)
        setattr(module, name, lambda *args, **kwargs: 1.5 * original(*args, **kwargs))

    change.__name__ = f"own {kind.__name__}.{name}"
    return change


class Negated(nn.Module):
    def forward(self, weight):
        return -weight


def parametrized_convolution(net):
    parametrize.register_parametrization(first(net, nn.Conv2d), "weight", Negated())


def parametrized_norm(net):
    parametrize.register_parametrization(first(net, nn.BatchNorm2d), "weight", Negated())


class LoudConv2d(nn.Conv2d):
    def forward(self, x):
        return 1.5 * super().forward(x)


class LoudNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 1.5 * super().forward(x)


def subclass_of_a_convolution(net):
    first(net, nn.Conv2d).__class__ = LoudConv2d


def subclass_of_a_norm(net):
    first(net, nn.BatchNorm2d).__class__ = LoudNorm


class Wrapper(nn.Module):
    """Holds a module and has none of its attributes, as adapters do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 1.5 * self.inner(x)


def wrapped_convolution(net):
    owner, name = next(
        (module, name)
        for module in net.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.Conv2d)
    )
    setattr(owner, name, Wrapper(getattr(owner, name)))


def norm_without_a_bias(net):
    norm = first(net, nn.BatchNorm2d)
    nn.init.constant_(norm.bias, 0.5)
    norm.bias = None


def tensor_for_eps(net):
    first(net, nn.BatchNorm2d).eps = torch.tensor(0.5)


CHANGES = [
    wrapped_convolution,
    norm_without_a_bias,
    tensor_for_eps,
    own_method(nn.Conv2d, "forward"),
    own_method(nn.Conv2d, "_conv_forward"),
    own_method(nn.Conv2d, "_call_impl"),
    own_method(nn.BatchNorm2d, "forward"),
    own_method(nn.BatchNorm2d, "_call_impl"),
    parametrized_convolution,
    parametrized_norm,
    subclass_of_a_convolution,
    subclass_of_a_norm,
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
def test_a_changed_module_is_called(change, make, training):
    plain = make().double()
    fused = fuse(plain, verbose=False)
    untouched = copy.deepcopy(plain)
    results = []
    for net in (plain, fused):
        change(net)
        with torch.no_grad():
            results.append(net.train(training)(images().double()))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    if training is False and change is not norm_without_a_bias:
        with torch.no_grad():
            assert not torch.allclose(untouched.eval()(images().double()), results[0])


def test_a_dispatch_mode_may_ask_for_the_fused_ops(counted):
    seen = set()

    class Watcher(TorchDispatchMode):
        sees_fused_ops = True

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.namespace)
            return func(*args, **(kwargs or {}))

    fused = fuse(fastres_net(), verbose=False)
    with Watcher():
        assert counted.during(lambda: fused(images())) > 0
    assert "fastres" in seen


@pytest.mark.parametrize("training", [True, False])
def test_a_block_whose_shortcut_is_cut(training):
    plain = fastres_net().double()
    fused = fuse(plain, verbose=False)
    results = []
    for net in (plain, fused):
        net.layer2[0].residual = False
        with torch.no_grad():
            out = net.train(training)(images().double())
        results.append([out, *net.buffers()])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_sequential_returns_the_layout_that_torch_does(layout, training):
    plain = sequential()[:3].to(memory_format=layout).train(training)
    fused = fuse(plain, verbose=False)
    x = images().contiguous(memory_format=layout)
    with torch.no_grad():
        assert fused(x).stride() == plain(x).stride()


def test_a_class_derived_from_a_fused_one_is_its_own(monkeypatch):
    fused = fuse(sequential(), verbose=False)

    class Mixin:
        pass

    class Loud(Mixin, type(fused)):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    quiet = copy.deepcopy(fused)
    fused.__class__ = Loud
    torch.testing.assert_close(fused(images()), 2 * quiet(images()), rtol=0, atol=0)
    original = nn.Sequential.forward
    monkeypatch.setattr(nn.Sequential, "forward", lambda self, input: 3 * original(self, input))
    torch.testing.assert_close(fused(images()), 2 * quiet(images()), rtol=0, atol=0)
    monkeypatch.undo()
    with warnings.catch_warnings(action="ignore"), pytest.raises((RuntimeError, ValueError)):
        torch.jit.script(fused)


class LoudSequential(nn.Sequential):
    def forward(self, x):
        return 1.5 * super().forward(x)


@pytest.mark.parametrize("training", [True, False])
def test_a_shortcut_of_another_class_is_called(training):
    plain = fastres_net().double()
    fused = fuse(plain, verbose=False)
    results = []
    for net in (plain, fused):
        block = net.layer2[0]
        block.downsample = LoudSequential(*block.downsample)
        with torch.no_grad():
            results.append(net.train(training)(images().double()))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def torchvision_block():
    return pytest.importorskip("torchvision.models.resnet").BasicBlock


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize(
    ("make", "kind"),
    [(fastres_net, lambda: resnet.BasicBlock), (torchvision_net, torchvision_block)],
)
def test_a_replaced_block_is_what_runs(make, kind, patch_first, monkeypatch):
    """Whether somebody gave the plain class another forward before or after the net was fused."""
    plain = make().double()
    fused = None if patch_first else fuse(plain, verbose=False)
    original = kind().forward
    monkeypatch.setattr(kind(), "forward", lambda self, x: 1.5 * original(self, x))
    if fused is None:
        fused = fuse(plain, verbose=False)
    with torch.no_grad():
        results = [net.eval()(images().double()) for net in (plain, fused)]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_fuse_says_that_a_function_of_torch_is_replaced(monkeypatch, capsys):
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: F.conv2d(x, self.weight))
    fuse(fastres_net())
    assert "none of them while Conv2d.forward is not torch's own" in capsys.readouterr().out


def test_a_scripted_net_is_the_plain_one_and_the_fused_stays_fused():
    """torch.jit.script reads the source of modules, and knows no registered op of ours."""
    plain = torchvision_net().eval()
    fused = fuse(plain, verbose=False)
    kinds = [type(module) for module in fused.modules()]
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        scripted = [torch.jit.script(net)(images()) for net in (fused, plain)]
    torch.testing.assert_close(*scripted, rtol=0, atol=0)
    assert [type(module) for module in fused.modules()] == kinds
    pickle.dumps(fused)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("segment", ["net", "stage", "layer"])
def test_recomputation_moves_running_statistics_as_in_plain_nets(segment, reentrant, counted):
    """Twice, also those of a segment's last block."""
    results = []
    plain = sequential() if segment == "layer" else fastres_net()
    for net in (plain, fuse(plain, verbose=False)):
        net = copy.deepcopy(net).train()
        x = images().requires_grad_()
        inner = net.layer2 if segment == "stage" else net
        if segment == "stage":
            x = randn(4, inner[0].conv1.in_channels, 8, 8).requires_grad_()
        checkpoint(inner, x, use_reentrant=reentrant).square().sum().backward()
        moved = [b for name, b in inner.named_buffers() if "num_batches" in name]
        assert [int(b) for b in moved] == [2] * len(moved)
        results.append([*inner.buffers(), x.grad])
    assert counted.calls > 0
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "shape", [(3, 8, 8), (1, 4, 3, 8, 8), (4, 3), (), (4, 5, 8, 8)], ids=lambda s: f"{len(s)}-D {s}"
)
@pytest.mark.parametrize("make", NETS)
def test_what_is_no_batch_of_images_is_refused_in_torchs_words(make, shape, training):
    plain = make().train(training)
    messages = []
    for net in (plain, fuse(plain, verbose=False)):
        with torch.no_grad(), pytest.raises((RuntimeError, ValueError, IndexError)) as caught:
            net(torch.zeros(shape, device=DEVICE))
        messages.append((caught.type, str(caught.value)))
    assert messages[1] == messages[0]
