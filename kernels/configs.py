"""Launch configurations: looked up in a committed table, else given by rules. Never tuned live.

The table `launch_table.json` beside this file holds what was measured, by GPU name as torch
spells it, then by "op/dtype/batch/layer":

    {"schema": 1, "gpus": {"NVIDIA H200": {"fprop/bfloat16/n512/h32w32c16k16r3s3u1p1":
        {"route": "triton", "block_m": 128, "block_n": 16, "block_k": 32,
         "num_warps": 4, "num_stages": 4, "split_k": 1}}}}

A layer measured at other batch sizes only is served by the nearest of them. A GPU or layer that the
table does not know gets `heuristic_config`, whose reasons stand beside its numbers.
"""

import functools
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from fastres.kernels.shapes import ConvOp, ConvShape

__all__ = [
    "ConvConfig",
    "Route",
    "RowConfig",
    "assume_entries",
    "conv_config",
    "gpu_name",
    "heuristic_config",
    "load_table",
    "row_config",
    "table_key",
]

# FASTRES_LAUNCH_TABLE names another table than the committed one: what a machine tuned for itself.
TABLE_PATH = Path(
    os.environ.get("FASTRES_LAUNCH_TABLE") or Path(__file__).with_name("launch_table.json")
)
TABLE_SCHEMA = 1

# Multiprocessors of an H100 or H200: the programs that fill a GPU once.
NUM_SMS = 132

Route = Literal["triton", "cudnn"]

_assumed: ContextVar[Mapping[str, "ConvConfig"] | None] = ContextVar(
    "fastres_assumed_entries", default=None
)


@dataclass(frozen=True)
class ConvConfig:
    """Tiles and route of one convolution kernel; split_k counts the parts of a wgrad reduction."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    route: Route = "triton"

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k", "num_warps"):
            value = getattr(self, name)
            least = 1 if name == "num_warps" else 16
            if value < least or value & (value - 1):
                raise ValueError(f"{name} must be a power of two >= {least}, got {value}")
        for name in ("num_stages", "split_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.route not in get_args(Route):
            raise ValueError(f"route must be one of {get_args(Route)}, got {self.route!r}")

    def constexprs(self) -> dict[str, int]:
        """The tile as the kernels' compile-time arguments."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}


@dataclass(frozen=True)
class RowConfig:
    """Tile of an elementwise or reducing batch-norm kernel: rows (pixels) x channels."""

    block_rows: int
    block_c: int
    num_warps: int


