"""Which values of a graph may share memory, and which calls may change them."""

import operator
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastres.fusion.operations import Graph, is_in_place

__all__ = ["Aliases"]

# Their results are new tensors. Of all others it is taken that they may be views of any argument.
_NEW = {
    *(torch.conv2d, F.batch_norm, F.relu, torch.relu, operator.add, torch.add, operator.mul),
    *(torch.cat, F.linear, F.avg_pool2d, F.max_pool2d, torch.sigmoid, F.silu, F.gelu, F.pad),
}
_NEW_METHODS = {"add", "mul", "relu", "sigmoid", "mean", "sum"}
_NEW_MODULES = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Linear, nn.MaxPool2d, nn.AvgPool2d)
# Of a custom op the schema could be asked; those in networks are rare.
_MAY_CHANGE = (
    torch._ops.HigherOrderOperator,
    torch._ops.OpOverload,
    torch._ops.OpOverloadPacket,
)
# Calls that give those behind them another meaning.
_MODES = (
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
    torch.autograd.grad_mode._enter_inference_mode,
    torch.autograd.grad_mode._exit_inference_mode,
)


class Aliases:
    """The memory that each value of a graph may lie in, by the values that first had it."""

    def __init__(self, graph: Graph):
        self._root = graph.root
        self._memory: dict[fx.Node, set[fx.Node]] = {}
        self._first: dict[int | None, fx.Node] = {}
        for node in graph.graph.nodes:
            self._memory[node] = self._memory_of(node)

    def are_movable(self, nodes: Iterable[fx.Node], last: fx.Node) -> bool:
        """Whether all of `nodes` may be computed where the last of them stands."""
        inside = set(nodes)
        read = {value for node in inside for value in node.all_input_nodes} - inside
        between, started = [], False
        for node in last.graph.nodes:
            started = started or node in inside
            if node is last:
                break
            if started and node not in inside:
                between.append(node)
        return not any(node.target in _MODES or self._changes(node, read) for node in between)

    def _changes(self, node: fx.Node, values: set[fx.Node]) -> bool:
        """Whether a call may change one of `values`, or what belongs to a module."""
        changed = set().union(*(self._memory[value] for value in self._changed_by(node)))
        memory = set().union(*(self._memory[value] for value in values))
        return not changed.isdisjoint(memory) or any(value.op == "get_attr" for value in changed)

    def _changed_by(self, node: fx.Node) -> list[fx.Node]:
        if node.op in ("placeholder", "get_attr", "output"):
            return []
        if node.op == "call_module":
            module = self._module(node)
            if not _is_of_torch(module):
                return node.all_input_nodes
            return node.all_input_nodes if getattr(module, "inplace", False) else []
        changes = isinstance(node.target, _MAY_CHANGE) or is_in_place(node)
        return node.all_input_nodes if changes else []

    def _memory_of(self, node: fx.Node) -> set[fx.Node]:
        if node.op == "placeholder":
            return {self._first.setdefault(_storage(node), node)}
        if node.op == "get_attr" or (self._makes_a_tensor(node) and not self._changed_by(node)):
            return {node}
        return {node}.union(*(self._memory[value] for value in node.all_input_nodes))

    def _makes_a_tensor(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self._module(node)) in _NEW_MODULES
        return node.target in (_NEW if node.op == "call_function" else _NEW_METHODS)

    def _module(self, node: fx.Node) -> nn.Module:
        return self._root.get_submodule(str(node.target))


def _storage(node: fx.Node) -> int | None:
    """The memory of an input, of which two may be views; None where there is no example."""
    example = node.meta.get("example_value")
    return example.untyped_storage()._cdata if isinstance(example, Tensor) else None


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules.")
