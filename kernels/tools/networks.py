"""The convolutions of the real networks, block by block: the one description of a network.

`network_blocks` lists the stem, then the residual blocks; the distinct convolutions follow from it.
What a block launches is in network_launches.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastres.kernels.block import Shortcut
from fastres.kernels.conv_shape import ConvShape

__all__ = [
    "MAX_BATCH",
    "NETWORKS",
    "PRECISIONS",
    "NamedBlock",
    "NamedConv",
    "Precision",
    "network_blocks",
    "network_convs",
    "precision_set",
    "resnet18_convs",
    "resnet20_convs",
]

# Widths of the stages, and basic blocks in each.
NETWORKS = {"resnet20": ((16, 32, 64), 3), "resnet18": ((64, 128, 256, 512), 2)}

# Images. The first layers launch up to 16 programs an image, and a grid has fewer than 2**31.
MAX_BATCH = 2**26


@dataclass(frozen=True)
class Precision:
    """How a network computes: the dtype of its tensors, and whether fp32 rounds to TF32."""

    dtype: torch.dtype
    tf32: bool = False


PRECISIONS = {
    "bf16": Precision(torch.bfloat16),
    "fp16": Precision(torch.float16),
    "tf32": Precision(torch.float32, tf32=True),
    "fp32": Precision(torch.float32),
}


class NamedConv(NamedTuple):
    """A convolution of a network and how many layers have its shape."""

    name: str
    shape: ConvShape
    num_layers: int


@dataclass(frozen=True)
class NamedBlock:
    """A stem or a residual block, and how many of the network are like it.

    layers: shapes on the main path. projection: that of the shortcut, or None. shortcut: as in
    `block_ops.Block`. need_dx: whether the gradient of its input is wanted.
    """

    name: str
    layers: tuple[ConvShape, ...]
    projection: ConvShape | None
    shortcut: Shortcut
    count: int
    need_dx: bool = True

    def convs(self) -> list[NamedConv]:
        """Its convolutions, each as often as there are such blocks."""
        if self.projection is None:
            return [NamedConv(self.name, shape, self.count) for shape in self.layers]
        stage = self.name.removesuffix(" first")
        down, *plain = self.layers
        return [
            NamedConv(f"{stage} down", down, self.count),
            NamedConv(f"{stage} projection", self.projection, self.count),
            *(NamedConv(stage, shape, self.count) for shape in plain),
        ]


def network_blocks(network: str, batch: int) -> list[NamedBlock]:
    """Stem and residual blocks of a CIFAR ResNet of basic blocks with 1x1 projections."""
    widths, num_blocks = NETWORKS[network]
    size, width = 32, widths[0]
    stem = ConvShape(batch, size, size, 3, width)
    blocks = [NamedBlock("stem", (stem,), None, "none", 1, need_dx=False)]
    for stage, wider in enumerate(widths, start=1):
        count = num_blocks
        if stage > 1:
            down = ConvShape(batch, size, size, width, wider, stride=2)
            projection = ConvShape(batch, size, size, width, wider, 1, 1, stride=2, padding=0)
            size, count = size // 2, count - 1
            layers = (down, ConvShape(batch, size, size, wider, wider))
            blocks.append(NamedBlock(f"stage{stage} first", layers, projection, "projected", 1))
        width = wider
        plain = ConvShape(batch, size, size, width, width)
        blocks.append(NamedBlock(f"stage{stage}", (plain, plain), None, "input", count))
    return blocks


def network_convs(network: str, batch: int) -> list[NamedConv]:
    """The different convolutions of a network, in order."""
    found: dict[str, NamedConv] = {}
    for conv in (conv for block in network_blocks(network, batch) for conv in block.convs()):
        num_layers = found[conv.name].num_layers if conv.name in found else 0
        found[conv.name] = conv._replace(num_layers=num_layers + conv.num_layers)
    return list(found.values())


def resnet20_convs(batch: int) -> list[NamedConv]:
    """The convolutions of ResNet-20 on 32x32 images."""
    return network_convs("resnet20", batch)


def resnet18_convs(batch: int) -> list[NamedConv]:
    """The convolutions of ResNet-18 on 32x32 images."""
    return network_convs("resnet18", batch)


@contextmanager
def precision_set(precision: Precision) -> Iterator[None]:
    """Let fp32 convolutions round to TF32, or not, inside the `with` block."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = precision.tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
