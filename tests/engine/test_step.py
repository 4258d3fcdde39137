"""The training step: schedule, weight decay, averages, parity of routes, nothing that waits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastres import create_model
from fastres.config import Config
from fastres.engine.ema import WeightAverage
from fastres.engine.optim import Optimizer, lr_factor
from fastres.engine.runtime import Runtime
from fastres.engine.step import TrainStep
from fastres.engine.trainer import count_steps

CPU = torch.device("cpu")
SMALL = Config(model="resnet8", width=0.5, lr=0.1, batch_size=8, warmup=0.0, schedule="constant")


def batch(seed=0, device=CPU):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randn(8, 3, 32, 32, generator=rng)
    return images.to(device), torch.randint(0, 10, (8,), generator=rng).to(device)


def make(config=SMALL, total_steps=10, **runtime):
    step_runtime = Runtime(**{"device": CPU} | runtime)
    model = create_model(config.model, width=config.width, seed=0).train()
    step_runtime.place(model)
    return TrainStep(model, config, step_runtime, total_steps)


def plain_step(model, optimizer, images, labels, label_smoothing=0.0):
    """Train one step as anybody would write it."""
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels, label_smoothing=label_smoothing).backward()
    optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("smoothing", "nesterov", "decay"), [(0.0, True, "filters"), (0.2, False, "all")]
)
def test_a_step_equals_plain_torch(fused, smoothing, nesterov, decay):
    config = SMALL.replace(
        label_smoothing=smoothing, weight_decay=0.1, nesterov=nesterov, decay=decay
    )
    step = make(config, fused_optimizer=fused)
    model = create_model("resnet8", width=0.5, seed=0).train()
    filters = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [
            {"params": filters, "weight_decay": 0.1},
            {"params": rest, "weight_decay": 0.1 if decay == "all" else 0.0},
        ],
        lr=0.1,
        momentum=0.9,
        nesterov=nesterov,
    )
    for number in range(3):
        step(number, *batch(number))
        plain_step(model, optimizer, *batch(number), label_smoothing=smoothing)
    expected = model.state_dict()
    for name, value in step.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("decay", ["filters", "all"])
def test_batch_norm_and_biases_decay_where_asked_for(optimizer, decay):
    model = create_model("resnet8", width=0.5, seed=0)
    config = SMALL.replace(weight_decay=0.5, lr=1.0, optimizer=optimizer, decay=decay)
    optimizer = Optimizer(model, config, fused=False)
    torch.nn.init.ones_(model.bn1.bias)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.rules[0].step()
    for name, p in model.named_parameters():
        decays = not torch.equal(p, before[name])
        # That of a batch norm's bias is 0 at first, but for the one that was set above.
        can_decay = p.ndim > 1 or (decay == "all" and bool(before[name].any()))
        assert decays == can_decay, name


@pytest.mark.parametrize(
    ("schedule", "progress", "factor"),
    [
        ("one-cycle", 0.05, 0.5),
        ("one-cycle", 0.1, 1.0),
        ("one-cycle", 0.55, 0.5),
        ("one-cycle", 1.0, 0.0),
        ("cosine", 0.55, 0.5),
        ("cosine", 1.0, 0.0),
        ("steps", 0.49, 1.0),
        ("steps", 0.5, 0.1),
        ("steps", 0.75, 0.01),
        ("constant", 0.9, 1.0),
    ],
)
def test_schedules(schedule, progress, factor):
    assert lr_factor(schedule, progress, warmup=0.1) == pytest.approx(factor)
    # After the warm-up its shape is nothing to the schedule.
    other = lr_factor(schedule, progress, 0.1, "constant")
    assert other == pytest.approx(0.1 if progress < 0.1 else factor)


@pytest.mark.parametrize(
    ("epochs", "steps_per_epoch", "steps"),
    [(1.1, 390, 429), (2.2, 25, 55), (0.25, 10, 3), (1e-3, 10, 1), (1 / 3, 3, 1), (12, 390, 4680)],
)
def test_a_fraction_of_an_epoch_has_no_step_of_rounding(epochs, steps_per_epoch, steps):
    assert count_steps(epochs, steps_per_epoch) == steps


def test_the_learning_rate_of_a_step_follows_the_schedule():
    step = make(SMALL.replace(schedule="one-cycle", lr=0.4), total_steps=4)
    seen = []
    for number in range(4):
        step(number, *batch())
        seen.append(float(step.optimizer.rules[0].param_groups[0]["lr"]))
    assert seen == pytest.approx([0.35, 0.25, 0.15, 0.05])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_the_fused_optimizer_steps_like_the_plain_one(optimizer):
    """At rates that change; the plain SGD gets its rate as a number, and reads no tensor back."""
    config = SMALL.replace(optimizer=optimizer, schedule="cosine", lr=0.01)
    steps = {way: make(config, 3, fused_optimizer=way) for way in (False, True)}
    for step in steps.values():
        for number in range(3):
            step(number, *batch(number))
    reads = isinstance(steps[False].optimizer.rules[0].param_groups[0]["lr"], float)
    assert reads == (optimizer == "sgd")
    for name, weight in steps[False].model.named_parameters():
        other = steps[True].model.get_parameter(name)
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-5, msg=name)


def test_the_average_is_applied_and_taken_back():
    step = make(SMALL.replace(ema=0.5))
    weight = step.model.get_parameter("conv1.weight")
    wanted = weight.detach().clone()
    for number in range(4):
        step(number, *batch(number))
        keep = min(0.5, (1 + number) / (10 + number))
        wanted = keep * wanted + (1 - keep) * weight.detach()
    live = weight.detach().clone()
    with step.evaluated_weights():
        torch.testing.assert_close(weight, wanted)
    assert torch.equal(weight, live)
    assert not torch.allclose(live, wanted)


def test_the_average_covers_batch_norm_statistics():
    average = WeightAverage(create_model("resnet8"), 0.9).average
    assert "bn1.running_mean" in average
    assert "bn1.num_batches_tracked" not in average


def test_totals_count_the_batch():
    step = make()
    images, labels = batch()
    with torch.no_grad():
        logits = copy.deepcopy(step.model)(images)
    step(0, images, labels)
    loss, accuracy, count = step.totals.read()
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert accuracy == 100 * (logits.argmax(1) == labels).double().mean().item()
    assert count == 8


@pytest.mark.parametrize("runtime", [{"channels_last": True}, {"compiled": True}])
def test_routes_take_the_same_steps(runtime):
    """Losses of five steps agree to what one float32 rounding of the input does to them."""
    plain, other = make(), make(**runtime)
    other.prepare(*batch(9))
    losses = []
    for step in (plain, other):
        losses.append([])
        for number in range(5):
            step.totals.values.zero_()
            step(number, *batch(number))
            losses[-1].append(step.totals.read()[0])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert plain.model.state_dict().keys() == other.model.state_dict().keys()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_preparing_leaves_no_trace(optimizer):
    step = make(SMALL.replace(optimizer=optimizer, ema=0.9), compiled=True)
    before = {k: v.clone() for k, v in step.state_dict().items()}
    step.prepare(*batch(1))
    after = step.state_dict()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    # Torch makes the state of Adam in the first step; momenta are there before.
    added = after.keys() - before.keys()
    assert bool(added) == (optimizer == "adamw")
    assert all(after[name].abs().max() == 0 for name in added)


def test_mixed_precision_keeps_float32_weights():
    step = make(dtype=torch.bfloat16, channels_last=True)
    step(0, *batch())
    assert {p.dtype for p in step.model.parameters()} == {torch.float32}
    assert step.model.bn1.running_mean.dtype == torch.float32


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_a_state_before_the_first_step_is_one_to_go_on_from(optimizer, tmp_path):
    config = SMALL.replace(optimizer=optimizer, lr=0.01)
    first, second = make(config), make(config)
    second.model.fc.weight.data.zero_()
    second.load_state_dict(first.state_dict(), tmp_path, first_step=True)
    for step in (first, second):
        step(0, *batch())
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_a_restored_step_goes_on_bit_for_bit(optimizer, tmp_path):
    config = SMALL.replace(optimizer=optimizer, ema=0.9, lr=0.01, mixup=1.0, cutmix=1.0)
    whole, first, second = make(config), make(config), make(config)
    for number in range(4):
        whole(number, *batch(number))
    for number in range(2):
        first(number, *batch(number))
    saved = {name: value.clone() for name, value in first.state_dict().items()}
    second.load_state_dict(saved, tmp_path)
    for number in range(2, 4):
        second(number, *batch(number))
    resumed = second.state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {"ema": 0.9, "label_smoothing": 0.1, "mixup": 1, "cutmix": 1},
        {"model": "resnet11", "label_smoothing": 0.2, "low_res": 24, "low_res_share": 0.4},
    ],
    ids=["mixed", "as speed"],
)
def test_a_step_reads_nothing_back(optimizer, dtype, changes):
    """Fake tensors have no values: any `.item()` raises, so the step can be captured."""
    config = SMALL.replace(optimizer=optimizer, **changes)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = create_model(config.model, width=config.width)
        model.conv1.weight.requires_grad_(config.model != "resnet11")
        runtime = Runtime(device=CPU, dtype=dtype, fused_optimizer=True)
        step = TrainStep(model, config, runtime, total_steps=10)
        for number in (0, 9):
            step(number, torch.empty(8, 3, 32, 32), torch.empty(8, dtype=torch.int64))
        with pytest.raises(DataDependentOutputException):
            step.totals.read()


def small_first(config=SMALL):
    return config.replace(low_res=24, low_res_share=0.4)


def test_images_are_small_at_first():
    """For the steps whose middle lies in the share: two of five; whoever serves them serves 32."""
    step, sizes = make(small_first(), total_steps=5), []
    step.model.conv1.register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[2:]))
    for number in range(5):
        step(number, *batch(number))
    assert sizes == [(24, 24)] * 2 + [(32, 32)] * 3


def test_a_small_step_is_a_plain_step_on_shrunk_images():
    step, plain = make(small_first(), total_steps=5), make()
    images, labels = batch()
    # Averages over windows of triangles that add up to one.
    weights = torch.stack([resampled(row) for row in torch.eye(32)], dim=1)
    small = torch.einsum("ih,jw,nchw->ncij", weights, weights, images.double())
    step(0, images, labels)
    plain._compute(small.float(), labels, 24)
    for name, value in step.model.state_dict().items():
        expected = plain.model.state_dict()[name]
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=name)


def resampled(row):
    """32 numbers as 24, by triangles as wide as two of the result, in fp64."""
    scale = 32 / 24
    centres = (torch.arange(24, dtype=torch.float64) + 0.5) * scale
    distance = (torch.arange(32, dtype=torch.float64) + 0.5 - centres[:, None]).abs() / scale
    weights = (1 - distance).clamp(min=0)
    return (weights / weights.sum(dim=1, keepdim=True)) @ row.double()


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "mixed", "small_first"])
def test_a_replayed_graph_takes_the_eager_steps(compiled, dtype, kind):
    cuda = torch.device("cuda", 0)
    options = {"device": cuda, "dtype": dtype, "channels_last": True, "fused_optimizer": True}
    configs = {"plain": SMALL, "mixed": SMALL.replace(mixup=1.0, cutmix=1.0)}
    options["config"] = configs.get(kind, small_first())
    options["total_steps"] = 5
    eager = make(**options)
    graph = make(**options, compiled=compiled, graph=True)
    graph.prepare(*batch(9, cuda))
    for number in range(5):
        eager(number, *batch(number, cuda))
        graph(number, *batch(number, cuda))
    a, b = eager.totals.read(), graph.totals.read()
    assert a[0] == pytest.approx(b[0], rel=2e-2 if dtype == torch.bfloat16 else 2e-3)
    assert a[2] == b[2] == 40
