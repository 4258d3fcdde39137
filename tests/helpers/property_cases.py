"""Drawn cases of the registered ops: shapes, strides with gaps, routes, tiles; and their judge."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from fastres.kernels import ops
from fastres.kernels.conv_shape import ConvOp, ConvShape
from fastres.kernels.conv_types import ConvBN, stat_dtype
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.launch_rules import (
    fused_config,
    heuristic_config,
    pixel_config,
    strip_config,
)
from fastres.kernels.reference.error_bound import UNIT_ROUNDOFF
from tests.helpers.interpreter import DEVICE, HAS_GPU
from tests.helpers.numerics import PooledErrorBound

# Steps of the main loop, over all programs, that one launch may take in the interpreter: a step
# costs about as much for a large tile as for a small one, so large problems get large tiles.
MOST_STEPS = 6
MOST_ELEMENTS = 8_000

# Draws on which a case that is refused is judged; see numerics.PooledErrorBound.
MOST_DRAWS = 48
ROUNDINGS = 3

Shortcut = Literal["none", "input", "given", "projected"]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LayerSize:
    """One convolution: K filters of size R over C channels."""

    k: int
    c: int
    r: int
    stride: int = 1


@dataclass(frozen=True)
class Case:
    """What hypothesis draws; everything else follows from it and the number of the draw.

    size: (N, C, H, W) of x. gaps: (channels, columns) that lie between the pixels and rows of x,
    residual and dout. tile: (BLOCK_M, BLOCK_N, BLOCK_K, split_k), grown for large problems; in
    patches BLOCK_M of them, in split_k programs. cudnn: the products that torch computes. forms:
    those that compute what they can take, the rest is im2col's. stored: products whose operand is
    stored first. zero_gamma: every third gamma is 0.
    """

    op: str
    size: tuple[int, int, int, int]
    layers: tuple[LayerSize, ...]
    shortcut: Shortcut = "none"
    projection: LayerSize | None = None
    relu: bool = True
    dtype: torch.dtype = torch.float32
    gaps: tuple[int, int] = (0, 0)
    tile: tuple[int, int, int, int] = (32, 32, 64, 2)
    cudnn: frozenset[str] = field(default_factory=frozenset)
    forms: frozenset[str] = field(default_factory=frozenset)
    stored: frozenset[str] = field(default_factory=frozenset)
    zero_gamma: bool = False
    need_dx: bool = True

    def output_size(self) -> tuple[int, int, int, int]:
        """(N, K, P, Q)."""
        n, _, h, w = self.size
        for layer in self.layers:
            h, w = (-(-extent // layer.stride) for extent in (h, w))
        return n, self.layers[-1].k, h, w

    def config(self, op: ConvOp, shape: ConvShape, dtype: torch.dtype, *_, **options) -> ConvConfig:
        """Stands in for the launch table."""
        route = "cudnn" if op in self.cudnn else "triton"
        in_patches = self._in_patches(op, shape, dtype)
        if in_patches is not None:
            return replace(in_patches, route=route, stored=op in self.stored)
        if HAS_GPU:
            config = heuristic_config(op, shape, dtype, **options)
            return replace(config, route=route)
        m, n, k = shape.gemm(op)
        if op == "wgrad":
            m, n = n, m
        block_m, block_n, block_k, split_k = self.tile

        def steps() -> int:
            return -(-m // block_m) * -(-n // block_n) * -(-k // block_k)

        while steps() > MOST_STEPS:
            # No dimension outgrows the problem: Triton's tensors have a largest size.
            block_m = 2 * block_m if block_m < m else block_m
            block_n = 2 * block_n if block_n < min(n, 128) else block_n
            block_k = 2 * block_k if block_k < k else block_k
        # The second pass over the partials is a program for every 128 elements.
        split_k = split_k if shape.num_w <= 2048 else 1
        return ConvConfig(block_m, block_n, block_k, 4, 2, split_k, route, stored=op in self.stored)

    def _in_patches(self, op: ConvOp, shape: ConvShape, dtype: torch.dtype) -> ConvConfig | None:
        """The form in patches that computes a product here, with few patches a tile."""
        starts = {
            "fused": fused_config(shape, dtype) if op == "dgrad" else None,
            "strip": strip_config(op, shape, dtype),
            "pixel": pixel_config(op, shape, dtype),
        }
        found = [starts[form] for form in sorted(self.forms) if starts[form] is not None]
        if not found:
            return None
        block_m, split_k = self.tile[0], self.tile[3]
        if HAS_GPU:
            return found[0]
        grid_size = split_k if found[0].form in ("fused", "strip") else 0
        return replace(found[0], block_m=block_m, split_k=split_k, grid_size=grid_size)


def _channels() -> st.SearchStrategy[int]:
    """Few channels mostly: the per-channel kernels cost the interpreter a program a channel."""
    few, some, many = st.integers(1, 8), st.integers(9, 24), st.integers(25, 130)
    # What forms in patches take; 64 rarely, since an image of so many channels is small here.
    narrow = st.sampled_from([3, 16, 16, 32, 32, 64])
    return st.integers(0, 15).flatmap(
        lambda i: few if i < 5 else narrow if i < 12 else some if i < 15 else many
    )


def _extent() -> st.SearchStrategy[int]:
    return st.integers(0, 7).flatmap(
        lambda i: (
            st.integers(1, 8) if i < 5 else st.integers(9, 40) if i == 7 else st.integers(1, 16)
        )
    )


@st.composite
def cases(draw: st.DrawFn, op: str, depth: int = 1, shortcut: Shortcut = "none") -> Case:
    """Cases of one op: conv_bn_relu, conv_bn_folded, residual_block."""
    c = draw(_channels())
    stride = 1 if shortcut == "input" else draw(st.integers(1, 2))
    layers = _draw_layers(draw, c, depth, stride, shortcut)
    h, w = draw(_extent()), draw(_extent())
    widest = max(c, *(layer.k for layer in layers))
    n = draw(st.integers(1, max(1, min(9, MOST_ELEMENTS // (h * w * widest)))))
    last = layers[-1]
    projection = LayerSize(last.k, c, 1, stride) if shortcut == "projected" else None
    case = Case(
        op,
        (n, c, h, w),
        layers,
        shortcut,
        projection,
        relu=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        gaps=draw(st.sampled_from([(0, 0), (3, 0), (0, 2), (8, 1)])),
        tile=draw(
            st.tuples(
                st.sampled_from([16, 32, 64]),
                st.sampled_from([16, 32, 64]),
                st.sampled_from([16, 32, 64]),
                st.integers(1, 4),
            )
        ),
        cudnn=draw(st.frozensets(st.sampled_from(["fprop", "dgrad", "wgrad"]), max_size=1)),
        forms=draw(st.frozensets(st.sampled_from(["fused", "strip", "pixel"]), max_size=2)),
        stored=draw(st.frozensets(st.sampled_from(["fprop", "dgrad", "wgrad"]), max_size=1)),
        zero_gamma=draw(st.booleans()),
        need_dx=draw(st.booleans()),
    )
    n, _, p, q = case.output_size()
    if n * p * q == 1:
        case = replace(case, size=(2, c, h, w))
    # Torch's bf16 filter gradient is not to be trusted here on a CPU: NaN in some runs of many.
    if case.dtype == torch.bfloat16 and stride == 2 and w == 1:
        case = replace(case, dtype=torch.float16)
    return case


def _draw_layers(
    draw: st.DrawFn, c: int, depth: int, stride: int, shortcut: Shortcut
) -> tuple[LayerSize, ...]:
    k = c if shortcut == "input" else draw(_channels())
    if depth == 1:
        return (LayerSize(k, c, draw(st.sampled_from([1, 3])), stride),)
    if depth == 2:
        inner = draw(_channels())
        return LayerSize(inner, c, 3, stride), LayerSize(k, inner, 3)
    inner = draw(_channels())
    return LayerSize(inner, c, 1), LayerSize(inner, inner, 3, stride), LayerSize(k, inner, 1)


class Numbers:
    """Inputs of one draw of a case, and both ways through it."""

    def __init__(self, case: Case, seed: int):
        self.case = case
        self.generator = torch.Generator().manual_seed(seed)
        self.x = self._pixels(*case.size)
        self.layers = [self._layer(size) for size in case.layers]
        if case.projection is not None:
            self.layers.append(self._layer(case.projection))
        self.residual = self._pixels(*case.output_size()) if case.shortcut == "given" else None
        self.dout = self._pixels(*case.output_size())

    def _normal(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.generator)

    def _pixels(self, n: int, c: int, h: int, w: int) -> torch.Tensor:
        """A channels_last tensor cut out of one with more channels and columns."""
        more_c, more_w = self.case.gaps
        wide = self._normal(n, h, w + more_w, c + more_c).to(DEVICE, self.case.dtype)
        return wide[:, :, :w, :c].permute(0, 3, 1, 2)

    def _layer(self, size: LayerSize) -> ConvBN:
        w = self._normal(size.k, size.c, size.r, size.r) / (size.c * size.r**2) ** 0.5
        w = w.to(DEVICE, self.case.dtype).contiguous(memory_format=torch.channels_last)
        weight, bias = 1 + 0.2 * self._normal(size.k), self._normal(size.k)
        if self.case.zero_gamma:
            weight[::3] = 0
        return ConvBN(w, weight.to(DEVICE), bias.to(DEVICE), size.stride, size.r // 2)

    def run(
        self, block: Callable[..., torch.Tensor], *, double: bool = False, nchw: bool = False
    ) -> Tensors:
        """Output of `block`, and where it has one every gradient."""
        case = self.case

        def own(t: torch.Tensor, learns: bool) -> torch.Tensor:
            # In fp64 nothing depends on the layout; otherwise the strides are part of the case.
            t = t.double() if double else t.detach()
            return (t.contiguous() if double or nchw else t).requires_grad_(learns)

        learns = case.op != "conv_bn_folded"
        inputs = {"x": own(self.x, case.need_dx and learns)}
        if self.residual is not None:
            inputs["residual"] = own(self.residual, learns)
        layers = []
        for i, layer in enumerate(self.layers):
            names = ("w", "weight", "bias")
            params = {name: own(getattr(layer, name), learns) for name in names}
            inputs |= {f"{name} {i}": param for name, param in params.items()}
            layers.append(layer._replace(**params))
        out = block(case, inputs["x"], layers, inputs.get("residual"))
        wanted = {name: t for name, t in inputs.items() if t.requires_grad}
        if not wanted:
            return {"out": out}
        dout = self.dout.double() if double else self.dout
        grads = torch.autograd.grad(out, list(wanted.values()), dout)
        return {"out": out, **{f"d{name}": g for name, g in zip(wanted, grads, strict=True)}}


def _eager_layer(case: Case, x: torch.Tensor, layer: ConvBN) -> torch.Tensor:
    w = layer.w
    # oneDNN's strided 1x1 convolution is broken in NHWC for few channels: reference/backend.py.
    if x.device.type == "cpu" and layer.stride > 1 and layer.padding == 0:
        x, w = (t.clone(memory_format=torch.contiguous_format) for t in (x, w))
    y = F.conv2d(x, w, stride=layer.stride, padding=layer.padding)
    if case.op == "conv_bn_folded":
        a, b = layer.weight.view(-1, 1, 1), layer.bias.view(-1, 1, 1)
        return (y.to(stat_dtype(y.dtype)) * a + b).to(y.dtype)
    return F.batch_norm(y, None, None, layer.weight, layer.bias, True, 0.1, layer.eps)


def eager(
    case: Case,
    x: torch.Tensor,
    layers: list[ConvBN],
    residual: torch.Tensor | None,
    layer_of: Callable[..., torch.Tensor] = _eager_layer,
    store: Callable[[torch.Tensor], torch.Tensor] = lambda t: t,
) -> torch.Tensor:
    """The case in torch's own operators; `store` sees what the kernels round to the dtype."""
    z, x = store(x), store(x)
    main = layers[:-1] if case.projection is not None else layers
    for layer in main[:-1]:
        z = store(F.relu(layer_of(case, z, layer)))
    z = layer_of(case, z, main[-1])
    if case.projection is not None:
        z = z + layer_of(case, x, layers[-1])
    elif residual is not None:
        z = z + residual
    elif case.shortcut == "input":
        z = z + x
    return store(F.relu(z) if case.relu else z)


