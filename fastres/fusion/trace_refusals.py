"""What ends a trace, because a graph would lose it or answer it once and for all."""

import builtins
import gc
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fastres.fusion.traced_values import Attribute, TensorProxy, Untraceable, is_instance

__all__ = ["no_garbage_collected", "replaced", "undisturbed", "untouched_generators"]

# Methods of tensors that ask for what a trace may know.
_QUESTIONS = {"__get__", "size", "dim", "numel", "stride", "is_floating_point", "is_contiguous"}


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give a class or a module another attribute inside the `with` block."""
    is_own = name in vars(owner)
    # As it stands there: a class method is not bound to its class.
    original = vars(owner)[name] if is_own else None
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise Untraceable(f"it calls {name}")

    return refuse


# What a graph cannot hold, or answers once and for all.
_REFUSED = (
    (torch, "is_grad_enabled"),
    (torch, "is_inference_mode_enabled"),
    (torch, "is_autocast_enabled"),
    (torch, "get_autocast_dtype"),
    (torch.compiler, "is_compiling"),
    (torch.amp.autocast_mode.autocast, "__enter__"),
    (torch.inference_mode, "__enter__"),
    (torch.autograd.graph.saved_tensors_hooks, "__enter__"),
    (torch.autograd.Function, "apply"),
    (torch.random, "fork_rng"),
    (torch, "manual_seed"),
    (torch.utils.checkpoint, "_infer_device_type"),
    (builtins, "print"),
)


class _OnlyOfInputs(TorchFunctionMode):
    """Ends a trace where torch is called with nothing that the trace could record."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        is_recorded = any(type(leaf) in _PROXIES for leaf in tree_leaves((args, kwargs)))
        if not is_recorded and name not in _QUESTIONS:
            raise Untraceable(f"it calls {name} of nothing that is given to it")
        return func(*args, **(kwargs or {}))


_PROXIES = (fx.Proxy, TensorProxy, Attribute)


def _generators() -> list[tuple[Any, Callable[[], None]]]:
    """The state of every generator that a forward may draw from unseen, and what restores it."""
    with torch._C.DisableTorchFunction():
        of_python, of_torch = random.getstate(), torch.random.get_rng_state()
        found: list[tuple[Any, Callable[[], None]]] = [
            (of_python, lambda: random.setstate(of_python)),
            (of_torch.numpy().tobytes(), lambda: torch.random.set_rng_state(of_torch)),
        ]
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"].random
        name, keys, *rest = of_numpy = numpy.get_state()
        found.append(((name, keys.tobytes(), rest), lambda: numpy.set_state(of_numpy)))
    return found


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Refuse whoever draws random numbers, and give them back."""
    before = _generators()
    try:
        yield
    finally:
        pairs = zip(before, _generators(), strict=True)
        drawn = [restore for (state, restore), (now, _) in pairs if now != state]
        for restore in drawn:
            restore()
    if drawn:
        raise Untraceable("it draws random numbers")


@contextmanager
def no_garbage_collected() -> Iterator[None]:
    """Keep what is made inside in the youngest generation, which is quick to look through."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Refuse all that a graph would lose."""
    with ExitStack() as stack:
        stack.enter_context(untouched_generators())
        for owner, name in _REFUSED:
            if hasattr(owner, name):
                stack.enter_context(replaced(owner, name, _refusing(name.strip("_"))))
        stack.enter_context(replaced(builtins, "isinstance", is_instance))
        stack.enter_context(_OnlyOfInputs())
        yield
