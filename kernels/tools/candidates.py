"""Which configurations the tuner tries: the forms of a product, and the neighbourhood of each.

A form is a kernel with knobs of its own. `STARTS` asks it for the configuration that its author
would begin with; `neighbourhood` turns the knobs from there, as far as registers and shared memory
allow, and orders the outcome by how much was turned.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fastres.kernels.conv_shape import ConvOp, ConvShape
from fastres.kernels.gpu.launch_config import ConvConfig, Form
from fastres.kernels.gpu.launch_rules import (
    HOPPER,
    NUM_SMS,
    fused_config,
    heuristic_config,
    im2col_config,
    pixel_config,
    strip_config,
    tma_config,
)
from fastres.kernels.gpu.launch_table import Gpu, unmeasured_config
from fastres.kernels.gpu.patches import PATCH_W, patch_grid
from fastres.kernels.gpu.table_file import table_key
from fastres.kernels.tools.networks import Precision
from fastres.kernels.tools.tune_workloads import ConvWorkload

__all__ = [
    "STARTS",
    "GpuLimits",
    "Product",
    "distance",
    "gpu_limits",
    "heuristic_start",
    "im2col_start",
    "neighbourhood",
    "product_of",
    "start_configs",
    "unmeasured_start",
]

# Accumulators and a computed operand that a thread can hold beside its addresses, in fp32 numbers.
MAX_NUMBERS_A_THREAD = 160

# Patches of a pixel wgrad: of one row, whose programs own one filter row, and of two.
WGRAD_PATCHES = ((1, 2), (1, 4), (1, 8), (2, 2), (2, 4))


class GpuLimits(NamedTuple):
    """What of a GPU bounds its candidates.

    shared_bytes: shared memory that one program may have. multiprocessors: persistent schedules
    start one, two or four programs on each. has_tma, has_pdl: as Hopper and later do.
    """

    shared_bytes: int = 227 * 1024
    multiprocessors: int = NUM_SMS
    has_tma: bool = True
    has_pdl: bool = True


def gpu_limits(device: torch.device) -> GpuLimits:
    """Those of a GPU; of a Hopper where there is none."""
    if device.type != "cuda":
        return GpuLimits()
    # Not every release of torch names the attributes in its type stubs.
    properties: Any = torch.cuda.get_device_properties(device)
    return GpuLimits(
        shared_bytes=properties.shared_memory_per_block_optin,
        multiprocessors=properties.multi_processor_count,
        has_tma=properties.major >= 9,
        has_pdl=properties.major >= 9,
    )


class Product(NamedTuple):
    """One of the three products of a convolution.

    has_prologue: whether a prologue forms an operand of it in some variant of the layer, so that it
    could be stored first: that of dgrad and wgrad always does.
    """

    op: ConvOp
    shape: ConvShape
    precision: Precision
    has_prologue: bool = True

    @property
    def key(self) -> str:
        """Its name in the launch table."""
        return table_key(self.op, self.shape, self.precision.dtype, tf32=self.precision.tf32)


def product_of(op: ConvOp, workload: ConvWorkload) -> Product:
    """One product of a layer as training runs it."""
    has_prologue = op != "fprop" or any(variant.prologue for variant in workload.variants)
    return Product(op, workload.shape, workload.precision, has_prologue)


def heuristic_start(product: Product, capability: tuple[int, int] = HOPPER) -> ConvConfig:
    """What the rules choose, the route included."""
    op, shape, precision = product.op, product.shape, product.precision
    return heuristic_config(op, shape, precision.dtype, tf32=precision.tf32, capability=capability)


def unmeasured_start(product: Product, gpu: Gpu) -> ConvConfig:
    """What a GPU would use if it were not measured: another's entry, an ESTIMATE, the rules'."""
    op, shape, precision = product.op, product.shape, product.precision
    return unmeasured_config(op, shape, precision.dtype, gpu, tf32=precision.tf32)


def im2col_start(product: Product) -> ConvConfig:
    """The heuristic tiles of the form that computes everything."""
    precision = product.precision
    return im2col_config(product.op, product.shape, precision.dtype, tf32=precision.tf32)


def _tma_start(product: Product) -> ConvConfig | None:
    precision = product.precision
    return tma_config(product.op, product.shape, precision.dtype, tf32=precision.tf32)


def _fused_start(product: Product) -> ConvConfig | None:
    if product.op != "dgrad":
        return None
    return fused_config(product.shape, product.precision.dtype)


# What each form begins with, None for products that it cannot compute. A new form is added here.
STARTS: dict[Form, Callable[[Product], ConvConfig | None]] = {
    "im2col": im2col_start,
    "tma": _tma_start,
    "strip": lambda product: strip_config(product.op, product.shape, product.precision.dtype),
    "pixel": lambda product: pixel_config(product.op, product.shape, product.precision.dtype),
    "fused": _fused_start,
}


def start_configs(product: Product, gpu: GpuLimits) -> list[ConvConfig]:
    """The start of every form that the product has, on the route `triton`.

    Forms in tiles of pixels compete twice, an operand with a prologue formed or stored; those in
    patches are there to form it. GPUs before Hopper have no TMA, and in the other forms their
    products spill.
    """
    found = (start(product) for form, start in STARTS.items() if form == "im2col" or gpu.has_tma)
    starts = []
    for config in found:
        if config is not None:
            starts.append(replace(config, route="triton", stored=False))
            if product.has_prologue and config.form in ("im2col", "tma"):
                starts.append(replace(starts[-1], stored=True))
    return list(dict.fromkeys(starts))


def distance(config: ConvConfig, centre: ConvConfig) -> float:
    """How much was turned: doublings of tile, patch and warps, and one for each other knob.

    Such as stages and parts of a wgrad: twice as many or eight times, the tile and its code stay.
    """
    doubled = ("block_m", "block_n", "block_k", "patch_h", "patch_w", "num_warps")
    other = ("num_stages", "split_k", "grid_size", "ahead", "stored")
    doublings = sum(abs(math.log2(getattr(config, n) / getattr(centre, n))) for n in doubled)
    return doublings + sum(getattr(config, n) != getattr(centre, n) for n in other)


def neighbourhood(product: Product, start: ConvConfig, gpu: GpuLimits) -> list[ConvConfig]:
    """Everything else of the start's form that fits the GPU, nearest first.

    No two are the same launch: knobs that it does not read stay as they are. An operand that the
    start stores, all of them store.
    """
    found = dict.fromkeys(
        _in_bounds(config, product) for config in _FORMS[start.form](product, start, gpu)
    )
    found.pop(_in_bounds(start, product), None)
    return sorted(found, key=lambda config: distance(config, start))


def _in_bounds(config: ConvConfig, product: Product) -> ConvConfig:
    """The same launch, with no more parts and persistent programs than it has tiles."""
    num_tiles, multiple = math.inf, 1
    if config.form == "tma":
        gemm = product.shape.gemm(product.op)
        # Programs of a TMA launch are multiples, so that all tiles of one have the same filters.
        multiple = -(-gemm.n // config.block_n)
        num_tiles = -(-gemm.m // config.block_m) * multiple
    elif config.form != "im2col":
        patch_w = config.patch_w if config.form == "pixel" else PATCH_W
        num_tiles = patch_grid(product.shape, config.patch_h, config.block_m, patch_w).num_tiles
    size = config.grid_size and max(config.grid_size // multiple, 1) * multiple
    return replace(
        config,
        grid_size=size if size < num_tiles else 0,
        split_k=int(min(config.split_k, num_tiles)),
    )


def _powers(low: int, high: int) -> list[int]:
    return [2**i for i in range(low.bit_length() - 1, high.bit_length()) if low <= 2**i <= high]


def _splits(op: ConvOp, start: ConvConfig) -> Sequence[int]:
    """Parts of a wgrad, up to eight times the start's.

    That fills each multiprocessor once, and five to eight programs fit.
    """
    if op != "wgrad":
        return [start.split_k]
    return sorted({max(1, start.split_k // 2), *(start.split_k * times for times in (1, 2, 4, 8))})


def _grid_sizes(num_tiles: int, start: ConvConfig, gpu: GpuLimits) -> list[int]:
    """One program a tile, or persistent ones, fewer than tiles: one, two or four on each SM."""
    sizes = (gpu.multiprocessors * times for times in (1, 2, 4))
    return [0, *(size for size in sorted({start.grid_size, *sizes} - {0}) if size < num_tiles)]


def _im2col_configs(product: Product, start: ConvConfig, gpu: GpuLimits) -> Iterator[ConvConfig]:
    grid = itertools.product(
        sorted({start.block_m, 64, 128, 256}),
        _powers(16, 256),
        _powers(16, 128),
        (4, 8),
        (1, 2, 3, 4),
        _splits(product.op, start),
    )
    for block_m, block_n, block_k, num_warps, num_stages, split_k in grid:
        config = replace(
            start,
            block_m=block_m,
            block_n=block_n,
            block_k=block_k,
            num_warps=num_warps,
            num_stages=num_stages,
            split_k=split_k,
        )
        if _fits(config, product, gpu):
            yield config


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
    for config in (start, *_im2col_configs(product, start, gpu)):
        if config.block_k > start.block_k or config.tma_tile(product.op, product.shape) is None:
            continue
        num_tiles = -(-gemm.m // config.block_m) * -(-gemm.n // config.block_n)
        for size in _grid_sizes(num_tiles, start, gpu):
            yield replace(config, grid_size=size)


def _strip_configs(product: Product, start: ConvConfig, gpu: GpuLimits) -> Iterator[ConvConfig]:
    """The knobs of the strip and the fused form; channels are not cut into tiles.

    Programs of a wgrad are its parts. Every program of the fused form leaves one of dw, so one a
    tile would be too many.
    """
    knobs = itertools.product(
        sorted({start.block_m, 32, 64, 128}),
        sorted({start.patch_h, 2, 4}),
        (4, 8),
        (1, 2, 3),
        _splits(product.op, start),
    )
    for block_m, patch_h, num_warps, num_stages, split_k in knobs:
        num_tiles = patch_grid(product.shape, patch_h, block_m).num_tiles
        grid_sizes = [0] if product.op == "wgrad" else _grid_sizes(num_tiles, start, gpu)
        if start.form == "fused":
            grid_sizes = grid_sizes[1:] or [start.grid_size]
        rows = patch_h + 2
        for grid_size, ahead in itertools.product(grid_sizes, (0, rows // 2, rows)):
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
            if _strips_fit(config, product):
                yield config


def _strips_fit(config: ConvConfig, product: Product) -> bool:
    """Whether sums and the window rows loaded ahead of them fit the registers."""
    shape, op = product.shape, product.op
    operands, results = {
        "fprop": (shape.C, shape.K),
        "dgrad": (2 * shape.K, shape.C),
        "wgrad": (shape.C + 2 * shape.K, 0),
    }[op]
    sums = config.block_m * config.patch_h * PATCH_W * results
    ahead = config.block_m * config.ahead * (PATCH_W + 2) * operands
    return _registers_hold(sums, ahead, config, product)


def _registers_hold(sums: int, loaded: int, config: ConvConfig, product: Product) -> bool:
    """Whether the threads of a program have room for its sums and for what is loaded ahead."""
    numbers = sums + loaded * product.precision.dtype.itemsize / 4
    return numbers / (32 * config.num_warps) <= MAX_NUMBERS_A_THREAD


def _pixel_configs(product: Product, start: ConvConfig, gpu: GpuLimits) -> Iterator[ConvConfig]:
    """The knobs of the pixel form: those of wgrad, or of one program a tile of 2x2 patches.

    Programs of one tile have no loop, so nothing that stages would do.
    """
    configs = _pixel_wgrads(product, start) if product.op == "wgrad" else [start]
    for config, block_m, num_warps in itertools.product(
        configs, sorted({start.block_m, 32, 64, 128}), (4, 8)
    ):
        for ahead in _pixels_ahead(config, product):
            turned = replace(config, block_m=block_m, num_warps=num_warps, ahead=ahead)
            if _pixels_fit(turned, product):
                yield turned


def _pixel_wgrads(product: Product, start: ConvConfig) -> list[ConvConfig]:
    """The patches, blocks of filters, stages and parts of a pixel wgrad, the start's among them."""
    shape = product.shape
    patches = {
        (start.patch_h, start.patch_w),
        *((h, w) for h, w in WGRAD_PATCHES if h < 2 * shape.H and w < 2 * shape.W),
    }
    knobs = itertools.product(
        sorted(patches),
        sorted({start.block_n, *_powers(16, shape.K)}),
        (1, 2, 3),
        _splits("wgrad", start),
    )
    return [
        replace(
            start,
            patch_h=patch_h,
            patch_w=patch_w,
            block_n=block_n,
            num_stages=num_stages,
            split_k=split_k,
        )
        for (patch_h, patch_w), block_n, num_stages, split_k in knobs
    ]


