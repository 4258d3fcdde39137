"""`fuse`: any network with its convolutions, batch norms, ReLUs and sums in fused ops.

From the outside in: a module's forward is traced with all of its children's, and what matches in
the graph belongs to the innermost module in whose forward all of it happens. That module gets a
program (program.py) and a class derived from its own (fused_module.py), so that fusing a copy is
changing classes: no parameter moves, no key changes. Around it everything stays a call of modules.
"""

import copy
from collections.abc import Iterator
from contextlib import suppress
from typing import cast

import torch
from torch import fx, nn

from fastres.fusion.fused_module import (
    FusedModule,
    become_fused,
    become_plain,
    can_be_fused,
    is_of_a_fused_class,
)
from fastres.fusion.layouts import is_layout_seen
from fastres.fusion.norms import mark_norm, norms_then
from fastres.fusion.operations import ModuleGraph
from fastres.fusion.patterns import Found, Match, find_matches
from fastres.fusion.program import Program, Unwritten, find_heads, write_program
from fastres.fusion.traced_values import Untraceable
from fastres.fusion.tracing import Trace, trace, tracing
from fastres.model.interception import replaced_functions
from fastres.model.kernel_status import fused_kernels

__all__ = ["fuse", "fuse_again"]


def fuse(model: nn.Module, *, verbose: bool = True) -> nn.Module:
    """A copy of `model` in which all that is recognised runs fused; the original is unchanged.

    Convolution (with or without a bias) and batch norm, maybe a sum, maybe a ReLU, up to whole
    basic and bottleneck blocks, wherever torch.fx can trace the forward in which they stand.

    Parameters, buffers and state_dict keys are the model's; nothing is shared with it, so an
    optimizer must be made for the copy. Training, evaluation, autocast, torch.compile, hooks,
    copies, pickles and higher derivatives work as before. Left as they are: grouped and dilated
    convolutions, other norms and activations, values that somebody else reads too, modules with
    hooks, batch norms without parameters or running statistics. Under transforms of torch.func,
    forward-mode differentiation, tracers, exporters, global hooks and tensor subclasses the plain
    modules run, see model/interception.py; so they do where a module is changed later.

    Args:
        model: any module.
        verbose: print what was fused, and what was not and why.

    Returns: the fused copy; each module with a program is of a class derived from its own.
    """
    fused = copy.deepcopy(model)
    for module in fused.modules():
        if is_of_a_fused_class(module):
            become_plain(cast(FusedModule, module))
    with tracing():
        fusion = _Fusion(fused)
        fusion.fuse("", fused)
    if verbose:
        print("\n".join(_report(fused, fusion)))
    return fused


def fuse_again(module: FusedModule, source: Unwritten) -> None:
    """Write the program of a module that comes from a pickle, where it still has one."""
    become_plain(module)
    with suppress(Untraceable):
        with tracing():
            program = _Fusion(module).write(module, source.inlined, source.layouts)
        become_fused(module, program)


def _report(model: nn.Module, fusion: "_Fusion") -> Iterator[str]:
    """Yield the lines of the report: every convolution, and where it runs or why it stays."""
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    num_fused = sum(name in fusion.absorbed for name in convs)
    yield f"fuse: {num_fused} of {len(convs)} convolutions run fused"
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if num_fused and device.type in ("cpu", "cuda"):
        yield f"  by {fused_kernels(device)}"
    if replaced_functions():
        yield f"  none of them while {', '.join(replaced_functions())} is not torch's own"
    for name in convs:
        if name in fusion.absorbed:
            yield f"  fused       {name}: in {fusion.absorbed[name]}"
        else:
            yield f"  left alone  {name}: {fusion.why_not(name)}"


