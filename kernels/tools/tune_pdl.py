"""Whether a GPU starts kernels by programmatic dependent launch: what the tuner chooses last.

It lets a kernel's launch overlap the end of the kernel before it, so it is a property of neither:
whole steps of the networks are timed with and without it, all blocks forward and backward, with the
entries that the launch table has by then. Both ways must compute the same bits.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.kernels import block as block_ops
from fastres.kernels.block import Backend, Block
from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.conv_types import ConvBN
from fastres.kernels.gpu import backend as gpu_backend
from fastres.kernels.gpu.counters import own_counters
from fastres.kernels.gpu.launch import Launch, recording
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.launch_table import assume_entries, force_pdl
from fastres.kernels.tools.compile_ahead import compile_ahead
from fastres.kernels.tools.graph_timer import Trial
from fastres.kernels.tools.networks import (
    PRECISIONS,
    NamedBlock,
    Precision,
    network_blocks,
    precision_set,
)
from fastres.kernels.tools.seeded import Seeded
from fastres.kernels.tools.tuner import Timer, Tuner, first_line

__all__ = [
    "NetworkStep",
    "PdlChoice",
    "StepName",
    "blocks_step",
    "choose_pdl",
    "network_step",
]

# How many times faster steps must be, in the mean over networks: less is noise.
MIN_SPEEDUP = 1.005

# Enough for the calls of two trials; one step takes less than 2**18.
NUM_COUNTERS = 2**22


class StepName(NamedTuple):
    """A key of NETWORKS, images, a key of PRECISIONS."""

    network: str
    batch: int
    precision: str

    def __str__(self) -> str:
        return f"{self.network}, {self.batch} images, {self.precision}"


class PdlChoice(NamedTuple):
    """The decision for a GPU, and {step: seconds with it and without} of those that were timed."""

    enabled: bool
    seconds: dict[StepName, tuple[float, float]]


@dataclass(frozen=True)
class NetworkStep:
    """Stem and residual blocks of a network on tensors of its own, forward and backward.

    blocks: in order, each with whether the gradient of its input is wanted. x: images. dout: the
    gradient of the last block's output.
    """

    precision: Precision
    blocks: tuple[tuple[Block, bool], ...]
    x: Tensor
    dout: Tensor

    def run(self, backend: Backend) -> list[Tensor]:
        """Return the last block's output and the gradients of all parameters."""
        return [*self.outcome(backend).values()]

    def outcome(self, backend: Backend) -> dict[str, Tensor]:
        """The last block's output, all gradients of parameters, and dx where it is wanted."""
        kept = []
        x: Tensor = self.x
        dout: Tensor | None = self.dout
        with precision_set(self.precision):
            for block, _ in self.blocks:
                out, states = block_ops.forward(block, x, None, backend)
                kept.append((x, out, states))
                x = out
            made = {"out": x}
            for number, (block, need_dx) in reversed([*enumerate(self.blocks)]):
                given, out, states = kept.pop()
                mask = None if block.shortcut == "none" else out
                assert dout is not None
                grads = block_ops.backward(
                    block, dout, given, mask, states, backend, need_dx=need_dx
                )
                for place, layer in enumerate(grads.layers):
                    made |= {
                        f"{what} of layer {place} of block {number}": grad
                        for what, grad in layer._asdict().items()
                    }
                dout = grads.dx
        return made if dout is None else made | {"dx": dout}


def network_step(name: StepName, device: torch.device, seed: int = 0) -> NetworkStep:
    """Make a step of a whole network on seeded tensors."""
    blocks = [
        block for block in network_blocks(name.network, name.batch) for _ in range(block.count)
    ]
    return blocks_step(blocks, PRECISIONS[name.precision], device, seed)


