"""What the tuner measures: every convolution of a network as the fused blocks use it.

The launch table names a convolution by its shape, but a network uses one shape in several forms:
the first of a block reads a stored activation and adds the shortcut's gradient, later ones form
their input and mask its gradient. `layer_works` lists the shapes with their forms and how much of a
step's traffic they are; a `Case` holds the tensors of one form and runs it on any backend, so that
the `triton` and `cudnn` routes do equal work: the convolution and all that stands around it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.kernels.block import BackwardStep, LayerState
from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.gpu.checks import FoldedGrad
from fastres.kernels.gpu.launch import Launch
from fastres.kernels.reference import backend as reference_backend
from fastres.kernels.reference.block import ConvBN, bn_fold_ref
from fastres.kernels.tools.networks import (
    MODELS,
    Precision,
    network_chains,
    precision_set,
    record_training,
)

__all__ = ["Case", "LayerWork", "Use", "check_parity", "layer_works", "make_case"]

# Images of a parity check: its referee computes in fp64. The code of a kernel depends on the layer,
# not on the batch.
PARITY_BATCH = 4

# The design's bound: at most this much more error than eager's, and one rounding.
PARITY_RATIO = 1.25


class Use(NamedTuple):
    """One form of a convolution in training.

    prologue: its input is formed from the y before it, and its input's gradient is masked and
    reduced. shortcut: the shortcut's gradient is added to that of its input. need_dx: whether that
    gradient is wanted.
    """

    prologue: bool
    shortcut: bool
    need_dx: bool


@dataclass(frozen=True)
class LayerWork:
    """A convolution shape, how often a step uses it in each form, and what it declares to move."""

    shape: ConvShape
    precision: Precision
    uses: dict[Use, int]
    bytes: int


def layer_works(
    models: Sequence[str], batches: Sequence[int], precisions: Sequence[Precision]
) -> list[LayerWork]:
    """Every different convolution of the networks, those that move most bytes a step first."""
    works: dict[tuple[ConvShape, Precision], LayerWork] = {}
    for model, batch, precision in ((m, b, p) for m in models for b in batches for p in precisions):
        for chain in network_chains(MODELS[model](batch)):
            launches = record_training(chain, precision)
            for use, shape in _uses_of(chain):
                found = works.get((shape, precision), LayerWork(shape, precision, {}, 0))
                uses = {**found.uses, use: found.uses.get(use, 0) + chain.count}
                works[shape, precision] = replace(found, uses=uses)
            for shape in set(chain.conv_shapes()):
                found = works[shape, precision]
                moved = sum(launch.traffic.bytes for launch in launches if _is_of(launch, shape))
                works[shape, precision] = replace(found, bytes=found.bytes + chain.count * moved)
    return sorted(works.values(), key=lambda work: -work.bytes)


def _uses_of(chain: Any) -> list[tuple[Use, ConvShape]]:
    """The convolutions of a chain, each with the form in which the chain uses it."""
    uses = [
        (Use(i > 0, i == 0 and chain.shortcut in ("input", "projected"), i > 0 or chain.need_dx), s)
        for i, s in enumerate(chain.layers)
    ]
    if chain.projection is not None:
        uses.append((Use(False, False, chain.need_dx), chain.projection))
    return uses


def _is_of(launch: Launch, shape: ConvShape) -> bool:
    return launch.name.startswith("conv") and shape.constexprs().items() <= launch.args.items()


@dataclass(frozen=True)
class Case:
    """Tensors of one form of one convolution, and its two halves on any backend."""

    x: Tensor
    layer: ConvBN
    dy: FoldedGrad
    before: LayerState | None
    shortcut: Tensor | None
    need_dx: bool

    def forward(self, steps: Any) -> LayerState:
        """The convolution and the statistics of its output."""
        fold = None if self.before is None else self.before.scale_shift
        return steps.conv_bn(self.x, self.layer, fold)

    def backward(self, steps: Any) -> BackwardStep:
        """The gradients of filters and input, with the sums for the batch norm before it."""
        return steps.conv_backward(
            self.dy,
            self.x,
            self.layer,
            before=self.before,
            shortcut=self.shortcut,
            need_dx=self.need_dx,
        )

    def double(self) -> "Case":
        """The same numbers in fp64."""

        def widen(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.double()
            if isinstance(value, tuple):
                return type(value)(*(widen(part) for part in value))
            return value

        return Case(**{name: widen(value) for name, value in vars(self).items()})


def make_case(
    shape: ConvShape, use: Use, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Case:
    """Seeded tensors of unit scale; no pre-activation lies so near 0 that two masks may differ."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    def pixels(values: Tensor) -> Tensor:
        # Not `contiguous`: filters of 1x1 would keep the strides of NCHW, and cuDNN go by them.
        return values.to(dtype).to(memory_format=torch.channels_last)

    n, c, h, w = shape.N, shape.C, shape.H, shape.W
    k, p, q = shape.K, shape.P, shape.Q
    x, before = normal(n, c, h, w), None
    if use.prologue:
        weight, bias = 1 + 0.1 * normal(c), 0.1 * normal(c)
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        rstd = (var + 1e-5).rsqrt()
        fold = bn_fold_ref(mean, rstd, weight, bias)
        a, b = (vector.view(1, -1, 1, 1) for vector in fold)
        x = torch.where((a * x + b).abs() < 0.05, (1 - b) / a, x)
        before = LayerState(pixels(x), mean, var, rstd, fold)
    filters = pixels(normal(k, c, shape.R, shape.S) / shape.RSC**0.5)
    layer = ConvBN(filters, 1 + 0.1 * normal(k), normal(k), shape.stride, shape.padding)
    coefficients = torch.stack([1 + 0.1 * normal(k), 0.1 * normal(k), 0.1 * normal(k)])
    return Case(
        x=pixels(x) if before is None else before.y,
        layer=layer,
        dy=FoldedGrad(pixels(normal(n, k, p, q)), pixels(normal(n, k, p, q)), coefficients),
        before=before,
        shortcut=pixels(normal(n, c, h, w)) if use.shortcut else None,
        need_dx=use.need_dx,
    )


