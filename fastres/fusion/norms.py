"""Batch norms of classes of their own: nn.BatchNorm2d first, and then other modules.

timm's BatchNormAct2d, for one, is a batch norm and an activation in one module. Its forward
branches on `self.training`, which no graph holds; so it is traced once in either mode, and where
both graphs are a batch norm with the same modules behind it, that is what it computes.
"""

from collections.abc import Hashable

import torch.nn.functional as F
from torch import fx, nn

from fastres.fusion.operations import bind
from fastres.fusion.traced_values import Untraceable
from fastres.fusion.tracing import NORM_MARK, NormsThen, Trace, trace
from fastres.model.interception import computes_as

__all__ = ["mark_norm", "norms_then"]

_NAMES = "input running_mean running_var weight bias training momentum eps"


def norms_then(root: nn.Module) -> NormsThen:
    """All such modules of a network: {id: names of the children behind the norm, its trace}."""
    alike: dict[Hashable, tuple[list[str], Trace] | None] = {}
    found: NormsThen = {}
    for module in root.modules():
        if not isinstance(module, nn.BatchNorm2d) or computes_as(module, nn.BatchNorm2d):
            continue
        key = _key(module)
        if key not in alike:
            alike[key] = _modules_behind_norm(module)
        behind = alike[key]
        if behind is not None:
            found[id(module)] = behind
    return found


def _key(norm: nn.BatchNorm2d) -> Hashable:
    """What a forward may read of a module: those with the same of it are traced alike."""
    own = {name: value for name, value in vars(norm).items() if not name.startswith("_")}
    children = tuple((name, type(child)) for name, child in norm.named_children())
    return type(norm), repr(own), children, norm.bias is None, norm.running_mean is None


def mark_norm(norm: nn.BatchNorm2d) -> None:
    """Have `why_not_fused` take a module for the batch norm that it begins with."""
    setattr(norm, NORM_MARK, type(norm).forward)


def _modules_behind_norm(norm: nn.BatchNorm2d) -> tuple[list[str], Trace] | None:
    try:
        traces = [trace(norm, lambda _path, _child: True, {}, mode) for mode in (True, False)]
    except Untraceable:
        return None
    pairs = zip(traces, (True, False), strict=True)
    behind, *others = [_modules_behind(found.graph, norm, mode) for found, mode in pairs]
    if behind is None or [behind] != others:
        return None
    both = traces[0]
    both.reads |= traces[1].reads
    both.missing |= traces[1].missing
    return behind, both


def _modules_behind(graph: fx.Graph, norm: nn.BatchNorm2d, training: bool) -> list[str] | None:
    """The same of a graph in one mode."""
    (x, *others) = [node for node in graph.nodes if node.op == "placeholder"]
    calls = [node for node in graph.nodes if node.target is F.batch_norm]
    counted = [node.args for node in graph.nodes if node.target == "add_"]
    if others or len(calls) != 1 or len(counted) != training:
        return None
    given = {key: _plain(value) for key, value in bind(calls[0], _NAMES).items()}
    names = {name: name for name in ("running_mean", "running_var", "weight", "bias")}
    wanted = {"input": x.name, **names, "training": training}
    wanted |= {"momentum": norm.momentum, "eps": norm.eps}
    if given != wanted or (training and [_plain(v) for v in counted[0]] != _COUNT):
        return None
    return _calls_behind(calls[0])


_COUNT = ["num_batches_tracked", 1]


def _plain(value: object) -> object:
    """A node of an attribute or an argument by its name."""
    if not isinstance(value, fx.Node):
        return value
    return value.target if value.op == "get_attr" else value.name


def _calls_behind(node: fx.Node) -> list[str] | None:
    """Names of the modules that are called with a value, one after the other, up to the result."""
    names: list[str] = []
    while True:
        users = list(node.users)
        if len(users) != 1:
            return None
        if users[0].op == "output":
            return names if users[0].args[0] is node else None
        if users[0].op != "call_module" or users[0].args != (node,) or users[0].kwargs:
            return None
        node = users[0]
        names.append(str(node.target))
