"""Launch rules: form, tiles and route for GPUs and layers that nobody has measured.

Reasons stand beside the numbers; what they weigh is counted in machine code or follows from sizes,
and nothing here was timed. `heuristic_config` chooses among the forms, each of which has a rule of
its own for its tiles; `fits_strips`, `fits_fused` and `fits_pixels` say what a form can compute.
"""

import functools
from dataclasses import replace

import torch

from fastres.kernels.conv_shape import ConvOp, ConvShape
from fastres.kernels.gpu.launch_config import ConvConfig, RowConfig

__all__ = [
    "fits_fused",
    "fits_pixels",
    "fits_strips",
    "fused_config",
    "heuristic_config",
    "im2col_config",
    "pixel_config",
    "row_config",
    "strip_config",
    "tma_config",
]

# Multiprocessors of an H100 or H200: a grid of as many programs fills the GPU once.
NUM_SMS = 132

# Channels from which a convolution is bound by its products.
WIDE = 128

# Compute capability of the GPUs that devices which are none are taken for.
HOPPER = (9, 0)


def _has_warpgroup_products(capability: tuple[int, int]) -> bool:
    """Whether four warps multiply together: Hopper, and Blackwell but for its small GPUs (12.x).

    Those run the code of Ampere, in which the forms in patches spill.
    """
    return 9 <= capability[0] < 12


# An eager step asks for every product in every call.
@functools.lru_cache(maxsize=4096)
def heuristic_config(
    op: ConvOp,
    shape: ConvShape,
    dtype: torch.dtype,
    *,
    tf32: bool = False,
    capability: tuple[int, int] = HOPPER,
) -> ConvConfig:
    """Form, tiles and route by rule, for GPUs and layers nobody has measured.

    Narrow layers wait for the instructions of their own kernels, so the form that issues fewest
    computes them where warpgroups multiply; elsewhere it would spill.
    """
    if max(shape.C, shape.K) >= WIDE and shape.R * shape.S > 1:
        return _wide_config(op, shape, dtype, tf32, capability)
    im2col = im2col_config(op, shape, dtype, tf32=tf32)
    if not _has_warpgroup_products(capability) or dtype == torch.float32:
        return im2col
    if op == "dgrad" and (fused := fused_config(shape, dtype)) is not None:
        return fused
    by_form = strip_config(op, shape, dtype) or pixel_config(op, shape, dtype)
    if by_form is None and shape.stride > 1:
        # Four taps of a strided window are soon read: stages cost more instructions than they hide.
        config = replace(im2col, num_stages=1)
        # Eight warps share a small tile at the price of more instructions and, on sm_100, spills.
        is_small = op == "fprop" and config.block_m < 128
        return replace(config, num_warps=4) if is_small else config
    return by_form or im2col


def _wide_config(
    op: ConvOp, shape: ConvShape, dtype: torch.dtype, tf32: bool, capability: tuple[int, int]
) -> ConvConfig:
    """Wide layers are bound by products: cuDNN, or plain products with the epilogues.

    Their operands are stored first, by a pass that costs less than forming them for every tap and
    block of filters. Statistics, sums and a folded batch norm are worth a pass, a filter gradient
    has none of them.
    """
    im2col = im2col_config(op, shape, dtype, tf32=tf32)
    if op != "wgrad" and _has_warpgroup_products(capability) and dtype != torch.float32:
        by_tma = tma_config(op, shape, dtype)
        if by_tma is not None or op == "fprop":
            return replace(by_tma or im2col, stored=True)
    return replace(im2col, route="cudnn")


def im2col_config(
    op: ConvOp, shape: ConvShape, dtype: torch.dtype, *, tf32: bool = False
) -> ConvConfig:
    """The heuristic tiles of the form that computes everything."""
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
    # Sums and the operand that a prologue computes live in registers: 8 warps share large tiles.
    is_large = block_m == 128 and block_n >= 64
    num_warps = 8 if is_large or deep else 4
    # So few channels are an image, which has no prologue: four warps hold the sums and issue less.
    if op == "fprop" and shape.C <= 4:
        num_warps = 4
    # A dgrad that computes dy stages two tiles of pixels; small GPUs have 99 KiB of shared memory.
    if op == "dgrad" and is_large:
        num_stages = 2
    return ConvConfig(block_m, block_n, block_k, num_warps, num_stages)


