"""`explain`: what `torch.compile(model, backend="fastres")` fuses, and what it does not and why."""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastres.fusion.backend import find_in_graphs
from fastres.fusion.operations import FunctionGraph
from fastres.fusion.patterns import Found

__all__ = ["Explanation", "Row", "explain"]


@dataclass(frozen=True)
class Row:
    """One convolution of a captured graph.

    name: its path in the network. shape: filter, channels, stride. match: what it is fused with, or
    None. reason: why it stays as it is, where it does.
    """

    name: str
    shape: str
    match: str | None
    reason: str | None

    @property
    def runs(self) -> str:
        """How it runs, in words."""
        return f"as before: {self.reason}" if self.match is None else f"fused: {self.match}"


@dataclass
class Explanation:
    """All convolutions of a network, in the order in which they run.

    rows: one for every call of a convolution. num_graphs: graphs that Dynamo has captured.
    """

    rows: list[Row] = field(default_factory=list)
    num_graphs: int = 0

    @property
    def num_fused(self) -> int:
        """Convolutions that run fused."""
        return sum(row.match is not None for row in self.rows)

    def __str__(self) -> str:
        graphs = f"{self.num_graphs} graph{'s' * (self.num_graphs != 1)}"
        title = f"{self.num_fused} of {len(self.rows)} convolutions run fused, in {graphs}"
        cells = [("convolution", "shape", "runs")]
        cells += [
            (
                row.name,
                row.shape,
                f"fused: {row.match}" if row.match else f"as before: {row.reason}",
            )
            for row in self.rows
        ]
        widths = [max(len(row[i]) for row in cells) for i in range(2)]
        lines = [f"  {a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in cells]
        return "\n".join([title, *lines])


def explain(
    model: Callable[..., Any],
    *example: Any,
    options: Mapping[str, Any] | None = None,
    verbose: bool = True,
    **keywords: Any,
) -> Explanation:
    """What is fused of `model`, in the mode that it is in, called with `example`.

    A copy of the model is captured by Dynamo and run once, eagerly. As torch._dynamo.explain does,
    this empties Dynamo's caches: whatever is compiled will be compiled anew.

    Args:
        model: a module or a function.
        example: what it is called with; so are `keywords`.
        options: those of the backend; {"fuse": "all"} also tells of what is left because it would
            be slower.
        verbose: print the table.

    Returns: the table.
    """
    found, fuse = Explanation(), (options or {}).get("fuse", "auto")

    def look(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.num_graphs += 1
        for graph, matches in find_in_graphs(gm, example_inputs, fuse):
            found.rows += _rows(graph, matches)
        return gm.forward

    copied = copy.deepcopy(model) if isinstance(model, nn.Module) else model
    torch.compiler.reset()
    try:
        torch.compile(copied, backend=look)(*example, **keywords)
    finally:
        torch.compiler.reset()
    if isinstance(copied, nn.Module):
        found.rows += _uncaptured(copied, {row.name for row in found.rows})
    if verbose:
        print(found)
    return found


def _rows(graph: FunctionGraph, found: Found) -> list[Row]:
    """The convolutions of a graph."""
    matches = {layer.conv.node: m.described() for m in found.matches for layer in m.all_layers}
    rows = []
    for node in graph.graph.nodes:
        conv = graph.convolution(node)
        if conv is not None:
            shape = _shape(conv.given)
            rows.append(Row(_name(node), shape, matches.get(node), found.reasons.get(node)))
    return rows


def _uncaptured(model: nn.Module, captured: set[str]) -> list[Row]:
    """The convolutions of a network that no graph holds."""
    return [
        Row(name, "", None, "no graph holds it")
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and name not in captured
    ]


def _shape(given: Mapping[str, Any]) -> str:
    weight = given["weight"].meta.get("example_value")
    if not isinstance(weight, Tensor):
        return ""
    k, c, r, s = weight.shape
    stride = given["stride"]
    step = stride if isinstance(stride, int) else stride[0]
    return f"{r}x{s} {c * given['groups']}->{k}" + (f" /{step}" if step != 1 else "")


def _name(node: fx.Node) -> str:
    """The path of the module that a call comes from, as state_dict has it."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    source = str(stack[-1][0]) if stack else ""
    # Dynamo says L['self'].layer1[0]._modules['conv1'], or the like.
    path = re.sub(r"\._modules\[|\[", ".", re.sub(r"^L\['\w+'\]", "", source))
    return re.sub(r"['\"\]]", "", path).replace("._modules", "").strip(".") or node.name
