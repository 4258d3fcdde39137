"""Loaders: an epoch of augmented batches with nobody training, and what a training step waits.

    torchvision       what people write: ImageFolder or CIFAR10, transforms, DataLoader (peers/)
    torch, resident   fastres' loaders on the training device
    dali, dali_gpu    fastres' DALI loader on DALI's CPU back end and on the GPU

They read $FASTRES_DATA, or else the synthetic set; `torchvision` decodes image files every time, as
its users do, where the data are files.
"""

import dataclasses
import functools
from typing import Any

import pytest
import torch

import fastres
from benchmarks.harness.ablation import Unavailable, here
from benchmarks.harness.records import BenchmarkInfo
from benchmarks.harness.scheduler import Prepared
from benchmarks.harness.timing import wall_sample
from benchmarks.harness.worker_pool import WorkerPool
from benchmarks.suites.ablation_cases import data_arguments, load_data
from fastres.data.dataset import Dataset, ImageSet
from fastres.data.loaders import Loader, dali_missing

DEVICE = here()
LOADERS = ("torchvision", "torch", "resident", "dali", "dali_gpu")
BATCH_SIZE = 256
# Batch size and steps a round of the ResNet-20 that trains behind a loader: those of its ladder.
_FAST_STEPS = {"cpu": (128, 4), "cuda": (512, 40)}[DEVICE.type]
# Images of an epoch; torchvision's takes longer an image, most of all from files.
_EPOCH = {"torchvision": 10 * BATCH_SIZE, "fastres": 40 * BATCH_SIZE}
# DALI computes in another order than torch: float32 values of about 1, a few roundings apart.
_PIXEL_BOUND = 1e-5


def _refuse(loader: str) -> None:
    """Raise Unavailable where a loader cannot be had here."""
    missing = dali_missing()
    if loader.startswith("dali") and missing:
        raise Unavailable(missing)
    if loader == "dali_gpu" and DEVICE.type != "cuda":
        raise Unavailable("needs an NVIDIA GPU")


@functools.lru_cache(maxsize=1)
def _data(data_dir: str | None) -> Dataset:
    """The dataset, thinned out to the images of one measured epoch."""
    data = load_data(data_dir)
    step = max(1, len(data.train) // _EPOCH["fastres"])
    rows = slice(0, step * _EPOCH["fastres"], step)
    train = ImageSet(data.train.images[rows].copy(), data.train.labels[rows].copy())
    return dataclasses.replace(data, train=train)


def _make(loader: str, data_dir: str | None) -> Loader:
    device = torch.device("cpu") if loader == "dali" else DEVICE
    name = loader.removesuffix("_gpu")
    return fastres.make_loader(
        _data(data_dir),
        batch_size=BATCH_SIZE,
        loader=name,  # type: ignore[arg-type]
        device=device,
    )


def _check_pixels(name: str, served: Loader, data_dir: str | None) -> None:
    """Raise AssertionError unless an epoch starts with the pixels of the resident loader."""
    truth = _make("resident", data_dir)
    epochs = zip(served.serve(0), truth.serve(0), strict=True)
    for i, ((images, labels), (images_0, labels_0)) in enumerate(epochs):
        off = (images.to(images_0.device) - images_0).abs().max().item() if i == 0 else 0.0
        if not (torch.equal(labels.to(labels_0.device), labels_0) and off <= _PIXEL_BOUND):
            raise AssertionError(
                f"{name}: batch {i} is not the resident loader's, off by {off:.1e}"
            )


def _prepare_alone(data_dir: str | None, loader: str) -> Prepared:
    _refuse(loader)
    if loader == "torchvision":
        from benchmarks.peers import common

        data = common.load_data(data_dir)
        images, detail = _EPOCH["torchvision"], f"{data.name}, 2 worker processes"
        served: Any = common.make_train_loader(data.train, BATCH_SIZE, 2, images)
    else:
        served = _make(loader, data_dir)
        _check_pixels(loader, served, data_dir)
        images, detail = len(served) * BATCH_SIZE, served.detail

    def epoch() -> None:
        count = sum(len(labels) for _, labels in served)
        assert count == images

    def close() -> BenchmarkInfo:
        if isinstance(served, Loader):
            served.close()
        return {}

    info: BenchmarkInfo = {
        "suite": "loaders",
        "case": f"alone, batch {BATCH_SIZE}, {load_data(data_dir).name}",
        "images": images,
        "dtype": "fp32",
        "detail": detail,
        "clock": "wall clock, an epoch",
    }
    return Prepared(wall_sample(epoch, DEVICE), info, close)


@pytest.mark.share(8.0)
@pytest.mark.parametrize("provider", LOADERS)
def bench_alone(measure, data_dir, provider):
    """Serve an epoch; nobody trains."""
    measure(functools.partial(_prepare_alone, data_dir), "torchvision")


def _training_command(data_dir: str | None, loader: str) -> tuple[str, list[str]]:
    _refuse(loader)
    if loader == "dali" and DEVICE.type == "cuda":
        raise Unavailable("beside a GPU that trains DALI runs on the GPU")
    words = ["--configuration", "fast", "--loader", loader.removesuffix("_gpu")]
    words += data_arguments(DEVICE.type, "resnet20", *_FAST_STEPS, data_dir)
    return "benchmarks.suites.ablation_worker", words


def _prepare_training(pool: WorkerPool, data: str, loader: str) -> Prepared:
    worker = pool.worker(loader)
    batch_size, steps = _FAST_STEPS
    info: BenchmarkInfo = {
        "suite": "loaders",
        "case": f"while ResNet-20 trains, batch {batch_size}, {data}",
        "images": batch_size,
        "dtype": worker.hello["dtype"],
        "waits": loader != "none",
        "clock": f"wall clock, {steps} steps a round, own process",
    }
    return Prepared(worker.sample, info, worker.close)


@pytest.mark.full
@pytest.mark.share(30.0)
@pytest.mark.parametrize("provider", ["none", *LOADERS])
def bench_while_training(measure, data_dir, provider):
    """The fast step of ResNet-20 behind every loader; `none` trains on one batch for ever.

    What a step takes beyond that of `none` it has waited for its loader, or lost to it.
    """
    pool = WorkerPool(functools.partial(_training_command, data_dir), _FAST_STEPS[1])
    measure(
        functools.partial(_prepare_training, pool, load_data(data_dir).name), "none", pool.started
    )
