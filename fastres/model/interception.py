"""What others may put between the call of a module and what it computes.

PyTorch has many ways to change from outside what a module does, or to watch it: hooks on one module
or on all, attributes and class methods replaced, tracers that record calls, transforms and tensor
subclasses that give operations another meaning. A fused op would pass them all by. Wherever one is
at work the modules themselves are called: `is_overridden` asks it of one module, and
`is_intercepted` of everything that is no module's own.
"""

import sys
from types import BuiltinFunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fastres.kernels.plain_tensors import are_plain

__all__ = [
    "computes_as",
    "is_as_defined",
    "is_intercepted",
    "is_overridden",
    "is_plain_tensor",
    "replaced_functions",
]

# Methods between the call of a module and F: an instance that has its own computes something else.
_METHODS = frozenset(
    {
        "forward",
        "_call_impl",
        "_wrapped_call_impl",
        "_compiled_call_impl",
        "_conv_forward",
        "_check_input_dim",
    }
)


# The same of a class, where it may also change how its attributes are found.
_OF_A_CLASS = (*_METHODS, "__call__", "__getattr__", "__getattribute__")


def is_overridden(module: nn.Module) -> bool:
    """Whether a module has hooks or methods of its own, so that it must be called itself."""
    own = vars(module)
    has_hooks = (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )
    return bool(has_hooks) or not _METHODS.isdisjoint(own)


def computes_as(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module is of `kind`, or of a class derived from it that computes the same."""
    derived = type(module)
    return derived is kind or (
        isinstance(module, kind)
        and all(getattr(derived, name, None) is getattr(kind, name, None) for name in _OF_A_CLASS)
    )


def _functions() -> list[tuple[Any, str]]:
    """The functions that modules are computed by, each as its owner and its name."""
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Linear, nn.AdaptiveAvgPool2d, nn.Sequential)
    names = ("forward", "__call__", "_call_impl", "_wrapped_call_impl")
    methods = [(kind, name) for kind in kinds for name in names]
    methods += [(nn.Conv2d, "_conv_forward"), (nn.BatchNorm2d, "_check_input_dim")]
    functions = ("conv2d", "batch_norm", "relu", "linear", "adaptive_avg_pool2d")
    return [
        *methods,
        *((F, name) for name in functions),
        *((torch, name) for name in ("conv2d", "batch_norm", "relu")),
    ]


def is_as_defined(owner: Any, name: str) -> bool:
    """Whether a function is the one that the file of its class or module defines."""
    function = getattr(owner, name)
    if isinstance(function, BuiltinFunctionType):
        return True
    kinds = owner.__mro__ if isinstance(owner, type) else ()
    homes = [kind.__module__ for kind in kinds if name in vars(kind)][:1] or [owner.__name__]
    return getattr(function, "__globals__", None) is vars(sys.modules[homes[0]])


# None where a function had been replaced before this file was imported: then it is never the same.
_AS_DEFINED = [
    (owner, name, getattr(owner, name) if is_as_defined(owner, name) else None)
    for owner, name in _functions()
]


def replaced_functions() -> list[str]:
    """Names of the functions of torch that somebody has replaced, as `Conv2d.forward`."""
    return [
        f"{owner.__name__}.{name}"
        for owner, name, function in _AS_DEFINED
        if getattr(owner, name) is not function
    ]


def _is_traced() -> bool:
    """Whether a program is recorded that others run, for whom the ops of fastres are unknown."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def is_plain_tensor(x: Any) -> bool:
    """Whether x is a tensor whose numbers are all there is to it."""
    return isinstance(x, Tensor) and are_plain(x)


def is_intercepted(x: Any) -> bool:
    """Whether modules must be called on x, whatever they are: it may be no tensor at all.

    torch.compile does not count: it calls the ops in the graphs that it makes.
    """
    return (
        not is_plain_tensor(x)
        or bool(_has_any_global_hook())
        or _is_traced()
        or any(getattr(owner, name) is not function for owner, name, function in _AS_DEFINED)
        or any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())
        or _has_foreign_dispatch_mode()
    )


def _has_foreign_dispatch_mode() -> bool:
    """Whether a TorchDispatchMode may look for the operators of plain modules.

    Torch's own modes take any operator, and one that wants those that run has an attribute
    `sees_fused_ops` that is true.
    """
    return not torch.compiler.is_compiling() and any(
        not (type(mode).__module__.startswith("torch.") or getattr(mode, "sees_fused_ops", False))
        for mode in _get_current_dispatch_mode_stack()
    )
