"""A trained network with what using it takes: its classes, how images are normalised, its origin.

`load` reads a run folder, a checkpoint of one, and a folder that `fastres export --format hub`
wrote. Such files may be a stranger's: nothing in them is executed, names of networks and numbers
are checked before anything is allocated, and no path in them is opened.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastres.config import Config, NetworkOptions, ViewsName, checked_options, from_json
from fastres.data.files import FILE, FOLDER, kind_at
from fastres.engine import checkpoint
from fastres.engine.checkpoint_schema import check_values, read_weights
from fastres.engine.run_dir import RunDir
from fastres.errors import UsageError
from fastres.inference.hub_files import WEIGHTS, is_hub_folder, read_hub_folder
from fastres.model.resnet import network_of

__all__ = ["CheckpointName", "TrainedNetwork", "load"]

CheckpointName = Literal["auto", "model", "best", "last"]
# What config.json of a run decides, which people may edit, as when data has moved.
_OF_THE_FOLDER = ("model", "width", "shortcut", "stem", "data_dir", "tta")


@dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """A network and what belongs to it.

    Attributes:
        model: the plain PyTorch network, float32, in evaluation mode, on the CPU.
        config: options of its run; where it comes from elsewhere, those that name the network.
        classes: the name of each output.
        mean, std: of each channel, in units of 0..1: an image x is served as (x - mean) / std.
        dataset: what it was trained on, as records call it.
        dataset_fingerprint: SHA-256 of that data; empty where it is not known.
        source: the file that its weights came from.
    """

    model: nn.Module
    config: Config
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dataset: str
    dataset_fingerprint: str
    source: Path

    @property
    def tta(self) -> ViewsName:
        """Return the test-time augmentation that its run evaluated with."""
        return self.config.tta

    def identity(self) -> dict[str, Any]:
        """Return what a checkpoint says of its origin."""
        return {
            "config": self.config.to_json(),
            "classes": list(self.classes),
            "dataset": self.dataset,
            "dataset_fingerprint": self.dataset_fingerprint,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def __call__(self, images: Tensor) -> Tensor:
        """Map normalised images (N, 3, 32, 32) to logits (N, classes)."""
        return self.model(images)


def load(path: str | os.PathLike[str], checkpoint_name: CheckpointName = "auto") -> TrainedNetwork:
    """Load a trained network.

    Args:
        path: a run folder, a checkpoint (.safetensors) of one, or a folder that
            `fastres export --format hub` wrote.
        checkpoint_name: of a run folder: the weights at the end ("model"), those best on the
            validation images ("best"), those saved last ("last"), or the run's result ("auto").

    Returns:
        The network, in evaluation mode.

    Raises:
        UsageError: when there is none at `path`, or config.json has no such option or value.
        FailureError: when a file is damaged, or holds what no run writes.
    """
    if not os.fspath(path):
        raise UsageError("the name of the run is empty")
    path = Path(path)
    kind = kind_at(path)
    if kind not in (FILE, FOLDER):
        raise UsageError(f"there is no run and no checkpoint at {path}")
    is_hub = kind == FOLDER and is_hub_folder(path)
    if checkpoint_name != "auto" and (kind == FILE or is_hub):
        raise UsageError(f"{path} is no run folder, and has no checkpoint {checkpoint_name!r}")
    if kind == FILE:
        return _from_checkpoint(path)
    if is_hub:
        return _from_hub(path)
    folder = RunDir(path)
    source = path / folder.options_file
    options = from_json(folder.read_bytes(folder.options_file), source, only=_OF_THE_FOLDER)
    file = folder.result() if checkpoint_name == "auto" else folder.file(checkpoint_name)
    return _from_checkpoint(file, {option: getattr(options, option) for option in _OF_THE_FOLDER})


def _from_checkpoint(path: Path, changes: Mapping[str, Any] | None = None) -> TrainedNetwork:
    weights, meta = read_weights(path)
    config = Config(**checked_options(meta["config"], path)).replace(**(changes or {}))
    return _trained(weights, meta, config, path)


def _from_hub(folder: Path) -> TrainedNetwork:
    weights, meta = read_hub_folder(folder)
    path = folder / WEIGHTS
    network = _trained(weights, meta, Config(**meta["config"]), path)
    check_values(weights, path)
    return network


def _trained(
    weights: Mapping[str, Tensor], meta: Mapping[str, Any], config: Config, path: Path
) -> TrainedNetwork:
    model = _network(weights, config, len(meta["classes"]), path)
    mean, std = (tuple(meta[name]) for name in ("mean", "std"))
    return TrainedNetwork(
        model,
        config,
        tuple(meta["classes"]),
        mean,
        std,
        meta["dataset"],
        meta["dataset_fingerprint"],
        path,
    )


def _network(
    weights: Mapping[str, Tensor], options: NetworkOptions, num_classes: int, path: Path
) -> nn.Module:
    """Build the network and put the weights of the file `path` into it."""
    # Before a network is allocated that is as large as the file's options say.
    with torch.device("meta"):
        checkpoint.check_tensors(weights, network_of(options, num_classes).state_dict(), path)
    model = network_of(options, num_classes)
    checkpoint.load_weights(model, weights, path)
    return model.eval()
