"""Augmentation of image batches on the GPU: select, crop, flip, cutout, normalise in one kernel.

    out[b, y, x] = (pixel - mean) / std
    pixel = colour inside the cutout, else images[index[b], top + y, left + (x or its mirror image)]

The choices come as data, the rows of an augmentation plan: corners of the crop in the image padded
with zeros, mirroring after the crop, and last a rectangle in the colour of the mean; nothing here
is random. Raw pixels are uint8 (N, H, W, C), the batch is written once in the training dtype.

Passes: every pixel of the batch is read once as uint8 and written once. The padded, the cropped and
the mirrored batch, and the float one before it is normalised, are never stored.

Numerics: (pixel - mean) * (1 / std) in fp32, bit-equal to the same formula in torch (a difference
followed by a product leaves nothing to contract), then one rounding. Deterministic.
Source: own derivation.
"""

import torch
import triton
import triton.language as tl

from fastres.kernels.gpu.launch import Traffic, launch, num_bytes
from fastres.kernels.gpu.primitives import round_to, wait_for_previous_kernel

__all__ = ["augment_normalize"]

# Elements of a program, 8 a thread: a third of a 32x32 image, so that no program spans two images.
BLOCK = 1024


# The rows of a plan start where a batch does, aligned or not; one compiled kernel serves all.
@triton.jit(do_not_specialize_on_alignment=["index_ptr", "crop_ptr", "flip_ptr", "cutout_ptr"])
def _augment_normalize_kernel(
    images_ptr,  # (num_images, H, W, C) uint8 in
    index_ptr,  # (B,) int64 in: which image
    crop_ptr,  # (B, 2) int64 in: top and left corner in the padded image; None: no crop
    flip_ptr,  # (B,) uint8 in: not 0 mirrors; None: no image is mirrored
    cutout_ptr,  # (B, 4) int64 in: top, left, bottom, right; None: no cutout
    colour_ptr,  # (C,) uint8 in: what the cutout is painted in
    mean_ptr,  # (C,) fp32 in
    scale_ptr,  # (C,) fp32 in: 1 / std
    out_ptr,  # (B, H, W, C) out
    PADDING: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    IMAGE_STRIDES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    b = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < H * W * C
    c = offs % C
    x = offs // C % W
    y = offs // (W * C)

    # Where the pixel comes from; what lies in the padding is 0.
    from_x = x
    from_y = y
    inside = mask
    if flip_ptr is not None:
        from_x = tl.where(tl.load(flip_ptr + b) != 0, W - 1 - x, x)
    if crop_ptr is not None:
        from_y = from_y + (tl.load(crop_ptr + 2 * b) - PADDING).to(tl.int32)
        from_x = from_x + (tl.load(crop_ptr + 2 * b + 1) - PADDING).to(tl.int32)
        inside = mask & (from_y >= 0) & (from_y < H) & (from_x >= 0) & (from_x < W)
    image_ptr = images_ptr + tl.load(index_ptr + b) * IMAGE_STRIDES[0]
    offs_pixel = from_y * IMAGE_STRIDES[1] + from_x * IMAGE_STRIDES[2] + c * IMAGE_STRIDES[3]
    pixel = tl.load(image_ptr + offs_pixel, mask=inside, other=0)

    if cutout_ptr is not None:
        top = tl.load(cutout_ptr + 4 * b)
        left = tl.load(cutout_ptr + 4 * b + 1)
        bottom = tl.load(cutout_ptr + 4 * b + 2)
        right = tl.load(cutout_ptr + 4 * b + 3)
        in_cutout = (y >= top) & (y < bottom) & (x >= left) & (x < right)
        pixel = tl.where(in_cutout, tl.load(colour_ptr + c), pixel)

    value = (pixel.to(tl.float32) - tl.load(mean_ptr + c)) * tl.load(scale_ptr + c)
    tl.store(out_ptr + b * (H * W * C) + offs, round_to(value, out_ptr.dtype.element_ty), mask=mask)


def augment_normalize(
    images: torch.Tensor,
    index: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    *,
    crop: torch.Tensor | None = None,
    padding: int = 0,
    flip: torch.Tensor | None = None,
    cutout: torch.Tensor | None = None,
    colour: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Select, crop, mirror, paint and normalise a batch of images, in one launch.

    Args:
        images: (num_images, H, W, C) uint8, any strides: the whole set.
        index: (B,) int64: which images. Like the other choices not checked, for that would wait
            for the device: they must lie in the set.
        mean: (C,) fp32, on the scale of the pixels.
        scale: (C,) fp32, 1 / std on the same scale.
        crop: (B, 2) int64, top and left corner of the H x W window in the image padded with zeros,
            0 to 2 * padding; None: no crop.
        padding: zero pixels on each side of the padded image.
        flip: (B,) bool, mirror left to right after the crop; None: no image is.
        cutout: (B, 4) int64, top, left, bottom and right (exclusive), after the flip; None: no
            cutout.
        colour: (C,) uint8, what the cutouts are painted in; needed with cutout.
        dtype: of the batch: bf16, fp16, fp32.

    Returns: (B, C, H, W) dense channels_last.

    Raises: ValueError: when a tensor's shape, dtype, device or layout is not as above.

    Numerics: (pixel - mean) * scale in fp32, one rounding. Deterministic.
    """
    if images.dim() != 4 or images.dtype != torch.uint8:
        raise ValueError(f"images must be (N, H, W, C) uint8, got {images.dtype} {images.shape}")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype must be bfloat16, float16 or float32, got {dtype}")
    if (cutout is None) != (colour is None):
        raise ValueError("give both of cutout and colour, or neither")
    _, h, w, c = images.shape
    batch = len(index)
    _check("index", index, (batch,), torch.int64)
    _check("mean", mean, (c,), torch.float32)
    _check("scale", scale, (c,), torch.float32)
    _check("crop", crop, (batch, 2), torch.int64)
    _check("flip", flip, (batch,), torch.bool)
    _check("cutout", cutout, (batch, 4), torch.int64)
    _check("colour", colour, (c,), torch.uint8)
    size = (batch, c, h, w)
    out = torch.empty(size, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    if batch == 0:
        return out
    launch(
        _augment_normalize_kernel,
        (batch, triton.cdiv(h * w * c, BLOCK)),
        {
            "images_ptr": images,
            "index_ptr": index,
            "crop_ptr": crop,
            "flip_ptr": None if flip is None else flip.view(torch.uint8),
            "cutout_ptr": cutout,
            "colour_ptr": colour,
            "mean_ptr": mean,
            "scale_ptr": scale,
            "out_ptr": out,
            "PADDING": padding,
            "H": h,
            "W": w,
            "C": c,
            "IMAGE_STRIDES": images.stride(),
            "BLOCK": BLOCK,
        },
        num_warps=4,
        num_stages=1,
        traffic=Traffic(
            reads=out.numel() + num_bytes(index, crop, flip, cutout, colour, mean, scale),
            writes=num_bytes(out),
            flops=2 * out.numel(),
        ),
    )
    return out


def _check(
    name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Demand a contiguous tensor of this shape and dtype, or None."""
    if tensor is None:
        return
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{name} must be {shape} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
