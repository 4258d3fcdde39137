"""The picture of a study of depth: three panels, from its records alone.

Training error by epoch, as in figures 1 and 6 of He et al. 2015; the gradient that reaches the
first layer; F(x) beside x by block and, as in their figure 7, the responses of the 3x3 layers.
Plain nets are dashed and thin, residual ones solid; the darker, the deeper.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastres.studies.records import KINDS, Kind, NetRecord, epoch_rows, residual_share

__all__ = ["NetLines", "draw", "lines_of"]


@dataclass(frozen=True)
class NetLines:
    """What is drawn of one network.

    Attributes:
        kind: plain or residual.
        depth: its layers.
        train_error, test_error, gradient: {epoch: percent, percent, L2 norm}.
        shares: RMS of F(x) over RMS of what it is added to, by block.
        responses: standard deviation by 3x3 layer.
    """

    kind: Kind
    depth: int
    train_error: Mapping[float, float]
    test_error: Mapping[float, float]
    gradient: Mapping[float, float]
    shares: Sequence[float | None]
    responses: Sequence[float]


def lines_of(net: NetRecord) -> NetLines:
    """Return the lines of a record."""
    table = epoch_rows([net])

    def column(name: str) -> dict[float, float]:
        return {row["epoch"]: row[name] for row in table if name in row}

    return NetLines(
        kind=net["kind"],
        depth=net["depth"],
        train_error=column("train_error"),
        test_error=column("test_error"),
        gradient=column("gradient_norm"),
        shares=[residual_share(block) for block in net["blocks"]],
        responses=[layer["std"] for layer in net["layers"]],
    )


def draw(nets: Sequence[NetLines], title: str) -> Any:
    """Draw the networks, each as a line a panel, and return matplotlib's figure.

    Args:
        nets: at least one.
        title: one line over the panels.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 6.2), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplot_mosaic([["error", "gradient", "block"], ["error", "gradient", "layer"]])
    styles = _styles(nets)
    ordered = sorted(nets, key=lambda net: (KINDS.index(net.kind), net.depth))
    for net in ordered:
        style = styles[net.kind, net.depth]
        _line(panels["error"], net.train_error, style, _label(net))
        _line(panels["gradient"], net.gradient, style, None)
        # By the place in the net, so that nets of any depth share an axis.
        _line(panels["block"], _by_place(net.shares), style, None)
        _line(panels["layer"], _by_place(net.responses), style, None)
    for place, net in enumerate(ordered):
        _mark_test_error(panels["error"], net, styles[net.kind, net.depth], place)
    _describe(panels)
    return figure


def _styles(nets: Sequence[NetLines]) -> dict[tuple[Kind, int], dict[str, Any]]:
    """Give every depth a colour and every kind a line."""
    from matplotlib import colormaps

    depths = sorted({net.depth for net in nets})
    colours = colormaps["viridis_r"]
    steps = max(1, len(depths) - 1)
    lines: dict[Kind, dict[str, Any]] = {
        "plain": {"linestyle": (0, (4, 2)), "linewidth": 1.1, "marker": "x"},
        "residual": {"linestyle": "-", "linewidth": 1.8, "marker": "o"},
    }
    return {
        # The lightest yellow is left out: it is hard to see on white.
        (kind, depth): {"color": colours(0.12 + 0.88 * place / steps), "markersize": 3, **line}
        for kind, line in lines.items()
        for place, depth in enumerate(depths)
    }


def _label(net: NetLines) -> str:
    ends = [list(line.values())[-1:] for line in (net.train_error, net.test_error)]
    errors = " | ".join(f"{value:.1f}" for end in ends for value in end)
    return f"{net.kind} {net.depth}: {errors} %"


def _by_place(values: Sequence[float | None]) -> dict[float, float]:
    """Key values by their place in the net, from 0 at the images to 1 at the classifier."""
    return {(i + 0.5) / len(values): value for i, value in enumerate(values) if value is not None}


def _line(axes: Any, line: Mapping[float, float], style: dict[str, Any], label: str | None) -> None:
    if line:
        axes.plot(list(line), list(line.values()), label=label, **style)


def _mark_test_error(axes: Any, net: NetLines, style: dict[str, Any], place: int) -> None:
    """Mark the last test error right of the curves, each net a little further."""
    if not net.test_error:
        return
    epoch, error = list(net.test_error.items())[-1]
    marker = style | {"linestyle": "none", "markersize": 6}
    axes.plot([epoch * (1.03 + 0.012 * place)], [error], **marker)


def _describe(panels: Mapping[str, Any]) -> None:
    panels["error"].set(
        xlabel="epoch", ylabel="error (%)", title="training error; marks at the right: test error"
    )
    panels["error"].legend(fontsize=8, title="training | test error at the end", title_fontsize=8)
    panels["gradient"].set(
        xlabel="epoch (0: before the first step)",
        ylabel="L2 norm of dL/dW of conv1",
        title="gradient that reaches the first layer",
        yscale="log",
    )
    panels["block"].set(
        ylabel="RMS of F(x) / RMS of x", title="residual branches beside their shortcuts"
    )
    panels["layer"].set(
        xlabel="place in the net, images to classifier",
        ylabel="standard deviation",
        title="responses of the 3x3 layers, after batch norm",
    )
    for name, axes in panels.items():
        axes.grid(alpha=0.3)
        if name in ("block", "layer"):
            axes.set_xlim(0, 1)
            axes.set_ylim(bottom=0)
