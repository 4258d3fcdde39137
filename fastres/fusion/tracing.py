"""A module's forward as a graph of torch.fx, or a reason why there is none.

A trace fixes whatever Python decides while it is made, and loses what is no operation. Here is what
keeps it from telling a lie later:

    self.training            stays a question of the graph; to branch on it ends the trace
    other attributes         are recorded with their values, to be compared at every call
    arguments with defaults  have those; who gives others meets the plain forward
    modes, random numbers,   end the trace: `torch.no_grad`, autocast, checkpoint, `torch.rand`,
    tensors, side effects    `print`, assignments to attributes, tensors kept for later
    children that end it     are called as they are, and all around them is traced
"""

import enum
import gc
import inspect
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from fastres.fusion.trace_refusals import (
    no_garbage_collected,
    replaced,
    undisturbed,
    untouched_generators,
)
from fastres.fusion.traced_values import TensorProxy, Untraceable, is_number
from fastres.model.interception import is_overridden

__all__ = [
    "NORM_MARK",
    "Method",
    "NormsThen",
    "Trace",
    "plain_norm",
    "trace",
    "tracing",
]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Found in every module; what a forward reads beside them is its own.
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | frozenset(dir(nn.Module))
_CONSTANTS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_IDENTITIES = (type, enum.Enum, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)


class Method(NamedTuple):
    """A function that a module has of its class."""

    function: Any


@dataclass
class Trace:
    """A graph and what it takes for granted.

    inlined: {path: module} whose forward is part of the graph, the root's as "".
    reads: {(path, name): value} of attributes that a forward has read.
    missing: {(path, name): whether it is None} of children, parameters and buffers it has read.
    children: {path: their names} of modules that were asked for all of them.
    shared: {path: another} of modules that have two.
    opaque: {path: why it is called as it is}. takes_tensors: paths of the modules that were called
    with tensors and nothing else.
    """

    graph: fx.Graph
    inlined: dict[str, nn.Module] = field(default_factory=dict)
    reads: dict[tuple[str, str], Any] = field(default_factory=dict)
    missing: dict[tuple[str, str], bool] = field(default_factory=dict)
    children: dict[str, tuple[str, ...]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)
    takes_tensors: set[str] = field(default_factory=set)

    def copy(self) -> "Trace":
        """The same records, which no longer grow together."""
        return replace(
            self,
            inlined=dict(self.inlined),
            reads=dict(self.reads),
            missing=dict(self.missing),
            children=dict(self.children),
            opaque=dict(self.opaque),
            takes_tensors=set(self.takes_tensors),
        )


def _is_leaf_of_torch(module: nn.Module) -> bool:
    """Whether torch itself has defined what a module computes."""
    return type(module).__module__.startswith("torch.") and not isinstance(
        module, (*_CONTAINERS, nn.Identity)
    )


def plain_norm(norm: nn.BatchNorm2d, y: Tensor) -> Tensor:
    """The batch norm that a module of another class begins with."""
    return nn.BatchNorm2d.forward(norm, y)


# The attribute that says so of a module, with the forward of which it is true.
NORM_MARK = "begins_with_norm"

# {id of a batch norm of a class of its own: names of the children that it calls behind a plain
# one, and what that takes for granted}; see norms.py.
NormsThen = dict[int, tuple[list[str], Trace]]


def trace(
    root: nn.Module,
    inlines: Callable[[str, nn.Module], bool],
    norms: NormsThen,
    training: bool | None = None,
) -> Trace:
    """Trace the forward of `root`, of whose children those are inlined that `inlines` says.

    In a graph node's meta, "frame" is the path of the module whose forward has called it.

    Args:
        root: the module.
        inlines: asked with path and module of every child that is called.
        norms: those are recorded as `plain_norm` and what is behind it.
        training: what `self.training` is taken to be; None: a question of the graph.

    Raises: Untraceable: when its own forward has no graph.
    """
    tracer = _Tracer(inlines, norms, training)
    try:
        with no_garbage_collected():
            with undisturbed(), tracer.recording(root):
                graph = tracer.trace(root)
                graph.lint()
            tracer.refuse_kept_values()
    except (Exception, Untraceable) as error:
        raise Untraceable(_in_short(error)) from error
    first = {id(module): path for path, module in root.named_modules()}
    shared = {
        path: first[id(module)]
        for path, module in root.named_modules(remove_duplicate=False)
        if first[id(module)] != path
    }
    return replace(tracer.found, graph=graph, shared=shared)


def _in_short(error: BaseException) -> str:
    is_told = isinstance(error, Untraceable | fx.proxy.TraceError)
    return (str(error) if is_told else repr(error)).strip().split("\n")[0][:100]


