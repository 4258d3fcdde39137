"""Accuracy of a network on a whole set, every image counted exactly once."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.config import Config
from fastres.data.dataset import ImageSet
from fastres.data.loaders import BatchSpec, Loader, build_loader
from fastres.data.plan import NO_AUGMENTATION
from fastres.engine.distributed import ALONE, Processes
from fastres.engine.runtime import Runtime
from fastres.engine.step import Totals
from fastres.model.conv_bn import constant_parameters

__all__ = ["Score", "evaluate", "evaluation_loader"]


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
def evaluate(
    model: nn.Module,
    loader: Loader,
    runtime: Runtime,
    *,
    flip_tta: bool = False,
    processes: Processes = ALONE,
    after_batch: Callable[[], None] = lambda: None,
) -> Score:
    """Evaluate `model` on everything that `loader` serves, in evaluation mode.

    Args:
        model: its training mode is restored afterwards.
        loader: of a "val" or "test" split.
        runtime: precision and layout.
        flip_tta: average the class probabilities of each image and of its mirror image.
        processes: whose loaders serve the rest of the set.
        after_batch: called after every batch; what it raises ends the evaluation.
    """
    was_training = model.training
    model.eval()
    totals = Totals(runtime.device)
    with constant_parameters():
        for images, labels in loader.serve(0):
            log_probs = _log_probs(model, images, runtime)
            if flip_tta:
                pair = torch.stack([log_probs, _log_probs(model, images.flip(3), runtime)])
                log_probs = pair.logsumexp(dim=0) - pair.new_tensor(2.0).log()
            totals.add(F.nll_loss(log_probs, labels), log_probs, labels)
            after_batch()
    model.train(was_training)
    loss, accuracy, count = totals.read(processes)
    return Score(loss, accuracy, count)


def _log_probs(model: nn.Module, images: Tensor, runtime: Runtime) -> Tensor:
    """Return (B, classes) float32 log-probabilities."""
    with runtime.autocast():
        logits = model(images.contiguous(memory_format=runtime.memory_format))
    return logits.float().log_softmax(dim=1)
