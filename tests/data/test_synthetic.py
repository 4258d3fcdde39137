"""The built-in shapes: the same everywhere, easy for a network, hopeless for a linear model."""

import numpy as np
import pytest

from fastres.data.synthetic import SYNTHETIC_CLASSES, synthetic_dataset

FINGERPRINT = "a0841ac336e99d5f6b05094795aab1751505550ec58590280e729a58f4f7fe03"


def test_the_same_bytes_everywhere() -> None:
    """A change here is a change of the data: raise SYNTHETIC_VERSION with it."""
    dataset = synthetic_dataset(500, 100)
    assert dataset.fingerprint == FINGERPRINT


def test_counts_and_classes() -> None:
    dataset = synthetic_dataset(300, 70)
    assert dataset.name == "synthetic"
    assert dataset.classes == SYNTHETIC_CLASSES
    assert len(set(SYNTHETIC_CLASSES)) == 10
    assert np.bincount(dataset.train.labels).tolist() == [30] * 10
    assert np.bincount(dataset.test.labels).tolist() == [7] * 10


def test_an_image_depends_on_its_own_number_alone() -> None:
    small, large = synthetic_dataset(260, 10), synthetic_dataset(600, 20)
    np.testing.assert_array_equal(large.train.images[:260], small.train.images)
    np.testing.assert_array_equal(large.test.images[:10], small.test.images)


def test_no_image_twice() -> None:
    """Neither within a split, nor across splits, nor across seeds."""
    sets = [synthetic_dataset(400, 200, seed=seed) for seed in (0, 1)]
    rows = np.concatenate(
        [part.images.reshape(-1, 3072) for d in sets for part in (d.train, d.test)]
    )
    assert len(np.unique(rows, axis=0)) == 1200


def test_a_linear_model_stays_under_60_percent() -> None:
    """Ridge regression onto one-hot labels; logistic regression on all 10,000 gets 11 % as well."""
    dataset = synthetic_dataset(2_000, 1_000)
    x, x_test = (
        np.c_[part.images.reshape(len(part), -1) / 127.5 - 1, np.ones(len(part))].astype("f4")
        for part in (dataset.train, dataset.test)
    )
    y = np.eye(10, dtype="f4")[dataset.train.labels]
    ridge = 300 * np.eye(len(x), dtype="f4")
    weights = x.T @ np.linalg.solve(x @ x.T + ridge, y)
    fitted = np.mean((x @ weights).argmax(1) == dataset.train.labels)
    accuracy = np.mean((x_test @ weights).argmax(1) == dataset.test.labels)
    assert fitted > 0.6  # the model is not too weak to learn: there is nothing to learn
    assert accuracy < 0.30


@pytest.mark.slow
def test_resnet20_passes_95_percent() -> None:
    """Ten epochs of the plain recipe, mirrored images the only augmentation."""
    torch = pytest.importorskip("torch")
    from fastres.model.resnet import create_model

    dataset = synthetic_dataset()
    torch.manual_seed(0)
    mean, std = torch.tensor(dataset.mean) * 255, torch.tensor(dataset.std) * 255

    def batch(part, rows):
        images = (torch.from_numpy(part.images[rows]).float() - mean) / std
        return images.permute(0, 3, 1, 2), torch.from_numpy(part.labels[rows])

    epochs, size = 10, 128
    steps = len(dataset.train) // size
    model = create_model("resnet20").to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=epochs * steps)
    for _ in range(epochs):
        order = torch.randperm(len(dataset.train)).numpy()
        for step in range(steps):
            x, y = batch(dataset.train, order[step * size : (step + 1) * size])
            x = x.flip(3) if step % 2 else x
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(dataset.test), 500):
            x, y = batch(dataset.test, np.arange(start, start + 500))
            right += int((model(x).argmax(1) == y).sum())
    assert right / len(dataset.test) > 0.95
