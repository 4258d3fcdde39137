"""The network as it is deployed: normalisation inside, batch norm folded into convolutions."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastres.inference.trained import TrainedNetwork
from fastres.model.resnet import BasicBlock, Bottleneck

__all__ = ["Deployed", "deployed", "fold_batch_norm"]


class Deployed(nn.Module):
    """Maps images in 0..1, (N, 3, 32, 32) float32, to logits (N, classes).

    That is what torchvision's `ToTensor` returns: the normalisation of the training, which
    everybody forgets, is inside.

    Args:
        model: maps normalised images to logits.
        mean, std: of each channel, in 0..1.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, 3, 32, 32) to (N, classes)."""
        return self.model((images - self.mean) / self.std)


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Return a copy for inference, each batch norm folded into the convolution before it.

    With y = gamma * (w * x - mean) * rstd + beta the filters become w * gamma * rstd, and beta -
    mean * gamma * rstd their bias. The batch norm behind the max pool of a `ConvPool` stays as it
    is: a negative gamma would turn the maximum into a minimum.

    Args:
        model: a network of `create_model`, in evaluation mode.
    """
    folded = copy.deepcopy(model).eval()
    _fold(folded, "conv1", "bn1")
    for module in folded.modules():
        if isinstance(module, BasicBlock | Bottleneck):
            _fold(module, "conv1", "bn1")
            _fold(module, "conv2", "bn2")
            if isinstance(module, Bottleneck):
                _fold(module, "conv3", "bn3")
            if isinstance(module.downsample, nn.Sequential):
                _fold(module.downsample, "0", "1")
    return folded


def _fold(owner: nn.Module, conv: str, norm: str) -> None:
    before, after = owner.get_submodule(conv), owner.get_submodule(norm)
    assert isinstance(before, nn.Conv2d)
    assert isinstance(after, nn.BatchNorm2d)
    setattr(owner, conv, fuse_conv_bn_eval(before, after))
    setattr(owner, norm, nn.Identity())


def deployed(network: TrainedNetwork) -> Deployed:
    """Return a trained network as it is deployed, on the CPU."""
    return Deployed(fold_batch_norm(network.model), network.mean, network.std).eval()
