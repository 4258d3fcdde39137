"""Launch configurations: the tiles, form and route of a kernel, as its launch takes them.

launch_table.py looks up what was measured or estimated, launch_rules.py is for the rest.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from fastres.kernels.conv_shape import ConvOp, ConvShape

__all__ = ["ConvConfig", "Form", "Route", "RowConfig", "TmaTile"]

# Elements of a TMA tile in each of its dimensions, at most.
MAX_TMA_DIM = 256

Route = Literal["triton", "cudnn"]
Form = Literal["im2col", "tma", "strip", "pixel", "fused"]


class TmaTile(NamedTuple):
    """Consecutive pixels that TMA loads at once: images x rows x columns, powers of two."""

    n: int
    h: int
    w: int


@dataclass(frozen=True)
class ConvConfig:
    """Tiles and route of one convolution kernel.

    form: which kernel computes it; a launch that the form cannot take is computed by "im2col".

        im2col   conv_fprop.py, conv_dgrad.py, conv_wgrad.py: any shape, pixels by pointers
        tma      conv_tma.py: fprop and dgrad, pixels by tensor descriptors, see `tma_tile`
        strip    conv_strip.py: 3x3 of few channels, rows of patches
        pixel    conv_pixel.py: 3x3 of 16 to 64 channels, pixels of patches; strided dgrads
        fused    conv_backward.py, asked of dgrad: both gradients in one launch

    block_m, block_n, block_k: the tile of the matrix product; block_m counts patches where the form
    has them. split_k: partial sums of a wgrad reduction. grid_size: programs of a persistent
    schedule; 0 starts one program a tile. patch_h, patch_w: rows and columns of a patch, where the
    form leaves them open; a pixel wgrad with patches of one row has programs of one filter row.
    ahead: how many rows or pixels of its window are loaded before the first product.
    stored: whether a kernel of its own stores the activation or dy first, that the prologue would
    form otherwise.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    route: Route = "triton"
    form: Form = "im2col"
    grid_size: int = 0
    patch_h: int = 2
    patch_w: int = 2
    ahead: int = 0
    stored: bool = False

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
        if self.form not in get_args(Form):
            raise ValueError(f"form must be one of {get_args(Form)}, got {self.form!r}")
        if self.grid_size < 0 or (self.grid_size and self.form == "im2col"):
            raise ValueError(
                f"grid_size must be 0, or above in another form, got {self.grid_size} ({self.form})"
            )
        for name in ("patch_h", "patch_w"):
            if getattr(self, name) not in (1, 2, 4, 8):
                raise ValueError(f"{name} must be 1, 2, 4 or 8, got {getattr(self, name)}")
        if self.ahead < 0:
            raise ValueError(f"ahead must not be negative, got {self.ahead}")

    @property
    def label(self) -> str:
        """For people: tile, warps, stages, split-K, form, persistent grid, patch, stored."""
        text = f"{self.block_m}x{self.block_n}x{self.block_k} w{self.num_warps} s{self.num_stages}"
        text += f" k{self.split_k}"
        if self.form != "im2col":
            text += f" {self.form}"
        if self.grid_size:
            text += f" p{self.grid_size}"
        if self.form not in ("im2col", "tma"):
            text += f" h{self.patch_h} w{self.patch_w} a{self.ahead}"
        if self.stored:
            text += " stored"
        return text

    def constexprs(self) -> dict[str, int]:
        """The tile as the kernels' compile-time arguments."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}

    def divides(self, rows: int, columns: int) -> bool:
        """Whether tiles cover a matrix of this size exactly: their epilogue needs no masks."""
        return rows % self.block_m == 0 and columns % self.block_n == 0

    def tma_tile(self, op: ConvOp, shape: ConvShape) -> TmaTile | None:
        """The rectangle that a tile's pixels are: a section of a row, whole rows or whole images.

        None in other forms, for wgrad, for strides, and where block_m pixels are no rectangle,
        such as with rows of 7 pixels.
        """
        if self.form != "tma" or op == "wgrad" or shape.stride != 1:
            return None
        height, width = (shape.P, shape.Q) if op == "fprop" else (shape.H, shape.W)
        w = min(width, self.block_m)
        h = min(height, self.block_m // w)
        n = self.block_m // (w * h)
        is_whole = n * h * w == self.block_m and width % w == 0 and height % h == 0
        fits = max(n, h, w, self.block_n, self.block_k) <= MAX_TMA_DIM
        return TmaTile(n, h, w) if is_whole and fits else None


@dataclass(frozen=True)
class RowConfig:
    """Tile of an elementwise or reducing batch-norm kernel: rows (pixels) x channels."""

    block_rows: int
    block_c: int
    num_warps: int