def _outcome(case: Case, op: str, steps: Any) -> dict[str, Tensor]:
    """What one product of a case computes: tensors by name."""
    if op == "fprop":
        state = case.forward(steps)
        return {"y": state.y, "mean": state.mean, "scale_shift": state.scale_shift}
    step = case.backward(steps)
    if op == "wgrad":
        return {"dw": step.dw}
    assert step.dx is not None
    outcome = {"dx": step.dx}
    if case.before is not None:
        # The kernels leave their sums in tiles.
        for name in ("g", "gy"):
            total = getattr(step.sums, name)
            outcome[f"sum of {name}"] = total.sum(1) if total.dim() == 2 else total
    return outcome


def check_parity(work: LayerWork, op: str, steps: Any, device: torch.device) -> str | None:
    """Run one product on small batches in every form; say what is wrong with it, or None.

    Wrong is an error against fp64 above 1.25 times that of plain torch in the same dtype and one
    rounding, in root mean square or in the largest element, or a NaN.
    """
    shape = replace(work.shape, N=min(PARITY_BATCH, work.shape.N))
    dtype = work.precision.dtype
    for use in work.uses:
        if op == "dgrad" and not use.need_dx:
            continue
        case = make_case(shape, use, dtype, device)
        with precision_set(work.precision):
            computed, eager = _outcome(case, op, steps), _outcome(case, op, reference_backend)
        truth = _outcome(case.double(), op, reference_backend)
        for name, value in computed.items():
            wrong = _excess(value, eager[name], truth[name], _roundoff(work.precision))
            if wrong is not None:
                return f"{name} is off by {wrong}"
    return None


def _roundoff(precision: Precision) -> float:
    return 2.0**-11 if precision.tf32 else torch.finfo(precision.dtype).eps / 2


def _excess(value: Tensor, eager: Tensor, truth: Tensor, roundoff: float) -> str | None:
    """How far `value` is from the truth, where that is too far."""
    if not bool(torch.isfinite(value).all()):
        return "NaN or infinity"
    error, allowed = (value.double() - truth).abs(), (eager.double() - truth).abs()
    for norm, of in (("rms", lambda t: t.square().mean().sqrt()), ("at most", torch.amax)):
        bound = PARITY_RATIO * of(allowed) + roundoff * of(truth.abs())
        if bool(of(error) > bound):
            return f"{of(error).item():.3g} {norm}, allowed {bound.item():.3g}"
    return None
