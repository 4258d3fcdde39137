"""What a training step computes beside its network, in kernels of its own.

A step of a small network is as long as the number of its launches. Where its fused ops are Triton
kernels, SGD moves all parameters in one launch, which also rounds the filters for the next step,
and a second one adds the batch to the sums of the epoch.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from fastres import host
from fastres.engine.runtime import Runtime
from fastres.kernels.dispatch import is_interpreted, runs_on_triton
from fastres.kernels.filter_copies import FilterCopies
from fastres.kernels.gpu.counters import own_counters

if TYPE_CHECKING:
    from fastres.kernels.gpu.sgd import SGDTensors, SGDUpdate

__all__ = [
    "FilterCopies",
    "OneLaunchSGD",
    "add_to_totals",
    "compiles_kernels",
    "compiling_kernels",
    "copy_filters",
    "has_step_kernels",
    "own_counters",
]


def has_step_kernels(runtime: Runtime) -> bool:
    """Return whether the fused ops of a step are Triton kernels, and these may stand beside."""
    return runtime.route == "fused" and runs_on_triton(torch.empty(0, device=runtime.device))


def compiles_kernels(runtime: Runtime) -> bool:
    """Return whether the first step has Triton compile kernels, or find them compiled before."""
    return has_step_kernels(runtime) and not is_interpreted()


def compiling_kernels(num_processes: int = 1) -> AbstractContextManager[None]:
    """Return the context in which a step computes garbage, but has its kernels compiled at once.

    Args:
        num_processes: that share this machine's cores.
    """
    from fastres.kernels.tools.compile_ahead import compiling_only

    return compiling_only(max(1, host.usable_cores() // num_processes))


def copy_filters(model: nn.Module, runtime: Runtime) -> FilterCopies | None:
    """Return copies of the filters in the precision that the step computes in, where it is lower.

    Args:
        model: on its device and in its memory format.
        runtime: of the step.
    """
    if runtime.dtype == torch.float32 or not has_step_kernels(runtime):
        return None
    return FilterCopies(model.parameters(), runtime.dtype)


def add_to_totals(totals: Tensor, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
    """Add a batch to `Totals.values`, in one launch."""
    from fastres.kernels.gpu import totals as kernels

    kernels.add_to_totals(totals, loss, logits.contiguous(), labels.contiguous())


class OneLaunchSGD(torch.optim.SGD):
    """`torch.optim.SGD(fused=True)` in one launch, with the same state.

    All groups share momentum and Nesterov's form; their rates and weight decays may differ.

    Args:
        groups: parameter groups, fp32.
        copies: of filters, to be kept up to date, or None.
        lr, momentum, nesterov: as torch's.
    """

    # Also of an optimizer that was copied or unpickled: torch restores groups and state alone.
    _copies: FilterCopies | None = None
    _update: "SGDUpdate | None" = None

    def __init__(
        self,
        groups: list[dict[str, Any]],
        copies: FilterCopies | None,
        *,
        lr: float,
        momentum: float,
        nesterov: bool,
    ):
        super().__init__(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
        self._copies = copies

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does."""
        super().add_param_group(param_group)
        self._update = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient; torch's protocol of loss scaling is obeyed.

        Raises:
            ValueError: when the groups differ in more than rate and weight decay, or ask for
                dampening or maximization.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        momentum, nesterov = self._shared("momentum"), self._shared("nesterov")
        if self._shared("dampening") or self._shared("maximize"):
            raise ValueError("this SGD neither dampens nor maximizes; use torch.optim.SGD")
        rows = []
        for group in self.param_groups:
            device = group["params"][0].device
            lr = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
            rows += [self._tensors(param, lr, group) for param in group["params"]]
        if self._update is None:
            from fastres.kernels.gpu.sgd import SGDUpdate

            self._update = SGDUpdate([row.param for row in rows])
        self._update(
            rows,
            momentum=momentum,
            nesterov=nesterov,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
        )
        moved = [row for row in rows if row.grad is not None]
        increment_version([row.momentum_buffer for row in moved if row.momentum_buffer is not None])
        params = [row.param for row in moved]
        if self._copies is None:
            increment_version(params)
        else:
            self._copies.note_joint_update(params)
        return loss

    def _shared(self, name: str) -> Any:
        """Return an option that all groups must have alike."""
        value, *others = (group[name] for group in self.param_groups)
        # By identity first: to compare tensors would wait for the device.
        if any(other is not value and other != value for other in others):
            raise ValueError(f"all parameter groups of this SGD must have the same {name}")
        return value

    def _tensors(self, param: Tensor, lr: Tensor, group: dict[str, Any]) -> "SGDTensors":
        from fastres.kernels.gpu.sgd import SGDTensors

        buffer = None
        if group["momentum"] and param.grad is not None:
            state = self.state[param]
            buffer = state.get("momentum_buffer")
            if buffer is None:
                buffer = state["momentum_buffer"] = torch.zeros_like(param)
        copy = None if self._copies is None else self._copies.of(param)
        return SGDTensors(param, param.grad, buffer, copy, lr, group["weight_decay"])
