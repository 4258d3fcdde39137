"""The launch table as a file: what stands in it, read and checked.

`launch_table.json` beside this file holds a section for every GPU that was measured, by its name as
torch spells it, and one of ESTIMATES for an architecture, by Triton's name of it:

    {"schema": 4,
     "gpus": {"NVIDIA H200": {"capability": [9, 0], "pdl": true, "provenance": {...}, "entries": {
      "fprop/bfloat16/n512/h32w32c16k16r3s3u1p1": {"basis": "measured", "route": "triton", ...}}}},
     "architectures": {"sm_90": {"capability": [9, 0], "provenance": {...}, "entries": {
      "fprop/bfloat16/n512/h32w32c16k16r3s3u1p1": {"basis": "ESTIMATE", "route": "triton", ...}}}}}

An entry is named "op/dtype/batch/layer" and holds the fields of a `ConvConfig`. "measured" was
timed on that GPU; an ESTIMATE was counted in machine code, and nothing of it was timed. "pdl" says
whether kernels start by programmatic dependent launch (see `primitives.wait_for_previous_kernel`);
where it is missing, nobody has timed that.
"""

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from fastres.kernels.conv_shape import ConvOp, ConvShape
from fastres.kernels.gpu.launch_config import ConvConfig

__all__ = [
    "KIND_OF",
    "TABLE_SCHEMA",
    "Basis",
    "LaunchTable",
    "Section",
    "read_table",
    "table_key",
]

TABLE_SCHEMA = 4

Basis = Literal["measured", "ESTIMATE"]

# Where the entries of each basis stand; nowhere else.
KIND_OF: dict[Basis, Literal["gpus", "architectures"]] = {
    "measured": "gpus",
    "ESTIMATE": "architectures",
}

_KEY = re.compile(r"(?P<product>\w+/[\w-]+)/n(?P<batch>\d+)/(?P<layer>\w+)")


def table_key(op: ConvOp, shape: ConvShape, dtype: torch.dtype, *, tf32: bool = False) -> str:
    """The name under which the launch table keeps this product: op/dtype/batch/layer."""
    return f"{_product(op, dtype, tf32)}/n{shape.N}/{shape.layer_key}"


def _product(op: ConvOp, dtype: torch.dtype, tf32: bool) -> str:
    return f"{op}/{str(dtype).removeprefix('torch.')}{'-tf32' if tf32 else ''}"


@dataclass(frozen=True)
class Section:
    """What the table knows of one GPU or architecture.

    capability: its compute capability. entries: by `table_key`. pdl: whether kernels start by
    programmatic dependent launch; None where nobody has timed that.

    Raises: ValueError: when an entry has no name of a product.
    """

    capability: tuple[int, int]
    entries: Mapping[str, ConvConfig] = field(default_factory=dict)
    pdl: bool | None = None
    _batches: dict[tuple[str, str], dict[int, ConvConfig]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for key, config in self.entries.items():
            found = _KEY.fullmatch(key)
            if found is None:
                raise ValueError(f"malformed entry: {key!r} is no op/dtype/batch/layer")
            product, batch, layer = found.groups()
            self._batches.setdefault((product, layer), {})[int(batch)] = config

    def nearest(
        self, op: ConvOp, shape: ConvShape, dtype: torch.dtype, *, tf32: bool
    ) -> ConvConfig | None:
        """The entry of this product with the nearest batch size; None where there is none."""
        batches = self._batches.get((_product(op, dtype, tf32), shape.layer_key))
        if batches is None:
            return None
        return batches[min(batches, key=lambda n: abs(math.log(n / shape.N)))]


@dataclass(frozen=True)
class LaunchTable:
    """Sections of GPUs, all measured, and of architectures, all ESTIMATES."""

    gpus: dict[str, Section] = field(default_factory=dict)
    architectures: dict[str, Section] = field(default_factory=dict)

    def sources(self, name: str, capability: tuple[int, int]) -> dict[str, Section]:
        """The sections that serve a GPU, in the order in which they are asked.

        Its own; those of other GPUs of its compute capability; the ESTIMATES for that.
        """
        served = {gpu: of for gpu, of in self.gpus.items() if gpu == name}
        served |= {gpu: of for gpu, of in self.gpus.items() if of.capability == capability}
        estimates = self.architectures.items()
        return served | {arch: of for arch, of in estimates if of.capability == capability}


@functools.cache
def read_table(path: Path) -> LaunchTable:
    """Read a launch table; an absent file is an empty table.

    Raises: ValueError: when the schema is not this version's, or anything is malformed.
        OSError: when a file is there and cannot be read.
    """
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return LaunchTable()
    if raw.get("schema") != TABLE_SCHEMA:
        raise ValueError(
            f"{path.name}: schema must be {TABLE_SCHEMA}, got {raw.get('schema')!r}: "
            "tune this GPU again with python -m fastres.kernels.tools.tune"
        )
    try:
        sections = {
            kind: {name: _section(of, basis) for name, of in raw.get(kind, {}).items()}
            for basis, kind in KIND_OF.items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name}: malformed entry: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    return LaunchTable(**sections)


def _section(raw: Mapping[str, Any], basis: Basis) -> Section:
    major, minor = raw["capability"]
    pdl = raw.get("pdl")
    if pdl is not None and type(pdl) is not bool:
        raise ValueError(f"pdl must be true or false, got {pdl!r}")
    entries = {key: _config(entry, basis) for key, entry in raw["entries"].items()}
    return Section((major, minor), entries, pdl)


def _config(raw: Mapping[str, Any], basis: Basis) -> ConvConfig:
    fields = dict(raw)
    found = fields.pop("basis")
    if found != basis:
        raise ValueError(f"basis must be {basis!r} in {KIND_OF[basis]!r}, got {found!r}")
    return ConvConfig(**fields)