class _Tracer(fx.Tracer):
    """Records a forward, and what it reads of its modules."""

    def __init__(
        self,
        inlines: Callable[[str, nn.Module], bool],
        norms: NormsThen,
        training: bool | None,
    ):
        # Functions of math take numbers alone: a forward that has them of its input ends the trace.
        super().__init__(autowrap_modules=cast(Any, ()))
        self._inlines = inlines
        self._norms = norms
        self._training = training
        self._frames = [""]
        # By identity: to ask a module for its children would be recorded.
        self._paths: dict[int, str] = {}
        self._tensors: dict[int, str] = {}
        self._is_recording = False
        # What a forward was given for a list of its module, which it may not change.
        self._lent: dict[tuple[str, str], Any] = {}
        self._values: list[weakref.ref[fx.Proxy]] = []
        # Children that were asked for their forward and not called.
        self._asked: set[str] = set()
        self.found = Trace(fx.Graph())

    @contextmanager
    def recording(self, root: nn.Module) -> Iterator[None]:
        """Record what modules are asked for while a forward runs."""
        self._paths = {id(module): path for path, module in root.named_modules()}
        tensors = (*root.named_parameters(), *root.named_buffers())
        self._tensors = {id(tensor): path for path, tensor in tensors}
        self.found.inlined[""] = root
        self.found.reads["", "forward"] = Method(type(root).forward)
        with tracing():
            _tracers.append(self)
            try:
                yield
                self._refuse_changes()
                for path in self._asked:
                    raise Untraceable(f"it calls the forward of {path} past its hooks")
            finally:
                self._is_recording = False
                _tracers.pop()

    def path_of(self, module: nn.Module) -> str | None:
        """The path of a module that is asked for something by a forward."""
        return self._paths.get(id(module)) if self._is_recording else None

    def refuse_kept_values(self) -> None:
        """Refuse a forward that has put a value where others find it."""
        # The trace itself leaves cycles; all of it is young, see `_no_garbage_collected`.
        gc.collect(0)
        if any(value() is not None for value in self._values):
            raise Untraceable("it keeps a tensor for later")

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Refuse to branch on a value."""
        raise Untraceable("it branches on what it computes")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Refuse to run through a value."""
        raise Untraceable("it runs through what it computes")

    def keys(self, obj: fx.Proxy) -> Any:
        """Refuse to run through a value."""
        raise Untraceable("it runs through what it computes")

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Make a value for every argument without a default; the others are what they are."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        given = list(inspect.signature(root_fn).parameters.values())[1:]
        required = [p.name for p in given if p.kind in kinds and p.default is p.empty]
        if not required:
            raise Untraceable("it takes no tensor by name")
        self._is_recording = True
        return root_fn, [
            self.root,
            *(self.create_proxy("placeholder", name, (), {}) for name in required),
        ]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a value of the graph."""
        value = (fx.Proxy if node.meta["is_number"] else TensorProxy)(node, self)
        self._values.append(weakref.ref(value))
        return value

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        """Return parameters and buffers as values of the graph."""
        name = self._tensors.get(id(attr_val))
        return attr_val if name is None else self.create_proxy("get_attr", name, (), {})

    def create_arg(self, a: Any) -> Any:
        """Return the node of a value; torch.fx would ask first whether it is a parameter."""
        if isinstance(a, fx.Proxy):
            return a.node
        if id(a) in self._tensors:
            return self.create_node("get_attr", self._tensors[id(a)], (), {})
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record a call, and whose it is."""
        node = super().create_node(*args, **kwargs)
        node.meta["frame"] = self._frames[-1]
        node.meta["is_number"] = is_number(node)
        return node

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """Inline a child, or record a call of it."""
        path = self._paths.get(id(m))
        self._asked.discard(path or "")
        if path is None:
            # Made in the forward: nobody else can have it.
            return forward(*args, **kwargs)
        if id(m) in self._norms and not is_overridden(m) and len(args) == 1 and not kwargs:
            return self._norm_then(path, m, *args)
        if not self._is_inlined(path, m):
            return self.create_proxy("call_module", path, args, kwargs)
        last, before = next(iter(reversed(self.graph.nodes))), self.found.copy()
        if not kwargs and all(type(value) is TensorProxy for value in args):
            self.found.takes_tensors.add(path)
        self.found.inlined[path] = m
        self._frames.append(path)
        try:
            with untouched_generators():
                out = forward(*args, **kwargs)
                self._refuse_changes()
                return out
        except (Exception, Untraceable) as error:
            self._take_back(last)
            self._lent.clear()
            self.found = before
            self.found.opaque[path] = _in_short(error)
        finally:
            self._frames.pop()
        return self.create_proxy("call_module", path, args, kwargs)

    def _is_inlined(self, path: str, child: nn.Module) -> bool:
        if path in self.found.opaque or _is_leaf_of_torch(child) or is_overridden(child):
            return False
        self._is_recording = False
        try:
            return self._inlines(path, child)
        finally:
            self._is_recording = True

    def _norm_then(self, path: str, norm: nn.Module, y: Any) -> Any:
        """Record a batch norm of a class of its own as a plain one and the modules behind it."""
        names, found = self._norms[id(norm)]
        self.found.inlined[path] = norm
        for (at, name), value in found.reads.items():
            self.found.reads[f"{path}.{at}".rstrip("."), name] = value
        for (at, name), is_missing in found.missing.items():
            self.found.missing[f"{path}.{at}".rstrip("."), name] = is_missing
        self.found.reads[path, NORM_MARK] = type(norm).forward
        module = fx.Proxy(self.create_node("get_attr", path, (), {}), self)
        value = self.create_proxy("call_function", plain_norm, (module, y), {})
        children = object.__getattribute__(norm, "_modules")
        for name in names:
            value = children[name](value)
        return value

    def _take_back(self, last: fx.Node) -> None:
        """Erase the nodes behind one, which only each other read."""
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            self.graph.erase_node(node)

    def read(self, path: str, module: nn.Module, name: str) -> Any:
        """Return an attribute of a module, and record it."""
        if name == "training" and self._training is not None:
            return self._training
        if name == "training":
            where = f"{path}.{name}".lstrip(".")
            return fx.Proxy(self.create_node("get_attr", where, (), {}), self)
        try:
            value = object.__getattribute__(module, name)
        except AttributeError:
            kinds = ("_parameters", "_buffers", "_modules")
            members = [object.__getattribute__(module, kind).get(name) for kind in kinds]
            self.found.missing[path, name] = all(member is None for member in members)
            raise
        if name in ("_parameters", "_buffers"):
            raise Untraceable("it asks for all its parameters or buffers")
        if name == "_modules":
            # Whoever asks for all children, as a loop does, depends on which there are.
            self.found.children[path] = tuple(value)
        elif name == "forward" and path not in self.found.inlined:
            # So does torch.fx before it calls one.
            self._asked.add(path)
        elif name == "forward" or name not in _OF_EVERY_MODULE:
            return self._record(path, name, value)
        return value

    def _record(self, path: str, name: str, value: Any) -> Any:
        """Keep a value for comparison, and return what the forward gets for it."""
        if isinstance(value, Tensor | nn.Module):
            self.found.missing[path, name] = False
            return value
        kept = Method(value.__func__) if isinstance(value, types.MethodType) else value
        if not _is_constant(kept):
            raise Untraceable(f"it reads {name}, a {type(value).__name__}")
        if self.found.reads.setdefault((path, name), _copied(kept)) != kept:
            raise Untraceable(f"its attribute {name} changes while it runs")
        if isinstance(value, list | dict | set):
            return self._lent.setdefault((path, name), _copied(value))
        return value

    def _refuse_changes(self) -> None:
        """Refuse a forward that has changed a list of its module: it was lent a copy."""
        for (path, name), lent in self._lent.items():
            if not _is_constant(lent) or lent != self.found.reads[path, name]:
                raise Untraceable(f"it changes its attribute {name}")


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, set) else tree_map(lambda leaf: leaf, value)


