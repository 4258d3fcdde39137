"""A step whose optimizer, totals and copies of filters are kernels: same training, few launches."""

import collections
import copy
import functools
import types
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastres.config import Config
from fastres.engine import step as step_module
from fastres.engine.optim import Optimizer
from fastres.engine.runtime import Runtime
from fastres.engine.step import Totals, TrainStep
from fastres.engine.step_kernels import FilterCopies, OneLaunchSGD
from fastres.fusion.fuse import fuse
from fastres.kernels import filter_copies
from fastres.kernels.gpu import backend as gpu_backend
from fastres.kernels.gpu.launch import recording
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.launch_table import conv_config
from fastres.model.resnet import BasicBlock, ResNet, create_model
from tests.helpers.interpreter import DEVICE, HAS_GPU, needs_gpu
from tests.helpers.numerics import assert_like_eager

BF16 = torch.bfloat16
SMALL = Config(model="resnet8", lr=0.1, batch_size=4, warmup=0.0, ema=0.5)
# The first of ten steps on images of another size than the rest.
MUON_SMALL_FIRST = SMALL.replace(optimizer="muon", low_res=8, low_res_share=0.1)


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """A step of the interpreter costs about the same for a large tile as for a small one."""
    tiles = ConvConfig(256, 16, 128, num_warps=4, num_stages=2, split_k=2)

    def config(op, *arguments, **options):
        return conv_config(op, *arguments, **options) if HAS_GPU else tiles

    monkeypatch.setattr(gpu_backend, "conv_config", config)


def batch(number, size=6):
    generator = torch.Generator().manual_seed(number)
    images = torch.randn((4, 3, size, size), generator=generator).to(DEVICE)
    return images, torch.randint(0, 4, (4,), generator=generator).to(DEVICE)


