"""Output patches: what the strip and pixel convolutions (3x3, stride 1, padding 1) share.

A row of their matrix products is a patch of PATCH_H x 2 neighbouring pixels, not one pixel, and its
window is (PATCH_H + 2) x 4 pixels. What a prologue forms of a window pixel serves every output of
the patch that meets it: up to four at 2x2, where an im2col tile forms it again for each of nine
taps. Patches are numbered row by row and image by image; those at the lower and right border of an
image of odd size, and those behind the last image, hang over, and masks cut them:

    WHOLE   every patch of every tile lies inside an image: no output mask is needed at all

Letters: (n, h0, w0) is the upper left pixel of a patch, window pixel (r, s) is image pixel
(h0 + r - 1, w0 + s - 1), output (o, q) of a patch is image pixel (h0 + o, w0 + q). Tensors are
dense NHWC, and dy has the size of x. Source: own derivation.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.gpu.checks import nhwc_strides

__all__ = [
    "PATCH_W",
    "PatchGrid",
    "are_dense",
    "count_outputs",
    "locate_patches",
    "output_mask",
    "output_masks",
    "patch_grid",
    "window_mask",
]

PATCH_W = 2


class PatchGrid(NamedTuple):
    """The patches of a batch in tiles.

    num_patches: of all images. num_tiles: of BLOCK_M patches each, the last maybe of fewer.
    is_whole: whether no patch hangs over an image and no tile over the batch.
    """

    num_patches: int
    num_tiles: int
    is_whole: bool


def patch_grid(shape: ConvShape, patch_h: int, block_m: int, patch_w: int = PATCH_W) -> PatchGrid:
    """Tile the outputs of a convolution whose output has the size of its input."""
    num_patches = shape.N * triton.cdiv(shape.H, patch_h) * triton.cdiv(shape.W, patch_w)
    num_tiles = triton.cdiv(num_patches, block_m)
    is_whole = (shape.H % patch_h, shape.W % patch_w, num_patches % block_m) == (0, 0, 0)
    return PatchGrid(num_patches, num_tiles, is_whole)


def are_dense(*tensors: torch.Tensor | None) -> bool:
    """Whether all (N, C, H, W) tensors are channels_last without gaps; None has none."""

    def is_dense(t: torch.Tensor) -> bool:
        _, c, h, w = t.shape
        return nhwc_strides(t) == (h * w * c, w * c, c)

    return all(is_dense(t) for t in tensors if t is not None)


@triton.jit
def locate_patches(
    tile,
    BLOCK_M: tl.constexpr,
    PATCH_H: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PATCH_W: tl.constexpr = 2,
):
    """n, h0, w0 of the patches of a tile, [BLOCK_M] each.

    Where tiles divide images, or images tiles, n or the rows depend on the tile alone and most of
    the divisions are by constants of the lane: they leave the loop over tiles.
    """
    COLUMNS: tl.constexpr = (W + PATCH_W - 1) // PATCH_W
    PATCHES: tl.constexpr = (H + PATCH_H - 1) // PATCH_H * COLUMNS
    lane = tl.arange(0, BLOCK_M)
    if PATCHES % BLOCK_M == 0:
        first = tile % (PATCHES // BLOCK_M) * BLOCK_M
        n = tile // (PATCHES // BLOCK_M) + lane * 0
        if BLOCK_M % COLUMNS == 0:
            h0 = (first // COLUMNS + lane // COLUMNS) * PATCH_H
            w0 = lane % COLUMNS * PATCH_W
        else:
            h0 = (first + lane) // COLUMNS * PATCH_H
            w0 = (first + lane) % COLUMNS * PATCH_W
    elif BLOCK_M % PATCHES == 0:
        n = tile * (BLOCK_M // PATCHES) + lane // PATCHES
        h0 = lane % PATCHES // COLUMNS * PATCH_H
        w0 = lane % COLUMNS * PATCH_W
    else:
        patch = tile * BLOCK_M + lane
        n = patch // PATCHES
        h0 = patch % PATCHES // COLUMNS * PATCH_H
        w0 = patch % COLUMNS * PATCH_W
    return n, h0, w0


@triton.jit
def window_mask(
    h0, w0, r: tl.constexpr, s, PATCH_H: tl.constexpr, H: tl.constexpr, W: tl.constexpr
):
    """Whether window pixels (r, s) lie inside the image, [BLOCK_M, 1] or [BLOCK_M, columns].

    s: one column of the window, or a row [1, columns] of them. Comparisons that no patch can fail
    are left out.
    """
    w = w0[:, None] + (s - 1)
    inside = (w >= 0) & (w < W)
    if r == 0:
        inside = inside & (h0 > 0)[:, None]
    elif r > PATCH_H or H % PATCH_H != 0:
        inside = inside & (h0 < H + 1 - r)[:, None]
    return inside


@triton.jit
def output_mask(exists, h0, w0, o, q, PATCH_H: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """Whether outputs (o, q) of patches are pixels, [BLOCK_M, 1] or [BLOCK_M, columns].

    exists: [BLOCK_M] which patches there are. o, q: as s of `window_mask`.
    """
    inside = exists[:, None]
    if H % PATCH_H != 0:
        inside = inside & (h0[:, None] < H - o)
    if W % 2 != 0:
        inside = inside & (w0[:, None] + q < W)
    return inside


@triton.jit
def output_masks(
    exists,
    h0,
    w0,
    q,
    PATCH_H: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    WHOLE: tl.constexpr,
    JOIN: tl.constexpr = 1,
    o=0,
):
    """`output_mask` of every output row of the patches; where WHOLE, the constant True.

    Of JOIN rows at a time, if so many stand side by side: o is a row [1, columns] of their numbers.
    """
    masks: tl.tuple = ()
    for first in tl.static_range(0, PATCH_H, JOIN):
        if WHOLE:
            masks += (tl.full((exists.shape[0], 1), True, tl.int1),)
        else:
            masks += (output_mask(exists, h0, w0, first + o, q, PATCH_H, H, W),)
    return masks


@triton.jit
def count_outputs(
    exists,
    h0,
    w0,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PATCH_H: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
):
    """Number of pixels among the outputs of a tile, fp32."""
    if WHOLE:
        count = BLOCK_M * PATCH_H * 2.0
    else:
        pixels = tl.minimum(H - h0, PATCH_H) * tl.minimum(W - w0, 2)
        count = tl.sum(tl.where(exists, pixels, 0), axis=0).to(tl.float32)
    return count
