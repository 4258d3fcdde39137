"""What the nodes of a graph compute, in the words of the patterns: convolution, norm, ReLU, sum.

Two kinds of graphs are read. What Dynamo captures has functions and tensors alone
(`FunctionGraph`); what torch.fx traces of a module calls its children too (`ModuleGraph`).
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastres.fusion.tracing import plain_norm
from fastres.model.conv_bn import is_unmodified_relu, why_not_fused

__all__ = [
    "Convolution",
    "FunctionGraph",
    "Graph",
    "ModuleGraph",
    "Norm",
    "as_pair",
    "bind",
    "is_in_place",
    "replace_nodes",
]


class Convolution(NamedTuple):
    """A 2-d convolution: its node, its input, and all that it is called with."""

    node: fx.Node
    x: fx.Node
    given: Any


class Norm(NamedTuple):
    """A 2-d batch norm: its node, its input, and all that it is called with."""

    node: fx.Node
    y: fx.Node
    given: Any


class Graph(Protocol):
    """A graph whose nodes can be read."""

    @property
    def graph(self) -> fx.Graph:
        """Its nodes."""

    @property
    def root(self) -> nn.Module:
        """The module whose children are called in it."""

    def convolution(self, node: fx.Node) -> Convolution | None:
        """The convolution that a node is."""

    def norm(self, node: fx.Node) -> Norm | None:
        """The batch norm that a node is."""

    def activated(self, node: fx.Node) -> fx.Node | None:
        """What a node is the ReLU of."""

    def added(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The two values that a node is the sum of."""

    def why_not(self, conv: Convolution, norm: Norm) -> str | None:
        """Why a convolution and its batch norm cannot be one op, or None."""

    def are_alike(self, norm: Norm, other: Norm) -> bool:
        """Whether two batch norms take their statistics from the same place."""

    def place(self, norm: fx.Node) -> object:
        """In which module's forward a batch norm is called."""


def bind(node: fx.Node, names: str, **defaults: Any) -> dict[str, Any]:
    """The arguments of a call by name, where its function takes `names` in this order."""
    return defaults | dict(zip(names.split(), node.args, strict=False)) | node.kwargs


_RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
_SUMS = (operator.add, operator.iadd, torch.add)


def is_in_place(node: fx.Node) -> bool:
    """Whether a call by its name changes its first argument."""
    code = getattr(node.target, "__code__", None)
    names = "" if code is None else " ".join(code.co_varnames[: code.co_argcount])
    given = bind(node, names)
    if given.get("inplace") or given.get("out") is not None:
        return True
    name = str(getattr(node.target, "__name__", node.target)).rpartition(".")[2]
    if node.op == "call_function" and getattr(operator, name, None) is node.target:
        return name in _CHANGING_OPERATORS
    return name.endswith("_") and not name.endswith("__")


_CHANGING_OPERATORS = {
    *("iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior"),
    *("ipow", "irshift", "isub", "itruediv", "ixor", "setitem", "delitem"),
}


def _relu_of_call(node: fx.Node) -> fx.Node | None:
    is_function = node.op == "call_function" and node.target in _RELU_FUNCTIONS
    is_method = node.op == "call_method" and node.target in ("relu", "relu_")
    if not (is_function or is_method):
        return None
    x = bind(node, "input inplace")["input"]
    return x if isinstance(x, fx.Node) else None


