"""Where convolution, batch norm, sum and ReLU follow each other in a graph, up to whole blocks.

    layer    y = conv(x); z = bn(y)
    match    layers in a row, a ReLU between them; then maybe a sum with a shortcut, maybe a ReLU

Every value inside a match has one user, so that nobody misses it. A match is computed where its
last node stands, which is later than its first: nothing that it reads may change in between.

Why not torch's matchers (torch._inductor.pattern_matcher, torch.fx.passes.utils): theirs compare
graphs with example graphs node by node. Here ReLU, sum and convolution each have several spellings,
blocks have one to three layers and five kinds of shortcuts, and the training of a batch norm is
one function only before autograd splits it, which is where inductor's matcher works.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from fastres.fusion.aliases import Aliases
from fastres.fusion.operations import Convolution, Graph, Norm, is_in_place

__all__ = ["Found", "Layer", "Match", "find_matches"]

# Of a block: a bottleneck has three.
_MOST_LAYERS = 3


@dataclass(frozen=True)
class Layer:
    """A convolution and the batch norm that alone reads it."""

    conv: Convolution
    norm: Norm

    @property
    def nodes(self) -> list[fx.Node]:
        """Its nodes, in order."""
        return [self.conv.node, self.norm.node]


@dataclass
class Match:
    """`relu(layers(x) + shortcut)`, found in a graph.

    projection: the layer that makes the shortcut from x. shortcut: where there is none, the value
    that is added; x itself, or any other. between: the ReLUs between the layers. added, activated:
    the nodes of sum and last ReLU, where there are such.
    """

    layers: list[Layer]
    between: list[fx.Node] = field(default_factory=list)
    projection: Layer | None = None
    shortcut: fx.Node | None = None
    added: fx.Node | None = None
    activated: fx.Node | None = None

    @property
    def x(self) -> fx.Node:
        """The input."""
        return self.layers[0].conv.x

    @property
    def all_layers(self) -> list[Layer]:
        """The layers of the main path, then the projection."""
        return self.layers if self.projection is None else [*self.layers, self.projection]

    @property
    def nodes(self) -> list[fx.Node]:
        """All nodes that it takes the place of."""
        inner = [node for layer in self.all_layers for node in layer.nodes]
        ends = [node for node in (self.added, self.activated) if node is not None]
        return [*inner, *self.between, *ends]

    @property
    def last(self) -> fx.Node:
        """The node whose value it computes."""
        return self.activated or self.added or self.layers[-1].norm.node

    def described(self) -> str:
        """What is fused, in words."""
        number = len(self.layers)
        what = "convolution, norm" if number == 1 else f"{number} convolutions with their norms"
        if self.projection is not None:
            what += ", projection"
        if self.added is not None:
            what += ", sum"
        return f"{what}, ReLU" if self.activated is not None else what


@dataclass
class Found:
    """What was found in a graph: the matches, and for every other convolution why it stays."""

    matches: list[Match]
    reasons: dict[fx.Node, str]


def find_matches(graph: Graph) -> Found:
    """Find all layers of a graph, and put them together to blocks where they are."""
    layers, reasons = _find_layers(graph)
    finder = _Finder(graph, layers)
    matches = [*finder.blocks(), *finder.rows()]
    reasons |= dict.fromkeys(
        (layer.conv.node for layer in finder.free.values()),
        "what it reads changes before its batch norm is done",
    )
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    return Found(sorted(matches, key=lambda match: order[match.last]), reasons)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _find_layers(graph: Graph) -> tuple[dict[fx.Node, Layer], dict[fx.Node, str]]:
    """Layers by the node of their norm; for every other convolution why it is none."""
    layers, reasons = {}, {}
    for node in graph.graph.nodes:
        conv = graph.convolution(node)
        if conv is None:
            continue
        norms = [norm for user in node.users if (norm := graph.norm(user)) and norm.y is node]
        if not norms:
            reasons[node] = "no batch norm reads it"
        elif len(node.users) > 1:
            reasons[node] = "its output is read elsewhere, too"
        elif reason := graph.why_not(conv, norms[0]):
            reasons[node] = reason
        else:
            layers[norms[0].node] = Layer(conv, norms[0])
    return layers, reasons


class _Finder:
    """Puts layers together; each belongs to one match."""

    def __init__(self, graph: Graph, layers: dict[fx.Node, Layer]):
        self.graph = graph
        self.free = layers
        self.aliases = Aliases(graph)

    def blocks(self) -> Iterator[Match]:
        """Yield the largest matches that end in a sum, maybe with a ReLU behind it."""
        for node in self.graph.graph.nodes:
            pair = self.graph.added(node)
            if pair is None or pair[0] is pair[1]:
                continue
            # The longer path is the main one.
            ways = [self._block(node, *pair), self._block(node, *reversed(pair))]
            found = max((way for way in ways if way), key=lambda m: len(m.layers), default=None)
            if found is not None:
                yield self._claim(found)

    def rows(self) -> Iterator[Match]:
        """Yield what is left: layers in a row in one module's forward, maybe with a ReLU behind.

        From the end, so that two of a plain block stay together and not with those before it.
        """
        for end in reversed(self.free.copy()):
            if end not in self.free:
                continue
            layers, between = self._path_to(self.free[end])
            place = self.graph.place(end)
            while any(self.graph.place(layer.norm.node) != place for layer in layers):
                layers, between = layers[1:], between[1:]
            relu = self._relu_behind(end)
            ways = [Match(layers[i:], between[i:], activated=relu) for i in range(len(layers))]
            for match in (*ways, Match(layers[-1:])):
                if self.aliases.are_movable(match.nodes, match.last):
                    yield self._claim(match)
                    break

    def _claim(self, match: Match) -> Match:
        for layer in match.all_layers:
            del self.free[layer.norm.node]
        return match

    def _block(self, added: fx.Node, end: fx.Node, other: fx.Node) -> Match | None:
        """The match that ends in a sum, with `end` the end of its main path."""
        if end not in self.free or _only_user(end) is not added:
            return None
        if is_in_place(added) and added.args[0] is other and not self._is_alone(other, added):
            # It changes the shortcut, which others may have.
            return None
        relu = self._relu_behind(added)
        layers, between = self._path_to(self.free[end])
        while layers:
            match = Match(layers, between, None, other, added, relu)
            projection = self.free.get(other)
            if projection is not None and self._projects(projection, match, added):
                match.projection, match.shortcut = projection, None
            if self.aliases.are_movable(match.nodes, match.last):
                return match
            # A shorter path begins later, behind what was in the way.
            layers, between = layers[1:], between[1:]
        return None

    def _projects(self, layer: Layer, match: Match, added: fx.Node) -> bool:
        return (
            layer.conv.x is match.x
            and layer not in match.layers
            and self._is_alone(layer.norm.node, added)
            and self.graph.are_alike(layer.norm, match.layers[0].norm)
        )

    def _is_alone(self, shortcut: fx.Node, added: fx.Node) -> bool:
        """Whether a shortcut is the output of a layer that nobody else reads."""
        return shortcut in self.free and _only_user(shortcut) is added

    def _path_to(self, last: Layer) -> tuple[list[Layer], list[fx.Node]]:
        """The layers that lead to `last`, with a ReLU between each two."""
        layers = [last]
        between: list[fx.Node] = []
        while len(layers) < _MOST_LAYERS:
            relu = layers[0].conv.x
            norm = self.graph.activated(relu)
            before = None if norm is None else self.free.get(norm)
            if before is None or norm is None or not self.graph.are_alike(before.norm, last.norm):
                break
            if _only_user(relu) is not layers[0].conv.node or _only_user(norm) is not relu:
                break
            layers.insert(0, before)
            between.insert(0, relu)
        return layers, between

    def _relu_behind(self, node: fx.Node) -> fx.Node | None:
        user = _only_user(node)
        return user if user is not None and self.graph.activated(user) is node else None
