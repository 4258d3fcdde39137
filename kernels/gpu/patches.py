"""Output patches: what the strip and pixel convolutions (3x3, stride 1, padding 1) share.

A row of their matrix products is a patch of PATCH_H x 2 neighbouring pixels, not one pixel, and its
window is (PATCH_H + 2) x 4 pixels. What a prologue forms of a window pixel serves every output of
the patch that meets it: up to four at 2x2, where an im2col tile forms it again for each of nine
taps. Patches are numbered row by row and image by image; those at the lower and right border of an
image of odd size, and those behind the last image, hang over, and masks cut them:

    WHOLE   every patch of every tile lies inside an image: no output mask is needed at all

A kernel hands on two things: SHAPE, a `PatchShape`, and the `PatchTile` of `locate_patches`.

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
    "PatchShape",
    "PatchTile",
    "are_dense",
    "count_outputs",
    "locate_patches",
    "output_mask",
    "output_masks",
    "patch_grid",
    "window_mask",
]

PATCH_W = 2


class PatchShape(NamedTuple):
    """What a kernel in patches knows of them when it is compiled: its argument SHAPE.

    H, W: size of an image. PATCH_H, PATCH_W: size of a patch. WHOLE: no patch hangs over an image
    and no tile over the batch.
    """

    H: int
    W: int
    PATCH_H: int
    PATCH_W: int
    WHOLE: bool


class PatchGrid(NamedTuple):
    """The patches of a batch in tiles.

    num_patches: of all images. num_tiles: of BLOCK_M patches each, the last maybe of fewer.
    """

    num_patches: int
    num_tiles: int
    shape: PatchShape


class PatchTile(NamedTuple):
    """The patches of one tile in a kernel, [BLOCK_M] numbers each.

    n, h0, w0: upper left pixel of a patch. pixels: its number in the batch, of the dtype INDEX.
    exists: whether there is such a patch.
    """

    n: tl.tensor
    h0: tl.tensor
    w0: tl.tensor
    pixels: tl.tensor
    exists: tl.tensor


def patch_grid(shape: ConvShape, patch_h: int, block_m: int, patch_w: int = PATCH_W) -> PatchGrid:
    """Tile the outputs of a convolution whose output has the size of its input."""
    num_patches = shape.N * triton.cdiv(shape.H, patch_h) * triton.cdiv(shape.W, patch_w)
    is_whole = (shape.H % patch_h, shape.W % patch_w, num_patches % block_m) == (0, 0, 0)
    patches = PatchShape(shape.H, shape.W, patch_h, patch_w, is_whole)
    return PatchGrid(num_patches, triton.cdiv(num_patches, block_m), patches)


def are_dense(*tensors: torch.Tensor | None) -> bool:
    """Whether all (N, C, H, W) tensors are channels_last without gaps; None has none."""

    def is_dense(t: torch.Tensor) -> bool:
        _, c, h, w = t.shape
        return nhwc_strides(t) == (h * w * c, w * c, c)

    return all(is_dense(t) for t in tensors if t is not None)


@triton.jit
def locate_patches(
    number, num_patches, SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, INDEX: tl.constexpr
):
    """The tile of this number.

    Where tiles divide images, or images tiles, n or the rows depend on the tile alone and most of
    the divisions are by constants of the lane: they leave the loop over tiles.
    """
    H: tl.constexpr = SHAPE.H
    W: tl.constexpr = SHAPE.W
    PATCH_H: tl.constexpr = SHAPE.PATCH_H
    PATCH_W: tl.constexpr = SHAPE.PATCH_W
    COLUMNS: tl.constexpr = (W + PATCH_W - 1) // PATCH_W
    PATCHES: tl.constexpr = (H + PATCH_H - 1) // PATCH_H * COLUMNS
    lane = tl.arange(0, BLOCK_M)
    if PATCHES % BLOCK_M == 0:
        first = number % (PATCHES // BLOCK_M) * BLOCK_M
        n = number // (PATCHES // BLOCK_M) + lane * 0
        if BLOCK_M % COLUMNS == 0:
            h0 = (first // COLUMNS + lane // COLUMNS) * PATCH_H
            w0 = lane % COLUMNS * PATCH_W
        else:
            h0 = (first + lane) // COLUMNS * PATCH_H
            w0 = (first + lane) % COLUMNS * PATCH_W
    elif BLOCK_M % PATCHES == 0:
        n = number * (BLOCK_M // PATCHES) + lane // PATCHES
        h0 = lane % PATCHES // COLUMNS * PATCH_H
        w0 = lane % COLUMNS * PATCH_W
    else:
        patch = number * BLOCK_M + lane
        n = patch // PATCHES
        h0 = patch % PATCHES // COLUMNS * PATCH_H
        w0 = patch % COLUMNS * PATCH_W
    exists = number * BLOCK_M + lane < num_patches
    return PatchTile(n, h0, w0, (n.to(INDEX) * H + h0) * W + w0, exists)


@triton.jit
def window_mask(tile, SHAPE: tl.constexpr, r: tl.constexpr, s):
    """Whether window pixels (r, s) lie inside the image, [BLOCK_M, 1] or [BLOCK_M, columns].

    s: one column of the window, or a row [1, columns] of them. Comparisons that no patch can fail
    are left out.
    """
    w = tile.w0[:, None] + (s - 1)
    inside = (w >= 0) & (w < SHAPE.W)
    if r == 0:
        inside = inside & (tile.h0 > 0)[:, None]
    elif r > SHAPE.PATCH_H or SHAPE.H % SHAPE.PATCH_H != 0:
        inside = inside & (tile.h0 < SHAPE.H + 1 - r)[:, None]
    return inside


@triton.jit
def output_mask(tile, SHAPE: tl.constexpr, o, q):
    """Whether outputs (o, q) of patches are pixels, [BLOCK_M, 1] or [BLOCK_M, columns].

    o, q: as s of `window_mask`.
    """
    inside = tile.exists[:, None]
    if SHAPE.H % SHAPE.PATCH_H != 0:
        inside = inside & (tile.h0[:, None] < SHAPE.H - o)
    if SHAPE.W % SHAPE.PATCH_W != 0:
        inside = inside & (tile.w0[:, None] + q < SHAPE.W)
    return inside


@triton.jit
def output_masks(tile, SHAPE: tl.constexpr, q, JOIN: tl.constexpr = 1, o=0):
    """`output_mask` of every output row of the patches; where WHOLE, the constant True.

    Of JOIN rows at a time, if so many stand side by side: o is a row [1, columns] of their numbers.
    """
    PATCH_H: tl.constexpr = SHAPE.PATCH_H
    masks: tl.tuple = ()
    for first in tl.static_range(0, PATCH_H, JOIN):
        if SHAPE.WHOLE:
            masks += (tl.full((tile.exists.shape[0], 1), True, tl.int1),)
        else:
            masks += (output_mask(tile, SHAPE, first + o, q),)
    return masks


@triton.jit
def count_outputs(tile, SHAPE: tl.constexpr):
    """Number of pixels among the outputs of a tile, fp32."""
    PATCH_H: tl.constexpr = SHAPE.PATCH_H
    PATCH_W: tl.constexpr = SHAPE.PATCH_W
    if SHAPE.WHOLE:
        count = tile.exists.shape[0] * PATCH_H * PATCH_W * 1.0
    else:
        rows = tl.minimum(SHAPE.H - tile.h0, PATCH_H)
        columns = tl.minimum(SHAPE.W - tile.w0, PATCH_W)
        count = tl.sum(tl.where(tile.exists, rows * columns, 0), axis=0).to(tl.float32)
    return count
