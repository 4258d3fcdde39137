"""Accuracy, interval, classes, calibration and mistakes, counted by hand."""

import math

import numpy as np
import pytest
import torch

from fastres.inference.pictures import draw_calibration, draw_confusion, draw_mistakes
from fastres.inference.scores import score_predictions, wilson_interval
from fastres.inference.tables import (
    class_table,
    classes_csv,
    confused_pairs,
    confusion_csv,
    confusion_text,
    printable,
)

CLASSES = ("cat", "dog", "eel")


def log_probs(rows):
    return torch.tensor(rows, dtype=torch.float64).log().float()


@pytest.fixture
def evaluation():
    rows = [
        [0.8, 0.1, 0.1],  # cat, right
        [0.2, 0.7, 0.1],  # cat, said dog
        [0.3, 0.6, 0.1],  # dog, right
        [0.9, 0.05, 0.05],  # dog, said cat
    ]
    return score_predictions(log_probs(rows), torch.tensor([0, 0, 1, 1]), CLASSES)


def test_counts(evaluation):
    assert (evaluation.images, evaluation.accuracy) == (4, 50.0)
    assert evaluation.confusion.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert evaluation.loss == pytest.approx(-sum(map(math.log, (0.8, 0.2, 0.6, 0.05))) / 4)
    assert evaluation.top5 is None


def test_classes(evaluation):
    cat, dog, eel = evaluation.classes
    assert (cat.images, cat.predicted, cat.recall, cat.precision, cat.f1) == (2, 2, 50, 50, 50)
    assert (dog.recall, dog.precision) == (50, 50)
    assert (eel.images, eel.recall, eel.precision, eel.f1) == (0, None, None, None)


def test_mistakes_come_the_surest_first(evaluation):
    found = [(m.index, m.label, m.predicted) for m in evaluation.mistakes]
    assert found == [(3, 1, 0), (1, 0, 1)]
    assert evaluation.mistakes[0].confidence == pytest.approx(0.9)


def test_calibration_error_by_hand(evaluation):
    # Four bins of one image each: |0.8 - 1| + |0.7 - 0| + |0.6 - 1| + |0.9 - 0|, over four.
    assert evaluation.calibration_error == pytest.approx(100 * (0.2 + 0.7 + 0.4 + 0.9) / 4)
    assert [part.images for part in evaluation.bins] == [1, 1, 1, 1]


def test_a_calibrated_network_has_no_error():
    """Sure to 0.75, and right three times of four."""
    rows = [[0.75, 0.25, 0.0]] * 4
    probabilities = torch.tensor(rows).clamp(min=1e-30).log()
    found = score_predictions(probabilities, torch.tensor([0, 0, 0, 1]), CLASSES)
    assert found.calibration_error == pytest.approx(0, abs=1e-5)


def test_a_sum_that_rounding_carries_past_one_is_no_bin_of_its_own():
    certain = torch.tensor([[1e-6, -40.0, -40.0]])
    found = score_predictions(certain, torch.tensor([0]), CLASSES)
    assert found.bins[-1].confidence == 1.0
    assert found.accuracy == 100


def test_top5():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 10, generator=generator).log_softmax(1)
    labels = torch.randint(10, (200,), generator=generator)
    found = score_predictions(logits, labels, [f"c{k}" for k in range(10)])
    right = sum(
        label in row.argsort(descending=True)[:5].tolist()
        for row, label in zip(logits, labels.tolist(), strict=True)
    )
    assert found.top5 == pytest.approx(100 * right / 200)
    assert found.confusion.sum() == 200
    assert sum(score.images for score in found.classes) == 200


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [  # Brown, Cai and DasGupta 2001; R's binom.confint(method = "wilson")
        (0, 10, 0.0, 27.7533),
        (10, 10, 72.2467, 100.0),
        (5, 10, 23.6593, 76.3407),
        (9000, 10_000, 89.3966, 90.5727),
    ],
)
def test_wilson_interval(right, total, low, high):
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=2e-4)


def test_an_interval_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        wilson_interval(0, 0)


def test_tables(evaluation):
    assert class_table(evaluation).row_count == 3
    assert confusion_text(evaluation).splitlines() == [
        "label, said:  cat  dog  eel",
        "cat             1    1    .",
        "dog             1    1    .",
        "eel             .    .    .",
    ]
    assert confused_pairs(evaluation).row_count == 2
    assert classes_csv(evaluation).splitlines()[3] == "eel,0,0,,,"
    assert confusion_csv(evaluation).splitlines() == [
        "label,cat,dog,eel", "cat,1,1,0", "dog,1,1,0", "eel,0,0,0",
    ]  # fmt: skip


def test_of_many_classes_the_worst_are_shown():
    names = [f"c{k}" for k in range(100)]
    logits = torch.eye(100).repeat(2, 1).log_softmax(1)
    labels = torch.arange(100).repeat(2)
    labels[0] = 7
    found = score_predictions(logits, labels, names)
    assert class_table(found).row_count == 20
    assert confusion_text(found) is None
    assert confused_pairs(found).row_count == 1


def test_a_name_writes_no_line_and_no_colour_of_its_own():
    assert printable("cat \u00e9 [red]") == "cat \u00e9 [red]"
    assert printable("a\nb\x1b[31m\udc80") == r"a\nb\x1b[31m\udc80"


def test_names_are_no_formulas_in_pictures(evaluation):
    """matplotlib would look for a symbol of that name, and fail."""
    names = ["$\\nothing$", "dog", "eel"]
    matrix = draw_confusion(evaluation.confusion.numpy(), names, "$\\nothing$")
    images = np.zeros((4, 32, 32, 3), dtype=np.uint8)
    sheet = draw_mistakes(images, evaluation.mistakes, names, "$\\nothing$")
    for picture in (matrix, sheet):
        assert picture.startswith(b"\x89PNG")


def test_a_network_without_mistakes_has_its_pictures():
    found = score_predictions(log_probs([[0.9, 0.05, 0.05]]), torch.tensor([0]), CLASSES)
    images = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    assert draw_mistakes(images, found.mistakes, CLASSES, "mistakes").startswith(b"\x89PNG")
    assert draw_calibration(found.bins, "calibration").startswith(b"\x89PNG")
