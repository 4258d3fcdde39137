"""Charts as inline SVG whose text follows the page's colours, and images as inline PNG."""

import base64
import io
import re
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["grid_of", "line_chart", "png_image"]

# Told apart on light and on dark, and by most people who see fewer colours (Okabe and Ito 2008).
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8b8b8b")
# Stands for the page's own text colour, which matplotlib cannot name.
_TEXT = "#010203"


def line_chart(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x: str,
    y: str,
    dashed: Collection[str] = (),
) -> str:
    """Draw lines and return a <figure> element, the names of the lines below as HTML.

    Args:
        lines: {label: (x values, y values)}; labels may hold anything.
        title, x, y: texts of the chart and its axes.
        dashed: labels whose lines are dashed, in the colour of the line before.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings: Any = dict.fromkeys(names, _TEXT) | {
        "svg.fonttype": "none",
        "svg.hashsalt": "fastres",
        "font.family": "sans-serif",
    }
    keys, number = [], -1
    with mpl.rc_context(settings):
        # As wide as on a phone, where its letters keep their size.
        figure = Figure(figsize=(5, 3.3), layout="constrained")
        axes = figure.subplots()
        for label, (xs, ys) in lines.items():
            number += label not in dashed
            colour = _COLOURS[number % len(_COLOURS)]
            style = "dashed" if label in dashed else "solid"
            marker = "o" if len(xs) < 3 else None
            axes.plot(xs, ys, linestyle=style, color=colour, linewidth=1.8, marker=marker)
            keys.append(f'<span><i style="border-top: 3px {style} {colour}"></i> {escape(label)}')
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        svg = _inline(figure, title)
    legend = f"<figcaption>{'</span> '.join(keys)}</span></figcaption>" if len(keys) > 1 else ""
    return f"<figure>{svg}{legend}</figure>"


def _inline(figure: "Figure", title: str) -> str:
    text = io.StringIO()
    metadata: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=metadata)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(_TEXT, "currentColor")
    # Sized by the page, and with no id twice in it: charts share their clips and markers.
    svg = re.sub(r' (width|height)="[^"]*"', "", svg, count=2)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)


def grid_of(pictures: np.ndarray, *, columns: int, zoom: int, gap: int = 1) -> np.ndarray:
    """Lay pictures out in a grid with transparent gaps.

    Args:
        pictures: (N, H, W) grey or (N, H, W, 3) uint8, N >= 1.
        columns: of the grid, at most.
        zoom: pixels of the result for one of theirs.
        gap: between pictures, in their pixels.

    Returns:
        (rows, columns, 4) uint8, RGBA.
    """
    if pictures.ndim == 3:
        pictures = np.repeat(pictures[..., None], 3, axis=3)
    count, height, width = pictures.shape[:3]
    columns = min(columns, count)
    rows = -(-count // columns)
    grid = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), dtype=np.uint8)
    for number, picture in enumerate(pictures):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        grid[top : top + height, left : left + width, :3] = picture
        grid[top : top + height, left : left + width, 3] = 255
    return grid.repeat(zoom, axis=0).repeat(zoom, axis=1)


def png_image(pixels: np.ndarray, alt: str) -> str:
    """Return an <img> element with `pixels`, (H, W), (H, W, 3) or (H, W, 4) uint8, inside."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    height, width = pixels.shape[:2]
    return (
        f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}" '
        f'width="{width}" height="{height}">'
    )
