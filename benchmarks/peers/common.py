"""What the peers have in common: torchvision's data, the command line, a run or its rounds.

Images are read as users read them: a folder of image files by `ImageFolder`, which decodes every
file anew in every epoch; CIFAR's archives like torchvision's CIFAR10, as PIL images made from an
array in memory; without either the synthetic set, in memory too.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Subset

import fastres
from benchmarks.harness.ablation import fixed_batch
from benchmarks.harness.worker_pool import serve, wait_for_start
from fastres import strict_json

__all__ = ["Data", "first_loss", "load_data", "make_train_loader", "parse", "run"]

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class InMemory(torch.utils.data.Dataset):
    """Images of an array as PIL images, as torchvision's CIFAR10 gives them out."""

    def __init__(self, images: Any, labels: Any, transform: Callable):
        self.images, self.labels, self.transform = images, labels.tolist(), transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), self.labels[index]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class Data:
    """Training and test set, and a name for them."""

    name: str
    train: Any
    test: Any
    num_classes: int


def load_data(data_dir: str | None, limit: int | None = None) -> Data:
    """Find the images and put the usual transforms on them: crop, flip, normalise.

    Args:
        data_dir: folder of train/<class>/*, or of CIFAR's archives; None for the synthetic set.
        limit: keep about this many training and test images, evenly spread.
    """
    from torchvision import datasets
    from torchvision import transforms as T

    normalize = [T.ToTensor(), T.Normalize(MEAN, STD)]
    augment = T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), *normalize])
    plain = T.Compose(normalize)
    train: Any
    test: Any
    if data_dir and (Path(data_dir) / "train").is_dir():
        train = datasets.ImageFolder(f"{data_dir}/train", augment)
        test = datasets.ImageFolder(f"{data_dir}/test", plain)
        name, num_classes = f"{Path(data_dir).name} files", len(train.classes)
    else:
        data = fastres.load_dataset("auto" if data_dir else "synthetic", data_dir)
        train = InMemory(data.train.images, data.train.labels, augment)
        test = InMemory(data.test.images, data.test.labels, plain)
        name, num_classes = data.name, len(data.classes)
    if limit:
        train, test = _thin_out(train, limit), _thin_out(test, limit)
    return Data(name, train, test, num_classes)


def _thin_out(images: Any, limit: int) -> Any:
    step = max(1, len(images) // limit)
    return Subset(images, range(0, len(images), step)[:limit])


def make_train_loader(
    train: Any, batch_size: int, workers: int, num_samples: int | None = None
) -> DataLoader:
    """The usual DataLoader: shuffled, worker processes, pinned memory where there is a GPU.

    `num_samples` ends an epoch after so many images: workers prefetch, and what they prepared
    between two measurements would come for free.
    """
    return DataLoader(
        train,
        batch_size=batch_size,
        sampler=RandomSampler(train, num_samples=num_samples),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
    )


def parse(
    argv: Sequence[str] | None,
    module: str,
    description: str | None,
    add_own: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> Any:
    """Read the options that all peers have, and those that `add_own` adds."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--data-dir", help="images; default: synthetic ones")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--limit", type=int, help="use only so many training and test images")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, help="serve rounds of so many steps, see rounds.py")
    add_own(parser)
    return parser.parse_args(argv)


def first_loss(step: Callable[[Tensor, Tensor], float], batch_size: int, classes: int) -> float:
    """Train one step on the batch that every provider starts with, and return its loss.

    It warms up, compiles, and shows that two programs train the same network the same way.
    """
    return step(*fixed_batch(batch_size, classes))


def run(
    options: argparse.Namespace,
    data: Data,
    model: nn.Module,
    step: Callable[[Tensor, Tensor], float],
    predict: Callable[[Tensor], Tensor],
    dtype: str = "fp32",
) -> int:
    """Train and print one JSON line, or serve rounds of steps.

    Args:
        options: of `parse`.
        data: of `load_data`.
        model: the network, to switch between training and evaluation.
        step: trains on a batch of the loader and returns the loss.
        predict: (B, 3, 32, 32) images of the loader to (B,) classes on the CPU.
        dtype: that the step computes in, for the record.
    """
    model.train()
    if options.rounds:
        num_samples = options.rounds * options.batch_size
        loader = make_train_loader(data.train, options.batch_size, options.workers, num_samples)

        def train_round(steps: int) -> int:
            assert steps == len(loader) == options.rounds
            for images, labels in loader:
                step(images, labels)
            return num_samples

        wait_for_start()
        loss = first_loss(step, options.batch_size, data.num_classes)
        serve(train_round, {"loss": loss, "data": data.name, "dtype": dtype})
        return 0
    loader = make_train_loader(data.train, options.batch_size, options.workers)
    started, images_seen = time.perf_counter(), 0
    for _ in range(options.epochs):
        model.train()
        for images, labels in loader:
            step(images, labels)
            images_seen += len(labels)
    seconds = time.perf_counter() - started
    model.eval()
    right = count = 0
    for images, labels in _test_batches(data.test, options):
        right += int((predict(images) == labels).sum())
        count += len(labels)
    result = {
        "images_per_second": round(images_seen / seconds, 1),
        "train_seconds": round(seconds, 3),
        "test_accuracy": 100 * right / count,
        "test_images": count,
        "data": data.name,
    }
    print(strict_json.dumps(result))
    return 0


def _test_batches(test: Any, options: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    yield from DataLoader(test, batch_size=500, num_workers=options.workers)
