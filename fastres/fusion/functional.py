"""A match of a captured graph as one function of tensors, and the graph rewritten to call it."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor, fx

from fastres.fusion.operations import as_pair, replace_nodes
from fastres.fusion.patterns import Layer, Match
from fastres.model.conv_bn import (
    ConvArguments,
    ConvBNModules,
    NormArguments,
    are_images,
    takes_tensors,
    wants_gradient,
)
from fastres.model.residual_block import fold_layers, is_addable, train_layers

__all__ = ["LayerTensors", "fused_block", "rewrite", "shapes_of"]


class LayerTensors(NamedTuple):
    """The arguments of a convolution and of the batch norm behind it."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    running_mean: Tensor
    running_var: Tensor
    gamma: Tensor
    beta: Tensor
    momentum: float
    eps: float

    def named(self, training: bool) -> ConvBNModules:
        """The same under the names that modules give them."""
        return ConvBNModules(
            ConvArguments(*self[:4]),
            NormArguments(*self[4:8], training=training, momentum=self.momentum, eps=self.eps),
        )

    def plain(self, x: Tensor, training: bool) -> Tensor:
        """`bn(conv(x))` in plain torch."""
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        return F.batch_norm(y, *self[4:8], training, self.momentum, self.eps)


def fused_block(
    x: Tensor,
    shortcut: Tensor | None,
    layers: tuple[tuple[Any, ...], ...],
    projection: tuple[Any, ...] | None,
    training: bool,
    relu: bool,
    contiguous: bool,
) -> Tensor:
    """`relu(bn(conv(.. relu(bn(conv(x))))) + shortcut)` of tensors; moves the running statistics.

    Args:
        x: (N, C, H, W).
        shortcut: (N, K, P, Q), x itself, or None.
        layers: the fields of `LayerTensors` of every layer.
        projection: those of the layer that makes the shortcut from x, or None.
        training: whether the statistics of the batch are used.
        relu: whether the last ReLU is applied.
        contiguous: whether the result is to be contiguous; channels_last otherwise.
    """
    given = [LayerTensors(*layer) for layer in layers]
    projected = None if projection is None else LayerTensors(*projection)
    everything = given if projected is None else [*given, projected]
    if _has_an_op(x, shortcut, given, everything, training):
        compute = train_layers if training else fold_layers
        named = None if projected is None else projected.named(training)
        out = compute(x, [layer.named(training) for layer in given], named, shortcut, relu)
        return out.contiguous() if contiguous else out
    z = given[0].plain(x, training)
    for layer in given[1:]:
        z = layer.plain(F.relu(z), training)
    if projected is not None:
        shortcut = projected.plain(x, training)
    if shortcut is not None:
        z = z + shortcut
    return F.relu(z) if relu else z


def _has_an_op(
    x: Tensor,
    shortcut: Tensor | None,
    layers: list[LayerTensors],
    everything: list[LayerTensors],
    training: bool,
) -> bool:
    """Whether the ops compute on these tensors what plain torch would."""
    named = [layer.named(training) for layer in layers]
    tensors = [tensor for layer in everything for tensor in layer if isinstance(tensor, Tensor)]
    return (
        all(takes_tensors(x, layer.weight, tensors) for layer in everything)
        and are_images(x, named)
        and (shortcut is None or is_addable(shortcut, x, named))
        and (training or not wants_gradient(x, shortcut, *tensors))
    )


def rewrite(
    graph: fx.Graph, match: Match, replaced: dict[fx.Node, fx.Node], *, contiguous: bool
) -> None:
    """Have `fused_block` compute what the nodes of a match do; see `replace_nodes`."""
    last, shortcut = match.last, match.shortcut
    with graph.inserting_before(last):
        node = graph.call_function(
            fused_block,
            (
                replaced.get(match.x, match.x),
                None if shortcut is None else replaced.get(shortcut, shortcut),
                tuple(_tensors_of(layer) for layer in match.layers),
                None if match.projection is None else _tensors_of(match.projection),
                match.layers[0].norm.given["training"],
                match.activated is not None,
                contiguous,
            ),
        )
    replace_nodes(graph, match.nodes, last, node, replaced)


def _tensors_of(layer: Layer) -> tuple[Any, ...]:
    conv, norm = layer.conv.given, layer.norm.given
    names = ("running_mean", "running_var", "weight", "bias", "momentum", "eps")
    return (
        *(conv["weight"], conv["bias"], as_pair(conv["stride"]), as_pair(conv["padding"])),
        *(norm[name] for name in names),
    )


def shapes_of(layers: Sequence[Layer]) -> tuple[Tensor, list[tuple[Tensor, int, int]]]:
    """Examples of the input, in the dtype of the computation, and of all filters.

    With every filter come stride and padding, which are alike in both directions.
    """
    first = layers[0].conv
    x, y = first.x.meta["example_value"], first.node.meta["example_value"]
    filters = [layer.conv.given["weight"].meta["example_value"] for layer in layers]
    steps = [
        (
            cast(tuple[int, int], as_pair(layer.conv.given[name]))[0]
            for name in ("stride", "padding")
        )
        for layer in layers
    ]
    return x.to(y.dtype), [(w, *step) for w, step in zip(filters, steps, strict=True)]
