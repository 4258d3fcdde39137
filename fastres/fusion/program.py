"""The forward of a module with fused ops in it, and what it takes for granted.

A `Program` is generated once from a graph of the module's forward and belongs to no module: it
reads children and attributes of the module that it is run for, so that copies share it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fastres.fusion.aliases import Aliases
from fastres.fusion.layouts import is_flattened
from fastres.fusion.operations import ModuleGraph, is_in_place, replace_nodes
from fastres.fusion.patterns import Layer, Match
from fastres.fusion.tracing import Method, Trace
from fastres.model.conv_bn import ConvBNModules
from fastres.model.head import pool_classify
from fastres.model.interception import is_overridden
from fastres.model.residual_block import residual_block

__all__ = ["Head", "Program", "Unwritten", "find_heads", "run_layers", "write_program"]


def run_layers(
    x: Tensor,
    shortcut: Any,
    layers: Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]],
    projection: tuple[nn.Conv2d, nn.BatchNorm2d] | None,
    relu: bool,
    adds_in_place: bool,
    layout_is_seen: bool,
) -> Tensor:
    """`residual_block` of modules, in torch's own layout where that can be seen."""
    given = [ConvBNModules(*layer) for layer in layers]
    out = residual_block(
        x,
        given,
        projection=None if projection is None else ConvBNModules(*projection),
        shortcut=shortcut,
        relu=relu,
        adds_in_place=adds_in_place,
    )
    if not layout_is_seen or not all(isinstance(conv, nn.Conv2d) for conv, _ in layers):
        return out
    return out.contiguous() if _makes_contiguous(x, [conv.weight for conv, _ in layers]) else out


def _makes_contiguous(x: Tensor, filters: Iterable[Tensor]) -> bool:
    """Whether torch's convolutions of x would return NCHW: where neither is channels_last."""
    layouts = [(w.is_contiguous(), _is_channels_last(w)) for w in filters]
    if any(is_nchw and not is_nhwc for is_nchw, is_nhwc in layouts):
        return True
    # A 1x1 filter is both.
    return all(is_nchw for is_nchw, _ in layouts) and x.is_contiguous()


def _is_channels_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last)


class Head(NamedTuple):
    """A mean over all pixels and the linear layer that reads it."""

    x: fx.Node
    linear: fx.Node
    between: list[fx.Node]


def find_heads(graph: ModuleGraph) -> Iterator[Head]:
    """Yield the classifiers of a graph."""
    for node in graph.graph.nodes:
        if type(graph.module(node)) is not nn.Linear:
            continue
        between: list[fx.Node] = []
        value = node.args[0]
        while isinstance(value, fx.Node) and len(value.users) == 1 and len(between) < 2:
            between.insert(0, value)
            if _is_mean(graph, value) and isinstance(value.args[0], fx.Node):
                if Aliases(graph).are_movable([*between, node], node):
                    yield Head(value.args[0], node, between)
                break
            value = value.args[0] if is_flattened(value, graph.root) else None


def _is_mean(graph: ModuleGraph, node: fx.Node) -> bool:
    """Whether a node is the mean over all pixels, (N, C) or (N, C, 1, 1)."""
    module = graph.module(node)
    if type(module) is nn.AdaptiveAvgPool2d:
        is_global = module.output_size in (1, (1, 1)) and not is_overridden(module)
        # Only a flattened one is (N, C).
        return is_global and any(is_flattened(user, graph.root) for user in node.users)
    dims = node.args[1] if len(node.args) == 2 else node.kwargs.get("dim")
    return node.target == "mean" and dims in ((2, 3), [2, 3]) and set(node.kwargs) <= {"dim"}


class _Check(NamedTuple):
    """What a program takes for granted of one module inside the one it is run for."""

    path: tuple[str, ...]
    kind: type[nn.Module] | None
    methods: tuple[tuple[str, Any], ...] = ()
    values: tuple[tuple[str, Any], ...] = ()
    missing: tuple[tuple[str, bool], ...] = ()
    children: tuple[str, ...] | None = None

    def holds_for(self, root: nn.Module) -> bool:
        """Whether it is so now."""
        module = _child(root, self.path)
        if module is None:
            return False
        if self.kind is not None and (type(module) is not self.kind or is_overridden(module)):
            return False
        if self.children is not None and tuple(module._modules) != self.children:
            return False
        for name, function in self.methods:
            if getattr(type(module), name, None) is not function or name in vars(module):
                return False
        for name, value in self.values:
            now = getattr(module, name, _NOTHING)
            if now is not value and (type(now) is not type(value) or now != value):
                return False
        for name, is_missing in self.missing:
            if (getattr(module, name, None) is None) != is_missing:
                return False
        return True


_NOTHING = object()


class _Shared(NamedTuple):
    """That two paths lead to one module."""

    path: tuple[str, ...]
    other: tuple[str, ...]

    def holds_for(self, root: nn.Module) -> bool:
        """Whether it is so now."""
        return _child(root, self.path) is _child(root, self.other)


def _child(root: nn.Module, path: tuple[str, ...]) -> Any:
    """The module at a path, or None."""
    module: Any = root
    for name in path:
        module = None if module is None else module._modules.get(name)
    return module


