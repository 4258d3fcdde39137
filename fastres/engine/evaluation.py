"""Accuracy of a network on a whole set, every image counted exactly once.

The further views of test-time augmentation (views.py) are worth their time where the network is in
doubt: the quarter of the set whose two most likely classes lie closest together. Of the whole set,
as a batch of a sorted one holds a single class, easy or hard.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.config import Config, ViewsName
from fastres.data.dataset import ImageSet
from fastres.data.loaders import BatchSpec, Loader, build_loader
from fastres.data.plan import IMAGE_SIZE, NO_AUGMENTATION
from fastres.engine.distributed import ALONE, Processes
from fastres.engine.runtime import Runtime
from fastres.engine.step import Totals
from fastres.engine.step_kernels import compiles_kernels, compiling_kernels
from fastres.engine.views import (
    FURTHER_VIEWS,
    VIEW_WEIGHTS,
    further_views,
    log_probs_of,
    mean_probability,
)
from fastres.model.conv_bn import constant_parameters

__all__ = ["Score", "compile_evaluation", "evaluate", "evaluation_loader", "log_probs_of_set"]

_DOUBTFUL_SHARE = 0.25


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy (no label smoothing), accuracy in percent, images counted."""

    loss: float
    accuracy: float
    images: int


def evaluation_loader(
    images: ImageSet,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    config: Config,
    runtime: Runtime,
) -> Loader:
    """Make the loader that serves `images` once, in order and unchanged but for normalisation."""
    batches = BatchSpec(
        images=images,
        mean=mean,
        std=std,
        batch_size=config.eval_batch_size,
        seed=config.seed,
        augmentation=NO_AUGMENTATION,
        training=False,
    )
    return build_loader(runtime.loader, batches, runtime.device, workers=config.workers)


@torch.inference_mode()
def compile_evaluation(
    model: nn.Module,
    num_images: int,
    config: Config,
    runtime: Runtime,
    processes: Processes = ALONE,
) -> None:
    """Have the Triton kernels that evaluating so many images launches compiled side by side.

    Where there are none, nothing is done.
    """
    if not compiles_kernels(runtime):
        return
    whole, rest = divmod(num_images, config.eval_batch_size)
    was_training = model.training
    model.eval()
    with compiling_kernels(processes.local_size), constant_parameters():
        for size in {config.eval_batch_size * min(whole, 1), rest} - {0}:
            shape = (size, 3, IMAGE_SIZE, IMAGE_SIZE)
            log_probs_of(model, torch.zeros(shape, device=runtime.device), runtime)
    model.train(was_training)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Loader,
    runtime: Runtime,
    *,
    tta: ViewsName = "none",
    processes: Processes = ALONE,
    after_batch: Callable[[], None] = lambda: None,
) -> Score:
    """Evaluate `model` on everything that `loader` serves, in evaluation mode.

    Args:
        model: its training mode is restored afterwards.
        loader: of a "val" or "test" split.
        runtime: precision and layout.
        tta: "none"; "flip" averages each image and its mirror image; "multi" averages six views of
            the images in doubt, a quarter of the set.
        processes: whose loaders serve the rest of the set.
        after_batch: called after every batch; what it raises ends the evaluation.
    """
    parts, labels = log_probs_of_set(
        model, loader, runtime, tta=tta, processes=processes, after_batch=after_batch
    )
    totals = Totals(runtime.device)
    for log_probs, targets in zip(parts, labels, strict=True):
        totals.add(F.nll_loss(log_probs, targets), log_probs, targets)
    loss, accuracy, count = totals.read(processes)
    return Score(loss, accuracy, count)


@torch.inference_mode()
def log_probs_of_set(
    model: nn.Module,
    loader: Loader,
    runtime: Runtime,
    *,
    tta: ViewsName = "none",
    processes: Processes = ALONE,
    after_batch: Callable[[], None] = lambda: None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the log-probabilities and the labels of everything that `loader` serves, in batches.

    Args: as of `evaluate`.

    Returns:
        (B, classes) float32 and (B,) int64 tensors, on the device.
    """
    was_training = model.training
    model.eval()
    with constant_parameters():
        parts, labels = [], []
        for images, targets in loader.serve(0):
            log_probs = log_probs_of(model, images, runtime)
            if tta == "flip":
                mirrored = log_probs_of(model, images.flip(3), runtime)
                log_probs = mean_probability([log_probs, mirrored], (0.5, 0.5))
            parts.append(log_probs)
            labels.append(targets.clone())
            after_batch()
        if tta == "multi":
            leads = torch.cat([torch.empty(0, device=runtime.device), *map(_lead, parts)])
            doubtful = _least_certain(leads, processes)
            if len(doubtful) > 0:
                parts = _with_further_views(model, loader, runtime, parts, doubtful, after_batch)
    model.train(was_training)
    return parts, labels


def _with_further_views(
    model: nn.Module,
    loader: Loader,
    runtime: Runtime,
    parts: list[Tensor],
    doubtful: Tensor,
    after_batch: Callable[[], None],
) -> list[Tensor]:
    """Return the log-probabilities of all batches, the doubtful images' of six views.

    The loader serves its images again, from which those in doubt are picked: they are not known
    before its end.
    """
    sizes = [len(part) for part in parts]
    log_probs = torch.cat(parts)
    ends = list(itertools.accumulate(sizes))
    bounds = torch.searchsorted(doubtful, torch.tensor(ends, device=doubtful.device)).tolist()
    picked = []
    for batch, (images, _) in enumerate(loader.serve(0)):
        low = bounds[batch - 1] if batch else 0
        first = ends[batch] - sizes[batch]
        picked.append(images[doubtful[low : bounds[batch]] - first])
    # All views of some images make a batch like those before: few launches, and a network may be
    # compiled or tuned by shape.
    count = max(1, max(sizes) // FURTHER_VIEWS)
    for rows, images in zip(doubtful.split(count), torch.cat(picked).split(count), strict=True):
        views = log_probs_of(model, further_views(images), runtime).chunk(FURTHER_VIEWS)
        log_probs[rows] = mean_probability([log_probs[rows], *views], VIEW_WEIGHTS)
        after_batch()
    return list(log_probs.split(sizes))


def _lead(log_probs: Tensor) -> Tensor:
    """Return by how much the most likely class leads the next one, (B,); of a single class, 0."""
    most = log_probs.exp().topk(min(2, log_probs.shape[1]), dim=1).values
    return most[:, 0] - most[:, -1]


def _least_certain(leads: Tensor, processes: Processes) -> Tensor:
    """Return the indices, in order, of those images of this process that are in doubt.

    They are those with the smallest leads in the whole set, the images of all processes.
    """
    shares = processes.all_gather(leads)
    of_set = torch.cat(shares)
    count = math.ceil(_DOUBTFUL_SHARE * len(of_set))
    doubtful = of_set.topk(count, largest=False).indices.sort().values
    first = sum(len(share) for share in shares[: processes.rank])
    return doubtful[(doubtful >= first) & (doubtful < first + len(leads))] - first
