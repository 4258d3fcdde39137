"""Every kernel of convolutions and batch norms: a launch of each, of all it can read and write."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.conv_types import LayerState
from fastres.kernels.gpu.batchnorm_bwd import bn_backward_apply, bn_backward_reduce
from fastres.kernels.gpu.batchnorm_fwd import bn_apply, bn_stats
from fastres.kernels.gpu.conv_backward import conv_gradients
from fastres.kernels.gpu.conv_dgrad import conv_dgrad
from fastres.kernels.gpu.conv_fprop import conv_fprop, conv_fprop_folded
from fastres.kernels.gpu.conv_wgrad import conv_wgrad
from fastres.kernels.gpu.launch_config import ConvConfig
from tests.helpers.kernel_cases import ConvTensors, geometry

__all__ = ["FORMS", "Form", "all_tensors", "map_tensors"]

# Few programs, for the interpreter. Strips and pixels use no block_k; im2col in their place does.
IM2COL = ConvConfig(64, 16, 64, num_warps=4, num_stages=2, split_k=2)
TMA = replace(IM2COL, form="tma", block_k=16, split_k=1)
STRIP = ConvConfig(16, 16, 64, 4, 1, form="strip", patch_h=4, ahead=2, split_k=2, grid_size=2)
PIXEL = ConvConfig(16, 16, 64, 4, 1, form="pixel", ahead=2, split_k=2)
FUSED = replace(STRIP, form="fused", split_k=1)

# Four images of 8 x 8 pixels, 16 channels each way: of every form whole tiles, and more than one.
SHAPE = ConvShape(4, 8, 8, 16, 16)


def _fprop(t: ConvTensors, shape: ConvShape, config: ConvConfig) -> Any:
    options = {**geometry(shape), "config": config}
    return conv_fprop(t.x, t.w, scale_shift=t.scale_shift, batch_norm=t.batch_norm, **options)


def _fprop_folded(t: ConvTensors, shape: ConvShape, config: ConvConfig) -> Any:
    options = {**geometry(shape), "residual": t.dy.y, "config": config}
    return conv_fprop_folded(t.x, t.w, t.dy.coefficients[:2].contiguous(), **options)


def _dgrad(t: ConvTensors, shape: ConvShape, config: ConvConfig) -> Any:
    options = {**geometry(shape), "shortcut": t.shortcut, "config": config}
    options |= {"producer": t.producer, "producer_weight": t.producer_weight}
    return conv_dgrad(t.dy, t.w, (shape.H, shape.W), **options)


def _dgrad_storing_the_activation(t: ConvTensors, shape: ConvShape, config: ConvConfig) -> Any:
    options = {**geometry(shape), "config": config, "producer": t.producer}
    options["activation"] = activation = torch.full_like(t.shortcut, torch.nan)
    options["producer_weight"] = t.producer_weight
    return conv_dgrad(t.dy, t.w, (shape.H, shape.W), **options), activation


def _wgrad(t: ConvTensors, shape: ConvShape, config: ConvConfig) -> Any:
    options = {**geometry(shape), "scale_shift": t.scale_shift, "config": config}
    return conv_wgrad(t.x, t.dy, (shape.R, shape.S), **options)


def _gradients(t: ConvTensors, shape: ConvShape, config: ConvConfig) -> Any:
    options = {**geometry(shape), "config": config}
    options |= {"producer": t.producer, "producer_weight": t.producer_weight}
    return conv_gradients(t.dy, t.producer.y, t.w, **options)


def _gradients_and_shortcut(t: ConvTensors, shape: ConvShape, config: ConvConfig) -> Any:
    options = {**geometry(shape), "shortcut": t.shortcut, "config": config}
    return conv_gradients(t.dy, t.x, t.w, **options)


def _bn_stats(t: ConvTensors, shape: ConvShape, config: ConvConfig) -> Any:
    return bn_stats(t.dy.y, t.batch_norm)


def _bn_apply(t: ConvTensors, shape: ConvShape, config: ConvConfig) -> Any:
    scale_shift = t.scale_shift
    return bn_apply(t.x, scale_shift, residual=t.shortcut, residual_scale_shift=scale_shift)


def _bn_backward_reduce(t: ConvTensors, shape: ConvShape, config: ConvConfig) -> Any:
    projected = LayerState(t.shortcut, t.producer.stats)
    return bn_backward_reduce(
        t.dy.g,
        t.producer,
        t.producer_weight,
        out=t.x,
        projected=projected,
        projected_weight=t.producer_weight,
    )


def _bn_backward_apply(t: ConvTensors, shape: ConvShape, config: ConvConfig) -> Any:
    return bn_backward_apply(t.dy)


class Form(NamedTuple):
    """A kernel by name, and a launch of it.

    operands: which tensors of `ConvTensors` of the size of an activation it reads.
    """

    kernel: str
    run: Callable[[ConvTensors, ConvShape, ConvConfig], Any]
    operands: tuple[str, ...]
    config: ConvConfig
    shape: ConvShape = SHAPE


FPROP = (_fprop, ("x",))
FOLDED = (_fprop_folded, ("x", "dy.y"))
DGRAD = (_dgrad, ("dy.g", "dy.y", "shortcut", "producer.y"))
WGRAD = (_wgrad, ("x", "dy.g", "dy.y"))

FORMS = {
    "im2col fprop": Form("conv_fprop_kernel", *FPROP, IM2COL),
    "im2col folded fprop": Form("conv_fprop_kernel", *FOLDED, IM2COL),
    "im2col dgrad": Form("conv_dgrad_kernel", *DGRAD, IM2COL),
    "im2col dgrad with activation": Form(
        "conv_dgrad_kernel",
        _dgrad_storing_the_activation,
        ("dy.g", "dy.y", "producer.y"),
        IM2COL,
    ),
    "im2col wgrad": Form("conv_wgrad_kernel", *WGRAD, IM2COL),
    "tma fprop": Form("conv_fprop_tma_kernel", *FPROP, TMA),
    "tma folded fprop": Form("conv_fprop_tma_kernel", *FOLDED, TMA),
    "tma dgrad": Form("conv_dgrad_tma_kernel", *DGRAD, TMA),
    "strip fprop": Form("conv_strip_fprop_kernel", *FPROP, STRIP),
    "strip folded fprop": Form("conv_strip_fprop_kernel", *FOLDED, STRIP),
    "strip dgrad": Form("conv_strip_dgrad_kernel", *DGRAD, STRIP),
    "strip wgrad": Form("conv_strip_wgrad_kernel", *WGRAD, STRIP),
    "pixel fprop": Form("conv_fprop_pixel_kernel", *FPROP, PIXEL),
    "pixel folded fprop": Form("conv_fprop_pixel_kernel", *FOLDED, PIXEL),
    "pixel dgrad": Form("conv_dgrad_pixel_kernel", *DGRAD, PIXEL),
    "pixel dgrad, stride 2": Form(
        "conv_dgrad_pixel_kernel", *DGRAD, PIXEL, replace(SHAPE, stride=2)
    ),
    "pixel wgrad": Form("conv_wgrad_pixel_kernel", *WGRAD, PIXEL),
    "fused, producer": Form(
        "conv_backward_kernel", _gradients, ("dy.g", "dy.y", "producer.y"), FUSED
    ),
    "fused, shortcut": Form(
        "conv_backward_kernel", _gradients_and_shortcut, ("dy.g", "dy.y", "x", "shortcut"), FUSED
    ),
    "bn_stats": Form("bn_stats_kernel", _bn_stats, ("dy.y",), IM2COL),
    "bn_apply": Form("bn_apply_kernel", _bn_apply, ("x", "shortcut"), IM2COL),
    "bn_backward_reduce": Form(
        "bn_backward_reduce_kernel",
        _bn_backward_reduce,
        ("dy.g", "x", "producer.y", "shortcut"),
        IM2COL,
    ),
    "bn_backward_apply": Form(
        "bn_backward_apply_kernel", _bn_backward_apply, ("dy.g", "dy.y"), IM2COL
    ),
}


def all_tensors(result: Any) -> list[torch.Tensor]:
    """The tensors of nested tuples, in their order."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result for t in all_tensors(part)] if isinstance(result, tuple) else []


def map_tensors(change: Callable[[str, torch.Tensor], torch.Tensor], value: Any, name: str = ""):
    """Nested named tuples with every tensor t, named as "dy.g" is, replaced by change(name, t)."""
    if isinstance(value, torch.Tensor):
        return change(name, value)
    if not isinstance(value, tuple):
        return value
    names = [f"{name}.{field}".removeprefix(".") for field in value._fields]
    return type(value)(*(map_tensors(change, v, n) for n, v in zip(names, value, strict=True)))
