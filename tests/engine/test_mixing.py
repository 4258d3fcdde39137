"""Mixup and CutMix: weights by their distributions, images and loss by the formula."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastres import create_model
from fastres.config import Config
from fastres.engine.mixing import BatchMixing, plan_mix
from fastres.engine.runtime import Runtime
from fastres.engine.step import TrainStep
from fastres.model.head import SmoothCrossEntropy

CPU = torch.device("cpu")
WAYS = {"mixup": {"mixup": 0.4}, "cutmix": {"cutmix": 1.0}}


def mixing(step=18, seed=123, **ways):
    made = BatchMixing(Config(seed=seed, **ways), CPU)
    made.set_step(step)
    return made


def soft_targets(labels, weight, classes=10):
    """Dense targets: `weight` on the label, the rest on that of the neighbour."""
    own = F.one_hot(labels, classes).double()
    rows = np.arange(len(labels))
    partner = np.where(rows ^ 1 < len(rows), rows ^ 1, rows)
    return weight * own + (1 - weight) * own[partner]


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_weights_are_distributed_as_beta(alpha):
    """By its even moments about one half, to five standard errors; the odd ones are zero."""
    draws = [plan_mix(s, seed=1, mixup=alpha, cutmix=0).label_weight for s in range(1000)]
    offsets = np.array(draws) - 0.5
    second = 1 / (4 * (2 * alpha + 1))
    wanted = {1: 0.0, 2: second, 3: 0.0, 4: 3 * second / (4 * (2 * alpha + 3))}
    for power, moment in wanted.items():
        powers = offsets**power
        assert abs(powers.mean() - moment) < 5 * powers.std() / 1000**0.5, power


def test_a_tiny_alpha_leaves_the_images_whole():
    weights = {plan_mix(s, seed=1, mixup=1e-300, cutmix=0).label_weight for s in range(50)}
    assert weights == {0.0, 1.0}


def test_a_box_has_the_size_that_is_drawn_and_the_label_weighs_what_is_left():
    areas = []
    for step in range(500):
        mix = plan_mix(step, seed=2, mixup=0, cutmix=1.0)
        inside = mix.pixel_weight == 0
        rows, columns = inside.any(1).sum(), inside.any(0).sum()
        assert inside.sum() == rows * columns
        assert mix.label_weight == pytest.approx(1 - inside.mean(), abs=1e-7)
        assert (mix.pixel_weight[~inside] == 1).all()
        areas.append(inside.mean())
    # The area is uniform, but for what lies past the border.
    assert np.mean(areas) == pytest.approx(mean_box_area(), abs=0.04)


def mean_box_area():
    weights = (np.arange(400) + 0.5) / 400
    half = (32 * np.sqrt(1 - weights)).astype(int) // 2
    centre = np.arange(32)
    ends = np.minimum(32, centre + half[:, None]), np.maximum(0, centre - half[:, None])
    return (((ends[0] - ends[1]).mean(1) / 32) ** 2).mean()


def test_of_two_ways_each_batch_takes_one():
    mixes = [plan_mix(s, seed=3, mixup=1.0, cutmix=1.0) for s in range(300)]
    boxes = sum(len(np.unique(m.pixel_weight)) == 2 for m in mixes)
    assert 110 < boxes < 190


def test_the_choices_are_frozen():
    """Other choices of the same seed would change every resumed run and published number."""
    mixed = plan_mix(18, seed=123, mixup=0.4, cutmix=0)
    assert mixed.label_weight == pytest.approx(FROZEN_WEIGHT, rel=1e-9)
    box = plan_mix(18, seed=123, mixup=0, cutmix=1.0).pixel_weight == 0
    assert np.argwhere(box)[[0, -1]].tolist() == FROZEN_BOX


FROZEN_WEIGHT = 0.4284552813150826
FROZEN_BOX = [[0, 18], [11, 31]]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [6, 5, 1])
def test_images_are_mixed_by_the_formula(way, count):
    layout = torch.channels_last if count > 1 else torch.contiguous_format
    images = torch.randn(count, 3, 32, 32).to(memory_format=layout)
    got = mixing(**WAYS[way]).images(images)
    weight = plan_mix(18, seed=123, **{"mixup": 0, "cutmix": 0} | WAYS[way]).pixel_weight
    x, w = images.double().numpy(), weight.astype(np.float64)
    for i in range(count):
        j = i ^ 1 if i ^ 1 < count else i
        wanted = w * x[i] + (1 - w) * x[j]
        np.testing.assert_allclose(got[i].numpy(), wanted, rtol=0, atol=1e-6)
    assert got.stride() == images.stride()


def test_two_processes_mix_what_one_does():
    images = torch.randn(8, 3, 32, 32)
    whole = mixing(**WAYS["mixup"]).images(images)
    parts = [mixing(**WAYS["mixup"]).images(part) for part in images.split(4)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("loss", [SmoothCrossEntropy, nn.CrossEntropyLoss])
@pytest.mark.parametrize("count", [6, 5])
def test_the_loss_is_that_of_soft_targets(loss, count):
    made = mixing(**WAYS["mixup"])
    logits = torch.randn(count, 10, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(count) % 10
    weight = made._weights[-1].double()
    assert 0.01 < weight < 0.99
    wanted = F.cross_entropy(logits, soft_targets(labels, weight), label_smoothing=0.1)
    got = made.loss(loss(label_smoothing=0.1), logits, labels)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    (got_grad,), (wanted_grad,) = (torch.autograd.grad(v, logits) for v in (got, wanted))
    torch.testing.assert_close(got_grad, wanted_grad, rtol=1e-12, atol=1e-15)


def test_the_answer_is_the_label_with_the_larger_share():
    labels = torch.arange(6)
    seen = set()
    for step in range(8):
        made = mixing(step, mixup=1.0)
        weight = made._weights[-1].item()
        seen.add(weight < 0.5)
        wanted = soft_targets(labels, weight).argmax(1)
        assert torch.equal(made.main_labels(labels), wanted)
    assert seen == {True, False}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("route", ["eager", "fused"])
@pytest.mark.usefixtures("plain")
def test_a_step_equals_plain_torch(way, route):
    """Weights and totals of three steps on images and dense targets that are mixed by hand.

    In float64, which no kernel computes: rounding turns the sign of no activation there, which
    would turn gradients.
    """
    config = Config(model="resnet8", width=0.5, lr=0.1, warmup=0.0, schedule="constant")
    config = config.replace(label_smoothing=0.1, weight_decay=0.0, **WAYS[way])
    plain = create_model("resnet8", width=0.5, seed=0).double().train()
    step = TrainStep(copy.deepcopy(plain), config, Runtime(device=CPU, route=route), 10)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    losses, right = [], 0
    for number in range(3):
        images, labels = torch.randn(8, 3, 32, 32).double(), torch.randint(0, 10, (8,))
        mix = plan_mix(number, seed=0, **{"mixup": 0, "cutmix": 0} | WAYS[way])
        w = torch.from_numpy(mix.pixel_weight)
        partner = torch.arange(8) ^ 1
        targets = soft_targets(labels, mix.label_weight)
        step(number, images, labels)
        optimizer.zero_grad()
        logits = plain(w * images + (1 - w) * images[partner])
        loss = F.cross_entropy(logits, targets, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        right += (logits.argmax(1) == targets.argmax(1)).sum().item()
    got_loss, accuracy, count = step.totals.read()
    assert got_loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert (accuracy, count) == (pytest.approx(100 * right / 24), 24)
    for name, value in step.model.named_parameters():
        torch.testing.assert_close(value, plain.get_parameter(name), rtol=1e-5, atol=1e-6)
