"""Who may be given a channels_last tensor where plain torch makes a contiguous one.

Fused ops return channels_last, which is the same tensor to nearly everybody: numbers, shape and
speed of what follows. `view`, strides and whoever gets the result of a network tell them apart.
"""

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastres.model.interception import is_overridden

__all__ = ["is_flattened", "is_layout_seen"]

# Results in the layout of their input, which so is still to be seen.
_KEEPING = {
    *(F.relu, torch.relu, F.batch_norm, torch.conv2d, F.avg_pool2d, F.max_pool2d, F.dropout),
    *(F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.sigmoid, torch.cat, F.interpolate),
    *(operator.add, operator.iadd, operator.mul, operator.imul, torch.add, torch.mul, F.silu),
    *(F.pad, torch.relu_, F.gelu, F.relu6, F.hardtanh),
    *("add", "add_", "mul", "mul_", "relu", "relu_", "sigmoid", "to", "float", "type_as"),
    *(nn.ReLU, nn.ReLU6, nn.SiLU, nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d),
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout, nn.Dropout2d, nn.Identity),
    *(nn.Sigmoid, nn.GELU, nn.LeakyReLU, nn.Hardswish),
    *(torch.mean, torch.sum, torch.amax, "mean", "sum", "amax", "reshape"),
    *(torch.flatten, nn.Flatten, "flatten"),
}
# Results in a layout that does not depend on that of the input.
_FORGETTING = {F.linear, nn.Linear, "contiguous", "size", "dim", "numel"}


def is_layout_seen(node: fx.Node, takes_any: Callable[[fx.Node], bool], root: nn.Module) -> bool:
    """Whether somebody behind `node` could see in which layout its value is.

    takes_any: whether a node computes the same, to the strides, of either layout.
    """
    todo, done = [node], {node}
    while todo:
        for user in todo.pop().users:
            if user in done or takes_any(user):
                continue
            kind = _kind(user, root)
            if kind in _FORGETTING or _is_shape(user) or is_flattened(user, root):
                continue
            if kind not in _KEEPING:
                return True
            done.add(user)
            todo.append(user)
    return False


def _kind(node: fx.Node, root: nn.Module) -> object:
    """What a node calls: a function, the name of a method, or the class of a module."""
    if node.op == "call_module":
        return type(root.get_submodule(str(node.target)))
    return node.target


def is_flattened(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node is `flatten(x, 1)`, whose result is a matrix in the order of NCHW."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        is_matrix = type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
        return is_matrix and not is_overridden(module)
    return node.target in (torch.flatten, "flatten") and node.args[1:] == (1,) and not node.kwargs


def _is_shape(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1] in ("shape", "dtype", "device", "ndim")
