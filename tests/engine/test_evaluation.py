"""Test-time augmentation against its views written out one by one."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastres.engine.distributed import Processes
from fastres.engine.evaluation import evaluate
from fastres.engine.runtime import Runtime
from fastres.model.resnet import create_model

RUNTIME = Runtime(device=torch.device("cpu"))


class Batches:
    """Stands for a loader of the test images, all in one batch where no size is given."""

    def __init__(self, images, labels, size=None):
        self.parts = list(zip(images.split(size or 99), labels.split(size or 99), strict=True))

    def serve(self, epoch):
        yield from self.parts


@pytest.fixture(scope="module")
def model():
    net = create_model("resnet8", width=0.5, seed=0).eval()
    # Untrained logits hardly differ, and a lead of one class would be rounding.
    net.fc.weight.data.mul_(20)
    return net


@pytest.fixture(scope="module")
def images():
    return torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def shifted(image, by):
    """An image moved by a pixel in both directions, its last rows repeated as in a mirror."""
    index = torch.arange(32) + by
    index[index < 0], index[index > 31] = 1, 30
    return image[:, index][:, :, index]


@torch.no_grad()
def expected(model, images, tta):
    probabilities = model(images).softmax(dim=1)
    if tta == "none":
        return probabilities
    if tta == "flip":
        return (probabilities + model(images.flip(3)).softmax(dim=1)) / 2
    lead = probabilities.topk(2, dim=1).values.diff(dim=1).abs().flatten()
    for i in lead.argsort()[:3]:  # a quarter of ten, rounded up
        views = [images[i], shifted(images[i], -1), shifted(images[i], 1)]
        views = torch.stack([v for view in views for v in (view, view.flip(2))])
        weights = torch.tensor([2, 2, 1, 1, 1, 1]) / 8
        probabilities[i] = weights @ model(views).softmax(dim=1)
    return probabilities


@pytest.mark.parametrize("tta", ["none", "flip", "multi"])
def test_views_are_averaged(model, images, tta):
    wanted = expected(model, images, tta)
    labels = wanted.argsort(dim=1)[:, -2]
    labels[:4] = wanted[:4].argmax(dim=1)
    score = evaluate(model, Batches(images, labels), RUNTIME, tta=tta)
    assert (score.accuracy, score.images) == (40.0, 10)
    assert score.loss == pytest.approx(F.nll_loss(wanted.log(), labels).item(), rel=1e-5)


def test_further_views_are_of_images_in_doubt_alone(model, images):
    seen = []
    hook = model.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    evaluate(model, Batches(images[:8], torch.zeros(8, dtype=torch.int64)), RUNTIME, tta="multi")
    hook.remove()
    # Two of eight, an image and five views a batch.
    assert seen == [8, 5, 5]


@pytest.mark.parametrize("size", [1, 4, 7])
def test_images_in_doubt_are_those_of_the_whole_set(model, images, size):
    """Sorted, so that all of them lie in the first batches; batches change nothing."""
    with torch.no_grad():
        lead = model(images).softmax(dim=1).topk(2, dim=1).values.diff(dim=1).abs().flatten()
    images = images[lead.argsort()]
    wanted = expected(model, images, "multi")
    labels = wanted.argsort(dim=1)[:, -2]
    labels[:4] = wanted[:4].argmax(dim=1)
    seen = []
    hook = model.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    score = evaluate(model, Batches(images, labels, size), RUNTIME, tta="multi")
    hook.remove()
    assert (score.accuracy, score.images) == (40.0, 10)
    assert score.loss == pytest.approx(F.nll_loss(wanted.log(), labels).item(), rel=1e-5)
    assert max(seen) == max(size, 5)
    assert sum(seen) == 10 + 5 * 3


@dataclass(frozen=True)
class OneOfThree(Processes):
    """The second of three processes, whose shares of the leads are given."""

    rank: int = 1
    size: int = 3
    shares: tuple[torch.Tensor, ...] = ()

    def all_gather(self, values):
        torch.testing.assert_close(values, self.shares[1])
        return self.shares

    def total(self, values):
        return values


@pytest.mark.parametrize(("first", "last"), [(0, 4), (2, 7), (6, 10), (5, 5)])
def test_images_in_doubt_are_those_of_all_processes(model, images, first, last):
    with torch.no_grad():
        leads = model(images).softmax(dim=1).topk(2, dim=1).values.diff(dim=1).abs().flatten()
    images = images[leads.argsort()]
    wanted = expected(model, images, "multi")[first:last]
    seen = []
    hook = model.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    shares = leads.sort().values.split((first, last - first, 10 - last))
    mine = Batches(images[first:last], labels := torch.arange(10)[first:last])
    score = evaluate(model, mine, RUNTIME, tta="multi", processes=OneOfThree(shares=shares))
    hook.remove()
    doubtful = len(range(first, min(last, 3)))
    assert sum(seen) == last - first + 5 * doubtful
    if last > first:
        assert score.loss == pytest.approx(F.nll_loss(wanted.log(), labels).item(), rel=1e-5)


def test_a_single_class_is_never_wrong(images):
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 1))
    score = evaluate(net, Batches(images, torch.zeros(10, dtype=torch.int64)), RUNTIME, tta="multi")
    assert score.accuracy == 100
