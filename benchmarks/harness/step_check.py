"""The first step of a configuration against plain eager float32: its loss, and every update.

The truth is the eager network in float32 without TF32, from the same weights on the same batch. In
16 bits a step may be off from it by what eager torch in the same type is off; see error_bound.py.
"""

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import fastres
from benchmarks.harness import ablation, error_bound
from benchmarks.harness.error_bound import Distance
from fastres.engine.runtime import Runtime

__all__ = ["check_step", "reference_loss", "without_tf32"]


@contextmanager
def without_tf32() -> Iterator[None]:
    """Have cuDNN multiply float32 as it is inside the `with` block."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@functools.lru_cache(maxsize=4)
def reference_loss(model: str, batch_size: int) -> float:
    """Loss of the eager float32 network on the batch that every provider starts with."""
    images, labels = ablation.fixed_batch(batch_size)
    with torch.no_grad():
        logits = fastres.create_model(model, 10, seed=0).train()(images)
    return torch.nn.functional.cross_entropy(logits, labels).item()


def _update(model: str, after: Iterable[Tensor]) -> list[Tensor]:
    """By how much the first step moved every parameter, on the CPU."""
    before = fastres.create_model(model, 10, seed=0).parameters()
    update = [
        moved.detach().cpu().double() - start.detach().double()
        for moved, start in zip(after, before, strict=True)
    ]
    # What did not move is as far off as eager torch that did not move either, and proves nothing.
    if not any(tensor.any() for tensor in update):
        raise AssertionError("the first step moved no parameter: the scaled loss was too large")
    return update


@functools.lru_cache(maxsize=2)
def _reference_update(
    configuration: str, model: str, batch_size: int, device: torch.device, amp: str | None
) -> list[Tensor]:
    """The update of plain eager torch: in float32 the truth, in 16 bits the baseline."""
    options: dict[str, Any] = {} if amp is None else {"amp": amp}
    with without_tf32():
        built = ablation.build(configuration, model, batch_size, device, **options)
    return _update(model, built.model.parameters())


def check_step(
    name: str,
    model: str,
    batch_size: int,
    runtime: Runtime,
    loss: float,
    parameters: Iterable[Tensor],
) -> Distance | None:
    """Raise AssertionError unless a first step has the loss and the update of the reference.

    Args:
        name: of the configuration; the baseline itself, "amp", has its loss compared alone.
        model, batch_size: what was trained, from seed 0, on the fixed batch.
        runtime: of the step.
        loss: of that step.
        parameters: after it.

    Returns:
        How far the update is off, and how far it may be; None of the baseline.
    """
    truth = reference_loss(model, batch_size)
    if not abs(loss - truth) <= error_bound.LOSS_BOUND * truth:
        raise AssertionError(f"{name}: first loss {loss:.5f}, the reference has {truth:.5f}")
    if name == "amp":
        return None
    device, is_fp32 = runtime.device, runtime.dtype == torch.float32
    update = _update(model, parameters)
    exact = _reference_update("eager", model, batch_size, device, None)
    if is_fp32 and device.type == "cpu":
        off = Distance(error_bound.distance(update, exact), error_bound.FP32_BOUND)
        if not off.error <= off.allowed:
            raise AssertionError(f"{name} is off by {off.error:.2e} of the update")
        return off
    # On a GPU float32 convolutions round to TF32, which is finer than the baseline too.
    amp = None if is_fp32 else runtime.precision
    baseline = _reference_update("amp", model, batch_size, device, amp)
    return error_bound.check(name, update, baseline, exact, runtime.dtype)