class _Round(torch.autograd.Function):
    """Multiply by 1 + e, with e drawn between -u and u for each element; gradients likewise."""

    @staticmethod
    def forward(ctx, value, unit, generator):
        ctx.rounding = unit, generator
        errors = 2 * torch.rand(value.shape, generator=generator) - 1
        return value * (1 + unit * errors.to(value.device))

    @staticmethod
    def backward(ctx, grad):
        return _Round.apply(grad, *ctx.rounding), None, None


def _fp32(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return _Round.apply(value, UNIT_ROUNDOFF[torch.float32], generator)


def _sum(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Sum over the pixels in fp32, one after the other; (N, K, P, Q) to (K,)."""
    partial = values.transpose(0, 1).flatten(1).cumsum(1)
    return partial[:, -1] + (_fp32(partial, generator) - partial).sum(1)


class _RoundedBatchNorm(torch.autograd.Function):
    """Batch norm by the formulas of kernels/reference/block.py, every step rounded as in fp32."""

    @staticmethod
    def forward(ctx, y, weight, bias, eps, generator):
        def fp32(value):
            return _fp32(value, generator)

        count = y.numel() // y.shape[1]
        mean = fp32(y.mean((0, 2, 3)))
        centred = fp32(y - mean.view(-1, 1, 1))
        rstd = fp32((fp32(_sum(fp32(centred.square()), generator) / count) + eps).rsqrt())
        a = fp32(weight * rstd)
        b = fp32(bias - fp32(mean * a))
        ctx.save_for_backward(y, centred, mean, rstd, weight)
        ctx.generator = generator
        return fp32(fp32(y * a.view(-1, 1, 1)) + b.view(-1, 1, 1))

    @staticmethod
    def backward(ctx, g):
        def fp32(value):
            return _fp32(value, ctx.generator)

        y, centred, mean, rstd, weight = ctx.saved_tensors
        count = y.numel() // y.shape[1]
        dbias = _sum(g, ctx.generator)
        dweight = fp32(_sum(fp32(g * centred), ctx.generator) * rstd)
        c0 = fp32(weight * rstd)
        c1 = fp32(-fp32(c0 * rstd) * fp32(dweight / count))
        c2 = fp32(fp32(-c0 * fp32(dbias / count)) - fp32(c1 * mean))
        c0, c1, c2 = (c.view(-1, 1, 1) for c in (c0, c1, c2))
        return fp32(fp32(c0 * g) + fp32(fp32(c1 * y) + c2)), dweight, dbias, None, None


def rounded(seed: int) -> Callable[..., torch.Tensor]:
    """`eager` in fp64 with every step rounded at random, as some fp32 program would round it.

    The second baseline: eager sums in fp64 on a CPU, and in a small tensor it is exact by luck.
    """
    generator = torch.Generator().manual_seed(seed)

    def layer_of(case, x, layer):
        y = store(case, F.conv2d(x, layer.w, stride=layer.stride, padding=layer.padding))
        if case.op != "conv_bn_folded":
            return _RoundedBatchNorm.apply(y, layer.weight, layer.bias, layer.eps, generator)
        a, b = layer.weight.view(-1, 1, 1), layer.bias.view(-1, 1, 1)
        return _fp32(_fp32(a * y, generator) + b, generator)

    def store(case, value):
        return _Round.apply(value, UNIT_ROUNDOFF[case.dtype], generator)

    def block(case, x, layers, residual):
        return eager(case, x, layers, residual, layer_of, functools.partial(store, case))

    return block


def run_op(
    case: Case, x: torch.Tensor, layers: list[ConvBN], residual: torch.Tensor | None
) -> torch.Tensor:
    """The case in one call of its registered op."""
    if case.op == "conv_bn_folded":
        scale_shift = torch.stack([layers[0].weight, layers[0].bias])
        options = {"residual": residual, "relu": case.relu}
        return ops.conv_bn_folded(x, layers[0], scale_shift, **options)
    if case.op == "conv_bn_relu":
        return ops.conv_bn_relu(x, layers[0], relu=case.relu)[0]
    projection = layers[-1] if case.projection is not None else None
    main = layers[:-1] if projection is not None else layers
    options = {"projection": projection, "residual": residual}
    options |= {"add_input": case.shortcut == "input", "relu": case.relu}
    return ops.residual_block(x, main, **options)[0]


def judge(case: Case) -> PooledErrorBound:
    """Draw numbers for a case until its errors are within the bound; the last verdict stands."""
    bound = PooledErrorBound(case.dtype, has_relu=case.relu or len(case.layers) > 1)
    for seed in range(MOST_DRAWS):
        numbers = Numbers(case, seed)
        got, truth = numbers.run(run_op), numbers.run(eager, double=True)
        # Torch has a convolution for each layout, and each its own order of summation.
        baselines = [numbers.run(eager), numbers.run(eager, nchw=True)]
        baselines += [numbers.run(rounded(seed + i), double=True) for i in range(ROUNDINGS)]
        assert got["out"].is_contiguous(memory_format=torch.channels_last)
        for name, value in got.items():
            bound.add(name, value, [baseline[name] for baseline in baselines], truth[name])
        if not bound.refused():
            break
    return bound
