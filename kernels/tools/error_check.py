"""Whether a result is right: as near to the truth as plain torch's, and the same bits twice.

Right is an error against fp64 of at most RATIO times that of plain torch in the same dtype and one
rounding, in root mean square and in the largest element; a NaN or an infinity is wrong. Sums over
pixels are fp32 in all precisions and have the rounding of sums. RATIO and that are derived in
reference/error_bound.py. The tuner and the parity command decide by this rule, and run
what they check on memory that is filled with NaN, so that an element which no kernel writes shows.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastres.kernels.reference.error_bound import RATIO, UNIT_ROUNDOFF, statistics_rtol
from fastres.kernels.tools.networks import Precision

__all__ = [
    "Deviation",
    "Tensors",
    "as_bits",
    "deviations",
    "map_tensors",
    "poisoned_memory",
    "precision_roundoff",
    "same_bits",
    "to_double",
]

# What a computation leaves: tensors by name.
Tensors = Mapping[str, Tensor]

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Deviation:
    """How far a result is from the truth in one norm.

    what: name of the result. norm: "rms" or "at most". error, allowed: in that norm, the error
    infinite where the result is not finite. text: for people.
    """

    what: str
    norm: str
    error: float
    allowed: float
    text: str

    @property
    def share(self) -> float:
        """Of the allowed error: more than 1 is wrong."""
        if self.allowed > 0:
            return self.error / self.allowed
        return 0.0 if self.error == 0 else math.inf


def precision_roundoff(precision: Precision) -> float:
    """One rounding of a network's tensors. TF32 has the mantissa of fp16."""
    return UNIT_ROUNDOFF[torch.float16 if precision.tf32 else precision.dtype]


def deviations(
    computed: Tensors, eager: Tensors, truth: Tensors, roundoff: float | None
) -> Iterator[Deviation]:
    """Yield the deviation of every computed tensor, in both norms.

    Args:
        computed: results, by names that the others have too.
        eager: what plain torch computes in the same dtype.
        truth: the same in fp64.
        roundoff: one rounding, relative, of what has pixels or taps, while the rest are sums over
            pixels; None: each result's own dtype says it.

    Raises: ValueError: when a result has another shape than the truth.
    """
    for what, value in computed.items():
        true = truth[what]
        if value.shape != true.shape:
            raise ValueError(
                f"{what} must have shape {tuple(true.shape)}, got {tuple(value.shape)}"
            )
        unit = UNIT_ROUNDOFF[value.dtype] if roundoff is None else roundoff
        if roundoff is not None and value.dim() < 4:
            unit = max(unit, statistics_rtol())
        num_bad = int((~torch.isfinite(value)).sum())
        error, of_eager = (value.double() - true).abs(), (eager[what].double() - true).abs()
        for norm, of in (("rms", _rms), ("at most", torch.amax)):
            allowed = (RATIO * of(of_eager) + unit * of(true.abs())).item()
            if num_bad:
                text = f"{what} is off by NaN or infinity in {num_bad} of {value.numel()} elements"
                yield Deviation(what, norm, math.inf, allowed, text)
                continue
            size = of(error).item()
            text = f"{what} is off by {size:.3g} {norm}, allowed {allowed:.3g}"
            yield Deviation(what, norm, size, allowed, text)


def _rms(t: Tensor) -> Tensor:
    return t.square().mean().sqrt()


def as_bits(t: Tensor) -> Tensor:
    """The same memory as integers, which are equal where all bits are, NaN or not."""
    return t.view(_SAME_SIZE[t.element_size()])


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit; a NaN is equal to itself."""
    return one.dtype == other.dtype and torch.equal(as_bits(one), as_bits(other))


def map_tensors(value: Any, of_tensor: Callable[[Tensor], Tensor]) -> Any:
    """The same structure of tuples, lists, dicts and dataclasses with every tensor replaced."""
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, dict):
        return {name: map_tensors(item, of_tensor) for name, item in value.items()}
    if isinstance(value, tuple | list):
        items = [map_tensors(item, of_tensor) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: map_tensors(getattr(value, f.name), of_tensor) for f in fields(value)}
        return replace(value, **changed)
    return value


def to_double(value: Any) -> Any:
    """The same numbers in fp64; what is no floating point stays."""
    return map_tensors(value, lambda t: t.double() if t.is_floating_point() else t)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every torch.empty inside the `with` block: with NaN, integers with their largest.

    cuDNN is deterministic inside it, as all other kernels are anyway.
    """
    was_on = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=warns_only)
