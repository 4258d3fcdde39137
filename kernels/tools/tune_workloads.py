"""What the tuner measures: every convolution of a network as the fused blocks use it.

The launch table names a convolution by its shape, but a network uses one shape in several variants:
the first of a block reads a stored activation and adds the shortcut's gradient, later ones compute
their input from their producer's y and mask its gradient. `conv_workloads` lists the shapes with
their variants and how much of a step's traffic they are; a `ConvCase` holds the tensors of one
variant and runs it on any back end, so that the `triton` and `cudnn` routes do equal work: the
convolution and all that is fused with it.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastres.kernels.block import Backend
from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.conv_types import ConvBN, ConvGrads, DeferredGrad, LayerState
from fastres.kernels.gpu.launch import Launch
from fastres.kernels.reference import backend as reference_backend
from fastres.kernels.reference.block import bn_fold_ref
from fastres.kernels.reference.error_bound import RATIO, UNIT_ROUNDOFF
from fastres.kernels.tools.network_launches import computes, record_training
from fastres.kernels.tools.networks import NamedBlock, Precision, network_blocks, precision_set
from fastres.kernels.tools.torch_launches import AnyLaunch

__all__ = [
    "ConvCase",
    "ConvPass",
    "ConvVariant",
    "ConvWorkload",
    "ParityCheck",
    "conv_workloads",
    "make_case",
]

# Images of a parity check, whose truth is computed in fp64. The code of a kernel depends on the
# layer, not on the batch.
PARITY_BATCH = 4

# Of one layer, as training runs it: its convolution and all that is fused with it.
ConvPass = Literal["forward", "backward"]


class ConvVariant(NamedTuple):
    """How training uses a convolution.

    prologue: its input is computed from its producer's y, and its input's gradient is masked and
    reduced. shortcut: the shortcut's gradient is added to that of its input. need_dx: whether that
    gradient is wanted.
    """

    prologue: bool
    shortcut: bool
    need_dx: bool


@dataclass(frozen=True)
class ConvWorkload:
    """A convolution shape, how often a step has each variant, and what it declares to move."""

    shape: ConvShape
    precision: Precision
    variants: dict[ConvVariant, int]
    bytes: int


def conv_workloads(
    networks: Sequence[str], batches: Sequence[int], precisions: Sequence[Precision]
) -> list[ConvWorkload]:
    """Every different convolution of the networks, those that move most bytes a step first."""
    workloads: dict[tuple[ConvShape, Precision], ConvWorkload] = {}
    for network, batch, precision in itertools.product(networks, batches, precisions):
        for block in network_blocks(network, batch):
            launches = record_training(block, precision)
            for variant, shape in _variants_of(block):
                found = workloads.get((shape, precision), ConvWorkload(shape, precision, {}, 0))
                count = found.variants.get(variant, 0) + block.count
                variants = {**found.variants, variant: count}
                workloads[shape, precision] = replace(found, variants=variants)
            for shape in {conv.shape for conv in block.convs()}:
                found = workloads[shape, precision]
                moved = sum(launch.traffic.bytes for launch in launches if _is_of(launch, shape))
                total = found.bytes + block.count * moved
                workloads[shape, precision] = replace(found, bytes=total)
    return sorted(workloads.values(), key=lambda workload: -workload.bytes)


def _variants_of(block: NamedBlock) -> list[tuple[ConvVariant, ConvShape]]:
    """The convolutions of a block, each with the variant that the block has of it."""
    adds_gradient = block.shortcut in ("input", "projected")
    variants = [
        (ConvVariant(i > 0, i == 0 and adds_gradient, i > 0 or block.need_dx), shape)
        for i, shape in enumerate(block.layers)
    ]
    if block.projection is not None:
        variants.append((ConvVariant(False, False, block.need_dx), block.projection))
    return variants


def _is_of(launch: AnyLaunch, shape: ConvShape) -> bool:
    return isinstance(launch, Launch) and computes(launch, shape)


@dataclass(frozen=True)
class ConvCase:
    """Tensors of one variant of a convolution, and its two passes on any back end."""

    x: Tensor
    layer: ConvBN
    dy: DeferredGrad
    producer: LayerState | None
    producer_weight: Tensor | None
    shortcut: Tensor | None
    need_dx: bool

    def forward(self, backend: Backend) -> LayerState:
        """The convolution and the statistics of its output."""
        scale_shift = None if self.producer is None else self.producer.scale_shift
        return backend.conv_bn(self.x, self.layer, scale_shift)

    def backward(self, backend: Backend) -> ConvGrads:
        """The gradients of filters and input, and those of its producer's batch norm."""
        return backend.conv_backward(
            self.dy,
            self.x,
            self.layer,
            producer=self.producer,
            producer_weight=self.producer_weight,
            shortcut=self.shortcut,
            need_dx=self.need_dx,
        )

    def run(self, name: ConvPass, backend: Backend) -> LayerState | ConvGrads:
        """One of the two passes."""
        return self.forward(backend) if name == "forward" else self.backward(backend)

    def double(self) -> "ConvCase":
        """The same numbers in fp64."""
        return self._map(Tensor.double)

    def on_meta(self) -> "ConvCase":
        """Sizes, strides and dtypes alone: to record launches without making them."""
        return self._map(
            lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        )

    def _map(self, of_tensor: Callable[[Tensor], Tensor]) -> "ConvCase":
        def of_value(value: Any) -> Any:
            if isinstance(value, Tensor):
                return of_tensor(value)
            if isinstance(value, tuple):
                return type(value)(*(of_value(item) for item in value))
            return value

        return ConvCase(**{name: of_value(value) for name, value in vars(self).items()})