def make_step(config=SMALL, dtype=BF16, model=None, **options) -> TrainStep:
    runtime = Runtime(DEVICE, dtype, channels_last=True, route="fused", fused_optimizer=True)
    for name, value in options.items():
        setattr(runtime, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = fuse(model or ResNet(BasicBlock, (1,), 4, 4, "B"), verbose=False).train()
    runtime.place(model)
    return TrainStep(model, config, runtime, total_steps=10)


def assert_same_state(step, other):
    got, wanted = step.state_dict(), other.state_dict()
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name


def filters(step):
    return [p for p in step.model.parameters() if p.dim() == 4]


def assert_fresh(step):
    for w in filters(step):
        assert torch.equal(step._copies.of(w), w.to(step.runtime.dtype))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_copies_change_no_bit_of_a_training(optimizer, monkeypatch):
    """A filter that is rounded beforehand is what an op that rounds it itself computes with."""
    config = SMALL.replace(optimizer=optimizer)
    with_copies = make_step(config)
    monkeypatch.setattr(step_module, "copy_filters", lambda *_: None)
    without = make_step(config)
    for number in range(3):
        with_copies(number, *batch(number))
        without(number, *batch(number))
        assert_fresh(with_copies)
    assert without._copies is None
    assert_same_state(with_copies, without)


def test_whatever_changes_weights_changes_their_copies(tmp_path):
    """A checkpoint, an average that was put in and taken out, a hand; none says so."""
    one, two, three = make_step(), make_step(), make_step()
    for number in range(2):
        one(number, *batch(number))
        three(number, *batch(number))
    saved = {name: value.clone() for name, value in one.state_dict().items()}
    two(0, *batch(5))
    two.load_state_dict(saved, tmp_path)
    two(2, *batch(2))

    with one.evaluated_weights():
        pass
    with torch.no_grad():
        name, weight = next(iter(one.model.named_parameters()))
        weight.add_(1)
        weight.copy_(saved[f"model.{name}"])
    one(2, *batch(2))
    three(2, *batch(2))
    for step in (one, two):
        assert_same_state(step, three)


def test_the_average_is_evaluated_and_trained_with_while_it_is_applied():
    """Copies that were not made again would have trained on the weights of before."""
    step, other = make_step(), make_step()
    for number in range(2):
        step(number, *batch(number))
    with step.evaluated_weights():
        other.load_state_dict({k: v.clone() for k, v in step.state_dict().items()}, None)
        step(2, *batch(2))
        other(2, *batch(2))
        for w, wanted in zip(filters(step), filters(other), strict=True):
            assert torch.equal(w, wanted)


def test_a_state_goes_from_route_to_route(tmp_path):
    """The optimizer is torch's SGD in all that a checkpoint sees."""
    ours, theirs = make_step(), make_step(route="eager")
    assert type(ours.optimizer.rules[0]) is OneLaunchSGD
    assert type(theirs.optimizer.rules[0]) is torch.optim.SGD
    assert (
        ours.optimizer.rules[0].state_dict().keys() == theirs.optimizer.rules[0].state_dict().keys()
    )
    ours(0, *batch(0))
    theirs(0, *batch(0))
    saved = {name: value.clone() for name, value in ours.state_dict().items()}
    assert saved.keys() == theirs.state_dict().keys()
    theirs.load_state_dict(saved, tmp_path)
    assert_same_state(ours, theirs)
    group, wanted = (s.optimizer.rules[0].param_groups[0] for s in (ours, theirs))
    assert group.keys() == wanted.keys()
    assert {k: v for k, v in group.items() if k not in ("params", "lr")} == {
        k: v for k, v in wanted.items() if k not in ("params", "lr")
    }


def quadratic_steps(rule, params):
    """Three steps; the last parameter is not part of the first loss, and then has no buffer."""
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        rule.zero_grad()
        for p in params[:-1] if number == 0 else params:
            (p - torch.randn(p.shape, generator=generator).to(p)).square().sum().backward()
        rule.step()
        has_buffer = rule.param_groups[0]["momentum"] > 0 and number > 0
        assert (params[-1] in rule.state) == has_buffer
    return [*params, *(s["momentum_buffer"] for s in rule.state.values() if s)]


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.9, False), (0.0, False)])
def test_the_optimizer_is_torchs_sgd(momentum, nesterov):
    def run(kind, *arguments, dtype=torch.float32):
        sizes = [(4, 3, 3, 3), (1500,), (5,)]
        params = [torch.ones(s, device=DEVICE, dtype=dtype).requires_grad_() for s in sizes]
        groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:]}]
        rule = kind(groups, *arguments, lr=0.1, momentum=momentum, nesterov=nesterov)
        return [t.detach() for t in quadratic_steps(rule, params)]

    got, eager = run(OneLaunchSGD, None), run(torch.optim.SGD)
    truth = run(torch.optim.SGD, dtype=torch.float64)
    for tensors in zip(got, eager, truth, strict=True):
        assert_like_eager(f"{tuple(tensors[0].shape)}", *tensors)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("decay", ["filters", "all"])
def test_a_step_in_one_launch_moves_as_torchs_does(nesterov, decay):
    """All of what a recipe asks of the optimizer reaches the kernel."""
    config = SMALL.replace(nesterov=nesterov, decay=decay, weight_decay=0.5, ema=0)
    step = make_step(config, dtype=torch.float32)
    torch_step = make_step(config, dtype=torch.float32, fused_optimizer=False)
    assert type(step.optimizer.rules[0]) is OneLaunchSGD
    assert type(torch_step.optimizer.rules[0]) is torch.optim.SGD
    for number in range(2):
        step(number, *batch(number))
        torch_step(number, *batch(number))
    for (name, got), wanted in zip(
        step.model.named_parameters(), torch_step.model.parameters(), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6, msg=name)


