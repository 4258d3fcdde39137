"""Looks up how a convolution is launched: as measured, estimated or by rule. Never tuned live.

    an entry of this very GPU
    a measured entry of another GPU of the same compute capability: an H100's serves an H200
    an ESTIMATE for that compute capability
    the rules of launch_rules.py

The first of these that knows the product at any batch size serves it, with the nearest of those.
Whether kernels start by programmatic dependent launch is looked up in the same order, but has no
estimate: where nobody has timed it, they do not. Tables are files, see table_file.py;
`python -m fastres.kernels.tools.tune` writes them.
"""

import functools
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from fastres.kernels.conv_shape import ConvOp, ConvShape
from fastres.kernels.gpu.launch_config import ConvConfig, Route
from fastres.kernels.gpu.launch_rules import HOPPER, heuristic_config
from fastres.kernels.gpu.table_file import LaunchTable, Section, read_table
from fastres.kernels.override import Override

__all__ = [
    "Gpu",
    "assume_entries",
    "assume_gpu",
    "conv_config",
    "force_pdl",
    "force_route",
    "forget_table",
    "gpu_of",
    "load_table",
    "origin",
    "unmeasured_config",
    "uses_pdl",
    "wants_pdl",
]

# FASTRES_LAUNCH_TABLE names another table than the committed one: what a machine tuned for itself.
TABLE_PATH = Path(
    os.environ.get("FASTRES_LAUNCH_TABLE") or Path(__file__).with_name("launch_table.json")
)


class Gpu(NamedTuple):
    """A GPU as the table knows it. name: as torch spells it. capability: e.g. (9, 0)."""

    name: str
    capability: tuple[int, int]


_assumed_entries: Override[Section] = Override()
_assumed_gpu: Override[Gpu] = Override()
_forced_route: Override[Route] = Override()
_forced_pdl: Override[bool] = Override()


# Asked at every launch, and torch's answer takes microseconds.
@functools.cache
def _torch_gpu(device: torch.device) -> Gpu:
    name = torch.cuda.get_device_name(device)
    return Gpu(name, torch.cuda.get_device_capability(device))


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU that a device is, or is assumed to be; None for devices that are none."""
    if _assumed_gpu.value is not None:
        return _assumed_gpu.value
    return _torch_gpu(device) if device.type == "cuda" else None


def load_table() -> LaunchTable:
    """The launch table of this process.

    Raises: as `read_table`.
    """
    return read_table(TABLE_PATH)


def assume_entries(entries: Mapping[str, ConvConfig]) -> AbstractContextManager[None]:
    """Let `conv_config` know these entries alone inside the `with` block, and the rules.

    So launches can be recorded as another GPU would make them, and candidates be timed.
    """
    return _assumed_entries.set(Section(HOPPER, entries))


def assume_gpu(gpu: Gpu) -> AbstractContextManager[None]:
    """Look everything up as for this GPU inside the `with` block, whatever the device.

    Devices that are no GPUs, as long as they are assumed to be none, are served by the rules for
    Hopper.
    """
    return _assumed_gpu.set(gpu)


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
    gpu = gpu_of(device)
    if gpu is None or device.type != "cuda" or gpu.capability < HOPPER:
        return False
    forced = _forced_pdl.value
    return wants_pdl(gpu) if forced is None else forced


# Asked at every launch.
@functools.cache
def wants_pdl(gpu: Gpu) -> bool:
    """Whether the table has a GPU start its kernels by programmatic dependent launch."""
    switches = (section.pdl for section in load_table().sources(*gpu).values())
    return next((enabled for enabled in switches if enabled is not None), False)


def forget_table() -> None:
    """Have the table read again at its next use: it was written anew."""
    for of_table in (read_table, wants_pdl, _config_of_gpu):
        of_table.cache_clear()


def conv_config(
    op: ConvOp, shape: ConvShape, dtype: torch.dtype, device: torch.device, *, tf32: bool = False
) -> ConvConfig:
    """Form, tiles and route of a product on this device; see the top of this file."""
    gpu, assumed = gpu_of(device), _assumed_entries.value
    if assumed is None and gpu is not None:
        config = _config_of_gpu(op, shape, dtype, tf32, gpu)
    else:
        sections = () if assumed is None else (assumed,)
        capability = HOPPER if gpu is None else gpu.capability
        config = _first(sections, op, shape, dtype, tf32, capability)
    route = _forced_route.value
    return config if route is None else replace(config, route=route)


# An eager step asks for every product in every call.
@functools.lru_cache(maxsize=4096)
def _config_of_gpu(
    op: ConvOp, shape: ConvShape, dtype: torch.dtype, tf32: bool, gpu: Gpu
) -> ConvConfig:
    sections = tuple(load_table().sources(*gpu).values())
    return _first(sections, op, shape, dtype, tf32, gpu.capability)


def unmeasured_config(
    op: ConvOp, shape: ConvShape, dtype: torch.dtype, gpu: Gpu, *, tf32: bool = False
) -> ConvConfig:
    """What this GPU would use if it had not been measured: as `conv_config` but for its own."""
    sources = load_table().sources(*gpu)
    sources.pop(gpu.name, None)
    return _first(tuple(sources.values()), op, shape, dtype, tf32, gpu.capability)


def _first(
    sections: tuple[Section, ...],
    op: ConvOp,
    shape: ConvShape,
    dtype: torch.dtype,
    tf32: bool,
    capability: tuple[int, int],
) -> ConvConfig:
    """The configuration of the first section that knows the product, else that of the rules."""
    for section in sections:
        config = section.nearest(op, shape, dtype, tf32=tf32)
        if config is not None:
            return config
    return heuristic_config(op, shape, dtype, tf32=tf32, capability=capability)


def origin(gpu: Gpu) -> str:
    """Where the launch configurations of a GPU are from, for people, in a clause."""
    table = load_table()
    of = next((name for name, of in table.sources(*gpu).items() if of.entries), None)
    if of == gpu.name:
        return "launch configurations measured on this GPU"
    if of in table.gpus:
        return f"launch configurations measured on {of}"
    found = "by rule" if of is None else "ESTIMATES"
    return (
        f"launch configurations are {found}, nothing timed: "
        "python -m fastres.kernels.tools.tune measures them"
    )
