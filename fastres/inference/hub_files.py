"""The folder that a network is shared as: model.safetensors, config.json and a model card.

`config.json` holds the arguments of `fastres.hub.HubNetwork`, so that huggingface_hub's
`from_pretrained` builds the same network from the folder, or from its copy on the Hub.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load
from torch import Tensor

from fastres.config import Config, checked_options
from fastres.data.files import read_bytes
from fastres.engine.checkpoint import first_nonfinite
from fastres.engine.checkpoint_schema import check_identity
from fastres.errors import FailureError
from fastres.option_files import parse_table

__all__ = [
    "CONFIG",
    "NETWORK_OPTIONS",
    "WEIGHTS",
    "hub_config",
    "is_hub_folder",
    "read_hub_folder",
    "read_plain_weights",
]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# What of a run's options goes with its network.
NETWORK_OPTIONS = ("model", "width", "shortcut", "stem", "tta")
_IDENTITY = ("classes", "dataset", "dataset_fingerprint", "mean", "std")


def is_hub_folder(folder: Path) -> bool:
    """Tell whether `folder` is one; a run folder has a config.json of options alone.

    Raises:
        UsageError: when config.json is no JSON object.
        FailureError: when it is a FIFO, a socket or a device.
    """
    path = folder / CONFIG
    try:
        return "classes" in parse_table(read_bytes(path), path)
    except OSError:
        return False


def read_hub_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights, and what a checkpoint of a run says of its origin.

    Raises:
        UsageError: for options that fastres does not have.
        FailureError: when a file cannot be read, lacks something or holds a number not finite.
    """
    path = folder / CONFIG
    table = parse_table(_content(path), path)
    if unknown := sorted(table.keys() - {*NETWORK_OPTIONS, *_IDENTITY}):
        raise FailureError(f"{path} holds what fastres does not know: {', '.join(unknown)}")
    options = {name: table[name] for name in NETWORK_OPTIONS if name in table}
    meta = {name: table[name] for name in _IDENTITY if name in table}
    meta["config"] = Config(**checked_options(options, path)).to_json()
    return read_plain_weights(folder / WEIGHTS), check_identity(meta, path)


def read_plain_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, whoever wrote it.

    Raises:
        FailureError: when it cannot be read, or a number in it is not finite.
    """
    content = _content(path)
    try:
        weights = load(content)
    except (safetensors.SafetensorError, LookupError, ValueError, RuntimeError) as error:
        raise FailureError(f"{path} is no readable safetensors file: {error}") from None
    if name := first_nonfinite(weights):
        raise FailureError(f"{path}: {name} is not finite")
    return weights


def _content(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise FailureError(f"cannot read {path}: {error.strerror or error}") from None


def hub_config(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of config.json for what a checkpoint says of its origin."""
    options = {name: meta["config"][name] for name in NETWORK_OPTIONS}
    return options | {name: meta[name] for name in _IDENTITY}
