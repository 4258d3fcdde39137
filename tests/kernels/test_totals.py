"""The kernel of an epoch's sums against the same in torch."""

import pytest
import torch

from fastres.engine.step import Totals
from fastres.kernels.gpu.totals import add_to_totals
from tests.helpers.interpreter import DEVICE

INF, NAN = torch.inf, torch.nan
SIZES = {"ten classes": (13, 10), "several tiles": (19, 1000), "one class": (3, 1), "one": (1, 5)}


def draw(n, classes, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((n, classes), generator=generator).to(DEVICE, dtype)
    labels = torch.randint(0, classes, (n,), generator=generator).to(DEVICE)
    # Every other answer is right.
    labels[::2] = logits.argmax(1)[::2]
    return logits, labels


def assert_same_sums(*batches):
    """Each batch a loss, logits and labels, added one after the other."""
    totals = Totals(DEVICE)
    values = torch.zeros_like(totals.values)
    for loss, logits, labels in batches:
        loss = torch.tensor(loss, device=DEVICE)
        totals.add(loss, logits, labels)
        add_to_totals(values, loss, logits, labels)
    torch.testing.assert_close(values, totals.values, rtol=0, atol=0, equal_nan=True)
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SIZES)
def test_two_batches(name, dtype):
    logits, labels = draw(*SIZES[name], dtype)
    values = assert_same_sums((0.1, logits, labels), (2.3, -logits, labels))
    assert values[1] >= (len(labels) + 1) // 2


@pytest.mark.parametrize("loss", [INF, -INF, NAN])
def test_a_loss_that_is_not_finite_is_counted(loss):
    logits, labels = draw(5, 10, torch.float32)
    values = assert_same_sums((1.0, logits, labels), (loss, logits, labels))
    assert values[3] == 1


@pytest.mark.parametrize(
    "row",
    [
        [1.0, NAN, 3.0, NAN],
        [NAN, INF, INF, 0.0],
        [-INF, INF, NAN, INF],
        [0.0, 2.0, 2.0, 2.0],
        [-INF] * 4,
        [0.0, INF, 1.0, INF],
        [NAN] * 4,
        [-INF, -INF, -INF, -3e38],
    ],
)
def test_ties_and_nan_are_answered_as_by_torch(row):
    """Label by label, so that the answer is seen."""
    logits = torch.tensor([row], device=DEVICE)
    labels = [torch.tensor([label], device=DEVICE) for label in range(4)]
    right = [assert_same_sums((0.5, logits, label))[1].item() for label in labels]
    assert sorted(right) == [0, 0, 0, 1]


def test_tensors_that_do_not_fit_are_refused():
    logits, labels = draw(5, 10, torch.float32)
    totals, loss = torch.zeros(4, dtype=torch.float64, device=DEVICE), logits.sum()
    for arguments in (
        (totals.float(), loss, logits, labels),
        (totals, loss.double(), logits, labels),
        (totals, loss, logits.t(), labels),
        (totals, loss, logits, labels.int()),
    ):
        with pytest.raises(ValueError, match="must be"):
            add_to_totals(*arguments)
