"""`torch.compile(model, backend="fastres")`: the fused ops in graphs that Dynamo captures.

What matches is replaced by functions that call the registered ops; the graph then goes to inductor,
or to `eager`, as any graph does. Dynamo guards what it has assumed: another mode, dtype or shape
is captured anew.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend

from fastres.fusion.functional import rewrite, shapes_of
from fastres.fusion.layouts import is_layout_seen
from fastres.fusion.operations import FunctionGraph
from fastres.fusion.patterns import Found, find_matches
from fastres.model.kernel_status import why_slower_than_inductor

__all__ = ["fastres", "find_in_graphs", "rewrite_graphs"]


def fastres(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph of Dynamo with its convolutions, batch norms, sums and ReLUs in fused ops.

    Args:
        gm: the graph, with its parameters as inputs; it is changed.
        example_inputs: tensors like those that it will be called with.
        mode: as in torch.compile: "reduce-overhead", "max-autotune", ...; for inductor.
        options: {"fuse": "auto" (the default) leaves to the rest what is measured to be slower in
            fused ops on this device and in this dtype; "all" does not. "rest": who compiles all
            else: "inductor" (the default), "aot_eager", "eager" or the name of any backend}; other
            options are inductor's.

    Returns: what computes the graph.

    Raises: ValueError: when an option has no such value, or is inductor's and the rest is not.
    """
    options = dict(options or {})
    rest = options.pop("rest", "inductor")
    rewrite_graphs(gm, example_inputs, options.pop("fuse", "auto"))
    if rest == "inductor":
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        patches = (list_mode_options(mode) if mode else {}) | options
        return cast(Any, compile_fx(gm, list(example_inputs), config_patches=patches))
    if options or mode not in (None, "default"):
        wanted = [f"mode {mode!r}"] * bool(mode) + [f"option {name!r}" for name in options]
        raise ValueError(f"{', '.join(wanted)}: for inductor alone, and the rest goes to {rest!r}")
    return lookup_backend(rest)(gm, list(example_inputs))


def find_in_graphs(
    gm: fx.GraphModule, example_inputs: Sequence[Any], fuse: str = "auto"
) -> Iterator[tuple[FunctionGraph, Found]]:
    """Yield a graph and those inside it, such as the segments of a checkpoint, with what is found.

    Within a segment every gradient may be wanted; that of the whole graph asks its inputs.
    """
    if fuse not in ("auto", "all"):
        raise ValueError(f"option 'fuse' must be 'auto' or 'all', got {fuse!r}")
    wanted = torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in example_inputs
    )
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            graph = FunctionGraph(module, wanted)
            found = find_matches(graph)
            yield graph, found if fuse == "all" else _without_slower(found)


def _without_slower(found: Found) -> Found:
    """What was found, without what would be slower fused than in inductor's own code."""
    kept, reasons = [], dict(found.reasons)
    for match in found.matches:
        paths = [match.layers] + ([[match.projection]] if match.projection is not None else [])
        why = [why_slower_than_inductor(*shapes_of(layers)) for layers in paths]
        reason = next(filter(None, why), None)
        if reason is None:
            kept.append(match)
        else:
            reasons |= dict.fromkeys((layer.conv.node for layer in match.all_layers), reason)
    return Found(kept, reasons)


def rewrite_graphs(gm: fx.GraphModule, example_inputs: Sequence[Any], fuse: str = "auto") -> None:
    """Put the fused ops into a graph and into those inside it."""
    for graph, found in find_in_graphs(gm, example_inputs, fuse):
        inside = {node for match in found.matches for node in match.nodes}
        replaced: dict[fx.Node, fx.Node] = {}
        for match in found.matches:
            example = match.last.meta.get("example_value")
            is_plain = isinstance(example, Tensor) and example.is_contiguous()
            seen = is_plain and is_layout_seen(match.last, inside.__contains__, graph.root)
            rewrite(graph.graph, match, replaced, contiguous=seen)
        graph.graph.lint()
        graph.root.recompile()
