"""Which convolutions of a network the fused ops have computed: by what ran, not by a report."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastres.kernels.conv_types import ConvBN, LayerState
from fastres.kernels.dispatch import force_backend
from fastres.kernels.reference import backend as reference_backend

__all__ = ["RecordedOps", "recorded_ops"]


class RecordedOps:
    """The back end of plain torch, which keeps the first filter of every layer it computes.

    Filters come here copied into other layouts; random ones are told apart by their numbers.
    """

    def __init__(self) -> None:
        self._filters: set[tuple[float, ...]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(reference_backend, name)

    def conv_bn(self, x: Tensor, layer: ConvBN, scale_shift: Tensor | None) -> LayerState:
        self._filters.add(_numbers(layer.w))
        return reference_backend.conv_bn(x, layer, scale_shift)

    def conv_folded(self, x: Tensor, layer: ConvBN, *others: Any) -> Tensor:
        self._filters.add(_numbers(layer.w))
        return reference_backend.conv_folded(x, layer, *others)

    def take_names(self, net: nn.Module) -> set[str]:
        """The convolutions of a net that were computed here since the last time."""
        filters, self._filters = self._filters, set()
        convs = {n: m for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}
        return {name for name, conv in convs.items() if _numbers(conv.weight) in filters}


def _numbers(filters: Tensor) -> tuple[float, ...]:
    return tuple(filters[0].detach().flatten().tolist())


@contextmanager
def recorded_ops() -> Iterator[RecordedOps]:
    """Compute the fused ops in plain torch, and record of which layers."""
    recorded = RecordedOps()
    with force_backend(recorded):
        yield recorded
