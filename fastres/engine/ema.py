"""A moving average of the weights, to evaluate with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["WeightAverage"]


class WeightAverage:
    """Exponential moving average of parameters and of batch-norm statistics.

    Args:
        model: what to average.
        decay: share of the old average that a step keeps. Early on less is kept,
            (1 + steps) / (10 + steps), so that the first weights do not linger.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.live = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
        self.average = {k: v.detach().clone() for k, v in self.live.items()}

    def update(self, step: int) -> None:
        """Move the average towards the weights after training step `step` (0-based)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        blend = get_ema_multi_avg_fn(decay)
        blend(list(self.average.values()), list(self.live.values()), None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the model for the time of the context."""
        own = {k: v.clone() for k, v in self.live.items()}
        self._copy(self.average, self.live)
        try:
            yield
        finally:
            self._copy(own, self.live)

    def load(self, average: dict[str, Tensor]) -> None:
        """Put a saved average back."""
        self._copy(average, self.average)

    @staticmethod
    @torch.no_grad()
    def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
        for name, value in target.items():
            value.copy_(source[name])
