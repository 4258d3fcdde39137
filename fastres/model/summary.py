"""What a network consists of: layers, output shapes, parameters and operations, as data."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["LayerSummary", "ModelSummary", "summarize"]


@dataclass(frozen=True)
class LayerSummary:
    """One convolution, batch norm or linear layer.

    `macs` are multiply-accumulates of one image's forward pass; `output` is (C, H, W) or (C,).
    """

    name: str
    kind: str
    output: tuple[int, ...]
    params: int
    macs: int


@dataclass(frozen=True)
class ModelSummary:
    """All layers of a network in the order in which they run."""

    layers: tuple[LayerSummary, ...]

    @property
    def params(self) -> int:
        """Number of trainable parameters."""
        return sum(layer.params for layer in self.layers)

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of one image's forward pass: two per multiply-accumulate."""
        return 2 * sum(layer.macs for layer in self.layers)

    @property
    def training_flops(self) -> int:
        """Operations of one image's training step: forward, and two products as large backward.

        The first convolution needs no gradient of its input; that saving is not subtracted, as in
        the figures that others publish.
        """
        return 3 * self.forward_flops


def _layer_macs(module: nn.Module, output: Tensor) -> int:
    if isinstance(module, nn.Conv2d):
        return module.weight.numel() * output.shape[2] * output.shape[3]
    return module.weight.numel() if isinstance(module, nn.Linear) else 0


def summarize(model: nn.Module, image_size: int = 32) -> ModelSummary:
    """List the layers of `model` for one RGB image of `image_size` pixels a side.

    A copy on the meta device is traced, so nothing is computed and `model` is left alone.
    """
    layers: list[LayerSummary] = []

    def record(name: str, module: nn.Module, output: Tensor) -> None:
        params = sum(p.numel() for p in module.parameters(recurse=False))
        macs = _layer_macs(module, output)
        kind = type(module).__name__
        layers.append(LayerSummary(name, kind, tuple(output.shape[1:]), params, macs))

    traced = copy.deepcopy(model).to("meta").eval()
    for name, module in traced.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            module.register_forward_hook(
                lambda module, _inputs, output, name=name: record(name, module, output)
            )
    with torch.no_grad():
        traced(torch.empty(1, 3, image_size, image_size, device="meta"))
    return ModelSummary(tuple(layers))
