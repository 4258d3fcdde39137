"""One network on one set of labelled images, by the route that the options of a run mean here."""

import copy
import math
from typing import Literal

import torch

from fastres.config import Config, ViewsName, validate
from fastres.data.evaluation_set import EvaluationSet
from fastres.engine.evaluation import evaluation_loader, log_probs_of_set
from fastres.engine.runtime import Runtime, resolve_runtime
from fastres.errors import FailureError
from fastres.fusion.fuse import fuse
from fastres.inference.scores import Evaluation, score_predictions
from fastres.inference.trained import TrainedNetwork

__all__ = ["config_for", "evaluate_network", "placed"]


def config_for(
    network: TrainedNetwork,
    *,
    tta: ViewsName | None,
    fast: bool,
    device: Literal["auto", "cpu", "cuda"],
    batch_size: int,
) -> Config:
    """Return how a caller from Python has `network` compute; `tta` None does as its run did.

    Raises:
        UsageError: naming an option that has not a value it may.
    """
    config = Config(
        fast=fast,
        device=device,
        eval_batch_size=batch_size,
        tta=network.tta if tta is None else tta,
        # No process of its own in a caller's.
        loader="resident",
        compile="off",
    )
    return validate(config, renamed={"eval_batch_size": "batch_size"})


def placed(network: TrainedNetwork, config: Config) -> tuple[torch.nn.Module, Runtime]:
    """Return a copy of the network where and as `config` computes, and how that is.

    Sets torch's threads, determinism and cuDNN's search for the whole process.

    Raises:
        UsageError: for an option that cannot be had on this machine.
    """
    runtime = resolve_runtime(config, network.model)
    runtime.configure_torch()
    is_fused = runtime.route == "fused"
    model = fuse(network.model, verbose=False) if is_fused else copy.deepcopy(network.model)
    runtime.place(model)
    return model.eval(), runtime


def evaluate_network(
    network: TrainedNetwork,
    data: EvaluationSet,
    config: Config,
    model: torch.nn.Module,
    runtime: Runtime,
) -> Evaluation:
    """Say how good a network is on labelled images.

    Args:
        network: its normalisation is that of its training, whatever statistics the images have.
        data: of the network's classes.
        config: batch size, workers of the loader, test-time augmentation.
        model, runtime: of `placed`.

    Raises:
        FailureError: when the loss is not finite.
    """
    loader = evaluation_loader(data.images, network.mean, network.std, config, runtime)
    parts, labels = log_probs_of_set(model, loader, runtime, tta=config.tta)
    loader.close()
    evaluation = score_predictions(torch.cat(parts).cpu(), torch.cat(labels).cpu(), network.classes)
    if not math.isfinite(evaluation.loss):
        raise FailureError(
            f"the loss on the test images is {evaluation.loss}: the weights in {network.source} "
            f"are finite and overflow in {runtime.precision}"
        )
    return evaluation
