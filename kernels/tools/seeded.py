"""Seeded tensors of unit scale, as training has them: what the tools check and time kernels on."""

import torch
from torch import Tensor

from fastres.kernels.conv_types import LayerState
from fastres.kernels.reference.block import bn_fold_ref

__all__ = ["Seeded"]


class Seeded:
    """Draws tensors from one generator; on meta they have no numbers, to record launches.

    Args:
        device: of the tensors.
        dtype: of images and filters.
        seed: of the generator.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0):
        self.device, self.dtype = device, dtype
        on_meta = device.type == "meta"
        self.generator = None if on_meta else torch.Generator(device).manual_seed(seed)

    def normal(self, *size: int) -> Tensor:
        """Normal numbers in fp32."""
        return torch.randn(size, generator=self.generator, device=self.device)

    def integers(self, high: int, *size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Integers from 0 to high - 1."""
        return torch.randint(high, size, generator=self.generator, device=self.device, dtype=dtype)

    def to_pixels(self, values: Tensor) -> Tensor:
        """Images or filters in their dtype and channels_last."""
        # Not `contiguous`: filters of 1x1 would keep the strides of NCHW, and cuDNN go by them.
        return values.to(self.dtype).to(memory_format=torch.channels_last)

    def pixels(self, *size: int) -> Tensor:
        """Normal numbers as images or filters."""
        return self.to_pixels(self.normal(*size))

    def layer_state(self, *size: int) -> tuple[LayerState, Tensor]:
        """A layer's y of (N, C, H, W) with its statistics, and the weight of its batch norm.

        No pre-activation lies so near 0 that two masks of a ReLU may differ.
        """
        y, c = self.normal(*size), size[1]
        weight, bias = 1 + 0.1 * self.normal(c), 0.1 * self.normal(c)
        var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
        rstd = (var + 1e-5).rsqrt()
        scale_shift = bn_fold_ref(mean, rstd, weight, bias)
        a, b = (vector.view(1, -1, 1, 1) for vector in scale_shift)
        y = torch.where((a * y + b).abs() < 0.05, (1 - b) / a, y)
        return LayerState(self.to_pixels(y), torch.stack([mean, var, rstd, *scale_shift])), weight
