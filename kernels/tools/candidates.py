"""Which configurations the tuner tries: the forms of a product, and the neighbourhood of each.

A form is a kernel with knobs of its own. `STARTS` asks it for the configuration that its author
would begin with; `neighbourhood` turns the knobs from there, as far as registers and shared memory
allow, and orders the outcome by how much was turned.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from fastres.kernels.conv_shape import ConvOp, ConvShape
from fastres.kernels.gpu.launch_config import ConvConfig, Form
from fastres.kernels.gpu.launch_rules import (
    NUM_SMS,
    fused_config,
    heuristic_config,
    im2col_config,
    pixel_config,
    strip_config,
    tma_config,
)
from fastres.kernels.gpu.launch_table import table_key
from fastres.kernels.gpu.patches import PATCH_W, patch_grid
from fastres.kernels.tools.networks import Precision

__all__ = [
    "STARTS",
    "GpuLimits",
    "Product",
    "distance",
    "heuristic_start",
    "im2col_start",
    "neighbourhood",
    "start_configs",
]

# Accumulators and a computed operand that a thread can hold beside its addresses, in fp32 numbers.
MAX_NUMBERS_A_THREAD = 160


class GpuLimits(NamedTuple):
    """What of a GPU bounds its candidates.

    shared_bytes: shared memory that one program may have. multiprocessors: persistent schedules
    start one, two or four programs on each. has_tma, has_pdl: as Hopper and later do.
    """

    shared_bytes: int = 227 * 1024
    multiprocessors: int = NUM_SMS
    has_tma: bool = True
    has_pdl: bool = True


class Product(NamedTuple):
    """One of the three products of a convolution."""

    op: ConvOp
    shape: ConvShape
    precision: Precision

    @property
    def key(self) -> str:
        """Its name in the launch table."""
        return table_key(self.op, self.shape, self.precision.dtype, tf32=self.precision.tf32)


def heuristic_start(product: Product) -> ConvConfig:
    """What a GPU that nobody has measured uses, its route included."""
    precision = product.precision
    return heuristic_config(product.op, product.shape, precision.dtype, tf32=precision.tf32)


def im2col_start(product: Product) -> ConvConfig:
    """The heuristic tiles of the form that computes everything."""
    precision = product.precision
    return im2col_config(product.op, product.shape, precision.dtype, tf32=precision.tf32)


def _tma_start(product: Product) -> ConvConfig | None:
    precision = product.precision
    return tma_config(product.op, product.shape, precision.dtype, tf32=precision.tf32)


# What each form begins with, None for products that it cannot compute. A new form is added here.
def _fused_start(product: Product) -> ConvConfig | None:
    if product.op != "dgrad":
        return None
    return fused_config(product.shape, product.precision.dtype, has_producer=True)


STARTS: dict[Form, Callable[[Product], ConvConfig | None]] = {
    "im2col": im2col_start,
    "tma": _tma_start,
    "strip": lambda product: strip_config(product.op, product.shape, product.precision.dtype),
    "pixel": lambda product: pixel_config(product.op, product.shape, product.precision.dtype),
    "fused": _fused_start,
}


def start_configs(product: Product, gpu: GpuLimits) -> list[ConvConfig]:
    """The start of every form that the product has, on the route `triton`.

    GPUs before Hopper have no TMA, and in the other forms their products spill.
    """
    found = (start(product) for form, start in STARTS.items() if form == "im2col" or gpu.has_tma)
    on_triton = (replace(config, route="triton") for config in found if config is not None)
    return list(dict.fromkeys(on_triton))


def distance(config: ConvConfig, centre: ConvConfig) -> float:
    """How much was turned: doublings of tile and warps, and one for every other knob that differs.

    Such as stages and parts of a wgrad: twice as many or eight times, the tile and its code stay.
    """
    doubled = ("block_m", "block_n", "block_k", "num_warps")
    other = ("num_stages", "split_k", "grid_size", "patch_h", "ahead")
    doublings = sum(abs(math.log2(getattr(config, n) / getattr(centre, n))) for n in doubled)
    return doublings + sum(getattr(config, n) != getattr(centre, n) for n in other)


def neighbourhood(product: Product, start: ConvConfig, gpu: GpuLimits) -> list[ConvConfig]:
    """Everything else of the start's form that fits the GPU, nearest first, no repetition."""
    of_form = {"im2col": _im2col_configs, "tma": _tma_configs}.get(start.form, _patch_configs)
    found = dict.fromkeys(of_form(product, start, gpu))
    found.pop(start, None)
    return sorted(found, key=lambda config: distance(config, start))


def _powers(low: int, high: int) -> list[int]:
    return [2**i for i in range(low.bit_length() - 1, high.bit_length()) if low <= 2**i <= high]


