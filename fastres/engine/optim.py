"""The optimizer and its schedule, with the learning rate as a tensor on the device.

A CUDA graph replays fixed arguments; a rate that lives in a tensor can change between replays. Only
torch's plain SGD is given a number: it would read the tensor back once a parameter.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from fastres.config import Config
from fastres.engine.step_kernels import FilterCopies, OneLaunchSGD

__all__ = ["Optimizer", "lr_factor"]


def lr_factor(schedule: str, progress: float, warmup: float, warmup_shape: str = "linear") -> float:
    """Return the learning rate as a share of its peak.

    Args:
        schedule: "one-cycle", "cosine", "steps" or "constant".
        progress: share of the run that is done, 0 to 1.
        warmup: share of the run in which the rate is below its peak at first.
        warmup_shape: "linear" rises from zero, "constant" stays at a tenth.
    """
    if progress < warmup:
        return progress / warmup if warmup_shape == "linear" else 0.1
    rest = (progress - warmup) / (1 - warmup) if warmup < 1 else 1.0
    if schedule == "one-cycle":
        return 1 - rest
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * rest))
    if schedule == "steps":
        return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01
    return 1.0


def _scalar(like: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.float32, device=like.device)


class Optimizer:
    """The optimizer of a run: parameter groups, learning rate as a tensor, flat state.

    Convolution filters and the classifier's matrix decay; batch norm and biases where asked for.

    Args:
        model: on its device and in its memory format.
        config: optimizer, lr, momentum, nesterov, weight_decay, decay.
        fused: update all parameters in few kernels.
        one_launch: of SGD in one, which is our own and keeps `copies` up to date.
        copies: of filters in a lower precision, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        *,
        fused: bool,
        one_launch: bool = False,
        copies: FilterCopies | None = None,
    ):
        self.names = {id(p): name for name, p in model.named_parameters()}
        params = list(model.parameters())
        device = params[0].device
        self.lr = torch.tensor(config.lr, dtype=torch.float32, device=device)
        of_vectors = config.weight_decay if config.decay == "all" else 0.0
        groups = [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": of_vectors},
        ]
        self.rule: torch.optim.Optimizer
        if config.optimizer == "adamw":
            betas = (config.momentum, 0.999)
            on_cuda = device.type == "cuda"
            self.rule = torch.optim.AdamW(
                groups, lr=config.lr, betas=betas, fused=fused, capturable=on_cuda
            )
        else:
            momentum, nesterov = config.momentum, config.nesterov and config.momentum > 0
            options: dict[str, Any] = {"lr": config.lr, "momentum": momentum, "nesterov": nesterov}
            if fused and one_launch:
                self.rule = OneLaunchSGD(groups, copies, **options)
            else:
                self.rule = torch.optim.SGD(groups, **options, fused=fused)
            if fused and config.momentum:
                # Torch leaves a new buffer uninitialised where a loss scaler skips its first step.
                for param in params:
                    self.rule.state[param]["momentum_buffer"] = torch.zeros_like(param)
        if fused and not isinstance(self.rule, OneLaunchSGD):
            # Torch's fused kernels tell autograd nothing, nor whoever keeps copies of weights.
            self.rule.register_step_post_hook(lambda *_: increment_version(params))
        self._reads_lr = not fused and config.optimizer == "sgd"
        for group in self.rule.param_groups:
            group["lr"] = config.lr if self._reads_lr else self.lr

    def set_lr(self, rate: float) -> None:
        """Set the learning rate without waiting for the device."""
        self.lr.fill_(rate)
        if self._reads_lr:
            for group in self.rule.param_groups:
                group["lr"] = rate

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as flat tensors named "<parameter>.<entry>", not copied."""
        return {
            f"{self.names[id(param)]}.{entry}": value
            for param, state in self.rule.state.items()
            for entry, value in state.items()
            if isinstance(value, Tensor)
        }

    def layout(self) -> dict[str, Tensor]:
        """Return what `state_dict` names after a step of every parameter, as tensors on meta."""
        entries: dict[str, Callable[[Tensor], Tensor]]
        if isinstance(self.rule, torch.optim.AdamW):
            entries = {"step": _scalar, "exp_avg": torch.empty_like, "exp_avg_sq": torch.empty_like}
        else:
            has_momentum = self.rule.defaults["momentum"] > 0
            entries = {"momentum_buffer": torch.empty_like} if has_momentum else {}
        return {
            f"{self.names[id(param)]}.{entry}": like(param.detach().to("meta"))
            for group in self.rule.param_groups
            for param in group["params"]
            for entry, like in entries.items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put tensors that agree with `layout` back, in place where a graph may point at them."""
        params = {
            self.names[id(param)]: param
            for group in self.rule.param_groups
            for param in group["params"]
        }
        for key, value in state.items():
            name, _, entry = key.rpartition(".")
            param = params[name]
            entries = self.rule.state[param]
            if entry not in entries:
                like = param if value.shape == param.shape else value.to(param.device)
                entries[entry] = torch.empty_like(like)
            entries[entry].copy_(value)