def tma_config(
    op: ConvOp, shape: ConvShape, dtype: torch.dtype, *, tf32: bool = False
) -> ConvConfig | None:
    """The heuristic tiles with TMA loads, for GPUs of the Hopper generation and later.

    None where the shape has no TMA tile or its pixels and filters are no multiples of 16 bytes.
    Nobody has timed TMA loads on a GPU; the rules choose them for wide layers by what they issue.
    """
    config = im2col_config(op, shape, dtype, tf32=tf32)
    # A TMA tile holds channels of one tap; a pointer load takes several taps of few channels.
    channels = shape.C if op == "fprop" else shape.K
    config = replace(config, form="tma", block_k=_tile(channels, config.block_k))
    if op == "dgrad" and config.block_n == 128:
        # The epilogue's operands beside the sums of a larger tile do not fit the registers.
        config = replace(config, block_m=64, num_warps=4, num_stages=2)
    elif op == "dgrad" and config.block_m * config.block_n == 64 * 64:
        # Eight warps, and the barriers of a third stage, leave sm_100 too few registers a thread.
        config = replace(config, num_warps=4, num_stages=2)
    elif config.block_m * config.block_n >= 128 * 128:
        # The barriers of a third stage would keep a second program off the multiprocessor.
        config = replace(config, num_stages=2)
    elif config.block_m * config.block_n == 128 * 64:
        # Where several programs share a multiprocessor, eight warps have a few registers too few.
        config = replace(config, num_warps=4)
    is_aligned = all(c * dtype.itemsize % 16 == 0 for c in (channels, shape.C))
    return config if is_aligned and config.tma_tile(op, shape) else None


def fits_strips(op: ConvOp, shape: ConvShape, dtype: torch.dtype) -> bool:
    """Whether the strip form computes a product: 3x3 of few channels, stride and padding 1."""
    window = (shape.R, shape.S, shape.stride, shape.padding)
    narrow = shape.C in (16, 32) or (shape.C <= 4 and op != "dgrad")
    return window == (3, 3, 1, 1) and narrow and shape.K in (16, 32) and dtype != torch.float32


def fits_fused(shape: ConvShape, dtype: torch.dtype) -> bool:
    """Whether both gradients have a kernel together: strips of 16 channels."""
    return fits_strips("dgrad", shape, dtype) and (shape.C, shape.K) == (16, 16)


def strip_config(op: ConvOp, shape: ConvShape, dtype: torch.dtype) -> ConvConfig | None:
    """The heuristic configuration of the strip form; None where it does not fit or serve.

    Nobody has timed strips on a GPU; registers decide: patches of 4 rows form an operand least
    often. fprop and dgrad of 32 channels spill, or leave one program room where others have two.
    """
    is_wide = max(shape.C, shape.K) == 32
    if not fits_strips(op, shape, dtype) or (is_wide and op != "wgrad"):
        return None
    config = ConvConfig(64, 16, 16, num_warps=4, num_stages=1, form="strip", patch_h=4)
    if op != "wgrad":
        # Few programs leave few partials, and as many tiles each where the batch is a power of two.
        return replace(config, grid_size=512, ahead=3 if op == "fprop" else 0)
    # Two programs a multiprocessor; the sums of 32 channels leave room for one of eight warps.
    if is_wide and shape.C >= 16:
        return replace(config, patch_h=2, num_warps=8, ahead=4, split_k=NUM_SMS)
    patch_h = 64 // shape.K
    return replace(config, patch_h=patch_h, ahead=patch_h + 2, split_k=2 * NUM_SMS)


def fused_config(shape: ConvShape, dtype: torch.dtype) -> ConvConfig | None:
    """The heuristic configuration of both gradients in one launch; None where it does not fit.

    Patches of 2 rows, because the operands of a producer's mask take the registers of two more. In
    fp16, which has no packed prologue, eight warps have the registers that four lack.
    """
    if not fits_fused(shape, dtype):
        return None
    config = ConvConfig(64, 16, 16, 4, 1, form="fused", grid_size=2 * NUM_SMS)
    return config if dtype == torch.bfloat16 else replace(config, num_warps=8, grid_size=NUM_SMS)


def fits_pixels(op: ConvOp, shape: ConvShape, dtype: torch.dtype) -> bool:
    """Whether the pixel form computes a product: 3x3 with stride and padding 1, few channels.

    Of strided convolutions it has the input gradient: 3x3, or 1x1 without padding, at stride 2.
    """
    windows = {(3, 3, 1, 1)} | ({(3, 3, 2, 1), (1, 1, 2, 0)} if op == "dgrad" else set())
    is_met = (shape.R, shape.S, shape.stride, shape.padding) in windows
    is_narrow = shape.C in (16, 32, 64) and shape.K in (16, 32, 64)
    return is_met and is_narrow and dtype != torch.float32