def gpu_name(device: torch.device) -> str:
    """Name of the GPU as torch spells it; "unknown" for devices that are none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "unknown"


@functools.cache
def load_table(path: Path = TABLE_PATH) -> dict[str, dict[str, ConvConfig]]:
    """Read the launch table; an absent file is an empty table.

    Raises: ValueError: when the schema is not this version's, or an entry is malformed.
    """
    if not path.exists():
        return {}
    raw: dict[str, Any] = json.loads(path.read_text())
    if raw.get("schema") != TABLE_SCHEMA:
        raise ValueError(f"{path.name}: schema must be {TABLE_SCHEMA}, got {raw.get('schema')!r}")
    try:
        return {
            gpu: {key: ConvConfig(**entry) for key, entry in entries.items()}
            for gpu, entries in raw["gpus"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name}: malformed entry: {error}") from error


def table_key(op: ConvOp, shape: ConvShape, dtype: torch.dtype, *, tf32: bool = False) -> str:
    """The name under which the launch table keeps this product: op/dtype/batch/layer."""
    precision = f"{str(dtype).removeprefix('torch.')}{'-tf32' if tf32 else ''}"
    return f"{op}/{precision}/n{shape.N}/{shape.layer_key}"


@contextmanager
def assume_entries(entries: Mapping[str, ConvConfig]) -> Iterator[None]:
    """Let `conv_config` know these entries alone inside the `with` block, whatever the GPU.

    So launches can be recorded as another GPU would make them, and candidates be timed.
    """
    token = _assumed.set(entries)
    try:
        yield
    finally:
        _assumed.reset(token)


def conv_config(
    op: ConvOp, shape: ConvShape, dtype: torch.dtype, device: torch.device, *, tf32: bool = False
) -> ConvConfig:
    """The measured configuration of the nearest batch size on this GPU, else the heuristic one."""
    entries = _assumed.get()
    if entries is None:
        entries = load_table().get(gpu_name(device), {})
    prefix, _, suffix = table_key(op, shape, dtype, tf32=tf32).partition(f"/n{shape.N}/")
    prefix, suffix = f"{prefix}/n", f"/{suffix}"
    batches = {
        int(key[len(prefix) : -len(suffix)]): config
        for key, config in entries.items()
        if key.startswith(prefix) and key.endswith(suffix)
    }
    if not batches:
        return heuristic_config(op, shape, dtype, tf32=tf32)
    return batches[min(batches, key=lambda n: abs(math.log(n / shape.N)))]


def heuristic_config(
    op: ConvOp, shape: ConvShape, dtype: torch.dtype, *, tf32: bool = False
) -> ConvConfig:
    """Tiles by rule, for GPUs and layers nobody has measured."""
    gemm = shape.gemm(op)
    on_tensor_cores = dtype != torch.float32 or tf32
    if op == "wgrad":
        return _wgrad_config(shape, on_tensor_cores)
    if not on_tensor_cores:
        # Ordinary fp32 multiplications keep operands and sums in registers: small tiles.
        return ConvConfig(64, _tile(gemm.n, 32), 16, num_warps=8, num_stages=2)
    # The narrow networks are bound by loads, not by arithmetic: shallow blocks waste least of a
    # reduction such as 9 * 16, and more stages keep as many bytes in flight.
    deep = (shape.C if op == "fprop" else shape.K) >= 64
    block_k, num_stages = (64, 3) if deep else (32, 4)
    if dtype == torch.float32:
        block_k //= 2
    block_n = _tile(gemm.n, 128)
    block_m = 128
    if _ceil_div(gemm.m, block_m) * _ceil_div(gemm.n, block_n) < 2 * NUM_SMS:
        block_m = 64
    # Sums and the operand that a prologue forms live in registers: 8 warps share large tiles.
    is_large = block_m == 128 and block_n >= 64
    num_warps = 8 if is_large or deep else 4
    # A dgrad that forms dy stages two tiles of pixels; small GPUs have 99 KiB of shared memory.
    if op == "dgrad" and is_large:
        num_stages = 2
    return ConvConfig(block_m, block_n, block_k, num_warps, num_stages)


def _wgrad_config(shape: ConvShape, on_tensor_cores: bool) -> ConvConfig:
    """Tiles of RSC x K; the pixels are split until the GPU is full and no part is under 256.

    Every part is written and read again in fp32, so one program a multiprocessor is enough.
    """
    gemm = shape.gemm("wgrad")
    if on_tensor_cores:
        # Both operands are formed in registers, so blocks are shallow; but 16 channels of dy give
        # each thread 16 bytes to load only in a block twice as deep.
        block_m, block_n = 64, _tile(gemm.m, 128)
        block_k, num_stages = (64, 2) if block_n == 16 else (32, 3)
        num_warps = 8 if block_n >= 64 else 4
        # The addresses of a third stage of the widest tile do not fit the registers of sm_80.
        if block_n == 128:
            num_stages = 2
    else:
        block_m, block_n, block_k = 32, _tile(gemm.m, 32), 16
        num_warps, num_stages = 4, 2
    tiles = _ceil_div(gemm.n, block_m) * _ceil_div(gemm.m, block_n)
    split_k = min(_ceil_div(NUM_SMS, tiles), _ceil_div(gemm.k, 256))
    return ConvConfig(block_m, block_n, block_k, num_warps, num_stages, split_k)


def row_config(num_rows: int, channels: int) -> RowConfig:
    """About 4096 elements a program: 32 a thread, in four 16-byte loads of 16-bit numbers."""
    block_c = _tile(channels, 128)
    block_rows = min(4096 // block_c, max(16, _next_power_of_2(num_rows)))
    return RowConfig(block_rows, block_c, num_warps=4)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _tile(extent: int, most: int) -> int:
    """The smallest power of two that holds `extent`, between 16 and `most`."""
    return min(most, max(16, _next_power_of_2(extent)))