def _sum_of_call(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    is_function = node.op == "call_function" and node.target in _SUMS
    is_method = node.op == "call_method" and node.target in ("add", "add_")
    if not (is_function or is_method) or set(node.kwargs) - {"input", "other", "alpha"}:
        return None
    given = bind(node, "input other", alpha=1)
    pair = given.get("input"), given.get("other")
    if given["alpha"] != 1 or not all(isinstance(value, fx.Node) for value in pair):
        return None
    return pair  # type: ignore[return-value]


def as_pair(size: Any) -> tuple[int, int] | None:
    """A stride, padding or dilation as two numbers; None for words and symbols."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and all(isinstance(length, int) for length in size):
        return (size[0], size[-1]) if len(size) in (1, 2) else None
    return None


class FunctionGraph:
    """A graph of functions, as Dynamo captures it: parameters are inputs of the graph.

    wants_gradients: whether anything in it may want one.
    """

    def __init__(self, root: fx.GraphModule, wants_gradients: bool):
        self.graph = root.graph
        self.root = root
        self._wants_gradients = dict(_gradient_modes(root.graph, wants_gradients))

    def convolution(self, node: fx.Node) -> Convolution | None:
        """See `Graph`."""
        if node.op != "call_function" or node.target not in (torch.conv2d, F.conv2d):
            return None
        defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        given = bind(node, "input weight bias stride padding dilation groups", **defaults)
        x = given["input"]
        return Convolution(node, x, given) if isinstance(x, fx.Node) else None

    def norm(self, node: fx.Node) -> Norm | None:
        """See `Graph`."""
        if node.op != "call_function" or node.target is not F.batch_norm:
            return None
        names = "input running_mean running_var weight bias training momentum eps"
        defaults = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
        given = bind(node, names, **defaults)
        y = given["input"]
        return Norm(node, y, given) if isinstance(y, fx.Node) else None

    def activated(self, node: fx.Node) -> fx.Node | None:
        """See `Graph`."""
        return _relu_of_call(node)

    def added(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """See `Graph`."""
        pair = _sum_of_call(node)
        if pair is None:
            return None
        total, first, second = (_example(value) for value in (node, *pair))
        if total is None or first is None or second is None:
            return None
        # Plain torch would broadcast and promote, and no op does.
        alike = first.shape == second.shape and first.dtype == second.dtype == total.dtype
        return pair if alike and first.device == second.device else None

    def why_not(self, conv: Convolution, norm: Norm) -> str | None:
        """See `Graph`."""
        given = conv.given
        stride, padding, dilation = (
            as_pair(given[key]) for key in ("stride", "padding", "dilation")
        )
        if given["groups"] != 1:
            return f"{given['groups']} groups"
        if dilation != (1, 1):
            return f"dilation {given['dilation']}"
        if stride is None or padding is None or len({*stride}) != 1 or len({*padding}) != 1:
            return f"stride {given['stride']}, padding {given['padding']}"
        if any(norm.given[key] is None for key in ("weight", "bias")):
            return "batch norm without parameters"
        if any(norm.given[key] is None for key in ("running_mean", "running_var")):
            return "batch norm without running statistics"
        if not isinstance(norm.given["training"], bool) or not _are_numbers(norm):
            return "batch norm with a momentum or eps that is computed"
        if not norm.given["training"] and self._wants_gradients[norm.node]:
            return "batch norm in evaluation, with gradients"
        x, y = _example(conv.x), _example(conv.node)
        if x is None or y is None or x.dim() != 4 or not x.is_floating_point():
            return "its input is no batch of images"
        if type(x) not in _PLAIN_TYPES:
            return f"its input is a {type(x).__name__}"
        statistics = [norm.given["running_mean"], norm.given["running_var"]]
        if norm.given["training"] and any(len(value.users) > 1 for value in statistics):
            return "its batch norm is used more than once"
        return None

    def are_alike(self, norm: Norm, other: Norm) -> bool:
        """See `Graph`."""
        return norm.given["training"] == other.given["training"]

    def place(self, norm: fx.Node) -> object:
        """See `Graph`."""
        stack = list(norm.meta.get("nn_module_stack", {}).values())
        is_module = bool(stack) and _is_norm_class(stack[-1][1])
        return [source for source, _ in (stack[:-1] if is_module else stack)]


_PLAIN_TYPES = (Tensor, nn.Parameter, torch._subclasses.FakeTensor)


def _is_norm_class(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, nn.BatchNorm2d)


def _example(node: fx.Node) -> Tensor | None:
    """The tensor without numbers that Dynamo has computed for a node."""
    value = node.meta.get("example_value")
    return value if isinstance(value, Tensor) else None


def _are_numbers(norm: Norm) -> bool:
    return all(isinstance(norm.given[key], int | float) for key in ("momentum", "eps"))


def _gradient_modes(graph: fx.Graph, enabled: bool) -> Iterator[tuple[fx.Node, bool]]:
    """Yield every node with whether a gradient may be wanted of it."""
    now = enabled
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            now = enabled and bool(node.args[0])
        yield node, now


class ModuleGraph:
    """A graph that torch.fx has traced of `root`: children are called by name."""

    def __init__(self, graph: fx.Graph, root: nn.Module):
        self.graph = graph
        self.root = root
        # By the id of a norm: its calls, and the reads of its running statistics.
        self._uses: dict[int, int] = {}
        for node in graph.nodes:
            norm = self.norm(node)
            used = self._norm_with(node) if norm is None else norm.given
            if used is not None:
                self._uses[id(used)] = self._uses.get(id(used), 0) + 1

    def _norm_with(self, node: fx.Node) -> nn.Module | None:
        """The norm whose running statistics a node reads."""
        path, _, name = str(node.target).rpartition(".")
        if node.op != "get_attr" or not path:
            return None
        module = self.root.get_submodule(path)
        return module if isinstance(module, nn.BatchNorm2d) and name in module._buffers else None

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls with one value."""
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        return self.root.get_submodule(str(node.target))

    def _called(self, node: fx.Node, is_kind: Callable[[Any], bool]) -> nn.Module | None:
        module = self.module(node)
        return module if module is not None and is_kind(module) else None

    def convolution(self, node: fx.Node) -> Convolution | None:
        """See `Graph`."""
        module = self._called(node, lambda module: isinstance(module, nn.Conv2d))
        x = node.args[0] if module is not None else None
        return Convolution(node, x, module) if isinstance(x, fx.Node) else None

    def norm(self, node: fx.Node) -> Norm | None:
        """See `Graph`."""
        module = self._called(node, lambda module: isinstance(module, nn.BatchNorm2d))
        y = node.args[0] if module is not None else None
        if node.target is plain_norm:
            attribute, y = cast(tuple[fx.Node, fx.Node], node.args)
            module = self.root.get_submodule(str(attribute.target))
        return Norm(node, y, module) if isinstance(y, fx.Node) else None

    def activated(self, node: fx.Node) -> fx.Node | None:
        """See `Graph`."""
        x = node.args[0] if self._called(node, is_unmodified_relu) is not None else None
        return x if isinstance(x, fx.Node) else _relu_of_call(node)

    def added(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """See `Graph`."""
        return _sum_of_call(node)

    def why_not(self, conv: Convolution, norm: Norm) -> str | None:
        """See `Graph`."""
        if self._uses[id(norm.given)] > 1:
            return "its batch norm is used more than once"
        return why_not_fused(conv.given, norm.given, is_norm_alone=norm.node.target is plain_norm)

    def are_alike(self, norm: Norm, other: Norm) -> bool:
        """See `Graph`: modules are asked when they run."""
        return True

    def place(self, norm: fx.Node) -> object:
        """See `Graph`."""
        return norm.meta["frame"]


def replace_nodes(
    graph: fx.Graph,
    nodes: Sequence[fx.Node],
    last: fx.Node,
    node: fx.Node,
    replaced: dict[fx.Node, fx.Node],
) -> None:
    """Put a node into the place of others, of which the last one's value is read.

    replaced: {last node of what was replaced: the node that stands there now}, which is added to.
    """
    replaced[last] = node
    node.meta = dict(last.meta)
    last.replace_all_uses_with(node)
    inside = set(nodes)
    for old in [old for old in reversed(graph.nodes) if old in inside]:
        graph.erase_node(old)