def pixel_config(op: ConvOp, shape: ConvShape, dtype: torch.dtype) -> ConvConfig | None:
    """The heuristic configuration of the pixel form; None where it does not fit.

    Four warps, for eight form operands twice; nothing loaded ahead, for at 64 channels the
    four sums leave no registers. The tuner tries the rest.
    """
    if not fits_pixels(op, shape, dtype):
        return None
    config = ConvConfig(64, 16, 16, 4, 1, form="pixel")
    if op == "wgrad":
        # A product of a warpgroup has 64 rows: channels of x, or all filters where those are fewer.
        # Twice the filters are twice the dy of a tile: half the patches fit.
        block_n = shape.K if shape.C < 64 else min(shape.K, 32)
        # A program with one filter row writes a third of the sums, and in images no wider than a
        # patch forms each x once; with all rows it forms each dy once. Nine sums of 32x32, too few
        # channels for products of a warpgroup, do not fit the registers.
        if shape.W <= 8 or shape.C == shape.K == 32:
            blocks = 3 * shape.K // block_n
            block_m = 32 if block_n == 64 else 64
            config = replace(config, block_m=block_m, patch_h=1, patch_w=8, ahead=2)
        else:
            blocks = shape.K // block_n
            block_m = 16 if (shape.C, block_n) == (32, 64) else 32
            config = replace(config, block_m=block_m, ahead=1)
        config = replace(config, block_n=block_n, split_k=NUM_SMS // blocks)
    elif shape.C == 64 and (shape.H % 2 or shape.W % 2) and _lacks_registers(op, shape, dtype):
        config = replace(config, num_warps=8)
    elif shape.stride == 2 and shape.C == 16:
        # Four sums of 16 channels are small: twice the patches share the filters.
        config = replace(config, block_m=128)
    return config


def _lacks_registers(op: ConvOp, shape: ConvShape, dtype: torch.dtype) -> bool:
    """Whether masks of patches that hang over an image do not fit beside four sums of 64 channels.

    In dgrads they fit in bf16, whose mask of a ReLU is packed.
    """
    return shape.K == 64 if op == "fprop" else dtype == torch.float16


def _wgrad_config(shape: ConvShape, on_tensor_cores: bool) -> ConvConfig:
    """Tiles of RSC x K; the pixels are split until the GPU is full and no split is under 256.

    Every partial is written and read again in fp32, so one program a multiprocessor is enough.
    """
    gemm = shape.gemm("wgrad")
    if on_tensor_cores:
        # Both operands are computed in registers, so blocks are shallow; but 16 channels of dy give
        # each thread 16 bytes to load only in a block twice as deep.
        block_m, block_n = 64, _tile(gemm.m, 128)
        block_k = 64 if block_n == 16 else 32
        num_warps = 8 if block_n >= 64 else 4
        # On sm_80 the addresses of a third stage of these tiles do not fit the registers, and with
        # two of the narrowest the compiler spills to fit one more program.
        num_stages = 2 if block_n in (32, 128) else 3
    else:
        block_m, block_n, block_k = 32, _tile(gemm.m, 32), 32
        num_warps, num_stages = 4 if block_n == 16 else 8, 2
    tiles = _ceil_div(gemm.n, block_m) * _ceil_div(gemm.m, block_n)
    split_k = min(_ceil_div(NUM_SMS, tiles), _ceil_div(gemm.k, 256))
    return ConvConfig(block_m, block_n, block_k, num_warps, num_stages, split_k)


def row_config(num_rows: int, channels: int, dtype: torch.dtype) -> RowConfig:
    """8 KiB of a tensor a program: four 16-byte loads a thread.

    Two in tiles of 16 channels of 16-bit numbers: with four, bn_apply with a shortcut spills on
    sm_90 in fp16.
    """
    block_c = _tile(channels, 128)
    block_rows = min(8192 // dtype.itemsize // block_c, max(16, _next_power_of_2(num_rows)))
    is_narrow = block_c == 16 and dtype.itemsize == 2
    return RowConfig(block_rows, block_c, num_warps=8 if is_narrow else 4)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _tile(extent: int, most: int) -> int:
    """The smallest power of two that holds `extent`, between 16 and `most`."""
    return min(most, max(16, _next_power_of_2(extent)))
