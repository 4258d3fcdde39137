"""The tuner: candidates for every convolution, checked, timed, chosen, and kept in a launch table.

For a layer, first the tiles: candidates near the heuristic ones that fit the GPU, each proved right
before it is timed. Then the routes, as whole passes of the layer: the forward product with its
statistics on `triton` and on `cudnn`, and the two gradients together on all four pairs of routes,
because a dy that is stored for one of them serves both.

How time is measured is a `Timer`, so everything else runs and is tested without a GPU.
"""

import functools
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from fastres.kernels.conv_shape import ConvOp, ConvShape
from fastres.kernels.gpu import backend as gpu_backend
from fastres.kernels.gpu.conv_dgrad import conv_dgrad
from fastres.kernels.gpu.conv_wgrad import conv_wgrad
from fastres.kernels.gpu.launch_config import (
    NUM_SMS,
    TABLE_SCHEMA,
    ConvConfig,
    Route,
    assume_entries,
    heuristic_config,
    load_table,
    table_key,
    tma_config,
)
from fastres.kernels.tools.graph_timer import Trial
from fastres.kernels.tools.networks import precision_set
from fastres.kernels.tools.tune_workloads import (
    ConvCase,
    ConvVariant,
    ConvWorkload,
    check_parity,
    make_case,
)
from fastres.strict_json import dumps

__all__ = ["Choice", "Timer", "Tuner", "candidates", "merge_table"]

T = TypeVar("T")

# Accumulators and a computed operand that a thread can hold beside its addresses, in fp32 numbers.
MAX_NUMBERS_A_THREAD = 160


class Timer(Protocol):
    """Measures trials in turns, so that a slow spell of the machine strikes all of them."""

    def __call__(self, trials: Sequence[Trial]) -> list[float]:
        """Median seconds of one run of each trial."""


class Choice(NamedTuple):
    """A decision for one product: its entry, its time and that of the heuristic entry, in seconds.

    Times are of all variants of the layer in a step together. The gradients are timed together, so
    both of a layer carry the times of the pair. Heuristic tiles that compute the wrong thing are
    replaced by the nearest right ones.
    """

    key: str
    config: ConvConfig
    seconds: float
    heuristic_seconds: float

    @property
    def speedup(self) -> float:
        """How many times faster than the heuristics."""
        return self.heuristic_seconds / self.seconds


def _powers(low: int, high: int) -> list[int]:
    return [2**i for i in range(low.bit_length() - 1, high.bit_length()) if low <= 2**i <= high]