def blocks_step(
    named_blocks: Sequence[NamedBlock], precision: Precision, device: torch.device, seed: int = 0
) -> NetworkStep:
    """Make a step of blocks, one after the other, on seeded tensors of unit scale."""
    seeded = Seeded(device, precision.dtype, seed)

    def layer(shape: ConvShape) -> ConvBN:
        w = seeded.to_pixels(seeded.normal(shape.K, shape.C, shape.R, shape.S) / shape.RSC**0.5)
        weight, bias = 1 + 0.1 * seeded.normal(shape.K), 0.1 * seeded.normal(shape.K)
        # Training keeps its filters in fp32, and wants their gradients so.
        return ConvBN(w, weight, bias, shape.stride, shape.padding, dw_dtype=torch.float32)

    blocks = tuple(
        (
            Block(
                [layer(shape) for shape in named.layers],
                None if named.projection is None else layer(named.projection),
                named.shortcut,
            ),
            named.need_dx,
        )
        for named in named_blocks
    )
    first, last = named_blocks[0].layers[0], named_blocks[-1].layers[-1]
    x = seeded.pixels(first.N, first.C, first.H, first.W)
    return NetworkStep(precision, blocks, x, seeded.pixels(last.N, last.K, last.P, last.Q))


def choose_pdl(
    tuner: Tuner, names: Sequence[StepName], entries: Mapping[str, ConvConfig], timer: Timer
) -> PdlChoice | None:
    """Time steps in turns with and without programmatic dependent launch; one line for each miss.

    Args:
        tuner: whose device, deadline and threads are used.
        names: of the steps, each of which counts alike.
        entries: of the launch table.
        timer: how steps are timed.

    Returns: the choice, off where results differ; None where nothing could be timed.

    Raises: GpuLostError: when the GPU fails in every call since.
    """
    if not tuner.gpu.has_pdl:
        tuner.say("programmatic dependent launch: this GPU has none")
        return None
    seconds: dict[StepName, tuple[float, float]] = {}
    for name in names:
        label = f"programmatic dependent launch, {name}"
        try:
            with assume_entries(entries):
                if tuner.threads and not tuner.is_late():
                    compile_ahead(_launches(name), tuner.threads, tuner.is_late)
                if tuner.is_late():
                    tuner.say(f"not timed: {label}: no time is left")
                    break
                step = network_step(name, tuner.device)
                if not _computes_the_same(step):
                    tuner.say(f"left out: {label}: it changes results")
                    return PdlChoice(False, {})
                tuner.synchronize()
            trials = [
                Trial(f"{label}: {pdl}", functools.partial(_run, step, entries, pdl))
                for pdl in (True, False)
            ]
            # As a captured step has them: else a memset would stand before most kernels.
            with own_counters(tuner.device, NUM_COUNTERS):
                with_it, without = timer(trials)
        except Exception as error:  # Whatever a compiler or a driver raises.
            tuner.stop_if_lost(label, error)
            tuner.say(f"not timed: {label}: {first_line(error)}")
            continue
        seconds[name] = with_it, without
    if not seconds:
        return None
    speedups = [without / with_it for with_it, without in seconds.values()]
    return PdlChoice(sum(speedups) / len(speedups) >= MIN_SPEEDUP, seconds)


def _launches(name: StepName) -> list[Launch]:
    """What a step launches, both ways; recorded on meta, where no kernel is started either way."""
    with recording() as launches:
        network_step(name, torch.device("meta")).run(gpu_backend)
    return [
        replace(launch, args={**launch.args, "PDL": pdl})
        for launch in launches
        for pdl in (False, True)
    ]


def _run(step: NetworkStep, entries: Mapping[str, ConvConfig], pdl: bool) -> list[Tensor]:
    with assume_entries(entries), force_pdl(pdl):
        return step.run(gpu_backend)


def _computes_the_same(step: NetworkStep) -> bool:
    """Whether a step's numbers are the same both ways, bit for bit."""
    made = []
    cudnn = torch.backends.cudnn
    was_deterministic = cudnn.deterministic
    # All other kernels are; cuDNN may else choose one that adds in any order.
    cudnn.deterministic = True
    try:
        for pdl in (False, True):
            with force_pdl(pdl):
                made.append(step.run(gpu_backend))
    finally:
        cudnn.deterministic = was_deterministic
    return all(
        torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
        for one, other in zip(*made, strict=True)
    )
