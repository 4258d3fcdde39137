"""Shapes of convolutions: output size, GEMM view, arithmetic, bytes.

Letters: x (N, H, W, C), w (K, R, S, C), y (N, P, Q, K). GEMM view, M x N x K:
fprop NPQ x K x CRS, dgrad NHW x C x KRS, wgrad K x CRS x NPQ.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["ConvOp", "ConvShape", "GemmShape", "output_length"]

ConvOp = Literal["fprop", "dgrad", "wgrad"]


def output_length(length: int, side: int, stride: int, padding: int) -> int:
    """Height or width of what a convolution with filters of a side makes of a height or width."""
    return (length + 2 * padding - side) // stride + 1


class GemmShape(NamedTuple):
    """The matrix product (M, K) @ (K, N) that a convolution is."""

    m: int
    n: int
    k: int


@dataclass(frozen=True)
class ConvShape:
    """One 2-d convolution with square stride and padding."""

    N: int
    H: int
    W: int
    C: int
    K: int
    R: int = 3
    S: int = 3
    stride: int = 1
    padding: int = 1

    def __post_init__(self) -> None:
        for name in ("N", "H", "W", "C", "K", "R", "S", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.padding < 0:
            raise ValueError(f"padding must not be negative, got {self.padding}")
        if self.P < 1 or self.Q < 1:
            raise ValueError(
                f"a {self.R}x{self.S} filter with padding {self.padding} does not fit "
                f"an image of {self.H}x{self.W}"
            )

    @property
    def P(self) -> int:
        """Output height."""
        return output_length(self.H, self.R, self.stride, self.padding)

    @property
    def Q(self) -> int:
        """Output width."""
        return output_length(self.W, self.S, self.stride, self.padding)

    @property
    def RSC(self) -> int:
        """Elements of one filter."""
        return self.R * self.S * self.C

    @property
    def num_x(self) -> int:
        """Elements of the input."""
        return self.N * self.H * self.W * self.C

    @property
    def num_y(self) -> int:
        """Elements of the output."""
        return self.N * self.P * self.Q * self.K

    @property
    def num_w(self) -> int:
        """Elements of the filters."""
        return self.K * self.RSC

    @property
    def flops(self) -> int:
        """Multiplications and additions of any of the three products, padding taps included."""
        return 2 * self.num_y * self.RSC

    def num_bytes(self, itemsize: int) -> int:
        """Bytes of x, w and y together: the least that one product moves."""
        return (self.num_x + self.num_w + self.num_y) * itemsize

    def gemm(self, op: ConvOp) -> GemmShape:
        """The matrix product behind `op`."""
        if op == "fprop":
            return GemmShape(self.N * self.P * self.Q, self.K, self.RSC)
        if op == "dgrad":
            return GemmShape(self.N * self.H * self.W, self.C, self.K * self.R * self.S)
        return GemmShape(self.K, self.RSC, self.N * self.P * self.Q)

    def constexprs(self) -> dict[str, int]:
        """The shape as the kernels' compile-time arguments: all but the batch size."""
        names = ("H", "W", "C", "K", "R", "S", "P", "Q")
        sizes = {name: getattr(self, name) for name in names}
        return {**sizes, "STRIDE": self.stride, "PADDING": self.padding}

    @property
    def layer_key(self) -> str:
        """Name of the shape without its batch size, as the launch table spells it."""
        return (
            f"h{self.H}w{self.W}c{self.C}k{self.K}r{self.R}s{self.S}u{self.stride}p{self.padding}"
        )