@dataclass(frozen=True)
class Program:
    """A forward with fused ops in it.

    run: the function, of a module and its arguments. plain_forward: the function of its class that
    it computes. num_arguments: how many it takes. checks: what it takes for granted. absorbed:
    paths of the children whose work it does. source: what it was written from.
    """

    run: Callable[..., Any]
    plain_forward: Any
    num_arguments: int
    checks: tuple["_Check | _Shared", ...]
    absorbed: frozenset[str]
    source: "Unwritten"

    def holds_for(self, root: nn.Module) -> bool:
        """Whether nothing that the program takes for granted has changed."""
        for check in self.checks:  # noqa: SIM110 - asked at every call; all() takes longer
            if not check.holds_for(root):
                return False
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> "Program":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Unwritten, tuple(self.source)


class Unwritten(NamedTuple):
    """What a program is written anew from where it was pickled.

    inlined: paths of the children whose forward is part of it. layouts: whether the layout of each
    match is seen.
    """

    inlined: frozenset[str]
    layouts: tuple[bool, ...]


def write_program(
    found: Trace,
    graph: ModuleGraph,
    matches: Sequence[Match],
    source: Unwritten,
) -> Program:
    """Generate the program of a graph, which is changed, with its matches in fused ops."""
    heads = list(find_heads(graph))
    layers = [layer for match in matches for layer in match.all_layers]
    parts = [_path(graph, node) for layer in layers for node in layer.nodes]
    taken = [node for match in matches for node in (*match.between, match.activated)]
    taken += [node for head in heads for node in head.between]
    plain = [str(node.target) for node in taken if node is not None and node.op == "call_module"]

    replaced: dict[fx.Node, fx.Node] = {}
    for match, is_seen in zip(matches, source.layouts, strict=True):
        _rewrite(graph, match, replaced, is_seen)
    for head in heads:
        _rewrite_head(graph.graph, head, replaced)
    paths = {path for path, _ in (*found.reads, *found.missing)} | {*found.inlined, *found.children}
    checks: list[_Check | _Shared] = [
        *(_check_of(found, path) for path in sorted(paths)),
        *(_check_of_taken(path, graph.root.get_submodule(path)) for path in plain),
        *(_Shared(_split(path), _split(other)) for path, other in found.shared.items()),
    ]
    forward = found.reads["", "forward"].function
    absorbed = frozenset([*parts, *plain])
    num_arguments = sum(node.op == "placeholder" for node in graph.graph.nodes)
    run = _compiled(graph.graph)
    return Program(run, forward, num_arguments, tuple(checks), absorbed, source)


def _split(path: str) -> tuple[str, ...]:
    return tuple(path.split(".")) if path else ()


def _path(graph: ModuleGraph, node: fx.Node) -> str:
    """The path of the module that a convolution or a norm calls."""
    return str(node.target if node.op == "call_module" else node.args[0].target)  # type: ignore[union-attr]


def _check_of_taken(path: str, module: nn.Module) -> _Check:
    """What is taken for granted of a module in whose place an op computes."""
    names = [name for name in ("output_size", "start_dim", "end_dim") if name in vars(module)]
    values = tuple((name, getattr(module, name)) for name in names)
    return _Check(_split(path), type(module), values=values)


def _check_of(found: Trace, path: str) -> _Check:
    """What is taken for granted of a module, whose own forward may be part of the program."""
    own = [(name, value) for (at, name), value in found.reads.items() if at == path]
    # The forward of the module itself is the program's.
    own = [(name, value) for name, value in own if path or name != "forward"]
    methods = [(name, value.function) for name, value in own if isinstance(value, Method)]
    values = [(name, value) for name, value in own if not isinstance(value, Method)]
    missing = [(name, value) for (at, name), value in found.missing.items() if at == path]
    kind = type(found.inlined[path]) if path and path in found.inlined else None
    children = found.children.get(path)
    return _Check(_split(path), kind, tuple(methods), tuple(values), tuple(missing), children)


def _rewrite(
    graph: ModuleGraph, match: Match, replaced: dict[fx.Node, fx.Node], layout_is_seen: bool
) -> None:
    """Have `run_layers` compute what the nodes of a match do."""
    last, shortcut = match.last, match.shortcut

    def modules_of(layer: Layer) -> tuple[fx.Node, ...]:
        return tuple(graph.graph.get_attr(_path(graph, node)) for node in layer.nodes)

    with graph.graph.inserting_before(last):
        node = graph.graph.call_function(
            run_layers,
            (
                replaced.get(match.x, match.x),
                None if shortcut is None else replaced.get(shortcut, shortcut),
                tuple(modules_of(layer) for layer in match.layers),
                None if match.projection is None else modules_of(match.projection),
                match.activated is not None,
                match.added is not None and is_in_place(match.added),
                layout_is_seen,
            ),
        )
    replace_nodes(graph.graph, match.nodes, last, node, replaced)


def _rewrite_head(graph: fx.Graph, head: Head, replaced: dict[fx.Node, fx.Node]) -> None:
    """Have `pool_classify` compute a mean over pixels and the linear layer behind it."""
    with graph.inserting_before(head.linear):
        linear = graph.get_attr(str(head.linear.target))
        node = graph.call_function(pool_classify, (replaced.get(head.x, head.x), linear))
    replace_nodes(graph, [*head.between, head.linear], head.linear, node, replaced)


def _compiled(graph: fx.Graph) -> Callable[..., Any]:
    """The function of a graph: of a module, and of what the module is called with."""
    graph.lint()
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<a forward with fused ops>", "exec"), namespace)
    return namespace["forward"]
