"""The optimizers of a run and their schedule, with learning rates as tensors on the device.

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
from fastres.engine.muon import Muon
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


def _entries(rule: torch.optim.Optimizer) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return what a rule keeps of a parameter after a step of it, each made from the parameter."""
    if isinstance(rule, torch.optim.AdamW):
        return {"step": _scalar, "exp_avg": torch.empty_like, "exp_avg_sq": torch.empty_like}
    has_momentum = isinstance(rule, Muon) or rule.defaults["momentum"] > 0
    return {"momentum_buffer": torch.empty_like} if has_momentum else {}


def _reads_rate(group: dict[str, Any]) -> bool:
    """Whether a group is of torch's plain SGD, which reads its rate on the host."""
    return group.get("fused") is False and "nesterov" in group


def _split(model: nn.Module, config: Config) -> tuple[list[Tensor], list[Tensor]]:
    """Return the filters that Muon moves, and all other parameters that are trained.

    The stem is left to SGD, as the first layer is wherever Muon is used: its three input channels
    are no hidden space whose directions could count alike.
    """
    trained: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer != "muon":
        return [], trained
    stem = next(id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d))
    hidden = [p for p in trained if p.ndim == 4 and id(p) != stem]
    chosen = {id(p) for p in hidden}
    return hidden, [p for p in trained if id(p) not in chosen]


class Optimizer:
    """The optimizers of a run: parameter groups, learning rates as tensors, flat state.

    Convolution filters and the classifier's matrix decay; batch norm and biases where asked for.
    Parameters that need no gradient are nobody's.

    Args:
        model: on its device and in its memory format.
        config: the options of optimisation.
        dtype: that the step computes in, for the products of Muon.
        fused: update all parameters in few kernels.
        one_launch: of SGD in one, which is our own and keeps `copies` up to date.
        copies: of filters in a lower precision, or None.

    Attributes:
        rules: torch's optimizers, each of parameters of its own; all of them step.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        *,
        dtype: torch.dtype = torch.float32,
        fused: bool,
        one_launch: bool = False,
        copies: FilterCopies | None = None,
    ):
        self.names = {id(p): name for name, p in model.named_parameters()}
        orthogonal, params = _split(model, config)
        groups = [
            {
                "params": [p for p in params if p.ndim > 1],
                "lr": config.lr,
                "weight_decay": config.weight_decay,
            },
            {
                "params": [p for p in params if p.ndim <= 1],
                "lr": config.lr * config.bias_lr_scale,
                "weight_decay": config.weight_decay if config.decay == "all" else 0.0,
            },
        ]
        groups = [group for group in groups if group["params"]]
        self.rules: list[torch.optim.Optimizer] = []
        if orthogonal:
            self.rules.append(
                Muon(
                    orthogonal,
                    config.muon_lr,
                    momentum=config.muon_momentum,
                    dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
                )
            )
        if config.optimizer == "adamw":
            betas = (config.momentum, 0.999)
            on_cuda = params[0].device.type == "cuda"
            self.rules.append(
                torch.optim.AdamW(groups, betas=betas, fused=fused, capturable=on_cuda)
            )
        else:
            momentum, nesterov = config.momentum, config.nesterov and config.momentum > 0
            options: dict[str, Any] = {"lr": config.lr, "momentum": momentum, "nesterov": nesterov}
            if fused and one_launch:
                self.rules.append(OneLaunchSGD(groups, copies, **options))
            else:
                self.rules.append(torch.optim.SGD(groups, **options, fused=fused))
            if config.momentum:
                # Torch leaves a new buffer uninitialised where a loss scaler skips its first step,
                # and a checkpoint may come before it.
                for param in params:
                    self.rules[-1].state[param]["momentum_buffer"] = torch.zeros_like(param)
        if fused and not isinstance(self.rules[-1], OneLaunchSGD):
            # Torch's fused kernels tell autograd nothing, nor whoever keeps copies of weights.
            self.rules[-1].register_step_post_hook(lambda *_: increment_version(params))
        # Groups of one rate share a tensor, so that most runs set one.
        self._rates: dict[float, Tensor] = {}
        for group in self._groups:
            peak = group["peak_lr"] = group["lr"]
            rate = torch.tensor(peak, dtype=torch.float32, device=params[0].device)
            group["lr"] = peak if _reads_rate(group) else self._rates.setdefault(peak, rate)

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [group for rule in self.rules for group in rule.param_groups]

    def set_lr_factor(self, factor: float) -> None:
        """Set every rate to a share of its peak without waiting for the device."""
        for peak, rate in self._rates.items():
            rate.fill_(factor * peak)
        for group in self._groups:
            if _reads_rate(group):
                group["lr"] = factor * group["peak_lr"]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as flat tensors named "<parameter>.<entry>", not copied."""
        return {
            f"{self.names[id(param)]}.{entry}": value
            for rule in self.rules
            for param, state in rule.state.items()
            for entry, value in state.items()
            if isinstance(value, Tensor)
        }

    def layout(self) -> dict[str, Tensor]:
        """Return what `state_dict` names after a step of every parameter, as tensors on meta."""
        return {
            f"{self.names[id(param)]}.{entry}": like(param.detach().to("meta"))
            for rule in self.rules
            for group in rule.param_groups
            for param in group["params"]
            for entry, like in _entries(rule).items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put tensors that agree with `layout` back, in place where a graph may point at them."""
        owners = {
            self.names[id(param)]: (param, rule)
            for rule in self.rules
            for group in rule.param_groups
            for param in group["params"]
        }
        for key, value in state.items():
            name, _, entry = key.rpartition(".")
            param, rule = owners[name]
            entries = rule.state[param]
            if entry not in entries:
                like = param if value.shape == param.shape else value.to(param.device)
                entries[entry] = torch.empty_like(like)
            entries[entry].copy_(value)