def test_what_the_optimizer_cannot_do_is_refused():
    def rule(**options):
        params = [torch.ones(3, device=DEVICE).requires_grad_() for _ in range(2)]
        for p in params:
            p.grad = torch.ones_like(p)
        made = OneLaunchSGD(
            [{"params": [p]} for p in params], None, lr=0.1, momentum=0.9, nesterov=True
        )
        made.param_groups[1] |= options
        return made

    rule().step()
    for options in ({"momentum": 0.5}, {"nesterov": False}):
        with pytest.raises(ValueError, match=f"the same {next(iter(options))}"):
            rule(**options).step()
    for name, value in (("maximize", True), ("dampening", 0.5)):
        made = rule(**{name: value})
        made.param_groups[0][name] = value
        with pytest.raises(ValueError, match="neither dampens nor maximizes"):
            made.step()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_autograd_sees_that_parameters_have_changed(dtype):
    """A backward pass through weights of before a step is an error, as it is in torch."""
    step = make_step(dtype=dtype)
    images, labels = batch(0)
    with step.runtime.autocast():
        loss = F.cross_entropy(step.model(images), labels)
    step(0, images, labels)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_step_with_an_infinite_gradient_is_skipped():
    """Loss scaling: weights, buffers and copies stay, and the next step is taken."""
    step = make_step(dtype=torch.float16)
    step(0, *batch(0))
    before = {k: v.clone() for k, v in step.model.named_parameters()}
    buffers = {k: v.clone() for k, v in step.optimizer.state_dict().items()}
    images, labels = batch(1)
    images[0, 0, 0, 0] = torch.inf
    scale = step.scaler.get_scale()
    step(1, images, labels)
    assert step.scaler.get_scale() == scale / 2
    assert all(torch.equal(before[k], v) for k, v in step.model.named_parameters())
    assert all(torch.equal(buffers[k], v) for k, v in step.optimizer.state_dict().items())
    assert_fresh(step)


def test_copies_are_fresh_when_a_graph_is_replayed():
    """A replay asks for no version: it reads whatever the copies hold."""
    step = make_step()
    replayed = []

    class Graph:
        def replay(self):
            assert_fresh(step)
            replayed.append(True)

    step._graphs, step._inputs = {32: Graph()}, batch(0)
    with torch.no_grad():
        filters(step)[0].add_(1)
    step(0, *batch(1))
    assert replayed


class StandInGraph:
    """A CUDA graph for machines without CUDA: it calls the step again that it captured."""

    capturing = None

    @contextmanager
    def capture(self):
        StandInGraph.capturing = self
        yield
        StandInGraph.capturing = None

    def replay(self):
        self.step()


@pytest.fixture
def graphs_without_cuda(monkeypatch):
    """Have `TrainStep.prepare` capture where there is no CUDA: by a graph that stands in."""
    compute = TrainStep._compute

    def remember(step, *inputs):
        if StandInGraph.capturing is not None:
            StandInGraph.capturing.step = functools.partial(compute, step, *inputs)
        compute(step, *inputs)

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", StandInGraph.capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandInGraph)
    monkeypatch.setattr(step_module, "_WARMUP_STEPS", 1)
    monkeypatch.setattr(TrainStep, "_compute", remember)


def assert_replays_are_eager_steps(dtype, num_steps, size=6, model=None, config=SMALL):
    """Bit for bit after every step: weights, momentum, statistics, counts, average, sums, scale.

    A loss scale of fp16 is at first so large that the optimizer must skip a step.
    """
    graph, eager = (
        make_step(config, dtype, copy.deepcopy(model), graph=graph) for graph in (True, False)
    )
    if dtype == torch.float16:
        for step in (graph, eager):
            scaling = {"scale": 2.0**30, "backoff_factor": 2.0**-20}
            step.scaler.load_state_dict(step.scaler.state_dict() | scaling)
    with recording() as launches:
        graph.prepare(*batch(99, size))
    counts = collections.Counter(launch.name for launch in launches)
    num_captured = len(graph._graphs) * (step_module._WARMUP_STEPS + 1)
    assert counts["sgd_kernel"] == counts["running_stats_kernel"] == num_captured
    assert len(graph._graphs) == (1 if config is SMALL else 2)
    weights = {name: value.clone() for name, value in graph.model.named_parameters()}
    for number in range(num_steps):
        with recording() as launches:
            graph(number, *batch(number, size))
        assert launches == [] or StandInGraph in map(type, graph._graphs.values())
        eager(number, *batch(number, size))
        assert_same_state(graph, eager)
        is_skipped = dtype == torch.float16 and number == 0
        moved = {k for k, p in graph.model.named_parameters() if not torch.equal(p, weights[k])}
        assert moved == (set() if is_skipped else weights.keys())
    state = graph.state_dict()
    assert state["model.bn1.num_batches_tracked"] == num_steps
    assert any(name.endswith("momentum_buffer") for name in state)
    if dtype == torch.float16:
        assert graph.scaler.get_scale() == 2.0**10