def _num_places(config: ConvConfig, product: Product) -> int:
    """Pixels that a program of the pixel form loads of a window, one after the other."""
    shape = product.shape
    if product.op == "wgrad":
        filter_rows = 1 if config.patch_h == 1 else 3
        return (config.patch_h + filter_rows - 1) * (config.patch_w + 2)
    # A patch of a strided dgrad meets one place of dy for each tap of a filter row and column.
    return 16 if shape.stride == 1 else (shape.R - 1) ** 2 or 1


def _pixels_ahead(config: ConvConfig, product: Product) -> list[int]:
    """Loads ahead of the first product: none to all, all but the one that it takes itself."""
    most = _num_places(config, product) - 1
    return sorted({min(config.ahead, most), 0, *_powers(1, most), most})


def _pixels_fit(config: ConvConfig, product: Product) -> bool:
    """Whether sums and the window pixels loaded ahead of them fit the registers."""
    shape, block_m = product.shape, config.block_m
    if product.op == "wgrad":
        filter_rows = 1 if config.patch_h == 1 else 3
        # x is used after dy is formed.
        sums = 3 * filter_rows * shape.C * config.block_n
        operands = max(shape.C, 2 * config.block_n)
    else:
        is_fprop = product.op == "fprop"
        sums = 4 * block_m * (shape.K if is_fprop else shape.C)
        operands = shape.C if is_fprop else 2 * shape.K
    return _registers_hold(sums, block_m * config.ahead * operands, config, product)


# What turns the knobs of a form.
_FORMS: dict[Form, Callable[[Product, ConvConfig, GpuLimits], Iterator[ConvConfig]]] = {
    "im2col": _im2col_configs,
    "tma": _tma_configs,
    "strip": _strip_configs,
    "pixel": _pixel_configs,
    "fused": _strip_configs,
}
