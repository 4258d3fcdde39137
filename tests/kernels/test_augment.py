"""The augmentation kernel against the plain-torch pixels, and the resident loader that uses it."""

import importlib.util

import numpy as np
import pytest
import torch

import fastres
from fastres.data.augmentation import TensorPlan, augment, normalize
from fastres.data.dataset import Dataset, ImageSet
from fastres.data.loaders import resident
from fastres.data.loaders.base import BatchSpec
from fastres.data.loaders.resident import ResidentLoader
from fastres.data.plan import NO_AUGMENTATION, Augmentation, plan_epoch
from fastres.kernels.gpu.augment import augment_normalize
from fastres.kernels.gpu.launch import recording
from tests.helpers.interpreter import DEVICE, needs_gpu, strict_memory  # noqa: F401

pytestmark = pytest.mark.usefixtures("strict_memory")

NUM_IMAGES = 23
AUGMENTATIONS = {
    "crop": Augmentation(crop_padding=4, flip="none"),
    "crop of 2 and flip": Augmentation(crop_padding=2),
    "flip": Augmentation(crop_padding=0),
    "cutout": Augmentation(crop_padding=0, flip="none", cutout=9),
    "all": Augmentation(crop_padding=4, flip="alternating", cutout=8),
    "padding as wide as the image": Augmentation(crop_padding=32, cutout=32),
    "nothing": NO_AUGMENTATION,
}
LAYOUTS = ("dense", "planes", "gaps")


def draw_images(layout="dense"):
    """NUM_IMAGES images; pixel (0, 0, 0) is no common value, so that padding shows."""
    rng = np.random.default_rng(0)
    dense = torch.from_numpy(rng.integers(0, 256, (NUM_IMAGES, 32, 32, 3), dtype=np.uint8))
    if layout == "planes":
        return dense.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).to(DEVICE)
    if layout == "gaps":
        whole = torch.full((NUM_IMAGES, 33, 36, 5), 77, dtype=torch.uint8, device=DEVICE)
        part = whole[:, 1:, 2:34, 1:4]
        return part.copy_(dense)
    return dense.to(DEVICE)


class Batch:
    """One batch of a plan: what the kernel and the plain functions make of it."""

    def __init__(self, augmentation, layout="dense", rows=slice(0, 8)):
        plan = plan_epoch(NUM_IMAGES, seed=5, epoch=3, augmentation=augmentation, shuffle=True)
        self.plan, self.rows, self.images = TensorPlan(plan, DEVICE), rows, draw_images(layout)
        self.mean = torch.tensor([125.3, 122.95, 113.87], device=DEVICE)
        self.std = torch.tensor([62.99, 62.09, 66.7], device=DEVICE)
        self.colour = torch.tensor([125, 123, 114], dtype=torch.uint8, device=DEVICE)

    def on_kernel(self, dtype=torch.float32):
        plan, rows = self.plan, self.rows
        return augment_normalize(
            self.images,
            plan.index[rows],
            self.mean,
            1.0 / self.std,
            crop=None if plan.crop is None else plan.crop[rows],
            padding=plan.padding,
            flip=None if plan.flip is None else plan.flip[rows],
            cutout=None if plan.cutout is None else plan.cutout[rows],
            colour=None if plan.cutout is None else self.colour,
            dtype=dtype,
        )

    def in_torch(self):
        raw = augment(self.images, self.plan, self.rows, self.colour)
        return normalize(raw, self.mean, self.std)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_choice_of_a_plan(name):
    """Bit for bit: the formula leaves the order of roundings no choice."""
    batch = Batch(AUGMENTATIONS[name])
    got, wanted = batch.on_kernel(), batch.in_torch()
    assert torch.equal(got, wanted)
    assert got.stride() == wanted.stride() == (3072, 1, 96, 3)
    if name != "nothing":
        unchanged = batch.images[batch.plan.index[batch.rows]]
        assert not torch.equal(got, normalize(unchanged, batch.mean, batch.std))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_need_not_be_contiguous_nor_batches_whole(layout):
    for rows in (slice(16, 24), slice(4, 5), slice(3, 3)):
        batch = Batch(AUGMENTATIONS["all"], layout, rows)
        got, wanted = batch.on_kernel(), batch.in_torch()
        assert len(got) == len(range(NUM_IMAGES)[rows])
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_one_rounding(dtype):
    batch = Batch(AUGMENTATIONS["all"])
    assert torch.equal(batch.on_kernel(dtype), batch.in_torch().to(dtype))


def test_one_launch_reads_and_writes_every_pixel_once():
    batch = Batch(AUGMENTATIONS["all"])
    with recording() as launches:
        out = batch.on_kernel(torch.bfloat16)
    (launch,) = launches
    choices = 8 * (8 + 2 * 8 + 1 + 4 * 8) + 3 + 3 * 4 + 3 * 4
    assert launch.traffic.reads == out.numel() + choices
    assert launch.traffic.writes == 2 * out.numel()


