"""TrivialAugment on batches against torchvision's TrivialAugmentWide on one image at a time."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastres.data.plan import MAX_MAGNITUDE, Augmentation, Operation, plan_epoch
from fastres.data.trivial_augment import count_operations, trivial_augment

SIGNED = range(Operation.SHEAR_X, Operation.SHARPNESS + 1)


def draw_images(count):
    """Smooth pictures with noise, of few and of many values; the last ones of one value."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.integers(0, 256, (count, 3, 5, 5))).float()
    fine = torch.nn.functional.interpolate(coarse, 32, mode="bicubic")
    noisy = fine + torch.from_numpy(rng.normal(0, 12, fine.shape))
    images = noisy.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    images[1::4] //= 3
    images[2::4] = images[2::4] // 64 * 64
    images[-2:] = 77
    return images


def exact_magnitude(operation, magnitude):
    """The magnitude that torchvision's float32 bins stand for."""
    if operation in (Operation.TRANSLATE_X, Operation.TRANSLATE_Y):
        return 32 * magnitude / 30
    return {
        Operation.IDENTITY: 0.0,
        Operation.ROTATE: 4.5 * magnitude,
        Operation.POSTERIZE: 8 - round(magnitude / 5),
        Operation.SOLARIZE: (30 - magnitude) / 30,
        Operation.AUTOCONTRAST: 0.0,
        Operation.EQUALIZE: 0.0,
    }.get(operation, 0.033 * magnitude)


@pytest.fixture(scope="module")
def wide():
    v2 = pytest.importorskip("torchvision.transforms.v2", exc_type=ImportError)
    return v2.TrivialAugmentWide()


def torchvisions(wide, image, operation, magnitude):
    """What TrivialAugmentWide itself does: on a tensor, or with Pillow where that is the exact."""
    name = list(wide._AUGMENTATION_SPACE)[operation]
    pillow = operation == Operation.AUTOCONTRAST
    changed = wide._apply_image_or_video_transform(
        Image.fromarray(image.numpy()) if pillow else image.permute(2, 0, 1),
        name,
        exact_magnitude(operation, magnitude),
        interpolation=wide.interpolation,
        fill=wide._fill,
    )
    return torch.from_numpy(np.array(changed)) if pillow else changed.permute(1, 2, 0)


def test_operations_and_magnitudes_are_torchvisions(wide):
    for operation, (name, entry) in enumerate(wide._AUGMENTATION_SPACE.items()):
        assert name.lower() == Operation(operation).name.lower().replace("_", "")
        magnitudes, signed = entry
        assert signed == (operation in SIGNED)
        bins = magnitudes(MAX_MAGNITUDE + 1, 32, 32)
        if bins is not None:
            exact = [exact_magnitude(operation, m) for m in range(MAX_MAGNITUDE + 1)]
            assert bins.tolist() == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize("operation", Operation)
def test_every_magnitude_does_what_torchvisions_does(wide, operation):
    """But for one level where an exact value is an integer and torchvision rounds below it."""
    low = -MAX_MAGNITUDE if operation in SIGNED else 0
    magnitude = torch.arange(low, MAX_MAGNITUDE + 1)
    images = draw_images(len(magnitude))
    operations = torch.full_like(magnitude, operation)
    got = trivial_augment(images, operations, magnitude, count_operations(operations.numpy()))
    wanted = torch.stack(
        [
            torchvisions(wide, image, operation, size)
            for image, size in zip(images, magnitude.tolist(), strict=True)
        ]
    )
    difference = (got.int() - wanted.int()).abs()
    rounded = (Operation.BRIGHTNESS, Operation.COLOR, Operation.AUTOCONTRAST)
    assert difference.max() <= (1 if operation in rounded else 0)
    assert (difference > 0).double().mean() < 0.002
    assert torch.equal(got, images) == (operation == Operation.IDENTITY)


def test_images_of_a_batch_are_changed_each_by_its_own_operation():
    augmentation = Augmentation(trivial_augment=True)
    plan = plan_epoch(64, seed=0, epoch=0, augmentation=augmentation, shuffle=True)
    images, operation, magnitude = (
        draw_images(64), torch.from_numpy(plan.operation), torch.from_numpy(plan.magnitude)
    )  # fmt: skip
    whole = trivial_augment(images, operation, magnitude, count_operations(plan.operation))
    for row in range(64):
        one = slice(row, row + 1)
        counts = count_operations(plan.operation[one])
        alone = trivial_augment(images[one], operation[one], magnitude[one], counts)
        assert torch.equal(whole[one], alone)


def test_operations_are_drawn_evenly():
    augmentation = Augmentation(trivial_augment=True)
    plan = plan_epoch(50_000, seed=0, epoch=0, augmentation=augmentation, shuffle=True)
    counts = np.bincount(plan.operation, minlength=14)
    # Chi-squared with 13 degrees of freedom: 34.5 is exceeded once in a thousand seeds.
    assert ((counts - 50_000 / 14) ** 2 / (50_000 / 14)).sum() < 34.5
    signed = np.isin(plan.operation, SIGNED)
    counts = np.bincount(np.abs(plan.magnitude), minlength=31)
    assert ((counts - 50_000 / 31) ** 2 / (50_000 / 31)).sum() < 59.7
    assert (plan.magnitude[~signed] >= 0).all()
    assert abs((plan.magnitude[signed] < 0).mean() - 30 / 62) < 0.01


@pytest.mark.gpu
def test_a_gpu_makes_the_same_pixels():
    images, plan = (
        draw_images(512),
        plan_epoch(
            512, seed=1, epoch=0, augmentation=Augmentation(trivial_augment=True), shuffle=True
        ),
    )
    inputs = images, torch.from_numpy(plan.operation), torch.from_numpy(plan.magnitude)
    counts = count_operations(plan.operation)
    on_gpu = trivial_augment(*(t.cuda() for t in inputs), counts)
    assert torch.equal(on_gpu.cpu(), trivial_augment(*inputs, counts))
