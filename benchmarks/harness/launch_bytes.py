"""Bytes that recorded launches of Triton kernels move: the one count of all suites."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastres.kernels.gpu.launch import Launch

__all__ = ["tensor_bytes"]


def tensor_bytes(launches: "Iterable[Launch]") -> int:
    """Bytes of all images and filters that launches read and write, each operand once.

    Numbers per channel, sums of tiles and split-K partials are left out: they depend on the tiles,
    and other routes have none. So the same count stands for every route.
    """
    return sum(
        tensor.numel() * tensor.element_size()
        for launch in launches
        for tensor in launch.tensors.values()
        if tensor.dim() == 4
    )
