"""What a network says of images: classes with their probabilities, most likely first.

A prediction depends on its image alone, not on the others of a call. So `multi`, which spends six
views on the images in doubt of a whole test set, takes six views of every image here.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastres.config import Config, ViewsName
from fastres.engine.views import (
    FURTHER_VIEWS,
    VIEW_WEIGHTS,
    further_views,
    log_probs_of,
    mean_probability,
)
from fastres.errors import FailureError, UsageError
from fastres.inference.evaluating import config_for, placed
from fastres.inference.images import decoded_batches, list_images, pixels_of
from fastres.inference.trained import TrainedNetwork, load
from fastres.model.conv_bn import constant_parameters

__all__ = ["Prediction", "Predictor", "predict"]


@dataclass(frozen=True)
class Prediction:
    """What a network says of one image.

    Attributes:
        image: its path; None of an image that was given as pixels.
        classes: names, most likely first.
        probabilities: of those, in 0..1; they sum to one over all classes of the network.
    """

    image: str | None
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        pairs = zip(self.classes, self.probabilities, strict=True)
        return {
            "image": self.image,
            "predictions": [{"class": name, "probability": p} for name, p in pairs],
        }


class Predictor:
    """A network placed where it computes, by the route and in the precision of `config`.

    Args:
        network: trained.
        config: device, threads, precision, layout, route and test-time augmentation.
        top: classes an image, at most those that the network has.

    Raises:
        UsageError: for an option that cannot be had on this machine, and `top` below 1.
    """

    def __init__(self, network: TrainedNetwork, config: Config, *, top: int = 5):
        if top < 1:
            raise UsageError(f"top must be at least 1, got {top}")
        self.network = network
        self.top = min(top, len(network.classes))
        self._tta = config.tta
        self._model, self.runtime = placed(network, config)
        # In grey levels, so that pixels need no division of their own.
        device = self.runtime.device
        self._mean, self._std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1) * 255
            for values in (network.mean, network.std)
        )

    @torch.inference_mode()
    def log_probs(self, pixels: np.ndarray) -> Tensor:
        """Map (B, 32, 32, 3) uint8 pixels to (B, classes) float32 log-probabilities."""
        images = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.runtime.device)
        images = (images.permute(0, 3, 1, 2).float() - self._mean) / self._std
        with constant_parameters():
            log_probs = log_probs_of(self._model, images, self.runtime)
            if self._tta == "flip":
                mirrored = log_probs_of(self._model, images.flip(3), self.runtime)
                return mean_probability([log_probs, mirrored], (0.5, 0.5))
            if self._tta == "multi":
                views = log_probs_of(self._model, further_views(images), self.runtime)
                return mean_probability([log_probs, *views.chunk(FURTHER_VIEWS)], VIEW_WEIGHTS)
        return log_probs

    def predictions(self, pixels: np.ndarray, names: Sequence[str | None]) -> Iterator[Prediction]:
        """Yield what is said of (B, 32, 32, 3) uint8 pixels that are called `names`.

        Raises:
            FailureError: when a probability is not a number.
        """
        if not len(pixels):
            return
        log_probs = self.log_probs(pixels)
        if log_probs.isnan().any():
            raise FailureError(
                f"a probability is not a number: the weights in {self.network.source} are finite "
                f"and overflow in {self.runtime.precision}"
            )
        likeliest = log_probs.exp().topk(self.top, dim=1)
        columns = (names, likeliest.indices.tolist(), likeliest.values.tolist())
        for name, indices, values in zip(*columns, strict=True):
            classes = tuple(self.network.classes[index] for index in indices)
            yield Prediction(name, classes, tuple(min(value, 1.0) for value in values))


def predict(
    network: TrainedNetwork | str | os.PathLike[str],
    images: Any,
    *,
    top: int = 5,
    tta: ViewsName | None = None,
    fast: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    batch_size: int = 500,
) -> list[Prediction]:
    """Say what images show.

    Args:
        network: what `fastres.load` returned, or what it takes.
        images: one image or several: paths of files and folders, PIL images, or uint8 arrays
            (H, W, 3), (H, W) or, of several, (N, H, W, 3). Each is turned upright and resized to
            32x32, as in training.
        top: classes an image.
        tta: "none", "flip" (the mean of image and mirror image), "multi" (six views of every
            image); None does as the network's run did.
        fast: the fastest route of this machine; without it, eager float32.
        device: "auto", "cpu" or "cuda".
        batch_size: images that are computed together; no prediction depends on it, but for
            rounding.

    Returns:
        One prediction an image, in their order, those of a folder sorted.

    Raises:
        UsageError: for a path that leads nowhere, for what is no image, and for an option that has
            not a value it may or cannot be had on this machine.
        FailureError: for a file that cannot be decoded.
    """
    network = network if isinstance(network, TrainedNetwork) else load(network)
    config = config_for(network, tta=tta, fast=fast, device=device, batch_size=batch_size)
    predictor = Predictor(network, config, top=top)
    found: list[Prediction] = []
    for names, pixels in _pixels(images, batch_size):
        found += predictor.predictions(pixels, names)
    return found


def _pixels(images: Any, batch_size: int) -> Iterator[tuple[list[str | None], np.ndarray]]:
    """Yield batches of names and pixels (B, 32, 32, 3): files decoded ahead, or what is given."""
    several = [images] if _is_one(images) else list(images)
    is_path = [isinstance(image, str | os.PathLike) for image in several]
    if all(is_path):
        for batch in decoded_batches(list_images(several), batch_size):
            if batch.failures:
                raise FailureError(batch.failures[0])
            yield [str(path) for path in batch.paths], batch.pixels
    elif any(is_path):
        raise UsageError("images must be all paths, or all PIL images and arrays")
    else:
        for start in range(0, len(several), batch_size):
            part = [pixels_of(image) for image in several[start : start + batch_size]]
            yield [None] * len(part), np.stack(part)


def _is_one(images: Any) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim < 4
    return isinstance(images, str | os.PathLike | Image.Image) or not isinstance(images, Iterable)