def test_refusals():
    batch = Batch(AUGMENTATIONS["all"])
    index, mean = batch.plan.index[:8], batch.mean
    with pytest.raises(ValueError, match=r"images must be \(N, H, W, C\) uint8"):
        augment_normalize(batch.images.float(), index, mean, mean)
    with pytest.raises(ValueError, match=r"index must be \(8,\) torch.int64, got \(8,\) torch.int"):
        augment_normalize(batch.images, index.int(), mean, mean)
    with pytest.raises(ValueError, match=r"crop must be \(8, 2\)"):
        augment_normalize(batch.images, index, mean, mean, crop=batch.plan.crop, padding=4)
    with pytest.raises(ValueError, match="flip must be contiguous"):
        augment_normalize(batch.images, index, mean, mean, flip=batch.plan.flip[:16:2])
    with pytest.raises(ValueError, match="both of cutout and colour"):
        augment_normalize(batch.images, index, mean, mean, cutout=batch.plan.cutout[:8])
    with pytest.raises(ValueError, match="dtype must be bfloat16, float16 or float32"):
        augment_normalize(batch.images, index, mean, mean, dtype=torch.float64)


def make_data():
    images = draw_images().cpu().numpy()
    split = ImageSet(images, np.arange(NUM_IMAGES) % 10)
    return Dataset(
        name="noise",
        classes=tuple("abcdefghij"),
        train=split,
        test=split,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.25, 0.3),
        fingerprint="none",
        source="a test",
        notices=(),
    )


def assert_same_epochs(loader, other, epochs=2):
    for _ in range(epochs):
        for (a, i), (b, j) in zip(loader, other, strict=True):
            assert torch.equal(a.cpu(), b)
            assert torch.equal(i.cpu(), j)


@pytest.mark.parametrize(("split", "trivial"), [("train", False), ("train", True), ("test", False)])
def test_the_loader_serves_the_same_pixels_from_the_kernel(split, trivial, monkeypatch):
    """On a CPU in the interpreter: the loader as on a GPU, against torch's DataLoader."""
    monkeypatch.setattr(resident, "_find_kernel", lambda device: augment_normalize)
    augmentation = Augmentation(flip="alternating", cutout=8, trivial_augment=trivial)
    options = {"batch_size": 9, "seed": 3, "split": split, "augmentation": augmentation}
    served = fastres.make_loader(make_data(), loader="resident", device=DEVICE, **options)
    assert served.detail.endswith("by one Triton kernel a batch")
    with recording() as launches:
        assert_same_epochs(served, fastres.make_loader(make_data(), loader="torch", **options))
    assert len(launches) == 2 * len(served)


@pytest.mark.parametrize("use_kernel", [True, False])
def test_the_loader_serves_the_dtype_of_training(use_kernel, monkeypatch):
    monkeypatch.setattr(
        resident, "_find_kernel", lambda device: augment_normalize if use_kernel else None
    )
    data = make_data()
    batches = BatchSpec(data.train, data.mean, data.std, 8, 0, AUGMENTATIONS["all"], training=True)
    wide = ResidentLoader(batches, DEVICE)
    half = ResidentLoader(batches, DEVICE, dtype=torch.bfloat16)
    for (a, _), (b, _) in zip(wide, half, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a.bfloat16(), b)


def test_without_gpu_or_triton_the_loader_uses_tensor_operations(monkeypatch):
    assert resident._find_kernel(torch.device("cpu")) is None
    assert resident._find_kernel(torch.device("cuda")) is augment_normalize
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else found(name)
    )
    assert resident._find_kernel(torch.device("cuda")) is None


@needs_gpu
@pytest.mark.parametrize(("split", "trivial"), [("train", False), ("train", True), ("test", False)])
def test_the_loader_on_a_gpu_serves_the_pixels_of_the_cpu(split, trivial):
    augmentation = Augmentation(flip="alternating", cutout=8, trivial_augment=trivial)
    options = {"batch_size": 9, "seed": 3, "split": split, "augmentation": augmentation}
    on_gpu = fastres.make_loader(make_data(), loader="resident", device="cuda", **options)
    on_cpu = fastres.make_loader(make_data(), loader="torch", **options)
    assert on_gpu.detail.endswith("by one Triton kernel a batch")
    assert_same_epochs(on_gpu, on_cpu)
    # After the plan is uploaded nothing may wait for the device.
    served = on_gpu.serve(2)
    next(served)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in served:
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_batch_can_be_captured():
    batch = Batch(AUGMENTATIONS["all"])
    wanted = batch.on_kernel().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = batch.on_kernel()
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, wanted)
