"""Three loaders that serve the same pixels for the same seed and epoch.

Read `base.py` first: `BatchSpec` says which images make up a batch, `Loader` is the interface.
`resident.py` keeps the set on the device, `dataloader.py` uses torch's DataLoader, `dali.py` NVIDIA
DALI. `plan_ahead.py` plans the next epoch meanwhile, `worker_signals.py` says whom worker processes
obey, `worker_failure.py` puts the end of one into words. This file chooses one: `make_loader` for
users, `build_loader` for the trainer.
"""

import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Literal, get_args

import torch

from fastres.config import LoaderName
from fastres.data.dataset import Dataset, ImageSet
from fastres.data.loaders.base import BatchSpec, Loader
from fastres.data.loaders.dataloader import TorchLoader
from fastres.data.loaders.resident import ResidentLoader
from fastres.data.plan import NO_AUGMENTATION, Augmentation
from fastres.data.source import load_dataset, split_validation
from fastres.errors import UsageError
from fastres.host import usable_cores

__all__ = [
    "LOADERS",
    "BatchSpec",
    "Loader",
    "build_loader",
    "choose_loader",
    "dali_missing",
    "make_loader",
]

LOADERS: tuple[LoaderName, ...] = get_args(LoaderName)


def dali_missing() -> str | None:
    """Return why DALI cannot be used here, or None where it can."""
    if importlib.util.find_spec("nvidia") is None or not importlib.util.find_spec("nvidia.dali"):
        wheel = "nvidia-dali-cuda130"
        hint = f"pip install {wheel}" if sys.platform == "linux" else "it exists for Linux alone"
        return f"DALI is not installed ({hint})"
    return None


def build_loader(
    name: LoaderName,
    spec: BatchSpec,
    device: torch.device,
    *,
    epoch: int = 0,
    workers: int | None = None,
) -> Loader:
    """Make the loader `name` for the batches of `spec` on `device`.

    `workers` are processes for torch and threads for DALI; None takes what suits the machine.

    Raises:
        UsageError: for an unknown name, a negative number of workers, or DALI where it is missing.
    """
    if workers is not None and workers < 0:
        raise UsageError(f"workers must not be negative, got {workers}")
    most = min(8, usable_cores())
    if name == "resident":
        return ResidentLoader(spec, device, epoch)
    if name == "torch":
        # On a CPU the training step needs every core itself.
        default = most if device.type == "cuda" else 0
        return TorchLoader(spec, device, epoch, workers=default if workers is None else workers)
    if name == "dali":
        missing = dali_missing()
        if missing:
            raise UsageError(f"--loader dali: {missing}; resident and torch need nothing more")
        from fastres.data.loaders.dali import DaliLoader

        return DaliLoader(spec, device, epoch, threads=max(1, workers or most))
    raise UsageError(f"unknown loader {name!r}; the loaders are auto, {', '.join(LOADERS)}")


def choose_loader(device: torch.device) -> tuple[LoaderName, str]:
    """Return the loader that `auto` means on `device`, and why.

    On a CPU the resident loader leaves the most time to the training step: see the rows of suite
    "loaders" in benchmarks/results. On a GPU it launches one kernel a batch and copies nothing,
    where DALI calls Python and copies the batch's images; that is not measured on a GPU yet.
    """
    if device.type == "cpu":
        return "resident", "the fastest beside a training step on a CPU"
    return "resident", "the set stays on the GPU, and no batch is copied there"


def make_loader(
    dataset: str | Dataset = "auto",
    data_dir: str | Path | None = None,
    split: Literal["train", "val", "test"] = "train",
    batch_size: int = 256,
    loader: Literal["auto", LoaderName] = "auto",
    device: str | torch.device = "cpu",
    seed: int = 0,
    epoch: int = 0,
    *,
    augmentation: Augmentation | None = None,
    num_val: int | None = None,
    workers: int | None = None,
) -> Loader:
    """Serve (images, labels) of a dataset, the same pixels from every loader.

    Training batches are shuffled, augmented and all of one size (the last partial batch is
    dropped); validation and test batches hold every image exactly once, unchanged, in order.

    Args:
        dataset: a name for `load_dataset`, or a Dataset.
        data_dir: where the data is; see `load_dataset`.
        split: "train", "val" (images held out of the training set) or "test".
        batch_size: images a batch.
        loader: "dali", "resident" or "torch"; "auto" takes the resident loader.
        device: where the batches are wanted.
        seed: of order, augmentation and the validation split.
        epoch: the epoch that the first pass serves; each later pass serves the next one.
        augmentation: of the training images; None for crop with padding 4 and flip.
        num_val: images held out for validation. Give the same number for "train" and "val"; None
            holds nothing out of "train" and makes a tenth of it the "val" split.
        workers: processes for torch, threads for DALI; None takes what suits the machine.

    Returns:
        An iterable of ((B, 3, 32, 32) float32 channels-last, (B,) int64) with a length in batches.

    Raises:
        UsageError: for unknown names, a batch larger than the training set, sizes out of range, a
            device that is not here.
        FailureError: for data that cannot be read.
    """
    target = _usable_device(device)
    data = dataset if isinstance(dataset, Dataset) else load_dataset(dataset, data_dir)
    images = _choose_split(data, split, num_val, seed)
    training = split == "train"
    spec = BatchSpec(
        images=images,
        mean=data.mean,
        std=data.std,
        batch_size=batch_size,
        seed=seed,
        augmentation=(augmentation or Augmentation()) if training else NO_AUGMENTATION,
        training=training,
    )
    if loader == "auto":
        loader, _ = choose_loader(target)
    return build_loader(loader, spec, target, epoch=epoch, workers=workers)


def _usable_device(device: str | torch.device) -> torch.device:
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError):
        raise UsageError(f"device must be 'cpu' or 'cuda', got {device!r}") from None
    if target.type not in ("cpu", "cuda"):
        raise UsageError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if target.type == "cuda" and not (target.index or 0) < torch.cuda.device_count():
        raise UsageError(f"device {device!r}: torch finds no such NVIDIA GPU here")
    return target


def _choose_split(data: Dataset, split: str, num_val: int | None, seed: int) -> ImageSet:
    if split not in ("train", "val", "test"):
        raise UsageError(f"unknown split {split!r}; the splits are train, val, test")
    if split == "test":
        return data.test
    if split == "train":
        return split_validation(data.train, num_val, seed)[0] if num_val else data.train
    if num_val is None:
        num_val = len(data.train) // 10
        warnings.warn(
            f"the {num_val} validation images are part of split='train' too, unless "
            f"num_val={num_val} is given there as well",
            stacklevel=3,
        )
    return split_validation(data.train, num_val, seed)[1]