# Those at work; the last one records.
_tracers: list[_Tracer] = []


@contextmanager
def tracing() -> Iterator[None]:
    """Have modules tell tracers what they are asked for.

    To change nn.Module takes long, as all classes of modules hear of it: who traces more than once
    does it around all of them.
    """
    if nn.Module.__getattribute__ is not object.__getattribute__:
        yield
        return
    set_attribute = nn.Module.__setattr__
    delete_attribute = nn.Module.__delattr__

    def read(module: nn.Module, name: str) -> Any:
        path = _tracers[-1].path_of(module) if _tracers else None
        if path is None:
            return object.__getattribute__(module, name)
        return _tracers[-1].read(path, module, name)

    def write(module: nn.Module, name: str, value: Any) -> None:
        _refuse_change(name)
        set_attribute(module, name, value)

    def delete(module: nn.Module, name: str) -> None:
        _refuse_change(name)
        delete_attribute(module, name)

    with (
        replaced(nn.Module, "__getattribute__", read),
        replaced(nn.Module, "__setattr__", write),
        replaced(nn.Module, "__delattr__", delete),
    ):
        yield


def _refuse_change(name: str) -> None:
    if _tracers:
        raise Untraceable(f"it changes its attribute {name}")


def _is_constant(value: Any) -> bool:
    """Whether a value can be compared with what it was."""
    if isinstance(value, Method):
        return True
    if isinstance(value, list | tuple | set):
        return all(map(_is_constant, value))
    if isinstance(value, dict):
        return all(map(_is_constant, value.values()))
    return isinstance(value, (*_CONSTANTS, *_IDENTITIES))
