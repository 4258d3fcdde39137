"""What a study of depth records of each network, and of all of them together."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from fastres.engine.summary import MetricsRow, Summary
from fastres.host import Provenance

__all__ = [
    "KINDS",
    "BlockResponse",
    "Kind",
    "LayerResponse",
    "NetRecord",
    "StudyRecord",
    "block_rows",
    "epoch_rows",
    "layer_rows",
    "residual_share",
]

Kind = Literal["plain", "residual"]
KINDS: tuple[Kind, Kind] = ("plain", "residual")


class LayerResponse(TypedDict):
    """Standard deviation of a 3x3 layer's output, after batch norm, before ReLU and addition."""

    layer: str
    std: float


class BlockResponse(TypedDict):
    """RMS of F(x), and of what it is added to: x, in the shape that the shortcut gives it."""

    block: str
    residual_rms: float
    shortcut_rms: float


class NetRecord(TypedDict):
    """One network of a study.

    gradient_at_start: L2 norm of the gradient of the first filters before the first step; those
    after each epoch stand in the rows. first_layer_parameters: how many numbers it is of.
    first_layer_norm: L2 norm of those filters at the end.
    """

    kind: Kind
    depth: int
    seed: int
    first_layer_parameters: int
    first_layer_norm: float
    gradient_at_start: float
    rows: list[MetricsRow]
    layers: list[LayerResponse]
    blocks: list[BlockResponse]
    summary: Summary


class StudyRecord(TypedDict):
    """A whole study: results.json."""

    options: dict[str, Any]
    provenance: Provenance
    nets: list[NetRecord]


def residual_share(block: BlockResponse) -> float | None:
    """RMS of F(x) over RMS of what it is added to; None where the latter is zero."""
    return block["residual_rms"] / block["shortcut_rms"] if block["shortcut_rms"] else None


def _net(net: NetRecord) -> dict[str, Any]:
    return {name: net[name] for name in ("kind", "depth", "seed")}


def epoch_rows(nets: Sequence[NetRecord]) -> list[dict[str, Any]]:
    """Lay out errors in percent and gradients by epoch; epoch 0 is before the first step."""
    table = []
    for net in nets:
        start: dict[str, Any] = {
            "epoch": 0.0,
            "first_layer_gradient": net["gradient_at_start"],
        }
        rows: list[Mapping[str, Any]] = [start, *net["rows"]]
        for row in rows:
            line = _net(net) | {"epoch": row["epoch"]}
            for split in ("train", "test"):
                if f"{split}_accuracy" in row:
                    line[f"{split}_error"] = round(100 - row[f"{split}_accuracy"], 6)
            # An epoch that `fastres train` has resumed has no gradient beside it.
            if "first_layer_gradient" in row:
                norm = row["first_layer_gradient"]
                line["gradient_norm"] = norm
                line["gradient_rms"] = norm / math.sqrt(net["first_layer_parameters"])
            table.append(line)
    return table


def layer_rows(nets: Sequence[NetRecord]) -> list[dict[str, Any]]:
    """Lay out the responses of all 3x3 layers."""
    return [
        _net(net) | {"number": number, **layer}
        for net in nets
        for number, layer in enumerate(net["layers"], 1)
    ]


def block_rows(nets: Sequence[NetRecord]) -> list[dict[str, Any]]:
    """Lay out F(x) beside x for all blocks with a shortcut."""
    return [
        _net(net) | {"number": number, **block, "residual_share": residual_share(block)}
        for net in nets
        for number, block in enumerate(net["blocks"], 1)
    ]