@pytest.mark.skipif(HAS_GPU, reason="a GPU captures a graph")
@pytest.mark.usefixtures("graphs_without_cuda")
@pytest.mark.parametrize("config", [SMALL, MUON_SMALL_FIRST], ids=["sgd", "muon small first"])
def test_a_replayed_step_is_the_eager_one_where_a_graph_is_stood_in_for(config):
    assert_replays_are_eager_steps(torch.float16, 2, config=config)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_a_captured_step_is_the_eager_one(dtype):
    """Of a net with all forms of narrow layers; nothing in it is left to the order of a race."""
    assert_replays_are_eager_steps(dtype, 5, size=32, model=create_model("resnet20", seed=0))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_muon_and_small_images_are_captured(dtype):
    assert_replays_are_eager_steps(dtype, 3, size=32, config=MUON_SMALL_FIRST)


class RunOps(TorchDispatchMode):
    """The operators of torch that compute something."""

    sees_fused_ops = True

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


# They move no data on the device, or belong to the interpreter of Triton.
NO_LAUNCH = ("detach", "select", "empty", "set_", "lift_fresh", "profiler", "view", "aten.copy_")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_what_a_step_launches_beside_its_blocks(optimizer, monkeypatch):
    """One optimizer, one sum, one launch for all running statistics; no filter is cast."""
    step = make_step(SMALL.replace(optimizer=optimizer, ema=0))
    monkeypatch.setattr(step_module.WeightAverage, "update", lambda *_: None)
    step(0, *batch(0))
    images, labels = batch(1)
    images = images.contiguous(memory_format=torch.channels_last)

    def refuse(w, dtype):
        raise AssertionError(f"filters {tuple(w.shape)} are cast in an op")

    monkeypatch.setattr(filter_copies, "round_filter", refuse)
    with RunOps() as ops:
        step(1, images, labels)
    launched = {
        name: count
        for name, count in ops.counts.items()
        if not name.startswith("fastres.") and not any(part in name for part in NO_LAUNCH)
    }
    wanted = {
        "aten._to_copy.default": 1,  # the images
        "aten.fill_.Scalar": 1,  # the learning rate
    }
    if optimizer == "adamw":
        # Two groups of parameters, and their numbers of steps; then the copies.
        wanted |= {"aten._foreach_add_.Scalar": 2, "aten._fused_adamw_.tensor_lr": 2}
        wanted |= {"aten._foreach_copy_.default": 1}
    assert launched == wanted

    with recording() as launches:
        step(2, *batch(2))
    counts = collections.Counter(launch.name for launch in launches)
    assert counts["sgd_kernel"] == (optimizer == "sgd")
    assert counts["add_to_totals_kernel"] == 1
    assert counts["running_stats_kernel"] == 1


def test_only_a_fused_step_on_triton_has_kernels_beside_it():
    for options in ({"route": "eager"}, {"route": "compile"}):
        step = make_step(**options)
        assert step._copies is None
        assert type(step.optimizer.rules[0]) is torch.optim.SGD
    assert make_step(dtype=torch.float32)._copies is None
    assert isinstance(make_step()._copies, FilterCopies)
    assert type(make_step(fused_optimizer=False).optimizer.rules[0]) is torch.optim.SGD


def test_totals_add_alike():
    images, labels = batch(0)
    logits = images.flatten(1)[:, :10]
    sums = []
    for one_launch in (False, True):
        totals = Totals(DEVICE, one_launch=one_launch)
        totals.add(logits.mean(), logits, labels)
        sums.append(totals.values)
    assert torch.equal(*sums)


def test_an_optimizer_without_a_step_behind_it_is_torchs():
    model = ResNet(BasicBlock, (1,), 4, 4, "B")
    assert type(Optimizer(model, SMALL, fused=True).rules[0]) is torch.optim.SGD
