"""Inside a network: its first filters, the feature maps of an image, time and bytes by layer."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["FeatureMaps", "LayerCost", "feature_maps", "first_filters", "layer_costs"]

_TIMED = (nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.MaxPool2d)
_REPEATS = 7


@dataclass(frozen=True)
class LayerCost:
    """One layer in evaluation: float32, eager.

    Attributes:
        name, kind: of the module.
        output: (C, H, W) or (C,).
        params: of the layer.
        mflop: of an image, two operations a multiply-accumulate.
        bytes: that it must at least move for an image of the batch: what it reads and writes, its
            parameters once a batch.
        microseconds: for an image of the batch, the median of seven passes.
    """

    name: str
    kind: str
    output: tuple[int, ...]
    params: int
    mflop: float
    bytes: float
    microseconds: float = 0.0


@contextmanager
def _hooked(
    model: nn.Module, before: Callable[[str], None], after: Callable[..., None]
) -> Iterator[None]:
    """Call `before(name)` and `after(name, module, input, output)` around each timed layer."""
    handles: list[RemovableHandle] = []
    for name, module in model.named_modules():
        if isinstance(module, _TIMED):
            handles += [
                module.register_forward_pre_hook(lambda _m, _x, name=name: before(name)),
                module.register_forward_hook(lambda m, x, y, name=name: after(name, m, x[0], y)),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def layer_costs(model: nn.Module, batch_size: int = 128) -> list[LayerCost]:
    """Measure the layers of `model` one by one, in their order, where it is.

    What the networks call as functions is not among them: ReLUs, additions, most pools.
    """
    device = next(model.parameters()).device
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    started: dict[str, float] = {}
    seconds: dict[str, list[float]] = {}
    costs: dict[str, LayerCost] = {}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def before(name: str) -> None:
        started[name] = now()

    def after(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        seconds.setdefault(name, []).append(now() - started[name])
        costs[name] = _cost(name, module, x, y)

    with _hooked(model, before, after):
        for _ in range(_REPEATS + 1):
            model(images)
    return [
        replace(cost, microseconds=1e6 * median(seconds[name][1:]) / batch_size)
        for name, cost in costs.items()
    ]


def _cost(name: str, module: nn.Module, x: Tensor, y: Tensor) -> LayerCost:
    params = sum(p.numel() for p in module.parameters(recurse=False))
    macs = 0
    if isinstance(module, nn.Conv2d):
        macs = module.weight.numel() * y.shape[2] * y.shape[3]
    elif isinstance(module, nn.Linear):
        macs = module.weight.numel()
    moved = (x.numel() + y.numel() + params) * x.element_size()
    kind = type(module).__name__
    return LayerCost(name, kind, tuple(y.shape[1:]), params, 2 * macs / 1e6, moved / len(x))


def first_filters(model: nn.Module) -> np.ndarray:
    """Return the filters of the first convolution as (K, H, W, 3) uint8 pictures.

    Each is scaled by its own largest value; grey is zero.
    """
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    filters = first.weight.detach().float().cpu().numpy().transpose(0, 2, 3, 1)
    scale = np.abs(filters).max(axis=(1, 2, 3), keepdims=True)
    return np.clip(127.5 + 127.5 * filters / np.maximum(scale, 1e-12), 0, 255).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class FeatureMaps:
    """What one image becomes behind a part of the network: (C, H, W) uint8, each map by itself."""

    name: str
    maps: np.ndarray


@torch.inference_mode()
def feature_maps(model: nn.Module, image: Tensor, most: int = 32) -> list[FeatureMaps]:
    """Return the maps of one normalised image (3, 32, 32) behind the stem and each stage.

    Args:
        model: a network of fastres.
        image: on the model's device.
        most: maps of each part, the first ones.
    """
    found: list[FeatureMaps] = []
    names = [n for n, _ in model.named_children() if n == "bn1" or n.startswith("layer")]

    def keep(name: str, output: Tensor) -> None:
        maps = output[0, :most].relu().float().cpu().numpy()
        scale = np.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-12)
        title = "stem" if name == "bn1" else name
        found.append(FeatureMaps(title, (255 * maps / scale).astype(np.uint8)))

    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, _x, output, name=name: keep(name, output)
        )
        for name in names
    ]
    try:
        model(image[None])
    finally:
        for handle in handles:
            handle.remove()
    return found