def make_case(
    shape: ConvShape,
    variant: ConvVariant,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> ConvCase:
    """Seeded tensors of unit scale; no pre-activation lies so near 0 that two masks may differ."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    def pixels(values: Tensor) -> Tensor:
        # Not `contiguous`: filters of 1x1 would keep the strides of NCHW, and cuDNN go by them.
        return values.to(dtype).to(memory_format=torch.channels_last)

    n, c, h, w = shape.N, shape.C, shape.H, shape.W
    k, p, q = shape.K, shape.P, shape.Q
    x, producer, weight = normal(n, c, h, w), None, None
    if variant.prologue:
        weight, bias = 1 + 0.1 * normal(c), 0.1 * normal(c)
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        rstd = (var + 1e-5).rsqrt()
        scale_shift = bn_fold_ref(mean, rstd, weight, bias)
        a, b = (vector.view(1, -1, 1, 1) for vector in scale_shift)
        x = torch.where((a * x + b).abs() < 0.05, (1 - b) / a, x)
        producer = LayerState(pixels(x), torch.stack([mean, var, rstd, *scale_shift]))
    filters = pixels(normal(k, c, shape.R, shape.S) / shape.RSC**0.5)
    layer = ConvBN(filters, 1 + 0.1 * normal(k), normal(k), shape.stride, shape.padding)
    coefficients = torch.stack([1 + 0.1 * normal(k), 0.1 * normal(k), 0.1 * normal(k)])
    return ConvCase(
        x=pixels(x) if producer is None else producer.y,
        layer=layer,
        dy=DeferredGrad(pixels(normal(n, k, p, q)), pixels(normal(n, k, p, q)), coefficients),
        producer=producer,
        producer_weight=weight,
        shortcut=pixels(normal(n, c, h, w)) if variant.shortcut else None,
        need_dx=variant.need_dx,
    )


def _outcome(case: ConvCase, name: ConvPass, backend: Backend) -> dict[str, Tensor]:
    """What a pass of a case computes: tensors by name."""
    if name == "forward":
        state = case.forward(backend)
        return {"y": state.y, "mean": state.mean, "scale_shift": state.scale_shift}
    grads = case.backward(backend)
    outcome = {"dw": grads.dw}
    if grads.dx is not None:
        outcome["dx"] = grads.dx
    if grads.producer is not None:
        outcome |= {"dgamma": grads.producer.dgamma, "dbeta": grads.producer.dbeta}
    return outcome


class ParityCheck:
    """Compares a pass of a layer, in all variants and on small batches, with the truth in fp64.

    Wrong is an error against fp64 above RATIO times that of plain torch in the same dtype and one
    rounding, in root mean square or in the largest element, or a NaN. Truth and plain torch are
    computed once and serve every candidate.

    Args:
        workload: the layer.
        device: where it runs.
    """

    def __init__(self, workload: ConvWorkload, device: torch.device):
        self._workload = workload
        self._device = device
        self._expected: dict[tuple[ConvPass, ConvVariant], _Expected] = {}

    @functools.cached_property
    def cases(self) -> dict[ConvVariant, ConvCase]:
        """The tensors of each variant."""
        shape = replace(self._workload.shape, N=min(PARITY_BATCH, self._workload.shape.N))
        dtype = self._workload.precision.dtype
        return {v: make_case(shape, v, dtype, self._device) for v in self._workload.variants}

    def __call__(self, name: ConvPass, backend: Backend) -> str | None:
        """Run the pass; say what is wrong with it, or None."""
        precision = self._workload.precision
        for variant, case in self.cases.items():
            with precision_set(precision), _without_search():
                computed = _outcome(case, name, backend)
            eager, truth = self._expect(name, variant)
            for what, value in computed.items():
                wrong = _excess(value, eager[what], truth[what], _roundoff(precision))
                if wrong is not None:
                    return f"{what} is off by {wrong}"
        return None

    def _expect(self, name: ConvPass, variant: ConvVariant) -> "_Expected":
        place = name, variant
        if place not in self._expected:
            case = self.cases[variant]
            with precision_set(self._workload.precision), _without_search():
                eager = _outcome(case, name, reference_backend)
                truth = _outcome(case.double(), name, reference_backend)
            self._expected[place] = _Expected(eager, truth)
        return self._expected[place]


@contextmanager
def _without_search() -> Iterator[None]:
    """Have cuDNN choose by rule inside the `with` block: what runs once is not worth a search."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class _Expected(NamedTuple):
    """What plain torch computes in the dtype of a case, and in fp64."""

    eager: dict[str, Tensor]
    truth: dict[str, Tensor]


def _roundoff(precision: Precision) -> float:
    # TF32 has the mantissa of fp16.
    return UNIT_ROUNDOFF[torch.float16 if precision.tf32 else precision.dtype]


def _excess(value: Tensor, eager: Tensor, truth: Tensor, roundoff: float) -> str | None:
    """How far `value` is from the truth, where that is too far."""
    if not bool(torch.isfinite(value).all()):
        return "NaN or infinity"
    error, allowed = (value.double() - truth).abs(), (eager.double() - truth).abs()
    for norm, of in (("rms", lambda t: t.square().mean().sqrt()), ("at most", torch.amax)):
        bound = RATIO * of(allowed) + roundoff * of(truth.abs())
        if bool(of(error) > bound):
            return f"{of(error).item():.3g} {norm}, allowed {bound.item():.3g}"
    return None