def _fits(
    config: ConvConfig, op: ConvOp, shape: ConvShape, itemsize: int, shared_bytes: int
) -> bool:
    """Whether tiles fit shared memory and registers, and give every thread 16 bytes to load."""
    m, n, k = config.block_m, config.block_n, config.block_k
    threads = 32 * config.num_warps
    # The gradients compute an operand from two: both are staged.
    staged = {"fprop": m * k + k * n, "dgrad": 2 * m * k + k * n, "wgrad": k * m + 2 * k * n}[op]
    computed = {"fprop": m * k, "dgrad": m * k, "wgrad": k * (m + n)}[op]
    gemm = shape.gemm(op)
    rows, columns = (gemm.n, gemm.m) if op == "wgrad" else (gemm.m, gemm.n)
    return (
        staged * itemsize * config.num_stages <= shared_bytes
        and (m * n + computed) / threads <= MAX_NUMBERS_A_THREAD
        and min(m * k, k * n if op == "wgrad" else m * n) * itemsize >= 16 * threads
        and m < 2 * max(rows, 64)
        and n < 2 * max(columns, 16)
        and k < 2 * max(gemm.k, 16)
        and config.split_k <= -(-gemm.k // config.block_k)
    )


def _distance(config: ConvConfig, start: ConvConfig) -> float:
    """Doublings between two configurations; any other number of stages counts as one."""
    names = ("block_m", "block_n", "block_k", "num_warps", "split_k")
    doublings = (abs(math.log2(getattr(config, name) / getattr(start, name))) for name in names)
    return sum(doublings) + (config.num_stages != start.num_stages)


def _with_tma(
    op: ConvOp, shape: ConvShape, start: ConvConfig, tiles: Sequence[ConvConfig], grid_size: int
) -> dict[ConvConfig, float]:
    """TMA tiles among `tiles`, with one program a tile and `grid_size`; their distances."""
    found = {}
    for config in (start, *tiles):
        by_tma = replace(config, loads="tma")
        if by_tma.block_k <= start.block_k and by_tma.tma_tile(op, shape) is not None:
            for size in (0, grid_size):
                found[replace(by_tma, grid_size=size)] = 1 + _distance(by_tma, start)
    return found


def candidates(
    op: ConvOp,
    shape: ConvShape,
    dtype: torch.dtype,
    *,
    tf32: bool = False,
    shared_bytes: int = 227 * 1024,
    multiprocessors: int = NUM_SMS,
    has_tma: bool = True,
    limit: int = 24,
) -> list[ConvConfig]:
    """Tiles worth timing: the heuristic ones, then what fits the GPU, nearest to them first.

    Args:
        op: the product.
        shape: of the convolution.
        dtype: of its operands.
        tf32: whether fp32 is rounded to TF32.
        shared_bytes: shared memory that one program may have.
        multiprocessors: size of a persistent grid.
        has_tma: whether the GPU has TMA, as Hopper and later do.
        limit: how many at most.

    Returns: configurations on the route `triton`, without repetition.
    """
    start = heuristic_config(op, shape, dtype, tf32=tf32)
    splits = [1]
    if op == "wgrad":
        splits = sorted({max(1, start.split_k // 2), start.split_k, 2 * start.split_k})
    grid = itertools.product(
        (64, 128, 256), _powers(16, 256), _powers(16, 128), (4, 8), (2, 3, 4), splits
    )
    fitting = [
        config
        for config in (ConvConfig(*numbers) for numbers in grid)
        if config != start and _fits(config, op, shape, dtype.itemsize, shared_bytes)
    ]
    distances = {config: _distance(config, start) for config in fitting}
    by_tma = tma_config(op, shape, dtype, tf32=tf32) if has_tma else None
    if by_tma is not None:
        distances |= _with_tma(op, shape, by_tma, fitting, multiprocessors)
    return [start, *sorted(distances, key=distances.__getitem__)[: limit - 1]]


def _product(case: ConvCase, op: ConvOp, config: ConvConfig, tf32: bool) -> Callable[[], object]:
    """One product of a case on the route `triton`, with its prologue and epilogue."""
    geometry: dict[str, Any] = {"stride": case.layer.stride, "padding": case.layer.padding}
    geometry |= {"allow_tf32": tf32, "config": config}
    w, producer = case.layer.w, case.producer
    if op == "dgrad":
        size = (case.x.shape[2], case.x.shape[3])
        return lambda: conv_dgrad(
            case.dy,
            w,
            size,
            shortcut=case.shortcut,
            producer=producer,
            producer_weight=case.producer_weight,
            **geometry,
        )
    scale_shift = None if producer is None else producer.scale_shift
    return lambda: conv_wgrad(
        case.x, case.dy, (w.shape[2], w.shape[3]), scale_shift=scale_shift, **geometry
    )


def merge_table(
    path: Path, gpu: str, entries: Mapping[str, ConvConfig], provenance: Mapping[str, Any]
) -> None:
    """Put entries of one GPU into the table at `path`; all others stay. Atomic: all or nothing.

    Raises: ValueError: when a table is there and malformed.
    """
    table: dict[str, Any] = {"schema": TABLE_SCHEMA, "gpus": {}}
    if path.exists():
        load_table.__wrapped__(path)
        table = json.loads(path.read_text())
    mine = table["gpus"].setdefault(gpu, {})
    mine.update({key: asdict(config) for key, config in entries.items()})
    table["gpus"][gpu] = dict(sorted(mine.items()))
    table.setdefault("provenance", {})[gpu] = dict(provenance)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(dumps(table, indent=1) + "\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    load_table.cache_clear()


@dataclass
class Tuner:
    """Tunes layer by layer on one device.

    Attributes:
        device: where the kernels run.
        timer: how trials are timed.
        deadline: on `clock`, when to stop; None never does.
        shared_bytes: shared memory that one program may have.
        multiprocessors: of the device.
        has_tma: whether the device has TMA, as Hopper and later do.
        limit: candidates a product.
        say: receives one line for each candidate that is left out, and why.
        clock: seconds.
    """

    device: torch.device
    timer: Timer
    deadline: float | None = None
    shared_bytes: int = 227 * 1024
    multiprocessors: int = NUM_SMS
    has_tma: bool = True
    limit: int = 24
    say: Callable[[str], None] = print
    clock: Callable[[], float] = time.monotonic
    _cases: dict[ConvVariant, ConvCase] = field(default_factory=dict, init=False)

    def run(self, workloads: Sequence[ConvWorkload]) -> Iterator[list[Choice]]:
        """Yield the choices of each layer as soon as they are made; stop at the deadline.

        First the routes of all layers with heuristic tiles, which compiles little, then the tiles.
        """
        for limit in sorted({1, self.limit}):
            for workload in workloads:
                if self._is_late():
                    return
                choices = self.tune_layer(workload, limit)
                if choices:
                    yield choices

    def _is_late(self) -> bool:
        return self.deadline is not None and self.clock() >= self.deadline

    def tune_layer(self, workload: ConvWorkload, limit: int) -> list[Choice]:
        """Choose among `limit` tiles and the routes; of a pass that the deadline cuts off, none."""
        dtype = workload.precision.dtype
        self._cases = {
            variant: make_case(workload.shape, variant, dtype, self.device)
            for variant in workload.variants
        }
        with precision_set(workload.precision):
            return self._tune_forward(workload, limit) + self._tune_backward(workload, limit)

    def _key(self, op: ConvOp, workload: ConvWorkload) -> str:
        precision = workload.precision
        return table_key(op, workload.shape, precision.dtype, tf32=precision.tf32)

    def _right_candidates(self, op: ConvOp, workload: ConvWorkload, limit: int) -> list[ConvConfig]:
        """The candidates that compute the right thing, the heuristic one first if it does."""
        precision = workload.precision
        right: list[ConvConfig] = []
        for config in candidates(
            op,
            workload.shape,
            precision.dtype,
            tf32=precision.tf32,
            shared_bytes=self.shared_bytes,
            multiprocessors=self.multiprocessors,
            has_tma=self.has_tma,
            limit=limit,
        ):
            if right and self._is_late():
                break
            key = self._key(op, workload)
            try:
                with assume_entries({key: config}):
                    wrong = check_parity(workload, op, gpu_backend, self.device)
            except Exception as error:  # Whatever a compiler or a driver raises.
                wrong = f"{type(error).__name__}: {error}".splitlines()[0]
            if wrong is None:
                right.append(config)
            else:
                self.say(f"left out: {key} {config}: {wrong}")
        return right

    def _totals(
        self,
        what: str,
        variants: Mapping[ConvVariant, int],
        options: Mapping[T, Callable[[ConvCase], Callable[[], object]]],
    ) -> dict[T, float]:
        """Seconds of a step that each option takes in all these variants of the layer together."""
        places = [(option, variant) for variant in variants for option in options]
        trials = [
            Trial(f"{what} {option} {variant}", options[option](self._cases[variant]))
            for option, variant in places
        ]
        totals = dict.fromkeys(options, 0.0)
        for (option, variant), seconds in zip(places, self.timer(trials), strict=True):
            totals[option] += variants[variant] * seconds
        return totals

    def _pass(
        self, run_pass: Callable[[ConvCase, Any], object], entries: Mapping[str, ConvConfig]
    ) -> Callable[[ConvCase], Callable[[], object]]:
        """A pass of a layer with these entries in the table."""

        def of_case(case: ConvCase) -> Callable[[], object]:
            def run() -> object:
                with assume_entries(entries):
                    return run_pass(case, gpu_backend)

            return run

        return of_case

    def _tune_forward(self, workload: ConvWorkload, limit: int) -> list[Choice]:
        key = self._key("fprop", workload)
        right = self._right_candidates("fprop", workload, limit)
        if not right or self._is_late():
            return []
        options = {
            config: self._pass(ConvCase.forward, {key: config})
            for config in (*right, replace(right[0], route="cudnn"))
        }
        totals = self._totals("fprop", workload.variants, options)
        best = min(totals, key=totals.__getitem__)
        return [Choice(key, best, totals[best], totals[right[0]])]

    def _best_tiles(
        self, op: ConvOp, workload: ConvWorkload, limit: int
    ) -> tuple[ConvConfig, ConvConfig] | None:
        """The fastest right tiles and the heuristic ones, on the route `triton`; None: too late."""
        right = self._right_candidates(op, workload, limit)
        if not right or self._is_late():
            return None
        tf32 = workload.precision.tf32
        options = {
            config: functools.partial(_product, op=op, config=config, tf32=tf32) for config in right
        }
        variants = {
            variant: count
            for variant, count in workload.variants.items()
            if variant.need_dx or op == "wgrad"
        }
        totals = self._totals(op, variants, options)
        return min(totals, key=totals.__getitem__), right[0]

    def _tune_backward(self, workload: ConvWorkload, limit: int) -> list[Choice]:
        """Tiles of each gradient, then the pair of routes.

        A layer whose input needs no gradient has a filter gradient alone.
        """
        ops: list[ConvOp] = ["wgrad"]
        if any(variant.need_dx for variant in workload.variants):
            ops.insert(0, "dgrad")
        tiles = []
        for op in ops:
            found = self._best_tiles(op, workload, limit)
            if found is None:
                return []
            tiles.append(found)
        keys = [self._key(op, workload) for op in ops]
        start = tuple(heuristic for _, heuristic in tiles)
        routes: list[Route] = ["triton", "cudnn"]
        pairs = {
            tuple(replace(best, route=route) for (best, _), route in zip(tiles, pair, strict=True))
            for pair in itertools.product(routes, repeat=len(ops))
        } | {start}
        options = {
            pair: self._pass(ConvCase.backward, dict(zip(keys, pair, strict=True)))
            for pair in sorted(pairs, key=str)
        }
        totals = self._totals("gradients", workload.variants, options)
        best = min(totals, key=totals.__getitem__)
        return [
            Choice(key, config, totals[best], totals[start])
            for key, config in zip(keys, best, strict=True)
        ]
