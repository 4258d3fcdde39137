"""The head of a network: global average pool and linear classifier, forward and backward.

    pooled = mean over the pixels of x;  logits = pooled @ w.T + bias
    dx = (dlogits @ w) / (H * W) for every pixel;  dw = dlogits.T @ pooled;  dbias = sum of dlogits

Letters: x (N, H, W, C), w (classes, C), pooled (N, C), logits (N, classes).

Tensor passes: forward reads x once, backward writes dx once and reads no activation at
all, because pooled is what dw needs. One launch each way: a program of the forward pools some
images and classifies them; one of the backward makes either dx of some images or a tile of dw.

Numerics: pooled is kept in fp32, though eager rounds it to the dtype of x under autocast (`mean`
stands on no list of autocast and stays in bf16), and w is read as it is, though eager casts it. All
products and sums are in fp32, with one rounding at each result: never more than eager makes.
Ordinary multiplications, no tensor cores: ten to a thousand classes are no work worth them.
Deterministic: every sum is made by one program in fixed order. Source: own derivation.

Limits: a program holds whole pixels, so above 8192 channels registers spill.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastres.kernels.gpu.checks import check_activation, index_dtype, nhwc_strides
from fastres.kernels.gpu.launch import Traffic, launch, num_bytes
from fastres.kernels.gpu.launch_rules import NUM_SMS
from fastres.kernels.gpu.primitives import round_to, row_offsets, wait_for_previous_kernel
from fastres.kernels.layout import empty_channels_last

__all__ = ["HeadGrads", "pool_linear_bwd", "pool_linear_fwd"]

# Elements of the largest tile of a program: 32 a thread.
TILE = 4096
NUM_WARPS = 4

# Pixels that are added side by side before their sums are.
MAX_PIXELS = 16

# Channels of a tile of dw.
DW_BLOCK_C = 16


class HeadGrads(NamedTuple):
    """Gradients of the head: dx (N, C, H, W) channels_last, dw (classes, C), dbias (classes,)."""

    dx: torch.Tensor
    dw: torch.Tensor
    dbias: torch.Tensor


class _Tiles(NamedTuple):
    """Tile of a program that works on whole images: images, pixels, classes, all channels."""

    block_n: int
    block_p: int
    block_k: int
    block_c: int


def _image_tiles(num_images: int, num_pixels: int, num_classes: int, channels: int) -> _Tiles:
    """Images a program: few enough to fill the GPU, as many as that allows, to share w."""
    block_c = max(16, triton.next_power_of_2(channels))
    rest = max(1, TILE // block_c)
    per_program = max(1, num_images // NUM_SMS)
    block_n = min(16, rest, 1 << (per_program.bit_length() - 1))
    rest //= block_n
    block_p = min(MAX_PIXELS, rest, triton.next_power_of_2(num_pixels))
    block_k = min(rest, triton.next_power_of_2(num_classes))
    return _Tiles(block_n, block_p, block_k, block_c)


def _weight_tiles(num_images: int, num_classes: int) -> tuple[int, int]:
    """Images and classes of a tile of dw: about sixteen tiles of classes, 1 to 16 wide.

    Few classes make few tiles, and then many images at a time keep the sum over them short.
    """
    block_k = min(16, triton.next_power_of_2(triton.cdiv(num_classes, 16)))
    block_b = min(TILE // (block_k * DW_BLOCK_C), triton.next_power_of_2(num_images))
    return block_b, block_k


@triton.jit
def _pool_linear_fwd_kernel(
    x_ptr,  # (N, H, W, C) in
    w_ptr,  # (NUM_CLASSES, C) in
    bias_ptr,  # (NUM_CLASSES,) in; None: no bias
    pooled_ptr,  # (N, C) fp32 out
    logits_ptr,  # (N, NUM_CLASSES) out
    num_images,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    NUM_CLASSES: tl.constexpr,
    X_STRIDES: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    offs_n = tl.program_id(0).to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    mask_n = offs_n < num_images
    mask_c = offs_c < C

    sums = tl.zeros((BLOCK_N, BLOCK_P, BLOCK_C), dtype=tl.float32)
    for first in range(0, H * W, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        offs_nhw = offs_n[:, None] * (H * W) + offs_p[None, :]
        mask_nhw = mask_n[:, None] & (offs_p < H * W)[None, :]
        offs_x = row_offsets(offs_nhw, H, W, X_STRIDES)[:, :, None] + offs_c[None, None, :]
        mask = mask_nhw[:, :, None] & mask_c[None, None, :]
        sums += tl.load(x_ptr + offs_x, mask=mask, other=0.0).to(tl.float32)
    count = tl.full((BLOCK_N, BLOCK_C), H * W, dtype=tl.float32)
    pooled = tl.div_rn(tl.sum(sums, axis=1), count)  # [BLOCK_N, BLOCK_C]
    offs_pooled = offs_n[:, None] * C + offs_c[None, :]
    tl.store(pooled_ptr + offs_pooled, pooled, mask=mask_n[:, None] & mask_c[None, :])

    for first in range(0, NUM_CLASSES, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        mask_k = offs_k < NUM_CLASSES
        offs_w = offs_k[:, None] * C + offs_c[None, :]
        w = tl.load(w_ptr + offs_w, mask=mask_k[:, None] & mask_c[None, :], other=0.0)
        products = pooled[:, None, :] * w.to(tl.float32)[None, :, :]
        logits = tl.sum(products, axis=2)  # [BLOCK_N, BLOCK_K]
        if bias_ptr is not None:
            logits += tl.load(bias_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
        tl.store(
            logits_ptr + offs_n[:, None] * NUM_CLASSES + offs_k[None, :],
            round_to(logits, logits_ptr.dtype.element_ty),
            mask=mask_n[:, None] & mask_k[None, :],
        )


def pool_linear_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`logits = mean over pixels of x @ weight.T + bias`, reading x once.

    Args:
        x: (N, C, H, W) channels_last, gaps allowed; bf16, fp16, fp32.
        weight: (classes, C) contiguous; bf16, fp16, fp32.
        bias: (classes,) contiguous, dtype of weight; or None.

    Returns: logits: (N, classes), dtype of x. pooled: (N, C) fp32, for the backward.

    Raises: ValueError: when a tensor's shape, dtype, device or layout is not as above.

    Numerics: fp32; the logits are rounded once. Deterministic.
    """
    check_activation("x", x)
    n, c, h, w = x.shape
    num_classes = _check_linear(weight, bias, c)
    pooled = x.new_empty((n, c), dtype=torch.float32)
    logits = x.new_empty((n, num_classes))
    tiles = _image_tiles(n, h * w, num_classes, c)
    launch(
        _pool_linear_fwd_kernel,
        (triton.cdiv(n, tiles.block_n),),
        {
            "x_ptr": x,
            "w_ptr": weight,
            "bias_ptr": bias,
            "pooled_ptr": pooled,
            "logits_ptr": logits,
            "num_images": n,
            "H": h,
            "W": w,
            "C": c,
            "NUM_CLASSES": num_classes,
            "X_STRIDES": nhwc_strides(x),
            "INDEX": index_dtype(x, pooled, logits),
            "BLOCK_N": tiles.block_n,
            "BLOCK_P": tiles.block_p,
            "BLOCK_K": tiles.block_k,
            "BLOCK_C": tiles.block_c,
        },
        num_warps=NUM_WARPS,
        num_stages=1,
        traffic=Traffic(
            reads=num_bytes(x, weight, bias),
            writes=num_bytes(pooled, logits),
            flops=x.numel() + 2 * logits.numel() * c,
        ),
        # Of the pixels; classes are few, or the loop over them short beside it.
        trips=triton.cdiv(h * w, tiles.block_p),
    )
    return logits, pooled