class _Fusion:
    """The fusion of one network.

    absorbed: {path of a module: what computes it}.
    """

    def __init__(self, root: nn.Module):
        self.absorbed: dict[str, str] = {}
        self._reasons: dict[str, str] = {}
        self._opaque: dict[str, str] = {}
        self._norms = norms_then(root)
        # Modules that are fused, and those whose forward is part of another's program.
        self._done: set[int] = set()
        self._inlined: set[int] = set()
        # {id of the last convolution of a match: whether its layout is seen by somebody}.
        self._layout_is_seen: dict[int, bool] = {}

    def why_not(self, conv: str) -> str:
        """Say why a convolution stays as it is."""
        if conv in self._reasons:
            return self._reasons[conv]
        inside = [path for path in self._opaque if not path or conv.startswith(f"{path}.")]
        if inside:
            owner = max(inside, key=len)
            return f"the forward of {owner or 'the network'} has no graph: {self._opaque[owner]}"
        return "no forward that could be traced calls it"

    def fuse(self, path: str, module: nn.Module) -> None:
        """Fuse what a module is or holds, from the outside in."""
        if id(module) in self._done or not _has_conv(module):
            return
        self._done.add(id(module))
        if id(module) not in self._inlined and can_be_fused(module):
            program = self.program_of(path, module)
            if program is not None:
                owner = f"{type(module).__name__} {path}".rstrip()
                self.absorbed |= {join(path, part): owner for part in program.absorbed}
                become_fused(module, program)
        for name, child in module.named_children():
            self.fuse(join(path, name), child)

    def program_of(self, path: str, module: nn.Module) -> Program | None:
        """The program of a module in whose forward something matches, or None."""
        try:
            return self._program_of(path, module)
        except Untraceable as reason:
            self._opaque[path] = str(reason)
            return None

    def _program_of(self, path: str, module: nn.Module) -> Program | None:
        whole = trace(module, lambda _path, _child: True, self._norms)
        self._opaque |= {join(path, inner): why for inner, why in whole.opaque.items()}
        graph = ModuleGraph(whole.graph, module)
        found = find_matches(graph)
        self._keep_reasons(path, found)
        self._look_at_layouts(graph, found.matches)
        own = [match.nodes for match in found.matches]
        own += [[*head.between, head.linear] for head in find_heads(graph)]
        own = [nodes for nodes in own if _owner(nodes, whole) == ""]
        inlined = frozenset(frame for nodes in own for node in nodes for frame in _frames(node))
        return self.write(module, inlined) if own else None

    def write(
        self, module: nn.Module, inlined: frozenset[str], layouts: tuple[bool, ...] | None = None
    ) -> Program:
        """Write the program of a module that runs the forward of `inlined` children itself."""
        partial = trace(
            module, lambda path, child: path in inlined or not _has_conv(child), self._norms
        )
        graph = ModuleGraph(partial.graph, module)
        matches = find_matches(graph).matches
        for path, child in partial.inlined.items():
            if id(child) in self._norms and path:
                mark_norm(cast(nn.BatchNorm2d, child))
        self._inlined |= {id(child) for path, child in partial.inlined.items() if path}
        if layouts is None:
            layouts = tuple(map(self._sees_layout, matches))
        elif len(layouts) != len(matches):
            raise Untraceable("it has been changed")
        return write_program(partial, graph, matches, Unwritten(inlined, layouts))

    def _keep_reasons(self, path: str, found: Found) -> None:
        for node, reason in found.reasons.items():
            self._reasons.setdefault(join(path, str(node.target)), reason)

    def _look_at_layouts(self, graph: ModuleGraph, matches: list[Match]) -> None:
        """Find out whose layout is seen; a larger graph, which comes first, knows better."""
        inside = {node for m in matches if _decides_layout(m) for node in m.nodes}
        seen: dict[int, bool] = {}
        for match in matches:
            key = id(match.layers[-1].conv.given)
            is_seen = is_layout_seen(match.last, inside.__contains__, graph.root)
            seen[key] = seen.get(key, False) or is_seen
        self._layout_is_seen = seen | self._layout_is_seen

    def _sees_layout(self, match: Match) -> bool:
        return self._layout_is_seen.get(id(match.layers[-1].conv.given), True)


def join(*paths: str) -> str:
    """A path inside a path."""
    return ".".join(path for path in paths if path)


def _has_conv(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Conv2d) for child in module.modules())


def _decides_layout(match: Match) -> bool:
    """Whether the filters tell in which layout the result is, and not the input's."""
    shapes = [layer.conv.given.weight.shape for layer in match.layers]
    return any(shape[1] > 1 and shape[2:] != (1, 1) for shape in shapes)


def _frames(node: fx.Node) -> list[str]:
    """The paths of the modules in whose forward a node is called, without the root's."""
    parts = [part for part in str(node.meta["frame"]).split(".") if part]
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _owner(nodes: list[fx.Node], whole: Trace) -> str:
    """The path of the innermost module in whose forward all nodes are called.

    It must be called with tensors alone: that is how its program will be traced.
    """
    shared = set(_frames(nodes[0])).intersection(*(_frames(node) for node in nodes))
    return max((path for path in shared if path in whole.takes_tensors), key=len, default="")
