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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastres.kernels.block import Backend
from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.conv_types import (
    BatchNormGrads,
    ConvBN,
    ConvGrads,
    DeferredGrad,
    LayerState,
)
from fastres.kernels.gpu.launch import Launch
from fastres.kernels.reference import backend as reference_backend
from fastres.kernels.tools.error_check import (
    Tensors,
    deviations,
    map_tensors,
    precision_roundoff,
    to_double,
)
from fastres.kernels.tools.network_launches import computes, record_training
from fastres.kernels.tools.networks import NamedBlock, Precision, network_blocks, precision_set
from fastres.kernels.tools.seeded import Seeded
from fastres.kernels.tools.torch_launches import AnyLaunch

__all__ = [
    "ConvCase",
    "ConvPass",
    "ConvVariant",
    "ConvWorkload",
    "ParityCheck",
    "conv_outcome",
    "conv_workloads",
    "input_grads",
    "make_case",
]

# Images of a parity check at most: its truth in fp64 must fit the GPU. Fewer images than a workload
# has would check other code: the group in which last programs add up partials is a constant of the
# kernel, and so is whether tiles are whole; counts of tiles stop being multiples of 16, and a wgrad
# of one part has no partials at all.
PARITY_BATCH = 512

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
    """The convolutions of a block, each with the variant that the block has of it.

    Of a projected shortcut the projection adds the gradients of both ways, as it does where the
    other way is cuDNN's (`Backend.adds_in_projection`). Where the other way has an epilogue, that
    does it, and reads as much more.
    """
    variants = [
        (ConvVariant(i > 0, i == 0 and block.shortcut == "input", i > 0 or block.need_dx), shape)
        for i, shape in enumerate(block.layers)
    ]
    if block.projection is not None:
        variants.append((ConvVariant(False, True, block.need_dx), block.projection))
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
        return to_double(self)

    def on_meta(self) -> "ConvCase":
        """Sizes, strides and dtypes alone: to record launches without making them."""
        return map_tensors(
            self, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        )


def make_case(
    shape: ConvShape,
    variant: ConvVariant,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> ConvCase:
    """Seeded tensors of unit scale; no pre-activation lies so near 0 that two masks may differ.

    On meta they have no numbers: to record launches.
    """
    seeded = Seeded(device, dtype, seed)
    n, c, h, w = shape.N, shape.C, shape.H, shape.W
    k, p, q = shape.K, shape.P, shape.Q
    producer, weight = seeded.layer_state(n, c, h, w) if variant.prologue else (None, None)
    x = seeded.pixels(n, c, h, w) if producer is None else producer.y
    filters = seeded.to_pixels(seeded.normal(k, c, shape.R, shape.S) / shape.RSC**0.5)
    gamma, beta = 1 + 0.1 * seeded.normal(k), seeded.normal(k)
    layer = ConvBN(filters, gamma, beta, shape.stride, shape.padding)
    coefficients = [1 + 0.1 * seeded.normal(k), 0.1 * seeded.normal(k), 0.1 * seeded.normal(k)]
    g, y = seeded.pixels(n, k, p, q), seeded.pixels(n, k, p, q)
    return ConvCase(
        x=x,
        # Training keeps its filters in fp32, and wants their gradients so.
        layer=layer._replace(dw_dtype=torch.float32),
        dy=DeferredGrad(g, y, torch.stack(coefficients)),
        producer=producer,
        producer_weight=weight,
        shortcut=seeded.pixels(n, c, h, w) if variant.shortcut else None,
        need_dx=variant.need_dx,
    )


def conv_outcome(case: ConvCase, name: ConvPass, backend: Backend) -> dict[str, Tensor]:
    """What a pass of a case computes: tensors by name."""
    if name == "forward":
        state = case.forward(backend)
        return {"y": state.y, "mean": state.mean, "scale_shift": state.scale_shift}
    grads = case.backward(backend)
    return {"dw": grads.dw} | input_grads(grads.dx, grads.producer)


def input_grads(dx: Tensor | None, producer: BatchNormGrads | None) -> dict[str, Tensor]:
    """What a backward pass computes besides dw: tensors by name."""
    outcome = {} if dx is None else {"dx": dx}
    if producer is not None:
        outcome |= {"dgamma": producer.dgamma, "dbeta": producer.dbeta}
    return outcome


class ParityCheck:
    """Compares a pass of a layer, in all variants, with the truth in fp64: see error_check.py.

    Truth and plain torch are computed once and serve every candidate. On the meta device there are
    no values, and nothing is found wrong.

    Args:
        workload: the layer.
        device: where it runs.

    Attributes:
        num_images: of the check.
    """

    def __init__(self, workload: ConvWorkload, device: torch.device):
        self._workload = workload
        self._device = device
        self.num_images = min(PARITY_BATCH, workload.shape.N)
        self._expected: dict[tuple[ConvPass, ConvVariant], _Expected] = {}

    @functools.cached_property
    def cases(self) -> dict[ConvVariant, ConvCase]:
        """The tensors of each variant."""
        shape = replace(self._workload.shape, N=self.num_images)
        dtype = self._workload.precision.dtype
        return {v: make_case(shape, v, dtype, self._device) for v in self._workload.variants}

    def __call__(self, name: ConvPass, backend: Backend) -> str | None:
        """Run the pass; say what is wrong with it, or None."""
        if self._device.type == "meta":
            return None
        precision = self._workload.precision
        for variant, case in self.cases.items():
            with precision_set(precision), _without_search():
                computed = conv_outcome(case, name, backend)
            eager, truth = self._expect(name, variant)
            for found in deviations(computed, eager, truth, precision_roundoff(precision)):
                if found.share > 1:
                    return found.text
        return None

    def _expect(self, name: ConvPass, variant: ConvVariant) -> "_Expected":
        place = name, variant
        if place not in self._expected:
            case = self.cases[variant]
            with precision_set(self._workload.precision), _without_search():
                eager = conv_outcome(case, name, reference_backend)
                truth = conv_outcome(case.double(), name, reference_backend)
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

    eager: Tensors
    truth: Tensors
