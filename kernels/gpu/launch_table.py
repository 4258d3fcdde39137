"""The launch table: configurations that were measured, looked up; else by rule. Never tuned live.

The table `launch_table.json` beside this file holds what was measured, by GPU name as torch
spells it, then by "op/dtype/batch/layer":

    {"schema": 3, "gpus": {"NVIDIA H200": {"fprop/bfloat16/n512/h32w32c16k16r3s3u1p1":
        {"route": "triton", "form": "strip", "block_m": 64, "block_n": 16, "block_k": 16,
         "num_warps": 4, "num_stages": 1, "split_k": 1, "grid_size": 0, "patch_h": 4, "ahead": 6}}}}

"pdl" beside "gpus" names the GPUs that start kernels by programmatic dependent launch (see
`primitives.wait_for_previous_kernel`): {"pdl": {"NVIDIA H200": true}}. Others do not. The tuner
writes that too.

A layer measured at other batch sizes only is served by the nearest of them. A GPU or layer that the
table does not know gets `heuristic_config` of launch_rules.py.
"""

import functools
import json
import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastres.kernels.conv_shape import ConvOp, ConvShape
from fastres.kernels.gpu.launch_config import ConvConfig, Route
from fastres.kernels.gpu.launch_rules import HOPPER, heuristic_config
from fastres.kernels.override import Override

__all__ = [
    "assume_capability",
    "assume_entries",
    "assume_gpu",
    "conv_config",
    "force_pdl",
    "force_route",
    "forget_table",
    "gpu_name",
    "load_pdl",
    "load_table",
    "table_key",
    "uses_pdl",
]

# FASTRES_LAUNCH_TABLE names another table than the committed one: what a machine tuned for itself.
TABLE_PATH = Path(
    os.environ.get("FASTRES_LAUNCH_TABLE") or Path(__file__).with_name("launch_table.json")
)
TABLE_SCHEMA = 3

_assumed: Override[Mapping[str, ConvConfig]] = Override()
_forced_route: Override[Route] = Override()
_forced_pdl: Override[bool] = Override()
_assumed_capability: Override[tuple[int, int]] = Override()
_assumed_gpu: Override[str] = Override()


def gpu_name(device: torch.device) -> str:
    """Name of the GPU as torch spells it; devices that are none have that of `assume_gpu`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _assumed_gpu.value or "unknown"


def _read_table(path: Path) -> dict[str, Any]:
    """The launch table as in the file, all checked but its entries; an absent file has none."""
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {"gpus": {}}
    if raw.get("schema") != TABLE_SCHEMA:
        raise ValueError(
            f"{path.name}: schema must be {TABLE_SCHEMA}, got {raw.get('schema')!r}: "
            "tune this GPU again with python -m fastres.kernels.tools.tune"
        )
    pdl = raw.get("pdl", {})
    if not isinstance(pdl, dict) or not all(type(enabled) is bool for enabled in pdl.values()):
        raise ValueError(f"{path.name}: pdl must say true or false of names of GPUs, got {pdl!r}")
    return raw


@functools.cache
def load_table(path: Path = TABLE_PATH) -> dict[str, dict[str, ConvConfig]]:
    """Read the launch table; an absent file is an empty table.

    Raises: ValueError: when the schema is not this version's, or anything is malformed.
        OSError: when a file is there and cannot be read.
    """
    raw = _read_table(path)
    try:
        return {
            gpu: {key: ConvConfig(**entry) for key, entry in entries.items()}
            for gpu, entries in raw["gpus"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name}: malformed entry: {error}") from error


@functools.cache
def load_pdl(path: Path = TABLE_PATH) -> dict[str, bool]:
    """Read which GPUs start kernels by programmatic dependent launch; those not named do not.

    Raises: as `load_table`.
    """
    pdl: dict[str, bool] = _read_table(path).get("pdl", {})
    return pdl


def table_key(op: ConvOp, shape: ConvShape, dtype: torch.dtype, *, tf32: bool = False) -> str:
    """The name under which the launch table keeps this product: op/dtype/batch/layer."""
    precision = f"{str(dtype).removeprefix('torch.')}{'-tf32' if tf32 else ''}"
    return f"{op}/{precision}/n{shape.N}/{shape.layer_key}"


def assume_entries(entries: Mapping[str, ConvConfig]) -> AbstractContextManager[None]:
    """Let `conv_config` know these entries alone inside the `with` block, whatever the GPU.

    So launches can be recorded as another GPU would make them, and candidates be timed.
    """
    return _assumed.set(entries)


def assume_capability(capability: tuple[int, int]) -> AbstractContextManager[None]:
    """Let the rules take devices that are no GPUs for one of this compute capability, e.g. (8, 0).

    Without it they take them for Hopper.
    """
    return _assumed_capability.set(capability)


def assume_gpu(name: str) -> AbstractContextManager[None]:
    """Let devices that are no GPUs have this name, and so its entries of the launch table."""
    return _assumed_gpu.set(name)


def force_route(route: Route) -> AbstractContextManager[None]:
    """Have every convolution inside the `with` block on one route, tiles as `conv_config` gives.

    Backward passes choose their route when they run, so they belong inside the block too.
    """
    return _forced_route.set(route)


def force_pdl(enabled: bool) -> AbstractContextManager[None]:
    """Start kernels inside the `with` block with or without programmatic dependent launch.

    GPUs before Hopper do not have it, whatever is forced.
    """
    return _forced_pdl.set(enabled)


def uses_pdl(device: torch.device) -> bool:
    """Whether kernels on this device start by programmatic dependent launch: on GPUs alone."""
    if device.type != "cuda":
        return False
    forced = _forced_pdl.value
    return _has_pdl(device) and (_wants_pdl(device) if forced is None else forced)


# Asked at every launch, so both answers are kept.
@functools.cache
def _has_pdl(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _wants_pdl(device: torch.device) -> bool:
    return load_pdl().get(gpu_name(device), False)


def forget_table() -> None:
    """Have the table read again at its next use: it was written anew."""
    for of_table in (load_table, load_pdl, _wants_pdl):
        of_table.cache_clear()


def conv_config(
    op: ConvOp, shape: ConvShape, dtype: torch.dtype, device: torch.device, *, tf32: bool = False
) -> ConvConfig:
    """The measured configuration of the nearest batch size on this GPU, else the heuristic one."""
    config = _known_config(op, shape, dtype, device, tf32=tf32)
    route = _forced_route.value
    return config if route is None else replace(config, route=route)


def _known_config(
    op: ConvOp, shape: ConvShape, dtype: torch.dtype, device: torch.device, *, tf32: bool
) -> ConvConfig:
    entries = _assumed.value
    if entries is None:
        entries = load_table().get(gpu_name(device), {})
    prefix, _, suffix = table_key(op, shape, dtype, tf32=tf32).partition(f"/n{shape.N}/")
    prefix, suffix = f"{prefix}/n", f"/{suffix}"
    batches = {
        int(key[len(prefix) : -len(suffix)]): config
        for key, config in entries.items()
        if key.startswith(prefix) and key.endswith(suffix)
    }
    if not batches:
        return heuristic_config(op, shape, dtype, tf32=tf32, capability=_capability(device))
    return batches[min(batches, key=lambda n: abs(math.log(n / shape.N)))]


def _capability(device: torch.device) -> tuple[int, int]:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)
    return _assumed_capability.value or HOPPER
