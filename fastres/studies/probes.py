"""What is measured on a network beside its accuracy: gradients and responses, in float32.

The plain modules compute it, from the weights of whatever route has trained, so that no route's
rounding is part of it; the trained network itself is left alone.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.data.dataset import ImageSet
from fastres.data.loaders import BatchSpec, build_loader
from fastres.data.plan import NO_AUGMENTATION
from fastres.engine.trainer import Trainer
from fastres.model.resnet import BasicBlock, network_of
from fastres.studies.records import BlockResponse, LayerResponse

__all__ = [
    "FirstLayerGradient",
    "first_layer_gradient",
    "measure_responses",
    "plain_network",
    "probe_images",
]

_GRADIENT_IMAGES = 128


def plain_network(trainer: Trainer) -> nn.Module:
    """Return a plain float32 copy of a trainer's network as it is now, on its device."""
    model = network_of(trainer.config, len(trainer.data.classes))
    model.load_state_dict(trainer.model.state_dict())
    return model.to(trainer.runtime.device)


def probe_images(trainer: Trainer, images: ImageSet, count: int) -> tuple[Tensor, Tensor]:
    """Return at most `count` images of a set and their labels, not augmented but normalised.

    They lie evenly over the set, which may be sorted by class.
    """
    size = min(count, len(images))
    index = np.linspace(0, len(images) - 1, size).astype(np.int64)
    batch = BatchSpec(
        images=ImageSet(images.images[index], images.labels[index]),
        mean=trainer.data.mean,
        std=trainer.data.std,
        batch_size=size,
        seed=trainer.config.seed,
        augmentation=NO_AUGMENTATION,
        training=False,
    )
    loader = build_loader("resident", batch, trainer.runtime.device)
    return next(iter(loader.serve(0)))


def first_layer_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """||dL/dW||, W the filters of conv1 and L the mean cross-entropy: the L2 norm.

    Args:
        model: is put into training mode, and its running statistics move as in any forward there.
        images: (N, 3, 32, 32), normalised.
        labels: (N,) int64.
    """
    filters = model.train().get_parameter("conv1.weight")
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(images), labels), filters)
    return gradient.double().norm().item()


class FirstLayerGradient:
    """Measures the gradient that reaches the first layer, on the same training images every time.

    Args:
        trainer: whose network is measured, as it is at each call.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._batch = probe_images(trainer, trainer.train_images, _GRADIENT_IMAGES)

    def __call__(self) -> dict[str, float]:
        """Return {"first_layer_gradient": L2 norm}."""
        norm = first_layer_gradient(plain_network(self._trainer), *self._batch)
        return {"first_layer_gradient": norm}


def _rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


@torch.inference_mode()
def measure_responses(
    model: nn.Module, images: Tensor
) -> tuple[list[LayerResponse], list[BlockResponse]]:
    """Measure the responses of every 3x3 layer and of every residual branch, in evaluation mode.

    A layer's response is its output after batch norm and before ReLU and addition; its standard
    deviation is that of the paper's section "Analysis of Layer Responses". A block's is F(x), the
    response of its last layer, beside what it is added to.

    Args:
        model: a plain network of basic blocks; it is left in evaluation mode.
        images: (N, 3, 32, 32), normalised, on the device of the model.

    Returns:
        The layers in the order in which they run, and the blocks that have a shortcut.
    """
    layers: list[LayerResponse] = []
    blocks: list[BlockResponse] = []
    branch_rms: dict[str, float] = {}

    def after_norm(name: str, _norm: nn.Module, _inputs: tuple[Tensor], z: Tensor) -> None:
        layers.append({"layer": name, "std": z.double().std(correction=0).item()})
        branch_rms[name] = _rms(z)

    def after_block(name: str, block: BasicBlock, inputs: tuple[Tensor], _out: Tensor) -> None:
        (x,) = inputs
        shortcut = x if block.downsample is None else block.downsample(x)
        residual = branch_rms[f"{name}.bn2"]
        blocks.append({"block": name, "residual_rms": residual, "shortcut_rms": _rms(shortcut)})

    handles = []
    for name, module in model.named_modules():
        # That of a projection is named downsample.1: it normalises no 3x3 convolution.
        if isinstance(module, nn.BatchNorm2d) and name.rpartition(".")[2].startswith("bn"):
            handles.append(module.register_forward_hook(partial(after_norm, name)))
        if isinstance(module, BasicBlock) and module.residual:
            handles.append(module.register_forward_hook(partial(after_block, name)))
    model.eval()
    model(images)
    for handle in handles:
        handle.remove()
    return layers, blocks
