"""The augmentation plan: every choice is keyed by (seed, epoch, sample, purpose)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastres.data.plan import NO_AUGMENTATION, Augmentation, plan_epoch
from fastres.errors import UsageError

FULL = Augmentation(crop_padding=4, flip="random", cutout=8, trivial_augment=True)

FROZEN_INDEX = [374, 146, 665, 147, 581]
FROZEN_CROP = [[0, 8], [6, 0], [6, 4]]
FROZEN_FLIP = [False, True, True, True, True, True, False, False]
FROZEN_OPERATION = [3, 9, 10, 0, 1]
FROZEN_MAGNITUDE = [-3, 10, 5, 3, -4]


def plan(n=1000, seed=0, epoch=0, augmentation=FULL, shuffle=True):
    return plan_epoch(n, seed=seed, epoch=epoch, augmentation=augmentation, shuffle=shuffle)


def by_image(values, index):
    """Return per-sample choices in the order of the set."""
    out = np.empty_like(values)
    out[index] = values
    return out


@given(st.integers(0, 300), st.integers(0, 2**64 - 1), st.integers(0, 10**6), st.integers(0, 8))
def test_a_plan_is_a_permutation_with_choices_in_range(n, seed, epoch, padding):
    augmentation = Augmentation(crop_padding=padding, flip="random", cutout=7)
    p = plan(n, seed, epoch, augmentation)
    assert sorted(p.index) == list(range(n))
    assert ((p.crop >= 0) & (p.crop <= 2 * padding)).all()
    assert ((p.cutout >= 0) & (p.cutout <= 32)).all()
    assert (p.cutout[:, 2:] - p.cutout[:, :2] <= 7).all()
    assert (p.cutout[:, 2:] > p.cutout[:, :2]).all()


def test_choices_of_a_sample_do_not_depend_on_order_or_on_the_size_of_the_set():
    shuffled, ordered, longer = plan(), plan(shuffle=False), plan(2000, shuffle=False)
    for name in ("crop", "flip", "cutout", "operation", "magnitude"):
        wanted = getattr(ordered, name)
        np.testing.assert_array_equal(by_image(getattr(shuffled, name), shuffled.index), wanted)
        np.testing.assert_array_equal(getattr(longer, name)[:1000], wanted)


def test_seed_and_epoch_change_every_choice():
    base = plan()
    for other in (plan(seed=1), plan(epoch=1)):
        assert (base.index == other.index).mean() < 0.02
        first, second = (by_image(p.crop, p.index) for p in (base, other))
        assert 0.05 < (first[:, 0] == second[:, 0]).mean() < 0.18
        first, second = (by_image(p.flip, p.index) for p in (base, other))
        assert 0.4 < (first == second).mean() < 0.6


def test_offsets_are_uniform_and_independent():
    p = plan(90_000)
    counts = np.bincount(p.crop[:, 0] * 9 + p.crop[:, 1], minlength=81)
    expected = 90_000 / 81
    # Chi-squared with 80 degrees of freedom: 124.8 is exceeded once in a thousand seeds.
    assert ((counts - expected) ** 2 / expected).sum() < 124.8
    assert abs(p.flip.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(p.crop[:, 0], p.flip)[0, 1]) < 0.02


def test_alternating_flips_turn_each_image_over_in_every_epoch():
    alternating = Augmentation(flip="alternating")
    flips = [
        by_image(p.flip, p.index)
        for p in (plan(epoch=e, augmentation=alternating) for e in range(3))
    ]
    assert 0.4 < flips[0].mean() < 0.6
    np.testing.assert_array_equal(flips[0], ~flips[1])
    np.testing.assert_array_equal(flips[0], flips[2])


def test_evaluation_changes_nothing():
    p = plan(50, augmentation=NO_AUGMENTATION, shuffle=False)
    np.testing.assert_array_equal(p.index, np.arange(50))
    assert not p.crop.any()
    assert not p.flip.any()
    assert (p.cutout[:, 0] == p.cutout[:, 2]).all()
    assert not p.operation.any()


def test_a_slice_is_the_same_rows():
    p = plan()
    part = p[128:256]
    assert len(part) == 128
    np.testing.assert_array_equal(part.index, p.index[128:256])
    np.testing.assert_array_equal(part.cutout, p.cutout[128:256])
    np.testing.assert_array_equal(part.operation, p.operation[128:256])
    np.testing.assert_array_equal(part.magnitude, p.magnitude[128:256])


def test_the_plan_is_frozen():
    """Another order of the same seed would break every resumed run and every published number."""
    p = plan(1000, seed=123, epoch=7)
    np.testing.assert_array_equal(p.index[:5], FROZEN_INDEX)
    np.testing.assert_array_equal(p.crop[:3], FROZEN_CROP)
    np.testing.assert_array_equal(p.flip[:8], FROZEN_FLIP)
    np.testing.assert_array_equal(p.operation[:5], FROZEN_OPERATION)
    np.testing.assert_array_equal(p.magnitude[:5], FROZEN_MAGNITUDE)


@pytest.mark.parametrize(
    "bad",
    [{"crop_padding": -1}, {"crop_padding": 33}, {"flip": "up"}, {"cutout": -1}, {"cutout": 33}],
)
def test_bad_augmentation_is_refused(bad):
    with pytest.raises(UsageError, match=str(next(iter(bad.values())))):
        Augmentation(**bad)


@pytest.mark.parametrize("bad", [{"seed": -1}, {"seed": 2**64}, {"epoch": -1}])
def test_bad_keys_are_refused(bad):
    with pytest.raises(UsageError, match="must not be negative"):
        plan(**bad)