def _check_linear(weight: torch.Tensor, bias: torch.Tensor | None, channels: int) -> int:
    """Check the parameters of a classifier and return its number of classes."""
    if weight.dim() != 2 or weight.shape[1] != channels or weight.shape[0] == 0:
        raise ValueError(f"weight must have shape (classes, {channels}), got {list(weight.shape)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"bias must have shape ({weight.shape[0]},) and dtype {weight.dtype}, "
            f"got {list(bias.shape)} and {bias.dtype}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"{name} must be bfloat16, float16 or float32, got {tensor.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    return weight.shape[0]


@triton.jit
def _store_dx(
    tile,
    dlogits_ptr,  # (N, NUM_CLASSES) in
    w_ptr,  # (NUM_CLASSES, C) in
    dx_ptr,  # (N, H * W, C) out
    num_images,
    NUM_PIXELS: tl.constexpr,
    C: tl.constexpr,
    NUM_CLASSES: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient of all pixels of some images."""
    offs_n = tile.to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    mask_n = offs_n < num_images
    mask_c = offs_c < C
    dpooled = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for first in range(0, NUM_CLASSES, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        mask_k = offs_k < NUM_CLASSES
        offs_dlogits = offs_n[:, None] * NUM_CLASSES + offs_k[None, :]
        mask_nk = mask_n[:, None] & mask_k[None, :]
        dlogits = tl.load(dlogits_ptr + offs_dlogits, mask=mask_nk, other=0.0).to(tl.float32)
        offs_w = offs_k[:, None] * C + offs_c[None, :]
        w = tl.load(w_ptr + offs_w, mask=mask_k[:, None] & mask_c[None, :], other=0.0)
        dpooled += tl.sum(dlogits[:, :, None] * w.to(tl.float32)[None, :, :], axis=1)

    count = tl.full((BLOCK_N, BLOCK_C), NUM_PIXELS, dtype=tl.float32)
    dx = round_to(tl.div_rn(dpooled, count), dx_ptr.dtype.element_ty)
    dx = tl.broadcast_to(dx[:, None, :], (BLOCK_N, BLOCK_P, BLOCK_C))
    for first in range(0, NUM_PIXELS, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        offs_nhw = offs_n[:, None] * NUM_PIXELS + offs_p[None, :]
        mask_nhw = mask_n[:, None] & (offs_p < NUM_PIXELS)[None, :]
        offs_dx = offs_nhw[:, :, None] * C + offs_c[None, None, :]
        tl.store(dx_ptr + offs_dx, dx, mask=mask_nhw[:, :, None] & mask_c[None, None, :])


@triton.jit
def _store_dw(
    tile,
    dlogits_ptr,  # (N, NUM_CLASSES) in
    pooled_ptr,  # (N, C) fp32 in
    dw_ptr,  # (NUM_CLASSES, C) out
    dbias_ptr,  # (NUM_CLASSES,) out
    num_images,
    C: tl.constexpr,
    NUM_CLASSES: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tile of the gradient of the weights, and with the first channels that of the bias."""
    tiles_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    offs_k = tile // tiles_c * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_c = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_k = offs_k < NUM_CLASSES
    mask_c = offs_c < C
    products = tl.zeros((BLOCK_B, BLOCK_K, BLOCK_C), dtype=tl.float32)
    sums = tl.zeros((BLOCK_B, BLOCK_K), dtype=tl.float32)
    for first in range(0, num_images, BLOCK_B):
        offs_n = (first + tl.arange(0, BLOCK_B)).to(INDEX)
        mask_n = offs_n < num_images
        offs_dlogits = offs_n[:, None] * NUM_CLASSES + offs_k[None, :]
        mask_nk = mask_n[:, None] & mask_k[None, :]
        dlogits = tl.load(dlogits_ptr + offs_dlogits, mask=mask_nk, other=0.0).to(tl.float32)
        offs_pooled = offs_n[:, None] * C + offs_c[None, :]
        mask_nc = mask_n[:, None] & mask_c[None, :]
        pooled = tl.load(pooled_ptr + offs_pooled, mask=mask_nc, other=0.0)
        products += dlogits[:, :, None] * pooled[:, None, :]
        sums += dlogits

    dw = tl.sum(products, axis=0)  # [BLOCK_K, BLOCK_C]
    offs_dw = offs_k[:, None] * C + offs_c[None, :]
    mask_kc = mask_k[:, None] & mask_c[None, :]
    tl.store(dw_ptr + offs_dw, round_to(dw, dw_ptr.dtype.element_ty), mask=mask_kc)
    if tile % tiles_c == 0:
        dbias = round_to(tl.sum(sums, axis=0), dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + offs_k, dbias, mask=mask_k)


@triton.jit
def _pool_linear_bwd_kernel(
    dlogits_ptr,  # (N, NUM_CLASSES) in
    pooled_ptr,  # (N, C) fp32 in
    w_ptr,  # (NUM_CLASSES, C) in
    dx_ptr,  # (N, H * W, C) out
    dw_ptr,  # (NUM_CLASSES, C) out
    dbias_ptr,  # (NUM_CLASSES,) out
    num_images,
    num_dw_tiles,
    NUM_PIXELS: tl.constexpr,
    C: tl.constexpr,
    NUM_CLASSES: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DW_BLOCK_B: tl.constexpr,
    DW_BLOCK_K: tl.constexpr,
    DW_BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    # The tiles of dw start first: each sums over the whole batch.
    program = tl.program_id(0)
    if program < num_dw_tiles:
        _store_dw(
            program, dlogits_ptr, pooled_ptr, dw_ptr, dbias_ptr, num_images,
            C, NUM_CLASSES, INDEX, DW_BLOCK_B, DW_BLOCK_K, DW_BLOCK_C,
        )  # fmt: skip
    else:
        _store_dx(
            program - num_dw_tiles, dlogits_ptr, w_ptr, dx_ptr, num_images,
            NUM_PIXELS, C, NUM_CLASSES, INDEX, BLOCK_N, BLOCK_P, BLOCK_K, BLOCK_C,
        )  # fmt: skip


def pool_linear_bwd(
    dlogits: torch.Tensor, pooled: torch.Tensor, weight: torch.Tensor, size: tuple[int, int]
) -> HeadGrads:
    """All gradients of `pool_linear_fwd` in one launch: dx is written once, nothing large is read.

    Args:
        dlogits: (N, classes) contiguous, dtype of x; bf16, fp16, fp32.
        pooled: (N, C) fp32 contiguous, from the forward.
        weight: (classes, C) contiguous; bf16, fp16, fp32.
        size: (H, W) of x.

    Returns: `HeadGrads`: dx in the dtype of dlogits, dw and dbias in that of weight.

    Raises: ValueError: when a tensor's shape, dtype, device or layout is not as above.

    Numerics: fp32, one rounding of each result. Deterministic.
    """
    num_classes = _check_linear(weight, None, pooled.shape[-1])
    n, c = pooled.shape
    if dlogits.shape != (n, num_classes) or not dlogits.is_contiguous():
        raise ValueError(
            f"dlogits must be contiguous ({n}, {num_classes}), got {list(dlogits.shape)} "
            f"with strides {dlogits.stride()}"
        )
    dx = empty_channels_last(dlogits, n, c, *size)
    dw, dbias = torch.empty_like(weight), weight.new_empty(num_classes)
    tiles = _image_tiles(n, size[0] * size[1], num_classes, c)
    dw_block_b, dw_block_k = _weight_tiles(n, num_classes)
    num_dw_tiles = triton.cdiv(num_classes, dw_block_k) * triton.cdiv(c, DW_BLOCK_C)
    launch(
        _pool_linear_bwd_kernel,
        (num_dw_tiles + triton.cdiv(n, tiles.block_n),),
        {
            "dlogits_ptr": dlogits,
            "pooled_ptr": pooled,
            "w_ptr": weight,
            "dx_ptr": dx,
            "dw_ptr": dw,
            "dbias_ptr": dbias,
            "num_images": n,
            "num_dw_tiles": num_dw_tiles,
            "NUM_PIXELS": size[0] * size[1],
            "C": c,
            "NUM_CLASSES": num_classes,
            "INDEX": index_dtype(dx, dlogits),
            "BLOCK_N": tiles.block_n,
            "BLOCK_P": tiles.block_p,
            "BLOCK_K": tiles.block_k,
            "BLOCK_C": tiles.block_c,
            "DW_BLOCK_B": dw_block_b,
            "DW_BLOCK_K": dw_block_k,
            "DW_BLOCK_C": DW_BLOCK_C,
        },
        num_warps=NUM_WARPS,
        num_stages=1,
        traffic=Traffic(
            reads=num_bytes(dlogits, pooled, weight),
            writes=num_bytes(dx, dw, dbias),
            flops=4 * dlogits.numel() * c + dlogits.numel(),
        ),
        # Of the images, for the tiles of dw.
        trips=triton.cdiv(n, dw_block_b),
    )
    return HeadGrads(dx, dw, dbias)
