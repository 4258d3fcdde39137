"""Loaders: the same pixels from all of them, every image once, reproducible from any point."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import fastres
from fastres.config import Config
from fastres.data.augmentation import TensorPlan, select_images
from fastres.data.dataset import Dataset, ImageSet
from fastres.data.loaders import LOADERS, choose_loader, dali_missing
from fastres.data.plan import Augmentation, plan_epoch
from fastres.engine.runtime import Runtime, _choose_loader
from fastres.errors import UsageError

needs_dali = pytest.mark.skipif(dali_missing() is not None, reason=str(dali_missing()))
EACH_LOADER = [pytest.param(name, marks=needs_dali if name == "dali" else ()) for name in LOADERS]
AUGMENTATIONS = {
    "crop and flip": Augmentation(),
    "all": Augmentation(crop_padding=3, flip="alternating", cutout=9),
    "cutout alone": Augmentation(crop_padding=0, flip="none", cutout=32),
    "nothing": Augmentation(crop_padding=0, flip="none", cutout=0),
    "random operations": Augmentation(cutout=8, trivial_augment=True),
}


def noise(count, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return ImageSet(images, rng.integers(0, 10, count))


@pytest.fixture(scope="module")
def data():
    return Dataset(
        name="noise",
        classes=tuple("abcdefghij"),
        train=noise(100, 1),
        test=noise(41, 2),
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.25, 0.3),
        fingerprint="none",
        source="a test",
        notices=(),
    )


def load(data, loader, **options):
    return fastres.make_loader(data, loader=loader, **{"batch_size": 16, "seed": 3} | options)


def with_pillow(data, augmentation, epoch):
    """Augment one image at a time with Pillow: an implementation that shares nothing with ours.

    But for the random operations, which test_trivial_augment compares with torchvision's.
    """
    plan = plan_epoch(len(data.train), seed=3, epoch=epoch, augmentation=augmentation, shuffle=True)
    colour = tuple(round(255 * m) for m in data.mean)
    images = torch.from_numpy(data.train.images)
    for row, index in enumerate(plan.index):
        alone = TensorPlan(plan[row : row + 1], images.device)
        image = Image.fromarray(select_images(images, alone, slice(None))[0].numpy())
        if plan.padding:
            top, left = plan.crop[row].tolist()
            padded = ImageOps.expand(image, plan.padding, fill=(0, 0, 0))
            image = padded.crop((left, top, left + 32, top + 32))
        if plan.flip[row]:
            image = ImageOps.mirror(image)
        if augmentation.cutout:
            top, left, bottom, right = plan.cutout[row].tolist()
            image.paste(colour, (left, top, right, bottom))
        pixels = np.asarray(image, dtype=np.float64) / 255
        normal = (pixels - data.mean) / data.std
        yield normal.transpose(2, 0, 1), data.train.labels[index]


@pytest.mark.parametrize("loader", EACH_LOADER)
@pytest.mark.parametrize("augmentation", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_training_pixels_equal_pillows(data, loader, augmentation):
    served = load(data, loader, augmentation=augmentation, epoch=2)
    wanted = list(with_pillow(data, augmentation, epoch=2))
    assert len(served) == 6
    position = 0
    for images, labels in served:
        assert images.shape == (16, 3, 32, 32)
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        for image, label in zip(images.double().numpy(), labels.tolist(), strict=True):
            np.testing.assert_allclose(image, wanted[position][0], atol=1e-5)
            assert label == wanted[position][1]
            position += 1
    assert position == 96


@pytest.mark.parametrize("loader", EACH_LOADER)
def test_epochs_follow_each_other_and_can_be_entered_anywhere(data, loader):
    served = load(data, loader)
    epochs = [[images.clone() for images, _ in served] for _ in range(3)]
    assert served.epoch == 3
    assert not torch.equal(epochs[0][0], epochs[1][0])
    late = [images for images, _ in load(data, loader, epoch=2)]
    assert all(torch.equal(a, b) for a, b in zip(epochs[2], late, strict=True))
    resumed = [images for images, _ in load(data, loader).serve(1, start_batch=4)]
    assert len(resumed) == 2
    assert all(torch.equal(a, b) for a, b in zip(epochs[1][4:], resumed, strict=True))


@pytest.mark.parametrize("loader", EACH_LOADER)
def test_an_epoch_left_early_does_not_disturb_the_next(data, loader):
    served = load(data, loader)
    for _ in served:
        break
    assert served.epoch == 1
    follows = next(iter(served))[0].clone()
    assert torch.equal(follows, next(load(data, loader).serve(1))[0])
    again = [images for images, _ in served.serve(1)]
    fresh = [images for images, _ in load(data, loader).serve(1)]
    assert all(torch.equal(a, b) for a, b in zip(again, fresh, strict=True))


EACH_WAY_TO_SERVE = [
    pytest.param("resident", None, id="resident"),
    pytest.param("torch", 0, id="torch"),
    pytest.param("torch", 2, id="torch with workers"),
    pytest.param("dali", 2, id="dali", marks=needs_dali),
]


def check_equal(batches, wanted):
    for (images, labels), (images_0, labels_0) in zip(batches, wanted, strict=True):
        assert torch.equal(images, images_0)
        assert torch.equal(labels, labels_0)


@pytest.mark.parametrize(("loader", "workers"), EACH_WAY_TO_SERVE)
def test_passes_may_overlap(data, loader, workers):
    """Side by side, one inside another, one left early and still held, one ended late."""
    served = load(data, loader, workers=workers)
    apart = [list(load(data, loader, workers=workers).serve(epoch)) for epoch in range(5)]
    for batches in zip(zip(served, served, strict=True), zip(*apart[:2], strict=True), strict=True):
        check_equal(*batches)
    outer, left_early = iter(served), iter(served)
    outer_begins, early = [next(outer), next(outer)], [next(left_early)]
    check_equal(served, apart[4])
    check_equal([*outer_begins, *outer], apart[2])
    check_equal(early, apart[3][:1])
    check_equal(served.serve(0), apart[0])
    del left_early
    check_equal(served.serve(1), apart[1])
    check_equal(served.serve(1, start_batch=4), apart[1][4:])
    assert served.epoch == 5


@pytest.mark.parametrize(("loader", "workers"), EACH_WAY_TO_SERVE)
def test_a_loader_serves_again_after_an_error_in_the_middle_of_a_pass(data, loader, workers):
    served = load(data, loader, workers=workers)

    def fail():
        for _ in served:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    check_equal(served, load(data, loader, workers=workers).serve(1))


@pytest.mark.parametrize("loader", EACH_LOADER)
def test_a_batch_stays_as_it_was_while_later_ones_are_read(data, loader):
    kept = [(images, images.clone()) for images, _ in load(data, loader)]
    assert all(torch.equal(image, copy) for image, copy in kept)


@pytest.mark.parametrize("loader", EACH_LOADER)
@pytest.mark.parametrize("batch_size", [1, 7, 40, 41, 42, 500])
def test_evaluation_serves_every_image_once_and_unchanged(data, loader, batch_size):
    served = load(data, loader, split="test", batch_size=batch_size)
    batches = list(served)
    assert len(batches) == len(served)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    np.testing.assert_array_equal(labels.numpy(), data.test.labels)
    raw = images.double().permute(0, 2, 3, 1).numpy() * data.std + data.mean
    np.testing.assert_allclose(raw * 255, data.test.images, atol=1e-3)


def test_workers_do_not_change_the_batches(data):
    alone, helped = (load(data, "torch", workers=workers) for workers in (0, 2))
    for _ in range(2):
        for (a, i), (b, j) in zip(alone, helped, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(i, j)


def test_validation_images_are_held_out_of_the_training_images(data):
    loaders = [load(data, "resident", split=split, num_val=20) for split in ("train", "val")]
    train, val = (loader.spec.images.images.reshape(-1, 3072) for loader in loaders)
    assert (len(train), len(val)) == (80, 20)
    rows = np.concatenate([train, val])
    assert {row.tobytes() for row in rows} == {
        row.tobytes() for row in data.train.images.reshape(-1, 3072)
    }


def test_val_without_a_number_says_that_it_overlaps(data):
    with pytest.warns(UserWarning, match="num_val=10"):
        val = load(data, "resident", split="val")
    assert len(val.spec.images) == 10


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_is_the_resident_loader_and_lacks_nothing(data, device, monkeypatch):
    """With DALI or without it, which has to be asked for."""
    runtime = Runtime(device=torch.device(device))
    _choose_loader(Config(fast=True), runtime)
    (setting,) = runtime.settings
    assert (runtime.loader, setting.value, setting.fallback) == ("resident", "resident", False)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "dali" in name else found(name)
    )
    assert choose_loader(torch.device(device)) == ("resident", setting.reason)
    assert load(data, "auto").name == "resident"
    with pytest.raises(UsageError, match="DALI is not installed"):
        load(data, "dali")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loader": "ffcv"}, "the loaders are auto, dali, resident, torch"),
        ({"split": "dev"}, "the splits are train, val, test"),
        ({"batch_size": 101}, "larger than the 100 training images"),
        ({"batch_size": 0}, "at least 1"),
        ({"batch_size": 32.0}, "whole number of at least 1, got 32.0"),
        ({"batch_size": "32"}, "whole number of at least 1, got '32'"),
        ({"device": "gpu"}, "device must be 'cpu' or 'cuda', got 'gpu'"),
        ({"device": "meta"}, "device must be 'cpu' or 'cuda', got 'meta'"),
        ({"device": None}, "device must be 'cpu' or 'cuda', got None"),
        ({"device": "cuda:99"}, "finds no such NVIDIA GPU"),
        ({"loader": "torch", "workers": -1}, "must not be negative"),
    ],
)
def test_bad_use_is_one_sentence(data, options, message):
    with pytest.raises(UsageError, match=message):
        load(data, **{"loader": "resident"} | options)


def test_a_dataset_is_a_name_or_a_dataset():
    with pytest.raises(UsageError, match="unknown dataset None: choose from auto"):
        fastres.make_loader(None)


@needs_dali
def test_all_loaders_agree_on_the_ends_of_two_epochs_of_real_images(jpeg_data):
    """They are drawn from all images; that an epoch agrees in every batch is tested with noise."""
    assert jpeg_data.name == "cifar10-jpeg"
    loaders = [fastres.make_loader(jpeg_data, batch_size=500, loader=name) for name in LOADERS]
    for epoch in range(2):
        served = [loader.serve(epoch, start_batch=90) for loader in loaders]
        batches = list(zip(*served, strict=True))
        assert len(batches) == 10
        for (a, i), (b, j), (c, k) in batches:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
            torch.testing.assert_close(a, c, rtol=0, atol=1e-5)
            assert torch.equal(i, j)
            assert torch.equal(i, k)


@pytest.mark.gpu
@pytest.mark.parametrize("loader", EACH_LOADER)
def test_pixels_on_the_gpu_equal_those_on_the_cpu(data, loader):
    augmentation = Augmentation(flip="alternating", cutout=9, trivial_augment=True)
    on_gpu = load(data, loader, augmentation=augmentation, device="cuda")
    on_cpu = load(data, "resident", augmentation=augmentation)
    for _ in range(2):
        for (a, i), (b, j) in zip(on_gpu, on_cpu, strict=True):
            assert a.device.type == "cuda"
            torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-5)
            assert torch.equal(i.cpu(), j)
