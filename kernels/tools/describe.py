"""A recorded launch in words, and how wide its loads can be: for the codegen report."""

import re

import torch

from fastres.kernels.gpu.launch import Launch

__all__ = ["expected_bits", "tile_label", "variant_label"]

# What tells the variants of a kernel apart: parameter, and what its presence means.
_VARIANTS = {
    "conv_fprop_kernel": {
        "in_scale_shift_ptr": "bn+relu in",
        "batch_norm": "statistics out",
        "out_scale_shift_ptr": "bn out",
        "residual_ptr": "residual",
        "RELU": "relu out",
    },
    "conv_dgrad_kernel": {
        "coefficients_ptr": "deferred dy",
        "shortcut_ptr": "shortcut added",
        "producer_y_ptr": "relu mask and sums",
    },
    "conv_wgrad_kernel": {"in_scale_shift_ptr": "bn+relu in", "coefficients_ptr": "deferred dy"},
    "conv_backward_kernel": {
        "coefficients_ptr": "deferred dy",
        "shortcut_ptr": "shortcut added",
        "producer": "bn+relu in, relu mask and sums",
    },
    "bn_apply_kernel": {
        "shortcut_ptr": "shortcut",
        "shortcut_scale_shift_ptr": "projected",
        "RELU": "relu",
    },
    "bn_backward_reduce_kernel": {
        "out_ptr": "mask read",
        "scale_shift_ptr": "mask recomputed",
        "y_shortcut_ptr": "projected shortcut",
    },
}


_FORMS = re.compile("_(?:tma|strip|pixel)(?=_)")


def variant_label(launch: Launch) -> str:
    """The prologue and epilogue of a launch in words."""
    words = [
        word
        for name, word in _VARIANTS.get(_FORMS.sub("", launch.name), {}).items()
        if launch.args[name] is not None and launch.args[name] is not False
    ]
    return ", ".join(words) or "plain"


def tile_label(launch: Launch) -> str:
    """Tile, warps, stages; a patch and what of it is loaded ahead; persistent grid or split-K."""
    args, grid = launch.args, launch.grid
    sizes = [str(value) for name, value in args.items() if name.startswith("BLOCK_")]
    text = f"{'x'.join(sizes)} w{launch.num_warps} s{launch.num_stages}"
    if "AHEAD" in args:
        text += f" h{args['SHAPE'].PATCH_H} a{args['AHEAD']}"
    if "wgrad" in launch.name:
        return f"{text} k{grid[-1]}"
    is_persistent = args.get("PERSISTENT") or grid[0] < args.get("num_tiles", 0)
    return f"{text} p{grid[0]}" if is_persistent else text


def expected_bits(launch: Launch) -> dict[str, int]:
    """Width that loads of pixels and filters can have.

    A load is at most 16 bytes; no wider than what stays together and aligned in memory, which is a
    pixel's channels (6 bytes in a stem) or a filter's row; and no wider than a thread's share of
    the tile, which can be less for the filters of a narrow layer. Forms in patches read the filters
    once, before their loop, as it suits their products.
    """
    args, expected = launch.args, {}
    for name, tensor in args.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4 or tensor.stride(1) != 1:
            continue
        run = tensor.shape[1] * tensor.element_size()
        share = 16
        if name == "w_ptr":
            if "BLOCK_K" not in args:
                continue
            run *= 1 if launch.name == "conv_dgrad_kernel" else tensor[0, 0].numel()
            tile = args["BLOCK_K"] * args["BLOCK_N"] * tensor.element_size()
            share = tile // (32 * launch.num_warps)
        expected[name] = 8 * min(16, run & -run, max(share, tensor.element_size()))
    return expected