def _splits(op: ConvOp, start: ConvConfig) -> Sequence[int]:
    """Parts of a wgrad, up to eight times the start's.

    That fills each multiprocessor once, and five to eight programs fit.
    """
    if op != "wgrad":
        return [start.split_k]
    return sorted({max(1, start.split_k // 2), *(start.split_k * times for times in (1, 2, 4, 8))})


def _grid_sizes(num_tiles: int, gpu: GpuLimits) -> list[int]:
    """One program a tile, or persistent ones, fewer than tiles: one, two or four on each SM."""
    sizes = (gpu.multiprocessors * times for times in (1, 2, 4))
    return [0, *(size for size in sizes if size < num_tiles)]


def _im2col_configs(product: Product, start: ConvConfig, gpu: GpuLimits) -> Iterator[ConvConfig]:
    splits = _splits(product.op, start)
    grid = itertools.product(
        (64, 128, 256), _powers(16, 256), _powers(16, 128), (4, 8), (1, 2, 3, 4), splits
    )
    return (c for c in (ConvConfig(*numbers) for numbers in grid) if _fits(c, product, gpu))


def _fits(config: ConvConfig, product: Product, gpu: GpuLimits) -> bool:
    """Whether tiles fit shared memory and registers, and give every thread 16 bytes to load."""
    op, itemsize = product.op, product.precision.dtype.itemsize
    m, n, k = config.block_m, config.block_n, config.block_k
    threads = 32 * config.num_warps
    # The gradients compute an operand from two: both are staged.
    staged = {"fprop": m * k + k * n, "dgrad": 2 * m * k + k * n, "wgrad": k * m + 2 * k * n}[op]
    computed = {"fprop": m * k, "dgrad": m * k, "wgrad": k * (m + n)}[op]
    gemm = product.shape.gemm(op)
    rows, columns = (gemm.n, gemm.m) if op == "wgrad" else (gemm.m, gemm.n)
    return (
        staged * itemsize * config.num_stages <= gpu.shared_bytes
        and (m * n + computed) / threads <= MAX_NUMBERS_A_THREAD
        and min(m * k, k * n if op == "wgrad" else m * n) * itemsize >= 16 * threads
        and m < 2 * max(rows, 64)
        and n < 2 * max(columns, 16)
        and k < 2 * max(gemm.k, 16)
        and config.split_k <= -(-gemm.k // config.block_k)
    )


def _tma_configs(product: Product, start: ConvConfig, gpu: GpuLimits) -> Iterator[ConvConfig]:
    """The tiles of pointer loads that TMA can take, with one program a tile and persistent."""
    gemm = product.shape.gemm(product.op)
    for tile in (start, *_im2col_configs(product, start, gpu)):
        config = replace(tile, form="tma")
        if config.block_k > start.block_k or config.tma_tile(product.op, product.shape) is None:
            continue
        num_tiles = -(-gemm.m // config.block_m) * -(-gemm.n // config.block_n)
        for size in _grid_sizes(num_tiles, gpu):
            yield replace(config, grid_size=size)


def _patch_configs(product: Product, start: ConvConfig, gpu: GpuLimits) -> Iterator[ConvConfig]:
    """The knobs of the strip, the pixel and the fused form; channels are not cut into tiles.

    Programs of a wgrad are its parts. Every program of the fused form leaves one of dw, so one a
    tile would be too many.
    """
    splits = _splits(product.op, start)
    knobs = itertools.product((32, 64, 128), (2, 4), (4, 8), (1, 2, 3), splits)
    for block_m, patch_h, num_warps, num_stages, split_k in knobs:
        num_tiles = patch_grid(product.shape, patch_h, block_m).num_tiles
        if split_k > num_tiles:
            continue
        grid_sizes = [0] if product.op == "wgrad" else _grid_sizes(num_tiles, gpu)
        if start.form == "fused":
            grid_sizes = grid_sizes[1:] or [start.grid_size]
        for grid_size, ahead in itertools.product(grid_sizes, _loads_ahead(start.form, patch_h)):
            config = replace(
                start,
                block_m=block_m,
                patch_h=patch_h,
                num_warps=num_warps,
                num_stages=num_stages,
                split_k=split_k,
                grid_size=grid_size,
                ahead=ahead,
            )
            if _patches_fit(config, product):
                yield config


def _window_columns(form: Form) -> int:
    """Loads of a window row: the pixel form takes single pixels, the others the row as a whole."""
    return PATCH_W + 2 if form == "pixel" else 1


def _loads_ahead(form: Form, patch_h: int) -> tuple[int, int, int]:
    """None, half or all of a window's loads before the first product."""
    loads = (patch_h + 2) * _window_columns(form)
    return 0, loads // 2, loads


def _patches_fit(config: ConvConfig, product: Product) -> bool:
    """Whether sums and the loads ahead of them fit the registers."""
    shape, op = product.shape, product.op
    operands, results = {
        "fprop": (shape.C, shape.K),
        "dgrad": (2 * shape.K, shape.C),
        "wgrad": (shape.C + 2 * shape.K, 0),
    }[op]
    sums = config.block_m * config.patch_h * PATCH_W * results
    pixels = config.ahead * (PATCH_W + 2) // _window_columns(config.form)
    ahead = config.block_m * pixels * operands * product.precision.dtype.itemsize / 4
    return (sums + ahead) / (32 * config.num_warps) <= MAX_NUMBERS_A_THREAD
