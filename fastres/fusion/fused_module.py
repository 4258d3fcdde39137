"""A module whose forward is a program with fused ops in it.

A fused module is of a class derived from its own that overrides `forward` alone: the same children,
parameters, buffers, keys and hooks, because it inherits them. Where its program does not hold, or
something stands between a module's call and what it computes (model/interception.py), it falls
back to the forward of its own class: the module as it was.
"""

import functools
from typing import Any, ClassVar, cast

import torch
from torch import nn

from fastres.fusion.program import Program, Unwritten
from fastres.model.interception import is_as_defined, is_intercepted, is_plain_tensor

__all__ = [
    "FusedModule",
    "become_fused",
    "become_plain",
    "can_be_fused",
    "is_of_a_fused_class",
]


class FusedModule(nn.Module):
    """What all fused modules share; mixed in before the class that is sped up.

    Attributes:
        fused_program: what is run; None, as in a slice of a Sequential, is the plain forward.
    """

    _plain: ClassVar[type[nn.Module]]
    fused_program: Program | Unwritten | None = None

    def __prepare_scriptable__(self) -> nn.Module:
        """Return what torch.jit.script compiles in place of this module."""
        return _to_plain(self, {})

    def __reduce__(self) -> tuple[Any, ...]:
        if not is_of_a_fused_class(self):
            return cast(tuple[Any, ...], super().__reduce__())
        return _empty, (self._plain,), self.__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if isinstance(self.fused_program, Unwritten):
            from fastres.fusion.fuse import fuse_again

            fuse_again(self, self.fused_program)


def is_of_a_fused_class(module: nn.Module) -> bool:
    """Whether a module is fused, and not of a class that somebody derived from one of ours."""
    return isinstance(module, FusedModule) and type(module).__module__ == __name__


def can_be_fused(module: nn.Module) -> bool:
    """Whether a module is no fused one, and its forward is what the file of its class defines."""
    if isinstance(module, FusedModule) or "forward" in vars(module):
        return False
    return hasattr(module, "forward") and is_as_defined(type(module), "forward")


def become_fused(module: nn.Module, program: Program) -> None:
    """Have a module run a program."""
    module.__class__ = _fused_class(cast(Any, type(module)))
    module.fused_program = program  # type: ignore[assignment]


def become_plain(module: FusedModule) -> None:
    """Have a module run the forward of its own class."""
    module.__class__ = module._plain  # type: ignore[assignment]
    vars(module).pop(_PROGRAM, None)


@functools.cache
def _fused_class(plain: type[nn.Module]) -> type[FusedModule]:
    """The fused class of a class of modules."""

    # Tracers and exporters ask for the names of the arguments.
    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        program = self.fused_program
        if program is None or kwargs or not _runs(program, self, args):
            return plain.forward(self, *args, **kwargs)
        return program.run(self, *args)

    members = {"__module__": __name__, "_plain": plain, "forward": forward}
    return type(f"Fused{plain.__name__}", (FusedModule, plain), members)


def _runs(program: Program, module: FusedModule, args: tuple[Any, ...]) -> bool:
    """Whether a program computes what is wanted of these arguments."""
    return (
        len(args) == program.num_arguments
        and not is_intercepted(args[0])
        and all(map(is_plain_tensor, args[1:]))
        and module._plain.forward is program.plain_forward
        and program.holds_for(module)
    )


def _empty(plain: type[nn.Module]) -> nn.Module:
    """A fused module of a class, before it is given what it holds."""
    kind = _fused_class(cast(Any, plain))
    return kind.__new__(kind)


def _to_plain(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """The same parameters and buffers in modules of the plain classes; `module` stays as it is.

    done: {id of a module: what became of it}, for those that occur twice.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return module
    if id(module) not in done:
        kind = type(module)
        if is_of_a_fused_class(module):
            kind = cast(FusedModule, module)._plain
        plain = done[id(module)] = kind.__new__(kind)
        children = {
            name: child if child is None else _to_plain(child, done)
            for name, child in module._modules.items()
        }
        attributes = {name: value for name, value in vars(module).items() if name != _PROGRAM}
        plain.__dict__ = {**attributes, "_modules": children}
    return done[id(module)]


_PROGRAM = "fused_program"
